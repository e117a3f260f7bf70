"""Nested tensors (torch.jagged) in and out: the tokens of all sequences one after another, with their bounds."""

import torch

from compsparse_kernels.layouts.checks import describe, require

# What has no meaning, or no one meaning, for sequences of different lengths.
_REFUSED = ("attn_bias", "key_padding_mask", "cu_seqlens_q", "cu_seqlens_k")
_WANTED = "a nested tensor [B, H, tokens, width] of layout torch.jagged, as query, key and value must all be or none"


def attend(attention, query, key, value, options):
    """``attention`` over the sequences of nested tensors; its output is nested like the query."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check(name, tensor)
    for name in _REFUSED:
        require(options[name] is None, name, "None, with nested tensors", type(options[name]).__name__)
    bounds, key_bounds, value_bounds = (tensor.offsets() for tensor in (query, key, value))
    same = value_bounds is key_bounds or torch.compiler.is_compiling() or torch.equal(value_bounds, key_bounds)
    require(same, "value", "sequences as long as those of key", "others")
    options |= {"cu_seqlens_q": bounds, "cu_seqlens_k": key_bounds}
    result = attention(*(_packed(tensor) for tensor in (query, key, value)), **options)
    if not options["return_support"]:
        return _nested(result, bounds)
    out, support = result
    if options["return_support"] == "degree":
        support = _nested(support, bounds)
    return _nested(out, bounds), support


def _packed(tensor):
    """``[1, H, all tokens, width]``"""
    return tensor.transpose(1, 2).values().transpose(0, 1).unsqueeze(0)


def _nested(packed, bounds):
    values = packed.squeeze(0).transpose(0, 1)  # [all tokens, H] or [all tokens, H, width]
    return torch.nested.nested_tensor_from_jagged(values, bounds).transpose(1, 2)


def _check(name, tensor):
    if not (isinstance(tensor, torch.Tensor) and tensor.is_nested):
        require(False, name, _WANTED, describe(tensor), TypeError)
    require(tensor.layout == torch.jagged, name, _WANTED, f"one of layout {tensor.layout}", TypeError)
    require(tensor.dim() == 4, name, _WANTED, f"a {tensor.dim()}-D one")
    wanted = f"{_WANTED} (a transpose(1, 2) of [B, tokens, H, width])"
    require(tensor._ragged_idx == 2, name, wanted, "one whose tokens are not dimension 2")
    require(tensor.lengths() is None, name, "a contiguous nested tensor, without holes", "one with lengths")
