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
    source = "".join((SOURCES / name).read_text() for name in ("table.h", "tiles.h", "query.h", "indexed.h", "index.h"))

    def constant(name):
        return float(re.search(rf"\b{name} =\s+([0-9.]+);", source)[1])

    assert constant("index_panel_keys") == quality.PANEL
    assert constant("kStripBytes") / 4 == quality.STRIP  # floats
    assert constant("kBlockQueries") == quality.BLOCK
    assert constant("kSampledPanels") == quality.SAMPLED_PANELS
    assert constant("kMostCandidates") == quality.MOST_CANDIDATES
    assert constant("kLargestCode") == quality.LARGEST_CODE


@pytest.mark.skipif(cpu_isa() != "avx512_bf16", reason="the kernels of this processor have no index")
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
        scales = panel[padded * quality.PANEL :][: 4 * quality.PANEL].view(torch.float32)
        assert torch.equal(scales[:count].double(), ours.scale[mine])
        bounds = panel[-64:-40].view(torch.float64)
        largest = torch.stack([bound[mine].max() for bound in (ours.size, ours.error, ours.norm)])
        torch.testing.assert_close(bounds, largest, rtol=2.0**-39, atol=0)  # the kernel's are rounded up by 2^-40
        first += quality.PANEL


def one_by_one(query, key, scale):
    """Candidates by the same rule, a key at a time in plain numbers."""
    q, k = quality.encode(query), quality.encode(key)
    keys, chosen = len(key), torch.zeros(len(query), len(key), dtype=torch.bool)
    panels = [range(first, min(first + quality.PANEL, keys)) for first in range(0, keys, quality.PANEL)]

    def score(i, j):
        return float(q.codes[i] @ k.codes[j] * k.scale[j] * scale * q.scale[i])

    def error(i, panel):
        per_size = float(q.error[i] + 6 * quality.UNIT * (q.norm[i] + q.error[i]))
        return scale * (per_size * max(k.size[j] for j in panel) + q.norm[i] * max(k.error[j] for j in panel))

    samples = (
        [panels[(2 * s + 1) * len(panels) // 8] for s in range(4)] if len(panels) >= 8 else [panels[len(panels) // 2]]
    )
    for i in range(len(query)):
        reached = max(score(i, j) - error(i, panel) for panel in samples for j in panel)
        for first in range(0, len(panels), quality.STRIP // quality.PANEL):
            strip = panels[first : first + quality.STRIP // quality.PANEL]
            reached = max([reached, *(score(i, j) - error(i, panel) for panel in strip for j in panel)])
            for panel in strip:
                for j in panel:
                    chosen[i, j] = score(i, j) >= reached + CUT - error(i, panel)
    return chosen


@pytest.mark.parametrize("keys", [100, 600])
def test_screen_is_the_rule_one_key_at_a_time(keys, monkeypatch):
    monkeypatch.setattr(quality, "STRIP", 128)  # so that there are several
    query, key = 4 * random_tensor(5, 16), random_tensor(keys, 16, seed=1)
    candidates = quality.screen(query, key, 0.25, CUT).candidates
    assert torch.equal(candidates, one_by_one(query, key, 0.25)) and 0 < int(candidates.sum()) < candidates.numel()


def test_vectors_that_codes_hold_exactly_lose_nothing():
    query, key = (torch.randint(-126, 127, (2, 100, 32)).float() for _ in range(2))
    query[..., 0], key[..., 0] = 127, 127
    scores = query.double() @ key.double().mT * 2.0**-12
    assert torch.equal(
        quality.screen(query, key, 2.0**-12, CUT).candidates, scores >= scores.amax(-1, keepdim=True) + CUT
    )


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
