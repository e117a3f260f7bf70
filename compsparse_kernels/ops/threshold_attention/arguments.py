"""The tensors that users give, checked and brought to the shapes of the op."""

import torch

from compsparse_kernels.layouts.checks import describe, require
from compsparse_kernels.ops.arguments import check_dtype, check_same, check_strided
from compsparse_kernels.ops.threshold_attention import choices, reference


def check_tensors(query, key, value, enable_gqa):
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        ok = isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.dim() == query.dim()
        if not ok:
            wanted = "tensor [..., heads, tokens, width]" if tensor is query else f"{query.dim()}-D tensor, like query"
            _refuse(name, wanted, tensor)
        check_same(name, tensor, "query", query)
    check_dtype("query", query, "threshold_attention")
    *batch, heads = query.shape[:-2] if query.dim() > 2 else (1,)
    *key_batch, kv_heads = key.shape[:-2] if key.dim() > 2 else (1,)
    if key_batch != batch:
        require(False, "key", f"leading dimensions {batch}, like query", describe(key))
    if kv_heads != heads and not (enable_gqa and kv_heads > 0 and heads % kv_heads == 0):
        wanted = f"a divisor of {heads} heads" if enable_gqa else f"{heads} heads, like query (or enable_gqa=True)"
        require(False, "key", wanted, kv_heads)
    if key.shape[-1] != query.shape[-1] or query.shape[-1] == 0:
        require(query.shape[-1] > 0, "query", "a width of at least 1", describe(query))
        require(False, "key", f"width {query.shape[-1]}, like query", describe(key))
    if value.shape[:-1] != key.shape[:-1]:
        require(False, "value", f"tensor {[*key.shape[:-1], 'any width']}, like key", describe(value))


def four_dimensional(tensor):
    """``[batch, heads, tokens, width]``: the dimensions before the heads become one."""
    if tensor.dim() == 4:
        return tensor
    return tensor[(None,) * (4 - tensor.dim())] if tensor.dim() < 4 else tensor.flatten(0, -4)


def bias_of(attn_bias, shape, query):
    """The bias with four dimensions, each of full size or 1; ``shape`` is that of the scores."""
    if attn_bias is None:
        return None
    if not _is_broadcastable(attn_bias, shape):
        require(False, "attn_bias", f"tensor broadcastable to {list(shape)}", describe(attn_bias))
    if attn_bias.dtype == torch.bool:
        _check_place("attn_bias", attn_bias, query)
    else:
        check_same("attn_bias", attn_bias, "query", query)
    return _broadcast(attn_bias, shape)


def threshold_of(threshold, shape, query, rule, weighting):
    """``(number, None)`` or ``(0.0, float64 [B or 1, H or 1, Tq or 1])``; ``shape`` is that of the scores."""
    if not (isinstance(threshold, torch.Tensor) and rule in choices.WITH_CUT):
        choices.check_threshold(threshold, rule, weighting)
        return float(threshold), None
    shape = (*shape[:-1], 1)
    heads = shape[-3] if len(shape) > 2 else 1
    _check_place("threshold", threshold, query)
    per_head = threshold.dim() == 1 and threshold.shape[0] == heads
    given = threshold.view(heads, 1, 1) if per_head and len(shape) > 2 else threshold
    wanted = f"number, or float32 or float64 tensor broadcastable to {list(shape)} or of shape [{heads}]"
    ok = threshold.dtype in (torch.float32, torch.float64) and _is_broadcastable(given, shape)
    require(ok, "threshold", wanted, describe(threshold), ValueError if threshold.is_floating_point() else TypeError)
    if weighting == "softmax" and threshold.requires_grad and torch.is_grad_enabled():
        wanted = (
            "tensor that wants no gradient (the support is piecewise constant in it, and so is the output; with"
            " shrink=True or weights='rectified' it is continuous)"
        )
        require(False, "threshold", wanted, "one with requires_grad=True")
    _check_values(threshold.detach(), rule, weighting)
    return 0.0, _broadcast(given, shape).squeeze(-1).double()


def _check_values(threshold, rule, weighting):
    if torch.compiler.is_compiling() or threshold.is_meta or threshold.numel() == 0:
        return
    if rule == "absolute":
        ok = threshold.isfinite()
    else:
        ok = (threshold > 0) & (threshold <= 1 if weighting == "softmax" else threshold < 1)
    if not ok.all():
        low, high = threshold.min().item(), threshold.max().item()
        wanted = f"values that are each {choices.wanted_threshold(rule, weighting)}"
        require(False, "threshold", wanted, f"{low:g}..{high:g}")


def check_padding(mask, batch, keys, query):
    if mask is None:
        return
    wanted = (batch, keys)
    if not (isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == wanted):
        require(False, "key_padding_mask", f"bool tensor {list(wanted)}", describe(mask))
    _check_place("key_padding_mask", mask, query)


def check_slopes(slopes, heads, query):
    if slopes is None:
        return
    ok = isinstance(slopes, torch.Tensor) and slopes.dtype == torch.float32 and slopes.shape == (heads,)
    if not ok:
        _refuse("alibi_slopes", f"float32 tensor [{heads}], one slope a head", slopes)
    _check_place("alibi_slopes", slopes, query)
    if slopes.requires_grad and torch.is_grad_enabled():
        require(False, "alibi_slopes", "tensor that wants no gradient", "one with requires_grad=True")


def sequences_of(cu_seqlens_q, cu_seqlens_k, query, key):
    """The bounds of sequences as int64 on the CPU, both or none."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return None, None
    both = (("cu_seqlens_q", cu_seqlens_q, "query", query), ("cu_seqlens_k", cu_seqlens_k, "key", key))
    bounds = []
    for name, given, other, tensor in both:
        ok = isinstance(given, torch.Tensor) and given.dim() == 1 and len(given) > 0
        if not (ok and given.dtype in (torch.int32, torch.int64)):
            wanted = "1-D int32 or int64 tensor [sequences + 1] (both or neither of cu_seqlens_q and cu_seqlens_k)"
            _refuse(name, wanted, given)
        check_strided(name, given)
        require(not given.is_meta or tensor.is_meta, name, "a tensor with data, since query has some", "one on meta")
        require(len(given) == len(cu_seqlens_q), name, f"{len(cu_seqlens_q)} bounds, like cu_seqlens_q", len(given))
        require(tensor.shape[0] == 1, other, "a batch of 1 (its tokens are those of all sequences)", tensor.shape[0])
        bounds.append(given.to("meta" if given.is_meta else "cpu", torch.int64).contiguous())
        _check_bounds(name, bounds[-1], tensor.shape[2])
    return bounds


def _check_bounds(name, bounds, tokens):
    if torch.compiler.is_compiling() or bounds.is_meta:
        return
    first, last, rises = int(bounds[0]), int(bounds[-1]), bool((bounds.diff() >= 0).all())
    came = f"{first}..{last}" if rises else f"{first}..{last}, with a fall between"
    require(first == 0 and last == tokens and rises, name, f"bounds ascending from 0 to {tokens}", came)


def check_index(index, key):
    if index is None:
        return
    wanted = reference.index_shape(key)
    if not (isinstance(index, torch.Tensor) and index.dtype == torch.uint8 and index.shape == wanted):
        _refuse("index", f"uint8 tensor {list(wanted)}, as torch.ops.compsparse.threshold_attention_index(key)", index)
    _check_place("index", index, key)


def _is_broadcastable(tensor, shape):
    ok = isinstance(tensor, torch.Tensor) and tensor.dim() <= len(shape)
    return ok and all(have in (1, want) for have, want in zip(reversed(tensor.shape), reversed(shape), strict=False))


def _broadcast(tensor, shape):
    """Four dimensions, each of full size or 1."""
    if tensor.dim() > 4 and any(size != 1 for size in tensor.shape[:-3]):
        tensor = tensor.expand(*shape[:-3], *tensor.shape[-3:])
    return four_dimensional(tensor)


def _check_place(name, tensor, other):
    check_strided(name, tensor)
    if tensor.device != other.device:
        require(False, name, f"a tensor on {other.device}, like query", f"one on {tensor.device}")


def _refuse(name, wanted, came):
    require(False, name, wanted, describe(came), ValueError if isinstance(came, torch.Tensor) else TypeError)
