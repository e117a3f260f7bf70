"""The profile of rows that miss their bars: parts that add up, work counted by hand, errors that name what lacks."""

import json

import pytest
import torch

from benchmarks import limits, profile

SINGLE = "block_sparse_linear / forward / block 32 / (1, 1024->1024) / d0.05 / vs dense"
TREE = "dag_network / forward / width 32, relu / tree of 64, batch 1024 / vs dense product of the same cost"


def profiled(tmp_path, name):
    path = tmp_path / "profile.json"
    assert profile.main(["--only", name, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["name"] == name and sum(row["stages_ms"].values()) == pytest.approx(row["ours_ms"])
    assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
    assert row["limit"] == pytest.approx(row["ratio"] / row["of_bound"])
    return row


def test_block_sparse_row(tmp_path):
    row = profiled(tmp_path, SINGLE)
    nonzeros = round(0.05 * 32 * 32) * 32 * 32
    assert row["gflops"] * row["ours_ms"] * 1e6 == pytest.approx(2 * nonzeros)
    assert row["bytes"] == 4 * (nonzeros + 1024 + 1024) and row["bound_by"] == "bytes"
    assert set(row["stages_ms"]) == {"call", "writing", "tiles", "scatter"}


def test_graph_row(tmp_path):
    row = profiled(tmp_path, TREE)
    # 32 nodes of 32 outputs read two leaves, 30 read two nodes, and the last has one output and no activation.
    multiply_adds, activations = 32 * 32 * 2 + 30 * 32 * 64 + 64, 62 * 32
    assert row["gflops"] * row["ours_ms"] * 1e6 == pytest.approx(2 * 1024 * (multiply_adds + activations))
    assert row["bound_by"] == "products" and set(row["stages_ms"]) == {"act", "levels"}


def test_every_class_has_a_row():
    names = [entry.name for entry in profile.representative_entries()]
    parts = ("block 8 ", "block 64 ", "forward+backward / block 16", "(1, 1024", "tree of 1024", "gelu", "loop over")
    for part in parts:
        assert any(part in name for name in names), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_are_rates(dtype):
    assert limits.peak_flops(dtype) > 1e8 and limits.bytes_per_second(1 << 16) > 1e8


def test_errors(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        profile.main(["--only", "no such row"])
    assert "--only: expected a part of a row's name, got no such row" in capsys.readouterr().err
    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    limits._library.cache_clear()
    with pytest.raises(RuntimeError, match="compiler: expected a C\\+\\+ compiler"):
        limits.peak_flops(torch.float32)
