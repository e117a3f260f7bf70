"""Schemas, fakes and the fallback of the block-sparse ops. Constitution: all backends and tests change with it.

``compsparse::block_sparse_linear``    y = act(x W^T + b), x [batch, in] -> y [batch, out]
``compsparse::sampled_block_matmul``   values[s] = sum over entries e with slot s of a[:, rows(e)]^T b[:, columns(e)]
``compsparse::activated``              act(z), or grad * act'(z) where there is a gradient; gelu or silu, z [batch, out]

One order of a :class:`BlockLayout` comes as (ptr, idx, slot). ``transposed``: values are stored [block_in, block_out].
"""

import torch

from compsparse_kernels.ops.backends import register_triton
from compsparse_kernels.ops.block_sparse_linear import reference

lib = torch.library.Library("compsparse", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)

lib.define(
    "block_sparse_linear(Tensor x, Tensor values, Tensor? bias, Tensor ptr, Tensor idx, Tensor slot,"
    " int out_features, bool transposed, str activation) -> Tensor",
    tags=TAGS,
)
lib.define(
    "sampled_block_matmul(Tensor a, Tensor b, Tensor ptr, Tensor idx, Tensor slot, int num_slots, bool shared,"
    " int block_out, int block_in) -> Tensor",
    tags=TAGS,
)
lib.define("activated(Tensor z, Tensor? grad, str activation) -> Tensor", tags=TAGS)
lib.impl("activated", reference.activated, "CompositeExplicitAutograd")
lib.impl("block_sparse_linear", reference.block_sparse_linear, "CompositeExplicitAutograd")
lib.impl("sampled_block_matmul", reference.sampled_block_matmul, "CompositeExplicitAutograd")
for _op in ("block_sparse_linear", "sampled_block_matmul"):
    register_triton(lib, _op, f"{__package__}.triton", getattr(reference, _op))


@torch.library.register_fake("compsparse::block_sparse_linear", lib=lib)
def _(x, values, bias, ptr, idx, slot, out_features, transposed, activation):
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("compsparse::sampled_block_matmul", lib=lib)
def _(a, b, ptr, idx, slot, num_slots, shared, block_out, block_in):
    return a.new_empty(num_slots, block_out, block_in)


@torch.library.register_fake("compsparse::activated", lib=lib)
def _(z, grad, activation):
    return z.new_empty(z.shape)
