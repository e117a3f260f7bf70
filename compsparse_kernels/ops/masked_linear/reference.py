"""The meaning of the masked ops, in dense torch: any device, any dtype, differentiable. Correct first."""

import torch
import torch.nn.functional as F

from compsparse_kernels.layouts.nm import bits_of, group, spread, unpack_offsets


def masked_linear(x, values, bias, ptr, idx, perm, out_features):
    """``x W^T + b`` with W built densely from its non-zeros; the arguments of the op of the same name."""
    entries = values if perm is None else values[perm.long()]
    weight = values.new_zeros(out_features, x.shape[1]).index_put((_rows(ptr), idx.long()), entries)
    return F.linear(x, weight, bias)


def sampled_matmul(a, b, ptr, idx):
    """The elements of ``a^T b`` that the pattern names."""
    return (a.mT @ b)[_rows(ptr), idx.long()]


def nm_linear(x, values, bias, positions, m):
    """``x W^T + b`` with W built densely from its slots."""
    return F.linear(x, _nm_weight(values, positions, m, x.shape[1]), bias)


def nm_linear_transposed(x, values, bias, positions, m, in_features):
    """``x W + b``."""
    return F.linear(x, _nm_weight(values, positions, m, in_features).mT, bias)


def nm_sampled(a, b, positions, n, m):
    """The elements of ``a^T b`` that have a slot; 0 in slots past the last column."""
    dense = group(a.mT @ b, m)  # [out, groups, m], 0 past the last column
    return dense.gather(-1, unpack_offsets(positions, dense.shape[1], n, bits_of(m)))


def _nm_weight(values, positions, m, in_features):
    offsets = unpack_offsets(positions, *values.shape[1:], bits_of(m))
    return spread(values, offsets, m, in_features)


def _rows(ptr):
    return torch.arange(len(ptr) - 1, device=ptr.device).repeat_interleave(ptr.diff())
