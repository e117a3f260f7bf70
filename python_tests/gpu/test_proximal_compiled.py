"""Level L3: the PTX that Triton compiles the proximal steps to, executed on the CPU, against float64."""

from functools import cache
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from compsparse_kernels.ops.proximal import triton as kernels
from python_tests.gpu import ledger
from python_tests.gpu.aot import compile_launch
from python_tests.gpu.proximal_cases import DTYPES, ProximalCase
from python_tests.gpu.ptx import Profile
from python_tests.gpu.ptx.mutate import mutants, reason_caught, score
from python_tests.gpu.ptx.program import Program
from python_tests.gpu.ptx.torch_launch import run_compiled
from python_tests.gpu.static.analyse import analyse
from python_tests.gpu.static.roofline import SECTOR
from python_tests.proximal import NAMES, Problem

# Penalty, strength, shape and blocks: a last tile that is cut; ragged groups, several in a program; longer than a tile.
SHAPES = {
    "none": (None, 0.0, (7, 300), None),
    "l1": ("l1", 5.0, (33, 65), None),
    "blocks": ("group_l1", 9.0, (50, 70), (8, 16)),
    "rows": ("group_l1", 9.0, (2, 2300), None),
    "ones": ("group_l1", 9.0, (1, 1), None),  # sizes of 1 become constants
}
LONG = pytest.mark.long


def cases(default, targets):
    """(shape, dtype, target): every one, of which the default run does a few."""
    every = product(SHAPES, DTYPES, targets)
    return [pytest.param(*case, marks=[] if case in default else LONG, id="-".join(case)) for case in every]


def problem(rule, shape, dtype, seed=0):
    penalty, strength, sizes, block_shape = SHAPES[shape]
    options = {"momentum": 0.9, "weight_decay": 0.1} if rule == "sgd" else {"weight_decay": 0.1}
    return Problem(rule, sizes, DTYPES[dtype], options, penalty, strength, block_shape, seed)


def launch_of(named):
    return (kernels.adamw_launch if "step" in named else kernels.sgd_launch)(**named)


def execute(one, target, ptx=None, **options):
    """Runs the compiled code on a problem and checks the results; a store to the gradient is a fault."""
    launch = launch_of(one.arguments())
    compiled = compile_launch(launch, launch.kernel.configs[0], target)
    program = Program(ptx) if ptx else None
    gradient = [i for i, value in enumerate(compiled.arguments) if value is launch.arguments["grad"]]
    run_compiled(compiled, program=program, readonly=gradient, **options)
    state = ("buffer",) if one.rule == "sgd" else ("mean", "square")
    return one.check([launch.arguments[name] for name in ("param", *state)])


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize(
    "shape, dtype, target",
    cases(
        [("l1", "fp32", "sm_80"), ("blocks", "bf16", "sm_90"), ("rows", "fp16", "sm_80"), ("ones", "fp32", "sm_80")],
        ("sm_80", "sm_90", "sm_100"),
    ),
)
def test_compiled_code_computes_the_reference(shape, dtype, target, rule):
    execute(problem(rule, shape, dtype), target)
    ledger.reached("L3", f"proximal-{rule}-{shape}-{dtype}-{target}")


@pytest.mark.parametrize("rule", NAMES)
def test_no_order_of_programs_changes_a_result(rule):
    one = problem(rule, "blocks", "fp32")
    programs = launch_of(one.arguments()).programs
    assert programs > 2
    first, second = (execute(one, "sm_80", order=order) for order in (range(programs), range(programs)[::-1]))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("rule", NAMES)
def test_a_thread_s_weights_are_one_access_of_each_tensor(rule, target):
    total = analyse(ProximalCase(rule, "fp32", "single", target).compiled(), target).total
    tensors = len(NAMES[rule])
    assert (total["global load"], total["global store"], total["atomic"]) == (tensors + 1, tensors, 0)


@pytest.mark.parametrize("rule, tensors, stores", [("sgd", 3, 2), ("adamw", 4, 3)])
def test_each_number_moves_once(rule, tensors, stores):
    """Without groups: what warps ask for, and the sectors they touch, are each tensor once in and once out."""
    one = Problem(rule, (8, 1024), torch.float32, {"momentum": 0.9} if rule == "sgd" else {}, "l1", 5.0)
    profile = Profile()
    execute(one, "sm_80", profile=profile)
    size = one.tensors[0].nbytes
    assert profile.loads.sectors * SECTOR == profile.load_dram_sectors * SECTOR == tensors * size
    assert profile.stores.sectors * SECTOR == profile.store_dram_sectors * SECTOR == stores * size


@cache
def battery(rule):
    """Problems that one compiled kernel serves: rows that end in and between tiles."""
    return [Problem(rule, (3, columns), torch.float32, {"weight_decay": 0.1}, "group_l1", 9.0, (2, 17), seed=columns)
            for columns in (93, 61, 127)]  # fmt: skip


@pytest.mark.parametrize("rule, per_kind", [("sgd", 2), *(pytest.param(rule, 20, marks=LONG) for rule in NAMES)])
def test_damaged_code_is_caught(rule, per_kind):
    problems = battery(rule)
    launch = launch_of(problems[0].arguments())
    original = compile_launch(launch, launch.kernel.configs[0], "sm_80").kernel.asm["ptx"]

    def reason(ptx):
        reasons = (reason_caught(lambda one=one: execute(one, "sm_80", ptx, limit=200_000)) for one in problems)
        return next((found for found in reasons if found), None)

    assert reason(original) is None
    result = score(mutants(original, seed=0, per_kind=per_kind), reason)
    ledger.mutants(f"proximal-{rule}", result.caught.total(), result.total.total())
    survivors = "\n".join(map(str, result.survivors))
    assert result.total.total() >= 10 and result.ratio >= 0.8, f"{result.ratio:.0%} caught, not:\n{survivors}"
