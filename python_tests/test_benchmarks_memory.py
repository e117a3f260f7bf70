"""The measure of memory sees what is taken, in torch's allocator and beside it, and the fit finds what does not fit."""

import json

import pytest

from benchmarks import attention_memory as memory
from compsparse_kernels.testing import run_in_subprocess

needs_linux = pytest.mark.skipif(not memory.PEAK.exists(), reason="there is no /proc/self/clear_refs here")


def rows_of(bytes_of):
    counts = [(tokens, share) for tokens in (8_000, 16_000, 32_000) for share in (0.01, 0.1)]
    rows = [{"tokens": tokens, "survivors": share * tokens**2 / 8} for tokens, share in counts]
    return [{**row, "ours_bytes": bytes_of(row["survivors"], row["tokens"])} for row in rows]


def test_fit_finds_the_line():
    found = memory.fit(rows_of(lambda survivors, tokens: 20 * survivors + 100 * tokens))
    assert found["per_survivor"] == pytest.approx(20) and found["per_token"] == pytest.approx(100)
    assert found["largest_error"] < 1e-6


def test_fit_tells_where_memory_grows_with_all_pairs():
    found = memory.fit(rows_of(lambda survivors, tokens: 20 * survivors + 100 * tokens + 4 * tokens**2 / 8))
    assert found["largest_error"] > 0.2


@needs_linux
def test_dense_scores_are_seen():
    code = memory.CHILD.format(side="top-k", length=512, factor=1.0, seed=0, threads=1)
    assert json.loads(run_in_subprocess(code)) >= 4 * memory.HEADS * 512**2  # at least once


@needs_linux
def test_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "LENGTHS", (1024,))
    monkeypatch.setattr(memory, "KEPT", {0.1: 0.1})
    path = tmp_path / "memory.json"
    assert memory.main(["--json", str(path), "--threads", "1"]) == 0
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert row["share"] == pytest.approx(0.1, rel=0.2) and row["survivors"] == round(row["share"] * 8 * 1024**2)
    assert row["ours_bytes"] >= 8 * row["survivors"]  # a column and a weight of each are kept for the backward
    over = row["bytes_per_survivor_over_sdpa"]
    assert over == pytest.approx((row["ours_bytes"] - row["sdpa_bytes"]) / row["survivors"])
    assert row["sdpa_bytes"] < row["ours_bytes"] < row["dense_scores_bytes"] == 4 * 8 * 1024**2
    assert result["threads"] == 1 and result["fit"]["largest_error"] < 1e-6  # two numbers from one row


def test_without_proc_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "PEAK", tmp_path / "not there")
    assert memory.main([]) == 2
    assert " ".join(capsys.readouterr().out.split()) == memory.NO_PROC
