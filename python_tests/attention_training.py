"""What the tests of attention's training share: inputs of which many keys are kept, and the way that a call takes."""

import torch

from compsparse_kernels import threshold_attention
from compsparse_kernels.testing import attention_inputs
from python_tests.attention import loss_of

KEEP = {"threshold": 1e-3}  # of scores like `many_kept` a good part


def many_kept(*sizes, dtype=torch.float32, **options):
    """Inputs whose scores lie close together: with KEEP most keys of a row are kept, and some are not."""
    query, key, value = attention_inputs(*sizes, dtype=dtype, **options)
    return [(query * 0.9).detach(), key, value]


def way_of(out):
    return out.grad_fn.name().removesuffix("AttentionBackward")


def leaves_of(tensors):
    return [tensor.detach().requires_grad_() for tensor in tensors]


def train(tensors, bias=None, way="Recomputed", **options):
    """Output and gradients of the loss that ``run`` has, by the way that is expected."""
    leaves = leaves_of(tensors)
    out = threshold_attention(*leaves, attn_bias=bias, **options)
    out = out[0] if options.get("return_support") else out
    assert way_of(out) == way
    return out.detach(), *torch.autograd.grad(out, leaves, loss_of(out))
