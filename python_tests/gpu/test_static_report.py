"""The cases that ship, what they must do at least, and the goals of level L4 for them."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from python_tests.gpu import attention_cases, cases, dag_cases, nm_cases, proximal_cases
from python_tests.gpu.aot import TARGETS, compile_launch
from python_tests.gpu.cases import DEFAULT, LARGE_BATCH, SMALL_BATCH, Case, least_work
from python_tests.gpu.ptx import Profile
from python_tests.gpu.ptx.torch_launch import run_compiled
from python_tests.gpu.report import emulate, examine, is_emulated, render
from python_tests.gpu.shipped import shipped
from python_tests.gpu.static.roofline import traffic

PRODUCT = Case("forward", "bf16", (64, 64), 8, 3, "sm_80")
SAMPLED = Case("sampled", "bf16", (64, 64), 4, 3, "sm_80")
RUN = [case for case in shipped() if is_emulated(case)]


def test_the_first_choice_of_each_kernel_for_each_target():
    rooms = (dag_cases, nm_cases, proximal_cases, attention_cases)
    defaults = (DEFAULT, *(room.DEFAULT for room in rooms))
    assert len(shipped()) == sum(map(len, defaults)) * len(TARGETS)
    assert len(shipped()) == len({case.name for case in shipped()})
    assert set(shipped()) <= set(shipped(long=True))


@pytest.mark.parametrize("case", [PRODUCT, SAMPLED], ids=lambda case: case.name)
def test_a_small_launch_is_the_same_kernel(case):
    large, small = case.launch(), case.small_launch()
    constants = [name for name in large.arguments if name.isupper()]
    assert constants
    assert [large.arguments[name] for name in constants] == [small.arguments[name] for name in constants]
    assert (large.arguments["batch"], small.arguments["batch"]) == (LARGE_BATCH, SMALL_BATCH)


def test_the_programs_of_a_small_launch_cover_its_batch():
    given = PRODUCT.small_launch().arguments
    assert PRODUCT.small_launch().programs == given["rows"] * SMALL_BATCH // given["TILE_BATCH"]
    assert SAMPLED.small_launch().programs == SAMPLED.launch().programs


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_least_work_of_a_product(direction):
    launch = Case(direction, "fp16", (128, 64), 8, 3, "sm_80").small_launch()
    given = launch.arguments
    rows = given["ptr"].diff().tolist()
    tiles = SMALL_BATCH // given["TILE_BATCH"]
    program_bytes = 0
    for entries in rows:
        of_entry = (given["TILE_BATCH"] * given["BLOCK_IN"] + 128 * 64) * 2 + 4 + 4
        of_output = given["TILE_BATCH"] * given["BLOCK_OUT"] * 2
        program_bytes += tiles * (entries * of_entry + of_output + 8 + 4)
    work = least_work(launch)
    assert work.tile_bytes == program_bytes
    assert work.flops == 2 * SMALL_BATCH * sum(rows) * 128 * 64
    assert work.bytes <= work.tile_bytes
    assert work.bytes >= sum(given[name].nbytes for name in ("values", "y", "idx", "slot", "order"))


def test_least_work_of_a_sampled_product():
    launch = SAMPLED.small_launch()
    entries = len(launch.arguments["entry_row"])
    work = least_work(launch)
    assert work.tile_bytes == entries * ((2 * SMALL_BATCH * 64 + 64 * 64) * 2 + 12)
    assert work.flops == 2 * SMALL_BATCH * entries * 64 * 64
    assert work.bytes <= work.tile_bytes


@pytest.mark.parametrize("case", RUN, ids=lambda case: case.name)
def test_traffic(case):
    """What is beyond 1 are indices: 4 bytes of a sector of 32, or the positions of N:M, fewer bytes still."""
    counted = emulate(examine(case)).traffic
    assert case.least_useful <= counted.useful_per_sector <= 1
    assert 1 <= counted.bank_conflicts <= 1.1
    assert 1 <= counted.requested <= 1.3
    assert 1 <= counted.memory <= 1.3


@triton.jit
def copy_spread(source, target, spread, COUNT: tl.constexpr):
    """Reads every ``spread``-th number."""
    n = tl.arange(0, COUNT)
    tl.store(target + n, tl.load(source + n * spread))


@pytest.mark.parametrize("spread", [1, 2, 8, 16])
def test_traffic_of_a_kernel_that_wastes_it(spread):
    """Of each sector of 8 numbers, 8 / spread are wanted, at least one."""
    count = 128  # one for each thread, so that a number is asked for by one instruction
    arguments = {
        "source": torch.arange(count * spread, dtype=torch.float32),
        "target": torch.zeros(count),
        "spread": spread,
        "COUNT": count,
    }
    launch = SimpleNamespace(kernel=SimpleNamespace(fn=copy_spread), arguments=arguments, programs=1)
    profile = Profile()
    config = triton.Config({}, num_warps=4, num_stages=1)
    run_compiled(compile_launch(launch, config, "sm_80"), profile=profile)
    assert torch.equal(arguments["target"], arguments["source"][::spread])
    counted = traffic(profile, SimpleNamespace(flops=0, bytes=2 * 4 * count, tile_bytes=2 * 4 * count))
    wasted = min(spread, 8)
    assert counted.useful_per_sector == pytest.approx(2 / (1 + wasted))
    assert counted.requested == counted.memory == (1 + wasted) / 2


@pytest.mark.parametrize("block", [(64, 64), (128, 128)])
def test_tensor_core_ceiling(block):
    """Issue 3, part 5: the loop lets sm_80's tensor cores reach 90 % of their rate."""
    wanted = ("forward", "bf16", block, "sm_80")
    (case,) = [one for one in cases.shipped() if (one.direction, one.dtype, one.block, one.target) == wanted]
    assert examine(case).bound.tensor_ceiling >= 0.9


def test_the_report_names_every_kernel_and_its_faults():
    good = examine(PRODUCT)
    bad = type(good)(SAMPLED, good.analysis, None, ["spills: expected none, got 8"])
    text = render([good, bad], [])
    assert f"{PRODUCT.name} " in text and f"{SAMPLED.name} " in text
    assert "spills: expected none, got 8" in text
    assert text.endswith("1 of 2 kernels pass the gates; 0 emulated.\n")
    assert max(map(len, text.splitlines())) <= 190


def test_tensors_of_a_small_launch_are_finite():
    assert all(torch.isfinite(SAMPLED.small_launch().arguments[name]).all() for name in ("a", "b"))
