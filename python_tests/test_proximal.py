"""proximal_sgd_ and proximal_adamw_: steps and maps against torch's optimizers and the float64 reference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsparse_kernels.ops import proximal_adamw_, proximal_sgd_
from compsparse_kernels.ops.proximal import reference
from compsparse_kernels.testing import (
    DTYPES,
    HALVES,
    ISAS,
    THREADS,
    assert_within_budget,
    num_threads,
    random_tensor,
    run_in_subprocess,
)

ALL_DTYPES = DTYPES + HALVES
SHAPES = [(), (1,), (5,), (1, 1), (7, 3), (33, 65), (3, 4, 5), (130, 70), (2, 1100), (90, 9)]
BLOCKS = [None, (1, 7), (4, 4), (5, 3), (16, 32), (100, 2)]
SGD = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.02},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
}
NAMES = {"sgd": ("param", "momentum_buffer"), "adamw": ("param", "exp_avg", "exp_avg_sq")}


class Problem:
    """A step on random numbers, the same in every dtype: the op, torch's optimizer followed by the map, float64."""

    def __init__(self, rule, shape, dtype, options, penalty=None, strength=0.0, block_shape=None, seed=0):
        self.rule, self.dtype, self.options = rule, dtype, {"lr": 0.1} | options
        self.penalty, self.strength, self.block_shape = penalty, strength, block_shape
        count = {"sgd": 3 if options.get("momentum") else 2, "adamw": 4}[rule]
        self.tensors = [random_tensor(*(shape or (1,)), dtype=dtype, seed=seed + i).view(shape) for i in range(count)]
        if rule == "adamw":
            self.tensors[3] = self.tensors[3].square()

    def ours(self, backend=None):
        tensors = [tensor.clone() for tensor in self.tensors]
        step = {"step": 3} if self.rule == "adamw" else {}
        op = {"sgd": proximal_sgd_, "adamw": proximal_adamw_}[self.rule]
        penalty = {"penalty": self.penalty, "strength": self.strength, "block_shape": self.block_shape}
        assert op(*tensors, **step, **self.options, **penalty, backend=backend) is tensors[0]
        assert torch.equal(tensors[1], self.tensors[1])
        return [tensors[0], *tensors[2:]]

    def dense(self, dtype):
        param, grad, *state = (tensor.to(dtype, copy=True) for tensor in self.tensors)
        param.requires_grad_().grad = grad
        if self.rule == "sgd":
            optimizer = torch.optim.SGD([param], **self.options, foreach=False)
            optimizer.state[param] = {"momentum_buffer": state[0]} if state else {}
        else:
            optimizer = torch.optim.AdamW([param], **self.options, foreach=False)
            step = torch.tensor(2.0)  # that many were made
            optimizer.state[param] = {"step": step, "exp_avg": state[0], "exp_avg_sq": state[1]}
        optimizer.step()
        bound = self.options["lr"] * self.strength
        return [mapped(param.detach(), self.penalty, bound, self.block_shape), *state]

    def terms(self):
        """Of each result, the sum of its terms in absolute value: with a negative lr no sign is left."""
        negative = {"lr": -self.options["lr"], "dampening": 0, "momentum": 0, "weight_decay": 0, "nesterov": False}
        param, grad, *state = (tensor.double().abs() for tensor in self.tensors)
        if self.rule == "sgd":
            given = (
                (self.options | negative)["lr"],
                *({**negative, **self.options}[name] for name in list(negative)[1:]),
            )
            lr, dampening, momentum, decay, nesterov = given
            arguments = (lr, momentum, dampening, decay, nesterov, False, "none", 0, 0, 1, 1)
            reference.proximal_sgd_(param, grad, state[0] if state else None, *arguments)
        else:
            arguments = (3, -self.options["lr"], 0.9, 0.999, 1e-8, self.options.get("weight_decay", 0.01))
            reference.proximal_adamw_(param, grad, *state, *arguments, "none", 0, 1, 1)
        return [param + self.options["lr"] * self.strength, *state]

    def check(self, backend=None):
        ours, exact = self.ours(backend), self.dense(torch.float64)
        dense = self.dense(torch.float32 if self.dtype == torch.float64 else self.dtype)
        for name, *parts, terms in zip(NAMES[self.rule], ours, dense, exact, self.terms(), strict=False):
            assert parts[0].dtype == self.dtype
            assert_within_budget(*parts, f"{name}, {self.penalty}", terms)
        return ours


def mapped(weight, penalty, bound, block_shape):
    """The maps as they are written in the papers, in the dtype of ``weight``."""
    if penalty == "l1":
        return weight.sign() * (weight.abs() - bound).clamp(min=0)
    if penalty != "group_l1":
        return weight
    matrix = weight.reshape(len(weight) if weight.dim() else 1, -1)
    block_out, block_in = block_shape or (1, matrix.shape[1])
    result = torch.empty_like(matrix)
    for row in range(0, matrix.shape[0], block_out):
        for column in range(0, matrix.shape[1], block_in):
            place = (slice(row, row + block_out), slice(column, column + block_in))
            group = matrix[place]
            factor = 1 - bound * math.sqrt(group.numel()) / torch.linalg.vector_norm(group)
            result[place] = group * factor.clamp(min=0)
    return result.view(weight.shape)


# ---- values


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
@pytest.mark.parametrize("penalty, strength", [(None, 0.0), ("l1", 5.0), ("group_l1", 3.0)])
def test_sgd(penalty, strength, options, dtype):
    for seed, shape in enumerate(SHAPES):
        Problem("sgd", shape, dtype, options, penalty, strength, seed=seed).check()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "betas": (0.9, 0.999)}], ids=["usual", "decay"])
@pytest.mark.parametrize("penalty, strength", [(None, 0.0), ("l1", 5.0), ("group_l1", 3.0)])
def test_adamw(penalty, strength, options, dtype):
    for seed, shape in enumerate(SHAPES):
        Problem("adamw", shape, dtype, options, penalty, strength, seed=seed).check()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
@pytest.mark.parametrize("rule", NAMES)
def test_blocks(rule, block_shape, dtype):
    """Panels of 512 columns, one that is cut, groups higher than the matrix, ragged ones; some die and some don't."""
    dead = 0.0
    for seed, shape in enumerate([(9, 1100), (37, 41), (3, 4, 5), (130, 9)]):
        problem = Problem(rule, shape, dtype, {}, "group_l1", 9.0, block_shape, seed)
        dead += float((problem.check()[0] == 0).double().mean()) / 4
    assert 0 < dead < 1 or block_shape in (None, (16, 32), (100, 2))  # the norm of a large group is near its mean


@given(
    rule=st.sampled_from(list(NAMES)),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(ALL_DTYPES),
    options=st.sampled_from(list(SGD.values())),
    penalty=st.sampled_from([(None, 0.0), ("l1", 2.0), ("group_l1", 4.0)]),
    block_shape=st.sampled_from([None, (1, 7), (3, 2), (8, 16), (64, 64)]),
    seed=st.integers(0, 2**20),
)
def test_any_step(rule, shape, dtype, options, penalty, block_shape, seed):
    options = options if rule == "sgd" else {"weight_decay": options.get("weight_decay", 0.01)}
    block_shape = block_shape if penalty[0] == "group_l1" else None
    Problem(rule, shape, dtype, options, *penalty, block_shape, seed).check()


def dyadic(*shape, seed, most=16):
    """Multiples of 1/8: every product and sum of a step with such settings is exact in every dtype."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).double() / 8


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("penalty, beta", [("hard", 3.0), ("l1", 0.0)])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_exact_sums_and_ties_at_the_threshold(momentum, penalty, beta, dtype):
    weight, grad, buffer = (dyadic(33, 67, seed=seed) for seed in range(3))
    stepped = weight - 0.5 * (grad + 0.25 * weight.sign() * (penalty == "hard") + momentum * buffer)
    bound = beta * 0.25 if penalty == "hard" else 0.5 * 0.25
    expected = torch.where(stepped.abs() >= bound, stepped, 0)
    if penalty == "l1":
        expected = stepped.sign() * (stepped.abs() - bound).clamp(min=0)
    assert (stepped.abs() == bound).sum() > 20 and (expected == 0).sum() > 100
    options = {"lr": 0.5, "momentum": momentum, "penalty": penalty, "strength": 0.25, "beta": beta}
    for backend in (None, "reference"):
        ours = [tensor.to(dtype, copy=True) for tensor in (weight, grad, buffer)]
        proximal_sgd_(*(ours if momentum else ours[:2]), **options, backend=backend)
        assert torch.equal(ours[0].double(), expected)


def test_hard_kills_what_l1_would_keep():
    """Algorithm 1 of Neyshabur (2020), by hand."""
    weight, grad = torch.tensor([1.0, 0.3, -0.3, 0.24, 0.0]), torch.tensor([0.0, 0.0, 0.0, 0.0, -2.0])
    proximal_sgd_(weight, grad, lr=0.1, penalty="hard", strength=0.5, beta=0.4)
    torch.testing.assert_close(weight, torch.tensor([0.95, 0.25, -0.25, 0.0, 0.2]))


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_neither_overflow_nor_vanish(rule, scale):
    """The squares of these are no float32."""
    weight = random_tensor(6, 40) * scale
    tensors = [weight.clone(), *(torch.zeros(6, 40) for _ in range(3 if rule == "adamw" else 1))]
    options = {"lr": 1.0, "penalty": "group_l1", "strength": 0.5 * scale, "weight_decay": 0.0}
    if rule == "adamw":
        proximal_adamw_(*tensors, **options, step=1)
    else:
        proximal_sgd_(*tensors, **options)
    expected = mapped(weight.double(), "group_l1", 0.5 * scale, None).float()
    torch.testing.assert_close(tensors[0] / scale, expected / scale)
    assert (tensors[0] != 0).all()


# ---- special numbers


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("penalty", [None, "l1", "hard", "group_l1"])
def test_special_numbers(penalty, dtype):
    """NaN and infinity stay in their weight, or reach its group; a dead weight is +0; nothing subnormal is flushed."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, tiny, -tiny, 1.0, -1.0], dtype=dtype)
    weight = special.repeat(5)
    strength = 0.5 if penalty else 0.0
    arguments = {"lr": 1.0, "penalty": penalty, "strength": strength, "beta": 2.0 if penalty == "hard" else 0.0}
    result = proximal_sgd_(weight.clone(), torch.zeros_like(weight), **arguments)
    expected = weight.clone()
    proximal_sgd_(expected, torch.zeros_like(weight), **arguments, backend="reference")
    assert torch.equal(result.isnan(), weight.isnan()) and torch.equal(result.nan_to_num(), expected.nan_to_num())
    if penalty is None:
        assert torch.equal(result[5:7], weight[5:7]) and (weight[5:7] != 0).all()
    else:
        assert result[1] == torch.inf and result[2] == -torch.inf
        assert not result[3:7].any() and (penalty == "group_l1" or not result[3:7].signbit().any())
    groups = weight.view(5, 9).clone()
    groups[1:, 0] = groups[1:, 1] = groups[1:, 2] = 1.0
    groups[2, 1] = torch.inf
    if penalty == "group_l1":
        proximal_sgd_(groups, torch.zeros_like(groups), **arguments)
        assert groups[0].isnan().all() and groups[1].isfinite().all() and groups[2, 1] == torch.inf


@pytest.mark.parametrize("rule", NAMES)
def test_a_term_of_weight_0_is_not_looked_at(rule):
    weight = torch.tensor([torch.inf, 1.0])
    tensors = [weight, *(torch.zeros(2) for _ in range(3 if rule == "adamw" else 2))]
    if rule == "adamw":
        proximal_adamw_(*tensors, step=1, lr=0.1, weight_decay=0.0)
    else:
        proximal_sgd_(*tensors, lr=0.1, momentum=0.9)
    assert weight.tolist() == [torch.inf, 1.0]


def test_the_first_step_does_not_read_the_buffer():
    weight, grad, buffer = random_tensor(40), random_tensor(40, seed=1), torch.full((40,), torch.nan)
    proximal_sgd_(weight, grad, buffer, lr=0.1, momentum=0.9, dampening=0.5, first=True)
    assert torch.equal(buffer, grad) and weight.isfinite().all()


# ---- memory


@pytest.mark.parametrize("memory", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("rule", NAMES)
def test_gradients_may_lie_anyhow(rule, memory):
    options = {"momentum": 0.9} if rule == "sgd" else {}
    problem = Problem(rule, (30, 20), torch.float32, options, "l1", 2.0)
    problem.tensors[1] = random_tensor(30, 20, memory=memory, seed=9)
    problem.check()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("penalty", [None, "l1", "group_l1", "hard"])
def test_nothing_to_do(penalty, backend, shape):
    tensors = [torch.zeros(shape) for _ in range(4)]
    strength = 1.0 if penalty else 0.0
    proximal_sgd_(*tensors[:2], lr=0.1, penalty=penalty, strength=strength, backend=backend)
    if penalty != "hard":
        proximal_adamw_(*tensors, step=1, lr=0.1, penalty=penalty, strength=strength, backend=backend)


def test_what_autograd_kept_is_seen_to_change():
    weight = random_tensor(5, requires_grad=True)
    loss = weight.square().sum()
    with torch.no_grad():
        proximal_sgd_(weight, torch.ones(5), lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- threads and instruction sets


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("penalty", [(None, 0.0), ("l1", 1.0), ("group_l1", 1.0), ("group_l1", 1.0, (7, 5))], ids=str)
def test_bitwise_equal_for_any_number_of_threads(penalty, rule, dtype):
    problem = Problem(rule, (83, 1009), dtype, {"momentum": 0.9} if rule == "sgd" else {}, *penalty)
    results = []
    for threads in THREADS:
        with num_threads(threads):
            results.append(problem.ours())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ISAS[:3])  # with avx512_bf16 it is avx512's table
def test_every_instruction_set(isa):
    """This file's tests of values, in a process whose kernels are capped to one instruction set."""
    code = (
        "import sys, pytest, compsparse_kernels.ops as ops\n"
        f"assert ops.cpu_isa() == {isa!r}\n"
        "tests = 'any_step or exact or special or bitwise'\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', tests, {__file__!r}]))"
    )
    run_in_subprocess(code, isa=isa)
