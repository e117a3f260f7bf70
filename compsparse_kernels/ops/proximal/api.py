"""What users call: checks, then the op. A step of an optimizer has no gradient, so there is no autograd Function."""

import math
from numbers import Real

import torch
from torch import Tensor, strided
from torch.autograd import forward_ad

from compsparse_kernels.layouts.checks import check_positive_int, describe, require
from compsparse_kernels.ops.arguments import check_dtype, check_same, refuse_forward_mode
from compsparse_kernels.ops.backends import check_backend, dtypes_on
from compsparse_kernels.ops.proximal import contract, reference  # noqa: F401  (contract defines the ops)

_sgd = torch.ops.compsparse.proximal_sgd_.default
_adamw = torch.ops.compsparse.proximal_adamw_.default

_CPU_DTYPES = dtypes_on("cpu", "proximal_sgd_")
PENALTIES = (None, "l1", "group_l1", "hard")


def proximal_sgd_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    penalty: str | None = None,
    strength: float = 0.0,
    beta: float = 0.0,
    block_shape: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""One step of SGD and the proximal map of a penalty, in place, in one pass over memory.

    .. math::
        w \leftarrow \mathrm{prox}(w - \eta d), \qquad d \text{ as in } \texttt{torch.optim.SGD}

    With :math:`\eta` = ``lr`` and :math:`\lambda` = ``strength``, the penalty is

    - None: :math:`\mathrm{prox}(w) = w`; the step is torch's;
    - ``"l1"``, :math:`\lambda \|w\|_1`: :math:`\mathrm{sign}(w) \max(|w| - \eta\lambda, 0)`;
    - ``"group_l1"``, :math:`\lambda \sum_g \sqrt{n_g} \|w_g\|_2` over groups of :math:`n_g` weights:
      :math:`w_g \max(1 - \eta\lambda\sqrt{n_g} / \|w_g\|_2, 0)`;
    - ``"hard"``, beta-LASSO: :math:`\lambda\,\mathrm{sign}(w)` is added to the gradient, and after the step what is
      smaller than :math:`\beta\lambda` becomes 0.

    So weights become exactly 0, and stay so until a gradient is larger than the penalty.

    Args:
        param: a contiguous tensor of any shape: float32, float64, float16 or bfloat16; changed in place. Half precision
            is computed in float32 and rounded once.
        grad: shape and dtype of ``param``.
        momentum_buffer: the same, contiguous, where ``momentum`` is not 0; changed in place. None where it is 0.
        lr: the step size, not negative.
        momentum, dampening, weight_decay, nesterov: as in ``torch.optim.SGD``.
        first: the first step, in which ``momentum_buffer`` is written only, with the gradient.
        penalty: one of the above.
        strength: :math:`\lambda`, not negative.
        beta: of ``"hard"``, not negative.
        block_shape: of ``"group_l1"``: groups are blocks ``(rows, columns)`` of the matrix that ``param`` is, its first
            dimension against all others; the last ones may be ragged. None: whole rows, so that a group is what feeds
            one output of a linear layer or a convolution.
        backend: None lets torch's dispatcher choose; ``"cpu"``, ``"triton"`` or ``"reference"`` runs that one or says
            why not.

    Returns:
        ``param``.

    Every element, or every group, is computed by one thread in one order: results don't depend on their number.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Parikh and Boyd, "Proximal Algorithms" (2014), sections 4.2 and 6.5; Yuan and Lin, "Model selection and
    estimation in regression with grouped variables" (2006), for the weight of a group; Neyshabur, "Towards Learning
    Convolutions from Scratch" (2020), algorithm 1, for beta-LASSO.

    Example:
        >>> import torch
        >>> from compsparse_kernels.ops import proximal_sgd_
        >>> weight, grad = torch.tensor([1.0, 0.05, -0.5]), torch.zeros(3)
        >>> proximal_sgd_(weight, grad, lr=0.1, penalty="l1", strength=1.0)
        tensor([ 0.9000,  0.0000, -0.4000])
    """
    check_number("lr", lr)
    check_number("momentum", momentum)
    check_number("dampening", dampening, -math.inf)
    check_number("weight_decay", weight_decay)
    check_nesterov(nesterov, momentum, dampening)
    check_penalty(penalty, strength, block_shape, beta)
    needs_buffer = "a tensor, since momentum is not 0" if momentum else "None, since momentum is 0"
    if (momentum_buffer is None) != (momentum == 0):
        require(False, "momentum_buffer", needs_buffer, describe(momentum_buffer))
    buffers = () if momentum_buffer is None else (("momentum_buffer", momentum_buffer),)
    _check_tensors("proximal_sgd_", param, grad, buffers, backend)
    op = reference.proximal_sgd_ if backend == "reference" else _sgd
    op(
        *(param, grad, momentum_buffer, lr, momentum, dampening, weight_decay, bool(nesterov), bool(first)),
        *(penalty or "none", strength, beta, *_block(param, penalty, block_shape)),
    )
    return _changed(param, *(tensor for _, tensor in buffers))


def proximal_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    penalty: str | None = None,
    strength: float = 0.0,
    block_shape: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""One step of AdamW and the proximal map of a penalty, in place, in one pass over memory.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        w \leftarrow \mathrm{prox}\Big(w - \eta \mu w
        - \eta \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}\Big)

    The maps are those of :func:`proximal_sgd_`. As AdamW's decay :math:`\mu`, they are decoupled from the gradient's
    scale: the threshold is :math:`\eta\lambda` for every weight, whatever its :math:`v`.

    Args:
        param, grad, penalty, strength, block_shape, backend: as in :func:`proximal_sgd_`, but for ``"hard"``, which is
            defined for SGD alone.
        exp_avg, exp_avg_sq: m and v, contiguous, of the shape and dtype of ``param``; changed in place.
        step: t, the number of this step, from 1.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.

    Returns:
        ``param``.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2; the maps as there.

    Example:
        >>> import torch
        >>> from compsparse_kernels.ops import proximal_adamw_
        >>> weight, grad = torch.tensor([[3.0, 4.0], [0.1, 0.1]]), torch.zeros(2, 2)
        >>> state = torch.zeros(2, 2), torch.zeros(2, 2)
        >>> proximal_adamw_(weight, grad, *state, step=1, lr=0.5, weight_decay=0, penalty="group_l1", strength=1.0)
        tensor([[2.5757, 3.4343],
                [0.0000, 0.0000]])
    """
    check_number("lr", lr)
    check_betas(betas)
    check_number("eps", eps)
    check_number("weight_decay", weight_decay)
    check_positive_int("step", step)
    if penalty == "hard":
        require(False, "penalty", "None, 'l1' or 'group_l1' ('hard' is defined for SGD)", repr(penalty))
    check_penalty(penalty, strength, block_shape)
    buffers = (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq))
    _check_tensors("proximal_adamw_", param, grad, buffers, backend)
    op = reference.proximal_adamw_ if backend == "reference" else _adamw
    op(
        *(param, grad, exp_avg, exp_avg_sq, step, lr, *betas, eps, weight_decay),
        *(penalty or "none", strength, *_block(param, penalty, block_shape)),
    )
    return _changed(param, exp_avg, exp_avg_sq)


def check_number(name: str, value: object, least: float = 0.0) -> None:
    """A finite number, at least ``least``."""
    if type(value) is float and least <= value < math.inf:
        return
    wanted = "a finite number" if least == -math.inf else f"a finite number, at least {least:g}"
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    require(is_number, name, wanted, type(value).__name__, TypeError)
    require(math.isfinite(value) and value >= least, name, wanted, value)


def check_betas(betas: object) -> None:
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not pair:
        require(False, "betas", "a pair of numbers in [0, 1)", repr(betas), TypeError)
    for beta in betas:
        check_number("betas", beta)
        if beta >= 1:
            require(False, "betas", "numbers in [0, 1)", beta)


def check_nesterov(nesterov: object, momentum: float, dampening: float) -> None:
    """As torch: Nesterov's momentum is defined with momentum and without dampening."""
    if nesterov and (momentum == 0 or dampening != 0):
        came = f"momentum={momentum}, dampening={dampening}"
        require(False, "nesterov", "False, or momentum > 0 and dampening = 0", came)


def check_penalty(penalty: object, strength: object, block_shape: object, beta: object = 0.0) -> None:
    """What is given must have an effect."""
    if penalty not in PENALTIES:
        require(False, "penalty", "None, 'l1', 'group_l1' or 'hard'", repr(penalty))
    check_number("strength", strength)
    check_number("beta", beta)
    if strength and penalty is None:
        require(False, "strength", "0 where penalty is None", strength)
    if beta and penalty != "hard":
        require(False, "beta", "0 where penalty is not 'hard'", beta)
    if block_shape is None:
        return
    require(penalty == "group_l1", "block_shape", "None where penalty is not 'group_l1'", repr(block_shape))
    pair = isinstance(block_shape, (tuple, list)) and len(block_shape) == 2
    require(pair, "block_shape", "a pair (rows, columns) or None", repr(block_shape), TypeError)
    for i, size in enumerate(block_shape):
        check_positive_int(f"block_shape[{i}]", size)


def _check_tensors(op: str, param, grad, buffers: tuple[tuple[str, Tensor], ...], backend: str | None) -> None:
    """The usual case is one expression each; what looks closer names the fault."""
    usual = isinstance(param, Tensor) and isinstance(grad, Tensor) and param.is_cpu and param.dtype in _CPU_DTYPES
    usual = usual and _is_like(grad, param) and param.layout == strided and param.is_contiguous()
    usual = usual and all(
        isinstance(tensor, Tensor) and _is_like(tensor, param) and tensor.is_contiguous() for _, tensor in buffers
    )
    if not (usual and backend is None and forward_ad._current_level < 0 and not torch.is_grad_enabled()):
        _look_closer(op, param, grad, buffers, backend)


def _is_like(tensor: Tensor, param: Tensor) -> bool:
    return tensor.dtype == param.dtype and tensor.shape == param.shape and tensor.is_cpu and tensor.layout == strided


def _look_closer(op: str, param, grad, buffers: tuple[tuple[str, Tensor], ...], backend: str | None) -> None:
    require(isinstance(param, Tensor), "param", "a tensor", describe(param), TypeError)
    check_dtype("param", param, op)
    wanted = f"tensor {list(param.shape)}, like param"
    for name, tensor in (("grad", grad), *buffers):
        require(isinstance(tensor, Tensor), name, wanted, describe(tensor), TypeError)
        require(tensor.shape == param.shape, name, wanted, describe(tensor))
        check_same(name, tensor, "param", param)
    for name, tensor in (("param", param), *buffers):
        is_own = tensor.is_contiguous()
        require(is_own, name, "a contiguous tensor, as it is changed in place", f"one with strides {tensor.stride()}")
        wants_grad = tensor.requires_grad and torch.is_grad_enabled()
        require(not wants_grad, name, "a call under torch.no_grad()", "a tensor that requires a gradient outside of it")
    refuse_forward_mode(("param", param), ("grad", grad))
    if backend is not None:
        check_backend(backend, op, param)


def _block(param: Tensor, penalty: str | None, block_shape) -> tuple[int, int]:
    """Whole rows by default; no block is larger than the matrix, whose sizes a kernel may multiply."""
    if penalty != "group_l1":
        return 1, 1
    rows = param.shape[0] if param.dim() else 1
    columns = param.numel() // rows if rows else 0
    block_out, block_in = (1, columns) if block_shape is None else block_shape
    return max(1, min(block_out, rows)), max(1, min(block_in, columns))


def _changed(param: Tensor, *buffers: Tensor) -> Tensor:
    """Autograd must know, where a tensor was kept for a backward."""
    if not torch.compiler.is_compiling():  # there the schema tells
        torch.autograd.graph.increment_version((param, *buffers))
    return param
