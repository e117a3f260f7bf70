"""Schemas, fakes and the fallback of the masked ops. Constitution: all backends and tests change with it.

``compsparse::masked_linear``         y = x W^T + b, x [batch, in] -> y [batch, out], W in CSR
``compsparse::sampled_matmul``        values[p] = sum over n of a[n, row of p] b[n, column of p]
                                      for a [batch, out], b [batch, in]
``compsparse::is_zero_outside``       is every element 0 (or -0) where the mask, bool of the same shape, has a False?
``compsparse::zero_outside_``         makes it so, in place
``compsparse::nm_linear``             y = x W^T + b, W in N:M
``compsparse::nm_linear_transposed``  y = x W + b, x [batch, out] -> y [batch, in]
``compsparse::nm_sampled``            the elements of a^T b that have a slot, values [out, groups, n]

One order of a :class:`MaskLayout` comes as (ptr, idx, perm), idx int16 or int32: entry p has the value
``values[perm[p]]``, or ``values[p]`` where perm is None. A sampled product is stored in the order of its entries, so it
has no perm. Half precision is summed in float32 and rounded once.

Of a :class:`NMLayout` come its positions and m, with values [out, groups, n]. Slots past the last column have no part
in a product, whatever is in them, and are 0 in a sampled one.
"""

import torch

from compsparse_kernels.ops.backends import register_triton
from compsparse_kernels.ops.masked_linear import reference

lib = torch.library.Library("compsparse", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)

lib.define(
    "masked_linear(Tensor x, Tensor values, Tensor? bias, Tensor ptr, Tensor idx, Tensor? perm, int out_features)"
    " -> Tensor",
    tags=TAGS,
)
lib.define("sampled_matmul(Tensor a, Tensor b, Tensor ptr, Tensor idx) -> Tensor", tags=TAGS)
lib.define("is_zero_outside(Tensor values, Tensor mask) -> bool", tags=TAGS)
lib.define("zero_outside_(Tensor(a!) values, Tensor mask) -> ()", tags=TAGS)
lib.define("nm_linear(Tensor x, Tensor values, Tensor? bias, Tensor positions, int m) -> Tensor", tags=TAGS)
lib.define(
    "nm_linear_transposed(Tensor x, Tensor values, Tensor? bias, Tensor positions, int m, int in_features) -> Tensor",
    tags=TAGS,
)
lib.define("nm_sampled(Tensor a, Tensor b, Tensor positions, int n, int m) -> Tensor", tags=TAGS)
for op in (
    "masked_linear",
    "sampled_matmul",
    "is_zero_outside",
    "zero_outside_",
    "nm_linear",
    "nm_linear_transposed",
    "nm_sampled",
):
    lib.impl(op, getattr(reference, op), "CompositeExplicitAutograd")
for op in ("nm_linear", "nm_linear_transposed", "nm_sampled"):
    register_triton(lib, op, f"{__package__}.triton", getattr(reference, op))


@torch.library.register_fake("compsparse::masked_linear", lib=lib)
def _(x, values, bias, ptr, idx, perm, out_features):
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("compsparse::sampled_matmul", lib=lib)
def _(a, b, ptr, idx):
    return a.new_empty(idx.shape[0])


@torch.library.register_fake("compsparse::zero_outside_", lib=lib)
def _(values, mask):
    return None


@torch.library.register_fake("compsparse::nm_linear", lib=lib)
def _(x, values, bias, positions, m):
    return x.new_empty(x.shape[0], values.shape[0])


@torch.library.register_fake("compsparse::nm_linear_transposed", lib=lib)
def _(x, values, bias, positions, m, in_features):
    return x.new_empty(x.shape[0], in_features)


@torch.library.register_fake("compsparse::nm_sampled", lib=lib)
def _(a, b, positions, n, m):
    return a.new_empty(a.shape[1], -(-b.shape[1] // m), n)
