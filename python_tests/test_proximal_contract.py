"""What torch asks of the proximal steps: schemas, fakes, compilation, backends; and every error."""

import pytest
import torch

from compsparse_kernels import explain
from compsparse_kernels.ops import OPS, proximal_adamw_, proximal_sgd_
from compsparse_kernels.ops.proximal import reference
from compsparse_kernels.testing import ISAS, random_tensor

SGD_OP, ADAMW_OP = torch.ops.compsparse.proximal_sgd_.default, torch.ops.compsparse.proximal_adamw_.default
PENALTIES = [("none", 0.0), ("l1", 0.7), ("l1", 3), ("group_l1", 0.7), ("hard", 0.7)]


def sgd_arguments(penalty, strength, momentum=0.7, nesterov=False, first=False, shape=(6, 7)):
    tensors = [random_tensor(*shape, seed=seed) for seed in range(2 + bool(momentum))]
    tensors += [None] * (3 - len(tensors))
    return (*tensors, 0.7, momentum, 0.3, 0.2, nesterov, first, penalty, strength, 0.7, 2, 3)


def adamw_arguments(penalty, strength, step=3, shape=(6, 7)):
    tensors = [random_tensor(*shape, seed=seed) for seed in range(4)]
    return (*tensors[:3], tensors[3].square(), step, 0.7, 0.9, 0.99, 1e-3, 0.3, penalty, strength, 2, 3)


def copies(arguments):
    return [argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in arguments]


def tensors_of(arguments):
    return [argument for argument in arguments if isinstance(argument, torch.Tensor)]


@pytest.mark.parametrize("shape", [(6, 7), (0, 7), (5,)], ids=str)
@pytest.mark.parametrize("penalty, strength", PENALTIES)
def test_opcheck(penalty, strength, shape):
    for momentum in (0.0, 0.7):
        torch.library.opcheck(SGD_OP, sgd_arguments(penalty, strength, momentum, shape=shape))
    if penalty != "hard":
        torch.library.opcheck(ADAMW_OP, adamw_arguments(penalty, strength, shape=shape))


@pytest.mark.parametrize("penalty, strength", PENALTIES)
def test_the_op_means_its_reference(penalty, strength):
    """Boxing does not check: each argument straight through the registered op."""
    every = [(SGD_OP, reference.proximal_sgd_, sgd_arguments(penalty, strength, *more)) for more in
             ((0.0,), (0.7,), (3,), (0.7, True), (0.7, False, True))]  # fmt: skip
    if penalty != "hard":
        every += [(ADAMW_OP, reference.proximal_adamw_, adamw_arguments(penalty, strength, step)) for step in (1, 40)]
    for op, meaning, arguments in every:
        ours, theirs = copies(arguments), copies(arguments)
        assert op(*ours) is None
        meaning(*theirs)
        torch.testing.assert_close(tensors_of(ours), tensors_of(theirs))
        assert not torch.equal(ours[0], arguments[0])


def test_compile():
    def steps(weight, grad, mean, square):
        proximal_sgd_(weight, grad, mean, lr=0.1, momentum=0.9, penalty="group_l1", strength=2.0, block_shape=(2, 2))
        proximal_adamw_(weight, grad, mean, square, step=2, lr=0.1, penalty="l1", strength=1.0)
        return weight * 2

    tensors = copies(adamw_arguments("none", 0.0)[:4])
    ours = copies(tensors)
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*ours), steps(*tensors))
    assert all(torch.equal(a, b) for a, b in zip(ours, tensors, strict=True))


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not ISAS, reason="none"))]
)
def test_backends(backend):
    weight, grad = random_tensor(5, 6), random_tensor(5, 6, seed=1)
    expected = (weight - 0.1 * grad).double()
    expected = expected.sign() * (expected.abs() - 0.2).clamp(min=0)
    result = proximal_sgd_(weight, grad, lr=0.1, penalty="l1", strength=2.0, backend=backend)
    assert result is weight
    torch.testing.assert_close(result, expected.float())


@pytest.mark.parametrize("op", ["proximal_sgd_", "proximal_adamw_"])
def test_explain(op):
    assert op in OPS
    half = torch.zeros(2, dtype=torch.bfloat16)
    assert explain(op, half)["reference"] in ("runs", "available")
    assert explain(op, half)["cpu"] == "runs" or not ISAS
    assert explain(op, half)["cuda"] == "has no kernel of this op"


# ---- errors

X = torch.zeros(4, 3)


def sgd(param=X, grad=X, buffer=None, **options):
    with torch.no_grad():
        return proximal_sgd_(param, grad, buffer, **({"lr": 0.1} | options))


def adamw(param=X, grad=X, exp_avg=X, exp_avg_sq=X, **options):
    with torch.no_grad():
        return proximal_adamw_(param, grad, exp_avg, exp_avg_sq, **({"lr": 0.1, "step": 1} | options))


ERRORS = [
    (lambda: sgd([1.0]), TypeError, "param: expected a tensor, got list"),
    (lambda: sgd(X.long(), X.long()), TypeError, "param: expected float32, .* got 2-D int64"),
    (lambda: sgd(X.to_sparse(), X), TypeError, r"param: expected a dense \(strided\) tensor"),
    (lambda: sgd(torch.zeros(3, 4).T), ValueError, r"param: expected a contiguous tensor, .* strides \(1, 4\)"),
    (lambda: sgd(X[:1].expand(4, 3)), ValueError, r"param: expected a contiguous tensor, .* strides \(0, 1\)"),
    (lambda: sgd(grad=None), TypeError, r"grad: expected tensor \[4, 3\], like param, got NoneType"),
    (lambda: sgd(grad=X.T), ValueError, r"grad: expected tensor \[4, 3\], like param, got 2-D float32 tensor \[3, 4\]"),
    (lambda: sgd(grad=X.double()), TypeError, "grad: expected float32, like param, got 2-D float64"),
    (lambda: sgd(grad=X.to_sparse()), TypeError, r"grad: expected a dense \(strided\) tensor"),
    (lambda: sgd(grad=X.to("meta")), ValueError, "grad: expected a tensor on cpu, like param, got one on meta"),
    (lambda: sgd(buffer=X), ValueError, "momentum_buffer: expected None, since momentum is 0, got 2-D"),
    (
        lambda: sgd(momentum=0.9),
        ValueError,
        "momentum_buffer: expected a tensor, since momentum is not 0, got NoneType",
    ),
    (lambda: sgd(buffer=3, momentum=0.9), TypeError, r"momentum_buffer: expected tensor \[4, 3\], like param, got int"),
    (
        lambda: sgd(buffer=torch.zeros(3, 4).T, momentum=0.9),
        ValueError,
        "momentum_buffer: expected a contiguous tensor",
    ),
    (lambda: sgd(lr=-1.0), ValueError, "lr: expected a finite number, at least 0, got -1.0"),
    (lambda: sgd(lr=float("nan")), ValueError, "lr: expected a finite number, at least 0, got nan"),
    (lambda: sgd(lr=torch.tensor(0.1)), TypeError, "lr: expected a finite number, at least 0, got Tensor"),
    (lambda: sgd(lr=True), TypeError, "lr: expected a finite number, at least 0, got bool"),
    (lambda: sgd(momentum=-0.1), ValueError, "momentum: expected a finite number, at least 0, got -0.1"),
    (lambda: sgd(dampening=float("inf")), ValueError, "dampening: expected a finite number, got inf"),
    (lambda: sgd(weight_decay=-1.0), ValueError, "weight_decay: expected a finite number, at least 0, got -1.0"),
    (lambda: sgd(nesterov=True), ValueError, "nesterov: expected False, or momentum > 0 and dampening = 0, got"),
    (lambda: sgd(penalty="l2"), ValueError, "penalty: expected None, 'l1', 'group_l1' or 'hard', got 'l2'"),
    (lambda: sgd(strength=1.0), ValueError, "strength: expected 0 where penalty is None, got 1.0"),
    (lambda: sgd(penalty="l1", strength=-1.0), ValueError, "strength: expected a finite number, at least 0, got -1.0"),
    (lambda: sgd(penalty="l1", strength="much"), TypeError, "strength: expected a finite number, .* got str"),
    (lambda: sgd(penalty="l1", beta=1.0), ValueError, "beta: expected 0 where penalty is not 'hard', got 1.0"),
    (lambda: sgd(penalty="hard", beta=-1.0), ValueError, "beta: expected a finite number, at least 0, got -1.0"),
    (
        lambda: sgd(penalty="l1", block_shape=(1, 2)),
        ValueError,
        r"block_shape: expected None where penalty is not 'group_l1', got \(1, 2\)",
    ),
    (
        lambda: sgd(penalty="group_l1", block_shape=4),
        TypeError,
        r"block_shape: expected a pair \(rows, columns\) or None, got 4",
    ),
    (
        lambda: sgd(penalty="group_l1", block_shape=(0, 4)),
        ValueError,
        r"block_shape\[0\]: expected a positive int, got 0",
    ),
    (lambda: sgd(backend="gpu"), ValueError, "backend: expected one of cpu, triton, cuda, reference or None"),
    (lambda: sgd(backend="cuda"), ValueError, r"backend: expected one that can run here \(cuda can't\), got has no"),
    (lambda: adamw(penalty="hard"), ValueError, "penalty: expected None, 'l1' or 'group_l1' .* got 'hard'"),
    (lambda: adamw(step=0), ValueError, "step: expected a positive int, got 0"),
    (lambda: adamw(step=1.0), TypeError, "step: expected a positive int, got float"),
    (lambda: adamw(betas=0.9), TypeError, r"betas: expected a pair of numbers in \[0, 1\), got 0.9"),
    (lambda: adamw(betas=(0.9, 1.0)), ValueError, r"betas: expected numbers in \[0, 1\), got 1.0"),
    (lambda: adamw(betas=(-0.1, 0.9)), ValueError, "betas: expected a finite number, at least 0, got -0.1"),
    (lambda: adamw(eps=-1.0), ValueError, "eps: expected a finite number, at least 0, got -1.0"),
    (lambda: adamw(weight_decay="a"), TypeError, "weight_decay: expected a finite number, at least 0, got str"),
    (lambda: adamw(exp_avg=None), TypeError, r"exp_avg: expected tensor \[4, 3\], like param, got NoneType"),
    (lambda: adamw(exp_avg_sq=X.half()), TypeError, "exp_avg_sq: expected float32, like param, got 2-D float16"),
    (
        lambda: proximal_sgd_(X.clone().requires_grad_(), X, lr=0.1),
        ValueError,
        r"param: expected a call under torch.no_grad\(\), got a tensor that requires a gradient outside of it",
    ),
]


@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_forward_mode_tangent_is_refused():
    from torch.autograd import forward_ad

    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="grad: expected a tensor without a forward-mode"):
        proximal_sgd_(X.clone(), forward_ad.make_dual(X.clone(), X.clone()), lr=0.1)
