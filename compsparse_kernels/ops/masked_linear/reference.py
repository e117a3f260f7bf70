"""The meaning of the masked ops, in dense torch: any device, any dtype, differentiable. Correct first."""

import torch
import torch.nn.functional as F


def masked_linear(x, values, bias, ptr, idx, perm, out_features):
    """``x W^T + b`` with W built densely from its non-zeros; the arguments of the op of the same name."""
    entries = values if perm is None else values[perm.long()]
    weight = values.new_zeros(out_features, x.shape[1]).index_put((_rows(ptr), idx.long()), entries)
    return F.linear(x, weight, bias)


def sampled_matmul(a, b, ptr, idx):
    """The elements of ``a^T b`` that the pattern names."""
    return (a.mT @ b)[_rows(ptr), idx.long()]


def _rows(ptr):
    return torch.arange(len(ptr) - 1, device=ptr.device).repeat_interleave(ptr.diff())
