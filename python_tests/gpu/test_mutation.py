"""Level L3b: damages the compiled kernels in one place each and counts how many of them the checks of L3 catch."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from compsparse_kernels.ops.dag_network import triton as dag_kernels
from python_tests.gpu import dag_problems, ledger
from python_tests.gpu.aot import compile_launch
from python_tests.gpu.attention_batteries import attention_battery
from python_tests.gpu.attention_problems import WRITTEN as ATTENTION_KERNELS
from python_tests.gpu.battery import Battery
from python_tests.gpu.dag_problems import Spec
from python_tests.gpu.nm_batteries import KERNELS as NM_KERNELS
from python_tests.gpu.nm_batteries import nm_battery
from python_tests.gpu.problems import LINEAR, SAMPLED, SHARED_MEMORY, Check, problem
from python_tests.gpu.ptx.mutate import score

LEAST_SCORE = 0.8
BLOCK = (32, 32)


def battery(direction, target: str, features: tuple[int, int], dtype=torch.float16) -> Battery:
    """``features`` decides how operands are loaded: multiples of 16 asynchronously, others element by element."""
    out_features, in_features = features
    more_rows = (out_features + 9 * BLOCK[0], in_features)  # more block rows than a group has
    tiles = 192 if direction is SAMPLED else 0  # three steps along the batch, before what is left over
    problems = [
        problem(BLOCK, features, 37 + tiles, dtype),
        problem(BLOCK, more_rows, 19, dtype, integers=True),
        problem(BLOCK, more_rows, 42, dtype, empty_last_row=True),
        direction.spoil(problem(BLOCK, features, 53 + tiles, dtype)),
        *(problem(BLOCK, features, batch, dtype) for batch in (7, 14, 23, 30, 58, 65, 129)),
    ]
    first = Check(direction, problems[0], target)
    constants = first.launch.arguments
    checks = [first, *(Check(direction, p, target, constants=constants) for p in problems[1:])]
    return Battery(first.name, first.ptx, [check.run for check in checks])


# Each kernel of dag_network where steps copy whole rows, and where nodes and sums end anywhere. The sizes of a battery
# end in all quarters of a tile, as each register has a comparison of its own with the end.
TILE = {"TILE_BATCH": 64, "TILE_OUT": 32, "TILE_IN": 32}
COPIED, BY_ELEMENT = (TILE | {"EVEN_OUT": False, "EVEN_IN": even} for even in (True, False))
WEIGHT = TILE | {"TILE_BATCH": 32}
BATCHES = (37, 7, 14, 65, 23, 30, 58, 129, 51, 64, 44)
WIDTHS = (41, 20, 15, 5, 9, 39, 13, 7, 3, 52, 11)
SIZES = tuple(zip(WIDTHS, BATCHES, strict=True))
EVEN_SIZES = tuple(((48, 80, 16)[i % 3], batch) for i, batch in enumerate(BATCHES))
DAG_BATTERIES = {
    "forward, copied": (
        lambda spec: dag_problems.forward(spec, COPIED, "relu"),
        [Spec(*sizes, in_channels=(48, 80, 16)[i % 3]) for i, sizes in enumerate(SIZES)],
    ),
    "forward, by element": (
        lambda spec: dag_problems.forward(spec, BY_ELEMENT, "silu"),
        [Spec(*sizes, step=(1, 0, 1, 1)[i % 4]) for i, sizes in enumerate(SIZES)],
    ),
    "backward, copied": (
        lambda spec: dag_problems.backward(spec, COPIED, "gelu"),
        [Spec(*sizes, step=1) for sizes in EVEN_SIZES],
    ),
    "backward, to sources": (
        lambda spec: dag_problems.backward(spec, COPIED, "relu"),
        [Spec(*sizes, step=2) for sizes in EVEN_SIZES],
    ),
    "backward, by element": (
        lambda spec: dag_problems.backward(spec, BY_ELEMENT, "relu"),
        [Spec(*sizes, step=(1, 0, 1, 1)[i % 4]) for i, sizes in enumerate(SIZES)],
    ),
    "weight": (
        lambda spec: dag_problems.weight(spec, WEIGHT),
        [Spec(*sizes) for sizes in SIZES[:6]],
    ),
    "weight in parts": (
        lambda spec: dag_problems.weight(spec, WEIGHT),
        [Spec(*sizes, parts=2 + i % 3) for i, sizes in enumerate(SIZES[:6])],
    ),
}
SHORT = ("forward, copied", "forward, by element", "backward, copied", "backward, by element", "weight")
NM_SHORT = ("product at once", "product by slot", "transposed by slot", "sampled, ragged")


def dag_battery(name: str, target: str) -> Battery:
    """In the configuration with most warps, so that there are barriers to damage."""
    make, specs = DAG_BATTERIES[name]
    problems = [make(spec) for spec in specs]
    launch = problems[0].launch
    suitable = dag_kernels.suitable(launch.kernel.configs, launch.arguments, SHARED_MEMORY)
    compiled = compile_launch(launch, max(suitable, key=lambda config: config.num_warps), target)
    checks = [partial(p.check, compiled.serving(p.launch)) for p in problems]
    return Battery(f"dag_network {name} {target}", compiled.kernel.asm["ptx"], checks)


def some(names, short: tuple[str, ...]) -> list:
    """All of them, those that are not in ``short`` behind the marker ``long``."""
    return [name if name in short else pytest.param(name, marks=pytest.mark.long) for name in names]


def check_score(battery: Battery, per_kind: int) -> None:
    assert battery.reason(battery.ptx) is None
    result = score(battery.mutants(per_kind), battery.reason)
    ledger.mutants(battery.name, result.caught.total(), result.total.total())
    survivors = "\n".join(map(str, result.survivors))
    assert result.total.total() >= 20 and result.ratio >= LEAST_SCORE, f"{result.ratio:.0%} caught, not:\n{survivors}"


@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.long)])
@pytest.mark.parametrize("features", [(80, 112), (70, 100)], ids=["copied", "by element"])
@pytest.mark.parametrize("direction", [LINEAR, SAMPLED], ids=lambda direction: direction.name)
@pytest.mark.parametrize("per_kind", [3, pytest.param(40, marks=pytest.mark.long)])
def test_damaged_code_is_caught(direction, features, target, per_kind):
    check_score(battery(direction, target, features), per_kind)


@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", some(DAG_BATTERIES, SHORT))
@pytest.mark.parametrize("per_kind", [2, pytest.param(40, marks=pytest.mark.long)])
def test_damaged_code_of_dag_network_is_caught(name, target, per_kind):
    check_score(dag_battery(name, target), per_kind)


@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", some(NM_KERNELS, NM_SHORT))
@pytest.mark.parametrize("per_kind", [2, pytest.param(40, marks=pytest.mark.long)])
def test_damaged_code_of_nm_products_is_caught(name, target, per_kind):
    check_score(nm_battery(name, target), per_kind)


@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("kernel", "per_kind"),
    [("attend_kernel", 2), *(pytest.param(kernel, 4, marks=pytest.mark.long) for kernel in ATTENTION_KERNELS)],
)
def test_damaged_code_of_attention_is_caught(kernel, per_kind, target):
    """Fewer damaged versions than of the others: their problems take longer."""
    check_score(attention_battery(kernel, target), per_kind)
