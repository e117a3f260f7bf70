"""Schemas, fakes and the fallback of the masked ops. Constitution: all backends and tests change with it.

``compsparse::masked_linear``   y = x W^T + b, x [batch, in] -> y [batch, out], W in CSR
``compsparse::sampled_matmul``  values[p] = sum over n of a[n, row of p] b[n, column of p]
                                for a [batch, out], b [batch, in]

One order of a :class:`MaskLayout` comes as (ptr, idx, perm): entry p has the value ``values[perm[p]]``, or
``values[p]`` where perm is None. A sampled product is stored in the order of its entries, so it has no perm. Half
precision is summed in float32 and rounded once.
"""

import torch

from compsparse_kernels.ops.masked_linear import reference

lib = torch.library.Library("compsparse", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)

lib.define(
    "masked_linear(Tensor x, Tensor values, Tensor? bias, Tensor ptr, Tensor idx, Tensor? perm, int out_features)"
    " -> Tensor",
    tags=TAGS,
)
lib.define("sampled_matmul(Tensor a, Tensor b, Tensor ptr, Tensor idx) -> Tensor", tags=TAGS)
lib.impl("masked_linear", reference.masked_linear, "CompositeExplicitAutograd")
lib.impl("sampled_matmul", reference.sampled_matmul, "CompositeExplicitAutograd")


@torch.library.register_fake("compsparse::masked_linear", lib=lib)
def _(x, values, bias, ptr, idx, perm, out_features):
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("compsparse::sampled_matmul", lib=lib)
def _(a, b, ptr, idx):
    return a.new_empty(idx.shape[0])
