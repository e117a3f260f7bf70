"""Triton kernels of the proximal steps, for CUDA and ROCm: float32, float16 and bfloat16, computed in float32.

single weights: a program owns a tile of them; parameter and state are read and written once.
groups:         a program owns whole groups, side by side. The step is made twice, for the norm and for the result, as a
                large group can't be kept unrounded; what is read again is in a cache.

Norms are taken in float64: no square overflows or vanishes. Every weight and every group has one owner and one order
of steps, and there are no atomics: results are the same run to run.
"""

import math

import triton
import triton.language as tl

from compsparse_kernels.ops.triton_launch import Launch, tuned

TILE = 1024  # weights of a program: 4 a thread

# A kernel that changes its arguments can't be tried in several configurations. Memory alone limits these.
ONE_CONFIG = tuned([triton.Config({}, num_warps=8)], [], lambda configs, arguments, shared_memory: configs)


def proximal_sgd_(param, grad, momentum_buffer, *settings):
    """The op of the same name at key CUDA."""
    if param.numel():
        sgd_launch(param, grad, momentum_buffer, *settings)()


def proximal_adamw_(param, grad, exp_avg, exp_avg_sq, *settings):
    """The op of the same name at key CUDA."""
    if param.numel():
        adamw_launch(param, grad, exp_avg, exp_avg_sq, *settings)()


def sgd_launch(
    param,
    grad,
    momentum_buffer,
    lr,
    momentum,
    dampening,
    weight_decay,
    nesterov,
    first,
    penalty,
    strength,
    beta,
    block_out,
    block_in,
) -> Launch:
    arguments = {
        "param": param,
        "grad": grad.contiguous(),
        "buffer": param if momentum_buffer is None else momentum_buffer,
        "lr": float(lr),
        "momentum": float(momentum),
        "share": float(1 - dampening),
        "decay": float(weight_decay),
        "sign": float(strength),
        "HAS_BUFFER": momentum_buffer is not None,
        "FIRST": bool(first),
        "NESTEROV": bool(nesterov),
        "HAS_DECAY": weight_decay != 0,
    }
    bound = beta * strength if penalty == "hard" else lr * strength
    parts, programs = _parts(param, penalty, bound, block_out, block_in)
    return Launch(sgd_kernel, arguments | parts, programs)


def adamw_launch(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    step,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    penalty,
    strength,
    block_out,
    block_in,
) -> Launch:
    arguments = {
        "param": param,
        "grad": grad.contiguous(),
        "mean": exp_avg,
        "square": exp_avg_sq,
        "keep": float(1 - lr * weight_decay),
        "rate": float(lr / (1 - beta1**step)),
        "mean_share": float(1 - beta1),
        "square_keep": float(beta2),
        "square_share": float(1 - beta2),
        "root": math.sqrt(1 - beta2**step),
        "eps": float(eps),
    }
    parts, programs = _parts(param, penalty, lr * strength, block_out, block_in)
    return Launch(adamw_kernel, arguments | parts, programs)


def _parts(param, penalty: str, bound: float, block_out: int, block_in: int) -> tuple[dict[str, object], int]:
    """(what both kernels get, programs)."""
    rows = param.shape[0] if param.dim() else 1
    columns = param.numel() // rows
    across, group = triton.cdiv(columns, block_in), block_out * block_in
    tile = min(TILE, triton.next_power_of_2(group)) if penalty == "group_l1" else TILE
    arguments = {
        "bound": float(bound),
        "size": param.numel(),
        "rows": rows,
        "columns": columns,
        "block_out": block_out,
        "block_in": block_in,
        "across": across,
        "group": group,
        "PENALTY": penalty,
        "GROUPS": TILE // tile,
        "TILE": tile,
    }
    if penalty != "group_l1":
        return arguments, triton.cdiv(param.numel(), TILE)
    return arguments, triton.cdiv(triton.cdiv(rows, block_out) * across, TILE // tile)


@triton.jit
def weights_of(size, TILE: tl.constexpr):
    """Places of this program's weights, and which of them exist."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    return at, at < size


@triton.jit
def weights_of_groups(
    start, rows, columns, block_out, block_in, across, group, GROUPS: tl.constexpr, TILE: tl.constexpr
):
    """``[GROUPS, TILE]``: places of weights ``start ..`` of each of this program's groups, and which of them exist.
    Past the last group there are no rows."""
    number = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    k = start + tl.arange(0, TILE)
    row = (number // across * block_out)[:, None] + (k // block_in)[None, :]
    column = (number % across * block_in)[:, None] + (k % block_in)[None, :]
    inside = (k < group)[None, :] & (row < rows) & (column < columns)
    return row * columns + column, inside


@triton.jit
def sizes_of_groups(rows, columns, block_out, block_in, across, GROUPS: tl.constexpr):
    """``[GROUPS, 1]``, float64: how many weights each has; not 0 past the last."""
    number = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    height = tl.minimum(block_out, rows - number // across * block_out)
    width = tl.minimum(block_in, columns - number % across * block_in)
    return tl.maximum(height * width, 1).to(tl.float64)[:, None]


@triton.jit
def squares_of(w, inside):
    wide = tl.where(inside, w, 0.0).to(tl.float64)
    return wide * wide


@triton.jit
def shrinkage(squares, sizes, bound):
    """``[GROUPS, 1]``: what each group is multiplied by; NaN stays."""
    norm = tl.sqrt(squares)
    cut = bound * tl.sqrt(sizes)
    return tl.where(norm <= cut, 0.0, 1.0 - cut / tl.where(norm <= cut, 1.0, norm)).to(tl.float32)


@triton.jit
def shrunk(w, bound, PENALTY: tl.constexpr):
    """A penalty on single weights; NaN stays."""
    if PENALTY == "l1":
        within = tl.where(w > bound, bound, w)
        w = w - tl.where(within < -bound, -bound, within)
    elif PENALTY == "hard":
        w = tl.where(tl.abs(w) < bound, 0.0, w)
    return w


@triton.jit
def sgd_step(
    param,
    grad,
    buffer,
    at,
    inside,
    lr,
    momentum,
    share,
    decay,
    sign,
    HARD: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    WRITE: tl.constexpr,
):
    """The stepped weights; the buffer is changed where WRITE."""
    w = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DECAY:
        d += decay * w
    if HARD:
        d += tl.where(w > 0, sign, tl.where(w < 0, -sign, w))
    if HAS_BUFFER:
        b = d
        if not FIRST:
            b = momentum * tl.load(buffer + at, mask=inside, other=0.0).to(tl.float32) + share * d
        if WRITE:
            tl.store(buffer + at, b.to(buffer.dtype.element_ty), mask=inside)
        d = d + momentum * b if NESTEROV else b
    return w - lr * d


@triton.jit
def adamw_step(
    param,
    grad,
    mean,
    square,
    at,
    inside,
    keep,
    rate,
    mean_share,
    square_keep,
    square_share,
    root,
    eps,
    WRITE: tl.constexpr,
):
    """The stepped weights; mean and square are changed where WRITE."""
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
    m = before + mean_share * (g - before)
    v = square_keep * tl.load(square + at, mask=inside, other=0.0).to(tl.float32) + square_share * g * g
    if WRITE:
        tl.store(mean + at, m.to(mean.dtype.element_ty), mask=inside)
        tl.store(square + at, v.to(square.dtype.element_ty), mask=inside)
    w = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
    return keep * w - tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)


@ONE_CONFIG
@triton.jit
def sgd_kernel(
    param,
    grad,
    buffer,  # where HAS_BUFFER
    lr,
    momentum,
    share,  # of the gradient in the buffer
    decay,
    sign,
    bound,
    size,
    rows,
    columns,
    block_out,
    block_in,
    across,  # groups in a row of them
    group,  # weights of a whole one
    HAS_BUFFER: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    PENALTY: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):
    HARD: tl.constexpr = PENALTY == "hard"
    if PENALTY != "group_l1":
        at, inside = weights_of(size, TILE)
        w = sgd_step(
            *(param, grad, buffer, at, inside, lr, momentum, share, decay, sign),
            *(HARD, HAS_BUFFER, FIRST, NESTEROV, HAS_DECAY, True),
        )
        tl.store(param + at, shrunk(w, bound, PENALTY).to(param.dtype.element_ty), mask=inside)
    else:
        sizes = sizes_of_groups(rows, columns, block_out, block_in, across, GROUPS)
        squares = tl.zeros((GROUPS, TILE), tl.float64)
        for start in range(0, group, TILE):
            at, inside = weights_of_groups(start, rows, columns, block_out, block_in, across, group, GROUPS, TILE)
            w = sgd_step(
                *(param, grad, buffer, at, inside, lr, momentum, share, decay, sign),
                *(HARD, HAS_BUFFER, FIRST, NESTEROV, HAS_DECAY, False),
            )
            squares += squares_of(w, inside)
        factor = shrinkage(tl.sum(squares, 1, keep_dims=True), sizes, bound)
        for start in range(0, group, TILE):
            at, inside = weights_of_groups(start, rows, columns, block_out, block_in, across, group, GROUPS, TILE)
            w = sgd_step(
                *(param, grad, buffer, at, inside, lr, momentum, share, decay, sign),
                *(HARD, HAS_BUFFER, FIRST, NESTEROV, HAS_DECAY, True),
            )
            tl.store(param + at, (factor * w).to(param.dtype.element_ty), mask=inside)


@ONE_CONFIG
@triton.jit
def adamw_kernel(
    param,
    grad,
    mean,
    square,
    keep,  # of the weight
    rate,
    mean_share,  # of the gradient in the mean, of its square in the mean square
    square_keep,
    square_share,
    root,
    eps,
    bound,
    size,
    rows,
    columns,
    block_out,
    block_in,
    across,  # groups in a row of them
    group,  # weights of a whole one
    PENALTY: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):
    if PENALTY != "group_l1":
        at, inside = weights_of(size, TILE)
        w = adamw_step(
            *(param, grad, mean, square, at, inside),
            *(keep, rate, mean_share, square_keep, square_share, root, eps, True),
        )
        tl.store(param + at, shrunk(w, bound, PENALTY).to(param.dtype.element_ty), mask=inside)
    else:
        sizes = sizes_of_groups(rows, columns, block_out, block_in, across, GROUPS)
        squares = tl.zeros((GROUPS, TILE), tl.float64)
        for start in range(0, group, TILE):
            at, inside = weights_of_groups(start, rows, columns, block_out, block_in, across, group, GROUPS, TILE)
            w = adamw_step(
                *(param, grad, mean, square, at, inside),
                *(keep, rate, mean_share, square_keep, square_share, root, eps, False),
            )
            squares += squares_of(w, inside)
        factor = shrinkage(tl.sum(squares, 1, keep_dims=True), sizes, bound)
        for start in range(0, group, TILE):
            at, inside = weights_of_groups(start, rows, columns, block_out, block_in, across, group, GROUPS, TILE)
            w = adamw_step(
                *(param, grad, mean, square, at, inside),
                *(keep, rate, mean_share, square_keep, square_share, root, eps, True),
            )
            tl.store(param + at, (factor * w).to(param.dtype.element_ty), mask=inside)
