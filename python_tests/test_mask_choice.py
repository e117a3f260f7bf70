"""The choice of a kind: by which costs, where they come from, and what is chosen."""

import json
import os
import sys
import time

import pytest
import torch

import compsparse_kernels.layouts.costs as costs_module
from compsparse_kernels import MaskLayout, prune
from compsparse_kernels.layouts.choice import Choice, choose_kind
from compsparse_kernels.layouts.costs import SHIPPED_COSTS, WAYS, CostModel, this_machine
from compsparse_kernels.ops.masked_linear.calibration import calibrate
from compsparse_kernels.testing import run_in_subprocess

# Dense takes 1 an element, csr twice that, N:M 1.5, blocks .8; and a feature 2 for all but dense.
STEPS = {"step": (0, 1), "step with zeros": (0, 2)}
PLAIN = CostModel(
    {
        **STEPS,
        "dense": (0, 1),
        "csr": (2, 2),
        "nm": (2, 1.5),
        "block 32": (2, 0.8),
        "block 16": (2, 0.8),
        "block 8": (2, 0.9),
    }
)


def random_mask(rows, columns, density, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def nm_mask(n, m, rows=128, groups=32):
    order = torch.rand(rows, groups, m, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return (order < n).flatten(1)


def block_mask(size, density=0.25, grid=(4, 8)):
    return random_mask(*grid, density).repeat_interleave(size, 0).repeat_interleave(size, 1)


CHOICES = {
    "sparse": (random_mask(64, 96, 0.1), Choice("csr")),
    "nearly full": (random_mask(64, 96, 0.95), Choice("block", (32, 32))),  # all blocks, and they are faster than dense
    "tiny": (random_mask(2, 3, 0.5), Choice("dense")),  # what a feature costs is more than there is to save
    "zeros": (torch.zeros(64, 96, dtype=torch.bool), Choice("csr")),
    "ones": (torch.ones(64, 96, dtype=torch.bool), Choice("block", (32, 32))),
    "blocks 32": (block_mask(32), Choice("block", (32, 32))),
    "blocks 16": (block_mask(16), Choice("block", (16, 16))),
    "ragged blocks": (block_mask(16)[:, :-5], Choice("block", (16, 16))),
    "blocks 8": (block_mask(8), Choice("block", (8, 8))),
    "partly filled": (block_mask(32) & random_mask(128, 256, 0.9), Choice("block", (32, 32))),
    "1:4": (nm_mask(1, 4), Choice("nm", nm=(1, 4))),
    "2:8, ragged": (nm_mask(2, 8)[:, :-3], Choice("nm", nm=(2, 8))),
    "hardly filled": (block_mask(32) & random_mask(128, 256, 0.1), Choice("csr")),
}


@pytest.mark.parametrize("mask, expected", CHOICES.values(), ids=CHOICES)
def test_auto(mask, expected):
    assert choose_kind(mask, None, PLAIN) == expected
    layout = MaskLayout.from_mask(mask, costs=PLAIN)
    assert layout.kind == expected.kind and torch.equal(layout.to_mask(), mask)
    assert layout.blocks is None or layout.blocks.block_shape == expected.block_shape
    assert layout.nm is None or (layout.nm.n, layout.nm.m) == expected.nm
    assert MaskLayout.from_dense(mask.float(), costs=PLAIN).kind == expected.kind


def test_auto_with_a_block_shape():
    assert MaskLayout.from_mask(block_mask(16), block_shape=(16, 8), costs=PLAIN).blocks.block_shape == (16, 8)
    assert MaskLayout.from_mask(block_mask(16), block_shape=(32, 32), costs=PLAIN).blocks.block_shape == (32, 32)
    scattered = random_mask(64, 96, 0.1)
    assert MaskLayout.from_mask(scattered, block_shape=(32, 32), costs=PLAIN).kind == "csr"


def test_blocks_smaller_than_any_line_cost_what_csr_does():
    mask = block_mask(4, grid=(32, 32))
    assert choose_kind(mask, (4, 4), PLAIN) == Choice("block", (4, 4))  # as much as csr, with fewer indices
    partly = mask & random_mask(*mask.shape, 0.9)
    assert choose_kind(partly, (4, 4), PLAIN) == Choice("csr")


def test_auto_follows_its_costs():
    mask = random_mask(256, 256, 0.3)
    slow_blocks = CostModel({way: (0, 1) if way.startswith("block") else line for way, line in PLAIN.lines.items()})
    slow = CostModel({**slow_blocks.lines, "csr": (2, 4)})
    assert choose_kind(mask, None, slow_blocks)[0] == "csr" and choose_kind(mask, None, slow)[0] == "dense"


def test_an_optimizer_counts_for_what_is_stored(monkeypatch):
    """At .55 csr takes 1.1 and a little to dense's 1 an element; with steps 1.7 to 3: dense trains zeros, too. Where
    csr takes 1.4, it is 1.9 to 3; or to 2, and too little less, where state is there that was moved without zeros."""
    slow_blocks = CostModel({way: (0, 9) if way.startswith("block") else line for way, line in PLAIN.lines.items()})
    mask = random_mask(200, 300, 0.55)
    assert choose_kind(mask, None, slow_blocks) == Choice("dense")
    assert choose_kind(mask, None, slow_blocks, with_step=True) == Choice("csr")
    dense_step = CostModel({**slow_blocks.lines, "csr": (2, 2.5)})
    assert choose_kind(mask, None, dense_step, with_step=True) == Choice("csr")
    assert choose_kind(mask, None, dense_step, with_step=True, state_of_zeros=False) == Choice("dense")
    for module in ("layouts.mask", "prune.convert"):
        monkeypatch.setattr(sys.modules[f"compsparse_kernels.{module}"], "this_machine", lambda: dense_step)
    kinds = []
    for trained in (None, "held", "stepped"):
        layer = torch.nn.Linear(300, 200)
        model, optimizer = torch.nn.Sequential(layer), torch.optim.Adam(layer.parameters())
        if trained == "stepped":
            layer(torch.ones(1, 300)).sum().backward()
            optimizer.step()
        prune.convert(model, {"0": mask}, optimizer=optimizer if trained else None)
        kinds.append(model[0].layout.kind)
    assert kinds == ["dense", "csr", "dense"]


def test_a_sparse_kind_must_be_faster_by_a_margin():
    barely = CostModel({**STEPS, **{way: (0, 1 if way == "dense" else 0.96) for way in WAYS}})
    assert choose_kind(torch.ones(64, 64, dtype=torch.bool), None, barely)[0] == "dense"


def test_the_shipped_costs():
    assert choose_kind(random_mask(512, 512, 0.1), None, SHIPPED_COSTS) == Choice("csr")
    assert choose_kind(random_mask(100, 100, 0.6), None, SHIPPED_COSTS) == Choice("dense")
    assert choose_kind(block_mask(32, 0.3, (16, 16)), None, SHIPPED_COSTS) == Choice("block", (32, 32))


def test_calibration_measures_every_way_and_gives_the_threads_back():
    threads, started = torch.get_num_threads(), time.process_time()
    with torch.no_grad():
        measured = calibrate()
    assert time.process_time() - started < 10 and torch.get_num_threads() == threads
    assert measured.lines.keys() == {*WAYS, *STEPS}
    assert all(line.per_element > 0 and line.per_feature >= 0 for line in measured.lines.values())
    assert measured.lines["dense"].per_feature == 0


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own; calls of the calibration are counted."""
    calls = []

    def count_calls():
        calls.append(1)
        return PLAIN

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(costs_module, "cache_path", lambda: tmp_path / "folder" / "costs.json")
    monkeypatch.setattr(costs_module, "_calibrate", count_calls)
    monkeypatch.setenv(costs_module.SWITCH, "1")
    this_machine.cache_clear()
    yield tmp_path / "folder" / "costs.json", calls
    this_machine.cache_clear()


def test_costs_are_measured_once_per_machine(cache):
    path, calls = cache
    assert this_machine() == PLAIN and this_machine() == PLAIN and len(calls) == 1
    this_machine.cache_clear()  # as in another process
    assert this_machine() == PLAIN and len(calls) == 1
    assert CostModel.load(path) == PLAIN and os.listdir(path.parent) == [path.name]
    assert MaskLayout.from_mask(block_mask(32)).kind == "block"


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"csr": 3}', "\x00", json.dumps({way: [1] for way in (*WAYS, *STEPS)})]
)
def test_a_spoilt_cache_is_measured_anew(cache, content):
    path, calls = cache
    path.parent.mkdir()
    path.write_text(content)
    assert this_machine() == PLAIN and len(calls) == 1 and CostModel.load(path) == PLAIN


def test_a_cache_that_can_not_be_written_is_done_without(cache):
    path, calls = cache
    path.parent.write_text("a file where the folder should be")
    assert this_machine() == PLAIN and len(calls) == 1


def test_the_first_to_write_the_cache_wins(cache):
    path, _ = cache
    SHIPPED_COSTS.save(path)
    PLAIN.save(path)
    assert CostModel.load(path) == SHIPPED_COSTS and os.listdir(path.parent) == [path.name]


def test_calibration_can_be_switched_off(cache, monkeypatch):
    _, calls = cache
    monkeypatch.setenv(costs_module.SWITCH, "0")
    assert this_machine() is SHIPPED_COSTS and not calls
    assert MaskLayout.from_mask(block_mask(32), costs=PLAIN).kind == "block" and not calls


def test_a_process_calibrates_by_itself_and_agrees_with_the_next(tmp_path, monkeypatch):
    code = (
        "import torch; from compsparse_kernels import MaskLayout;"
        "from compsparse_kernels.layouts.costs import cache_path, this_machine;"
        "MaskLayout.from_mask(torch.eye(64, dtype=torch.bool)); print(cache_path(), this_machine())"
    )
    for name, value in (("XDG_CACHE_HOME", str(tmp_path)), ("HOME", str(tmp_path)), (costs_module.SWITCH, "1")):
        monkeypatch.setenv(name, value)
    first, second = (run_in_subprocess(code) for _ in range(2))
    assert first == second and str(tmp_path) in first


ERRORS = {
    "lines": (lambda: CostModel([1]), TypeError, "lines: expected dict of way: (per_feature, per_element), got list"),
    "missing": (
        lambda: CostModel({"csr": (1, 1)}),
        ValueError,
        "lines: expected dense, csr, nm, block 32, block 16, block 8, step, step with zeros, got csr",
    ),
    "line": (
        lambda: CostModel(dict.fromkeys((*WAYS, *STEPS), (1, -1))),
        ValueError,
        "lines['dense']: expected two finite numbers, not negative, got (1, -1)",
    ),
    "costs": (
        lambda: MaskLayout.from_mask(block_mask(8), costs={}),
        TypeError,
        "costs: expected CostModel or None, got dict",
    ),
    "costs without auto": (
        lambda: MaskLayout.from_mask(block_mask(8), "csr", costs=PLAIN),
        ValueError,
        "costs: expected None with kind csr, got a CostModel",
    ),
}


@pytest.mark.parametrize("call, error, message", ERRORS.values(), ids=ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
