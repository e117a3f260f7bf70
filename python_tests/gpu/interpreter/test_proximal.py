"""The Triton kernels of the proximal steps, strictly interpreted, against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compsparse_kernels.ops.proximal import reference
from compsparse_kernels.ops.proximal import triton as kernels
from compsparse_kernels.testing import random_tensor
from python_tests.gpu import ledger
from python_tests.gpu.interpreter.guard_pages import far
from python_tests.gpu.interpreter.strict import strict
from python_tests.proximal import NAMES, SGD, Problem

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# More than a tile; groups that fill a tile, part of one and several; ragged ones; the last program is not full.
GROUPS = [
    ((7, 300), (2, 64)),
    ((50, 70), (8, 16)),
    ((3, 2500), None),
    ((33, 65), (32, 32)),
    ((9,), (2, 1)),
    ((5, 3, 4), (4, 5)),
]


def check(problem, seed=0):
    named = problem.arguments()
    tensors = [value for value in named.values() if isinstance(value, torch.Tensor)]
    with strict(seed):
        getattr(kernels, f"proximal_{problem.rule}_")(*named.values())
    assert torch.equal(tensors[1], problem.tensors[1])
    results = problem.check([tensors[0], *tensors[2:]])
    dtype = str(problem.dtype).removeprefix("torch.")
    ledger.reached("L1", f"proximal {problem.rule} {dtype} {problem.penalty} {problem.block_shape}")
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("penalty, strength", [(None, 0.0), ("l1", 5.0)])
def test_single_weights(penalty, strength, rule, dtype):
    for seed, shape in enumerate([(), (5,), (33, 65), (2, 1024)]):
        result, *_ = check(Problem(rule, shape, dtype, {}, penalty, strength, seed=seed), seed)
        assert penalty is None or shape in ((), (5,)) or 0.1 < (result == 0).double().mean() < 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("shape, block_shape", GROUPS, ids=str)
def test_groups(shape, block_shape, rule, dtype):
    check(Problem(rule, shape, dtype, {"weight_decay": 0.1}, "group_l1", 9.0, block_shape))


@pytest.mark.parametrize("penalty, strength", [(None, 0.0), ("l1", 5.0), ("group_l1", 5.0)])
@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_settings_of_sgd(options, penalty, strength):
    check(Problem("sgd", (40, 50), torch.float32, options, penalty, strength))


@given(
    rule=st.sampled_from(list(NAMES)),
    shape=st.lists(st.integers(1, 50), min_size=1, max_size=2),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(list(SGD.values())),
    penalty=st.sampled_from([(None, 0.0), ("l1", 2.0), ("group_l1", 4.0)]),
    block=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    seed=st.integers(0, 100),
)
@settings(max_examples=40)
def test_any_step(rule, shape, dtype, options, penalty, block, seed):
    options = options if rule == "sgd" else {"weight_decay": options.get("weight_decay", 0.01)}
    block = block if penalty[0] == "group_l1" else None
    check(Problem(rule, shape, dtype, options, *penalty, block, seed), seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beta_lasso(dtype):
    """Multiples of 1/8, so that every sum is exact: ties at the threshold are kept."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randint(-16, 17, (33, 67), generator=generator).to(dtype) / 8 for _ in range(2))
    stepped = weight.double() - 0.5 * (grad.double() + 0.25 * weight.double().sign())
    with strict():
        kernels.proximal_sgd_(weight, grad, None, 0.5, 0.0, 0.0, 0.0, False, False, "hard", 0.25, 3.0, 1, 1)
    assert (stepped.abs() == 0.75).sum() > 20
    assert torch.equal(weight.double(), stepped.where(stepped.abs() >= 0.75, 0))


@pytest.mark.parametrize("penalty", ["l1", "hard", "group_l1"])
def test_nan_and_infinity_stay(penalty):
    weight = torch.ones(4, 9)
    weight[0, 3], weight[1, 5] = torch.nan, torch.inf
    bad = ~weight.isfinite()
    with strict():
        kernels.proximal_sgd_(
            *(weight, torch.zeros(4, 9), None, 0.1, 0.0, 0.0, 0.0, False, False),
            *(penalty, 1.0, 1.0 if penalty == "hard" else 0.0, 1, 9),
        )
    assert weight[0, 3].isnan() and weight[1, 5] == torch.inf and weight[2:].isfinite().all()
    if penalty == "group_l1":
        bad[0] = True
        assert weight[0].isnan().all()
    assert weight[~bad].isfinite().all()


def test_the_first_step_does_not_read_the_buffer():
    weight, grad, buffer = torch.ones(40), torch.ones(40), torch.full((40,), torch.nan)
    with strict():
        kernels.proximal_sgd_(weight, grad, buffer, 0.1, 0.9, 0.5, 0.0, False, True, "none", 0.0, 0.0, 1, 1)
    assert torch.equal(buffer, grad) and weight.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_neither_overflow_nor_vanish(scale):
    weight = torch.full((4, 9), scale)
    with strict():
        kernels.proximal_sgd_(
            *(weight, torch.zeros(4, 9), None, 1.0, 0.0, 0.0, 0.0, False, False),
            *("group_l1", 0.5 * scale, 0.0, 1, 9),
        )
    torch.testing.assert_close(weight / scale, torch.full((4, 9), 0.5))


def test_nothing_to_do():
    empty = torch.zeros(0, 5)
    kernels.proximal_sgd_(empty, empty, None, 0.1, 0.0, 0.0, 0.0, False, False, "group_l1", 1.0, 0.0, 1, 5)
    kernels.proximal_adamw_(empty, empty, empty, empty, 1, 0.1, 0.9, 0.999, 1e-8, 0.0, "l1", 1.0, 1, 1)


@pytest.mark.parametrize("penalty", ["l1", "group_l1"])
def test_offsets_past_2_to_the_31(penalty):
    """The last programs alone, on memory that exists only where it is touched."""
    rows, columns = 2**21 + 5, 1030
    weight, grad, buffer = (far((rows, columns), torch.float16) for _ in range(3))
    last = 2 * columns  # weights of the last two rows
    ends = [random_tensor(last, dtype=torch.float16, seed=seed) for seed in range(3)]
    for tensor, end in zip((weight, grad, buffer), ends, strict=True):
        tensor.view(-1)[-last:] = end
    settings = (
        0.1,
        0.9,
        0.0,
        0.0,
        False,
        False,
        penalty,
        2.0,
        0.0,
        *((1, columns) if penalty == "group_l1" else (1, 1)),
    )
    launch = kernels.sgd_launch(weight, grad, buffer, *settings)
    assert launch.arguments["size"] > 2**31
    programs = 2 if penalty == "group_l1" else -(-last // kernels.TILE) + 1
    with strict(first_program=launch.programs - programs):
        launch._replace(programs=programs)()
    expected = [end.view(2, columns) for end in ends]
    reference.proximal_sgd_(*expected, *settings)
    for tensor, right in zip((weight, buffer), (expected[0], expected[2]), strict=True):
        torch.testing.assert_close(tensor.view(-1)[-last:].view(2, columns), right)
