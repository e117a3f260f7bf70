"""What is said of the screen is said of the kernel's own: its codes, its bounds, its constants; and it loses no key."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import screen_quality as quality
from compsparse_kernels.ops import cpu_isa
from compsparse_kernels.testing import random_tensor

SOURCES = Path(__file__).parent.parent / "csrc" / "cpu" / "threshold_attention"
CUT = -4.0


def test_constants_are_those_of_the_source():
    names = ("table.h", "query.h", "indexed.h", "index.h", "code_bounds.h", "codes_avx2.h")
    source = "".join((SOURCES / name).read_text() for name in names)

    def constant(name):
        return float(re.search(rf"\b{name} =\s+([0-9.]+)f?;", source)[1])

    assert constant("index_panel_keys") == quality.PANEL
    assert constant("kBlockQueries") == quality.BLOCK
    assert constant("kSampledPanels") == quality.SAMPLED_PANELS
    assert constant("kMostCandidates") == quality.MOST_CANDIDATES
    assert constant("kLargestCode") == quality.LARGEST_CODE
    assert constant("kMostTogether") == quality.MOST_TOGETHER


@pytest.mark.skipif(cpu_isa() not in ("avx2", "avx512_bf16"), reason="the kernels of this processor have no index")
@pytest.mark.parametrize("width", [64, 30])
def test_codes_and_bounds_are_those_of_the_index(width):
    key = random_tensor(1, 1, 100, width)
    key[0, 0, 7] = 0
    index, ours = torch.ops.compsparse.threshold_attention_index(key)[0, 0], quality.encode(key[0, 0])
    padded, first = -(-width // 4) * 4, 0
    for panel in index:
        count = min(quality.PANEL, 100 - first)
        mine = slice(first, first + count)
        codes = panel[: padded * quality.PANEL].view(-1, quality.PANEL, 4).transpose(0, 1).reshape(quality.PANEL, -1)
        assert torch.equal(codes[:count, :width].double() - 128, ours.codes[mine])
        scales, sizes, errors = panel[padded * quality.PANEL : -64].view(torch.float32).view(3, -1)[:, :count].double()
        assert torch.equal(scales, ours.scale[mine])
        for rounded, exact in ((sizes, ours.size[mine]), (errors, ours.error[mine])):
            assert (rounded >= exact).all()
            torch.testing.assert_close(rounded, exact, rtol=2.0**-21, atol=2.0**-125)
        bounds = panel[-64:-40].view(torch.float64)
        largest = torch.stack([bound[mine].max() for bound in (ours.size, ours.error, ours.norm)])
        torch.testing.assert_close(bounds, largest, rtol=2.0**-39, atol=0)  # the kernel's are rounded up by 2^-40
        first += quality.PANEL


def one_by_one(query, key, scale):
    """Candidates by the same rule, a key at a time in plain numbers."""
    q, k = quality.encode(query, quality.query_step(query, cpu_isa())), quality.encode(key)
    keys, chosen = len(key), torch.zeros(len(query), len(key), dtype=torch.bool)

    def score(i, j):
        return float(q.codes[i] @ k.codes[j] * k.scale[j] * scale * q.scale[i])

    def error(i, j):
        per_size = float(q.error[i] + 8 * quality.UNIT * (q.norm[i] + q.error[i]))
        return scale * float(per_size * k.size[j] + q.norm[i] * k.error[j])

    for i in range(len(query)):
        reached = max(score(i, j) - error(i, j) for j in range(keys))
        for j in range(keys):
            chosen[i, j] = score(i, j) >= reached + CUT - error(i, j)
    return chosen


@pytest.mark.parametrize("keys", [100, 600])
def test_screen_is_the_rule_one_key_at_a_time(keys):
    query, key = 4 * random_tensor(5, 16), random_tensor(keys, 16, seed=1)
    candidates = quality.screen(query, key, 0.25, CUT).candidates
    assert torch.equal(candidates, one_by_one(query, key, 0.25)) and 0 < int(candidates.sum()) < candidates.numel()


def test_vectors_that_codes_hold_exactly_lose_nothing():
    query, key = (torch.randint(-126, 127, (2, 100, 32)).float() for _ in range(2))
    query[..., 0], key[..., 0] = 127, 127
    scores = query.double() @ key.double().mT * 2.0**-12
    screened = quality.screen(query, key, 2.0**-12, CUT, "avx512_bf16")
    assert torch.equal(screened.candidates, scores >= scores.amax(-1, keepdim=True) + CUT)


def test_blocks_that_fall_back():
    sampled = torch.tensor([[0.4] * quality.BLOCK + [0.6] * quality.BLOCK + [0.9]])
    assert quality._falls_back(quality.Screened(None, sampled)).tolist() == [[False, True, True]]


def test_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "LENGTHS", (300,))
    monkeypatch.setattr(quality, "SHARES", (0.02, 0.6))
    monkeypatch.setattr(quality, "QUERIES", 48)
    monkeypatch.setattr(quality.random, "randrange", lambda stop: 0)  # the same data each time: so few queries differ
    path = tmp_path / "screen.json"
    assert quality.main(["--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["data"] for row in rows] == ["Gaussian"] * 2 + ["clustered"] * 2
    for row, share in zip(rows, (2, 60, 2, 60), strict=True):
        assert row["kept"] == pytest.approx(share, rel=0.25) and row["survivors_lost"] == 0
        assert row["points_lost"] == pytest.approx(row["candidates"] - row["kept"]) and row["points_lost"] > 0
        assert row["ok"] == (row["points_lost"] <= 5) and row["candidates"] <= 100
        assert row["blocks_in_full_precision"] == (0 if share == 2 else 100)


def test_a_survivor_that_is_lost_is_an_error(monkeypatch):
    row = {"data": "Gaussian", "shape": "s", "kept": 1.0, "candidates": 0.9, "points_lost": -0.1, "ok": True}
    monkeypatch.setattr(
        quality, "describe", lambda *case: {**row, "survivors_lost": 3, "blocks_in_full_precision": 0.0}
    )
    assert quality.main([]) == 1
