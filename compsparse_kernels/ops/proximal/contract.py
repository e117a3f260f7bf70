"""Schemas, fakes and the fallback of the proximal steps. Constitution: all backends and tests change with it.

``compsparse::proximal_sgd_``    param <- prox(param - lr * direction), direction and momentum_buffer as in torch's SGD
``compsparse::proximal_adamw_``  the same with AdamW's direction, of step number ``step`` (from 1)

``penalty``: ``none``; ``l1``; ``group_l1``, over blocks ``[block_out, block_in]`` of the matrix that a parameter is, of
its first dimension against all others; ``hard`` (SGD alone), beta-LASSO. ``first``: momentum_buffer holds nothing yet.
All tensors are contiguous but for grad, and have one shape and dtype.
"""

import torch

from compsparse_kernels.ops.backends import register_triton
from compsparse_kernels.ops.proximal import reference

lib = torch.library.Library("compsparse", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)

lib.define(
    "proximal_sgd_(Tensor(a!) param, Tensor grad, Tensor(b!)? momentum_buffer, float lr, float momentum,"
    " float dampening, float weight_decay, bool nesterov, bool first, str penalty, float strength, float beta,"
    " int block_out, int block_in) -> ()",
    tags=TAGS,
)
lib.define(
    "proximal_adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, int step, float lr,"
    " float beta1, float beta2, float eps, float weight_decay, str penalty, float strength, int block_out,"
    " int block_in) -> ()",
    tags=TAGS,
)
for _op in ("proximal_sgd_", "proximal_adamw_"):
    lib.impl(_op, getattr(reference, _op), "CompositeExplicitAutograd")
    register_triton(lib, _op, f"{__package__}.triton", getattr(reference, _op))
    torch.library.register_fake(f"compsparse::{_op}", lambda *arguments: None, lib=lib)
