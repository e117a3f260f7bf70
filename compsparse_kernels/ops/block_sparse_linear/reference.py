"""The meaning of the block-sparse ops, in dense torch: any device, any dtype, differentiable. Correct first."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def block_sparse_linear(x, values, bias, ptr, idx, slot, out_features, transposed, activation):
    """``act(x W^T + b)`` with W built densely from its blocks; the arguments of the op of the same name."""
    weight = _dense(values.mT if transposed else values, ptr, idx, slot, out_features, x.shape[1])
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def sampled_block_matmul(a, b, ptr, idx, slot, num_slots, shared, block_out, block_in):
    """The blocks of ``a^T b`` that the pattern names, added up over entries that share a slot."""
    rows, columns = len(ptr) - 1, -(-b.shape[1] // block_in)
    dense = F.pad(a.mT @ b, (0, columns * block_in - b.shape[1], 0, rows * block_out - a.shape[1]))
    blocks = dense.view(rows, block_out, columns, block_in).transpose(1, 2)
    entries = blocks[_rows(ptr), idx.long()]
    return entries.new_zeros(num_slots, block_out, block_in).index_add(0, slot.long(), entries)


def activated(z, grad, activation):
    """``act(z)``, or ``grad * act'(z)``."""
    if grad is None:
        return ACTIVATIONS[activation](z).contiguous()
    backward = {"gelu": torch.ops.aten.gelu_backward, "silu": torch.ops.aten.silu_backward}[activation]
    return backward(grad, z).contiguous()


def _rows(ptr):
    return torch.arange(len(ptr) - 1, device=ptr.device).repeat_interleave(ptr.diff())


def _dense(values, ptr, idx, slot, out_features, in_features):
    _, block_out, block_in = values.shape
    rows, columns = len(ptr) - 1, -(-in_features // block_in)
    blocks = values.new_zeros(rows, columns, block_out, block_in)
    blocks = blocks.index_put((_rows(ptr), idx.long()), values[slot.long()])
    dense = blocks.transpose(1, 2).reshape(rows * block_out, columns * block_in)
    return dense[:out_features, :in_features]
