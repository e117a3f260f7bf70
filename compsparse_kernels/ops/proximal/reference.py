"""The meaning of the proximal steps, in dense torch: any device, any dtype. Correct first.

Half precision is computed in float32 and rounded once, when it is stored.
"""

import math

import torch
import torch.nn.functional as F


def proximal_sgd_(
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
):
    """SGD as torch has it, then the penalty's map; the arguments of the op of the same name."""
    weight, direction = _wide(param), _wide(grad)
    if weight_decay:
        direction = direction + weight_decay * weight
    if penalty == "hard":
        direction = direction + strength * weight.sign()
    if momentum_buffer is not None:
        buffer = direction if first else momentum * _wide(momentum_buffer) + (1 - dampening) * direction
        direction = direction + momentum * buffer if nesterov else buffer
        momentum_buffer.copy_(buffer)
    bound = beta * strength if penalty == "hard" else lr * strength
    param.copy_(shrunk(weight - lr * direction, penalty, bound, (block_out, block_in)))


def proximal_adamw_(
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
):
    """AdamW as torch has it, then the penalty's map; the arguments of the op of the same name."""
    weight, slope, mean, square = (_wide(tensor) for tensor in (param, grad, exp_avg, exp_avg_sq))
    mean = mean + (1 - beta1) * (slope - mean)
    square = beta2 * square + (1 - beta2) * slope * slope
    size = square.sqrt() / math.sqrt(1 - beta2**step) + eps
    weight = (1 - lr * weight_decay) * weight - lr / (1 - beta1**step) * mean / size
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)
    param.copy_(shrunk(weight, penalty, lr * strength, (block_out, block_in)))


def shrunk(weight, penalty, bound, block_shape):
    """The proximal map of ``bound`` times the penalty, at ``weight``; NaN stays."""
    if penalty == "l1":
        return weight - weight.clamp(-bound, bound)
    if penalty == "hard":
        return weight.where(~(weight.abs() < bound), 0)
    if penalty == "group_l1" and weight.numel():
        return _shrunk_groups(weight, bound, *block_shape)
    return weight


def _shrunk_groups(weight, bound, block_out, block_in):
    """Norms in float64: no square overflows or vanishes."""
    matrix = weight.reshape(weight.shape[0] if weight.dim() else 1, -1)  # [rows, columns]
    rows, columns = matrix.shape

    def blocks_of(matrix):
        padded = F.pad(matrix, (0, -columns % block_in, 0, -rows % block_out))
        return padded.unflatten(1, (-1, block_in)).unflatten(0, (-1, block_out))  # [.., block_out, .., block_in]

    blocks = blocks_of(matrix)
    norm = torch.linalg.vector_norm(blocks, dim=(1, 3), keepdim=True, dtype=torch.float64)
    size = blocks_of(torch.ones_like(matrix)).sum((1, 3), keepdim=True, dtype=torch.float64)  # fewer in a ragged group
    cut = bound * size.sqrt()
    factor = torch.where(norm <= cut, 0, 1 - cut / norm).to(weight.dtype)
    return (blocks * factor).flatten(2).flatten(0, 1)[:rows, :columns].reshape(weight.shape)


def _wide(tensor):
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
