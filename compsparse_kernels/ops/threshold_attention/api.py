"""What users call: checks, then the op, inside an autograd Function only where a gradient is wanted."""

import math

import torch

from compsparse_kernels.layouts import AttentionSupport
from compsparse_kernels.layouts.checks import describe, require
from compsparse_kernels.ops.arguments import (
    autocast_to,
    autocasts,
    check_dtype,
    check_same,
    compute_dtype,
    refuse_forward_mode,
)
from compsparse_kernels.ops.backends import check_backend
from compsparse_kernels.ops.threshold_attention import contract, reference  # noqa: F401  (contract defines the ops)

_output = torch.ops.compsparse.threshold_attention.default
_support = torch.ops.compsparse.threshold_attention_support.default
_backward = torch.ops.compsparse.threshold_attention_backward.default

RULES = ("relative", "absolute")
WEIGHTS = ("softmax",)


def threshold_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    threshold: float,
    rule: str = "relative",
    weights: str = "softmax",
    attn_bias: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_support: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, AttentionSupport]:
    r"""Attention in which a query sees only the keys whose score reaches a threshold (the paper, section 5.2).

    .. math::
        s_{ij} = \mathrm{scale}\; q_i \cdot k_j + \mathrm{bias}_{ij}, \qquad
        o_i = \sum_{j \in S_i} \frac{e^{s_{ij}}}{\sum_{l \in S_i} e^{s_{il}}} v_j

    - ``rule="relative"``: :math:`S_i = \{j : s_{ij} \ge \max_l s_{il} + \log(\mathrm{threshold})\}`, the keys with at
      least ``threshold`` times the weight of the strongest, ``0 < threshold <= 1``;
    - ``rule="absolute"``: :math:`S_i = \{j : s_{ij} \ge \mathrm{threshold}\}`; it may be empty: output 0, gradient 0.

    The support is exact: that of exact arithmetic on the given numbers, but for scores within rounding of the threshold
    in double precision; keys with equal scores are kept or dropped together. All scores are computed, at the speed of a
    matrix product; everything after them, and all of the backward, costs the survivors only, and so does memory. Where
    nearly everything survives this is slower than ``F.scaled_dot_product_attention``.

    Args:
        query, key, value: ``[B, H, Tq, D]``, ``[B, Hkv, Tk, D]``, ``[B, Hkv, Tk, Dv]``, float32 or float64; any
            number of leading dimensions, as in ``F.scaled_dot_product_attention``.
        threshold: a number; with ``rule="relative"`` in (0, 1].
        rule: ``"relative"`` or ``"absolute"``.
        weights: ``"softmax"``, renormalised over the support.
        attn_bias: broadcastable to ``[B, H, Tq, Tk]``; added to the scores (dtype of ``query``, may want a gradient),
            or bool, true where a query may attend. It is read through its strides and never expanded.
        key_padding_mask: bool ``[B, Tk]``, true where a key is ignored (as in ``nn.MultiheadAttention``); ``B`` is the
            product of the dimensions before the heads.
        is_causal: query ``i`` sees the keys ``j <= i``.
        scale: of the scores; ``1 / sqrt(D)`` by default.
        enable_gqa: let ``Hkv`` be a divisor of ``H``: query head ``h`` reads key-value head ``h // (H / Hkv)``.
        return_support: return ``(out, support)`` with an :class:`AttentionSupport` (which carries no gradient).
        backend: None lets torch's dispatcher choose; ``"cpu"`` or ``"reference"`` runs that one or says why not.

    Returns:
        ``[..., H, Tq, Dv]``, differentiable once with respect to query, key, value and a float bias; the support counts
        as constant, as it is almost everywhere. A row without any key gives 0, a row with an undefined (NaN) score NaN.

    Under autocast the inputs are computed in float32 and the output has autocast's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import threshold_attention
        >>> query, key, value = (torch.randn(2, 4, 32, 16) for _ in range(3))
        >>> out, support = threshold_attention(query, key, value, threshold=0.5, return_support=True)
        >>> out.shape, support.degree.shape, support.density < 1
        (torch.Size([2, 4, 32, 16]), torch.Size([2, 4, 32]), True)
    """
    if autocasts(query):
        kwargs = {"rule": rule, "weights": weights, "key_padding_mask": key_padding_mask, "is_causal": is_causal}
        kwargs |= {"scale": scale, "enable_gqa": enable_gqa, "return_support": return_support, "backend": backend}
        return _under_autocast(query, key, value, attn_bias, threshold=threshold, **kwargs)
    _check_tensors(query, key, value, enable_gqa)
    _check_choices(threshold, rule, weights, scale)
    leading = query.shape[:-2]
    query, key, value = (_four_dimensional(tensor) for tensor in (query, key, value))
    shape = (*query.shape[:3], key.shape[2])
    attn_bias = _bias_of(attn_bias, (*leading, *shape[2:]), query)
    _check_padding(key_padding_mask, shape, query)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    arguments = (query, key, value, attn_bias, key_padding_mask, None, None, None, None, None, float(threshold), rule)
    arguments += (weights, is_causal, -1, -1, 0, scale, 0.0, 0)
    if backend is not None:
        check_backend(backend, "threshold_attention", query)
    out, *arrays = _run(arguments, return_support, backend)
    arrays = arrays[:3]
    if len(leading) != 2:
        out = out.view(*leading, *out.shape[2:])
    return (out, AttentionSupport(*arrays, shape)) if return_support else out


def _run(arguments, with_support, backend):
    """``(out,)``, or output and support; through autograd where a gradient is wanted."""
    if backend == "reference":
        if with_support:
            out, row_ptr, col_idx, weights, *_ = reference.threshold_attention_support(*arguments)
            return out, row_ptr, col_idx, weights.detach()
        return (reference.threshold_attention(*arguments),)
    refuse_forward_mode(*zip(("query", "key", "value", "attn_bias"), arguments[:4], strict=True))
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments[:4]):
        return _ThresholdAttention.apply(*arguments)
    return _support(*arguments) if with_support else (_output(*arguments),)


class _ThresholdAttention(torch.autograd.Function):
    """Keeps the support for the backward; a second derivative is refused."""

    @staticmethod
    def forward(ctx, query, key, value, attn_bias, *options):
        out, row_ptr, col_idx, weights, _, slope = _support(query, key, value, attn_bias, *options)
        ctx.save_for_backward(query, key, value, attn_bias, row_ptr, col_idx, weights, slope)
        threshold, rule, weighting, *_, scale, dropout_p, seed = options[6:]
        ctx.options = threshold, rule, weighting, scale, dropout_p, seed
        ctx.bias_shape = None if attn_bias is None else attn_bias.shape
        ctx.mark_non_differentiable(row_ptr, col_idx, weights)
        return out, row_ptr, col_idx, weights

    @staticmethod
    def backward(ctx, grad, *_):
        query, key, value, bias, row_ptr, col_idx, weights, slope = ctx.saved_tensors
        with torch.no_grad():
            support = row_ptr, col_idx, weights, slope
            *grads, score_grad, _ = _backward(grad, query, key, value, *support, *ctx.options)
            if ctx.needs_input_grad[3]:
                grads.append(_bias_grad(score_grad, row_ptr, col_idx, query.shape[:3], ctx.bias_shape))
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
            grads = _OnceDifferentiable.apply(len(grads), *grads, grad, query, key, value, bias)
        bias_grad = grads[3] if ctx.needs_input_grad[3] else None
        return *grads[:3], bias_grad, *[None] * 16


class _OnceDifferentiable(torch.autograd.Function):
    """The first ``count`` tensors, marked as functions of the rest that can't be differentiated. (torch's own
    ``once_differentiable`` sees a dependence on the incoming gradient only, and takes the inputs for constant.)"""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "threshold_attention: trying to differentiate twice what is once differentiable; backend='reference' can be"
            " differentiated again"
        )


def _bias_grad(score_grad, row_ptr, col_idx, rows_shape, bias_shape):
    """The gradient of the scores, added up where the bias was broadcast, in the order of the support."""
    rows = torch.arange(len(row_ptr) - 1, device=row_ptr.device)
    strides = [0 if size == 1 else math.prod(bias_shape[d + 1 :]) for d, size in enumerate(bias_shape)]
    _, heads, queries = rows_shape
    start = rows // (heads * queries) * strides[0] + rows // queries % heads * strides[1] + rows % queries * strides[2]
    start = start.repeat_interleave(row_ptr.diff(), output_size=len(col_idx))
    flat = score_grad.new_zeros(math.prod(bias_shape), dtype=torch.float64)  # sums may be long
    flat = flat.index_add(0, start + col_idx * strides[3], score_grad.double())
    return flat.view(bias_shape).to(score_grad.dtype)


def _under_autocast(query, key, value, attn_bias, **kwargs):
    device = query.device.type
    dtype, compute = torch.get_autocast_dtype(device), compute_dtype("threshold_attention", device)
    with torch.autocast(device, enabled=False):
        query, key, value, attn_bias = (autocast_to(compute, tensor) for tensor in (query, key, value, attn_bias))
        result = threshold_attention(query, key, value, attn_bias=attn_bias, **kwargs)
    return (result[0].to(dtype), result[1]) if kwargs["return_support"] else result.to(dtype)


def _four_dimensional(tensor):
    """``[batch, heads, tokens, width]``: the dimensions before the heads become one."""
    if tensor.dim() == 4:
        return tensor
    return tensor[(None,) * (4 - tensor.dim())] if tensor.dim() < 4 else tensor.flatten(0, -4)


def _bias_of(attn_bias, shape, query):
    """The bias with four dimensions, each of full size or 1."""
    if attn_bias is None:
        return None
    ok = isinstance(attn_bias, torch.Tensor) and attn_bias.dim() <= len(shape)
    ok = ok and all(have in (1, want) for have, want in zip(reversed(attn_bias.shape), reversed(shape), strict=False))
    if not ok:
        require(False, "attn_bias", f"tensor broadcastable to {list(shape)}", describe(attn_bias))
    if attn_bias.dtype != torch.bool:
        check_same("attn_bias", attn_bias, "query", query)
    elif attn_bias.device != query.device:
        require(False, "attn_bias", f"a tensor on {query.device}, like query", f"one on {attn_bias.device}")
    if attn_bias.dim() > 4 and any(size != 1 for size in attn_bias.shape[:-3]):
        attn_bias = attn_bias.expand(*shape[:-3], *attn_bias.shape[-3:])
    return _four_dimensional(attn_bias)


def _check_tensors(query, key, value, enable_gqa):
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        ok = isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.dim() == query.dim()
        if not ok:
            wanted = "tensor [..., heads, tokens, width]" if tensor is query else f"{query.dim()}-D tensor, like query"
            require(
                False, name, wanted, describe(tensor), ValueError if isinstance(tensor, torch.Tensor) else TypeError
            )
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


def _check_choices(threshold, rule, weights, scale):
    require(rule in RULES, "rule", f"one of {', '.join(RULES)}", repr(rule))
    require(weights in WEIGHTS, "weights", f"one of {', '.join(WEIGHTS)}", repr(weights))
    for name, number in (("threshold", threshold), ("scale", scale)):
        if number is None and name == "scale":
            continue
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        require(is_number, name, "a number", describe(number), TypeError)
        require(-math.inf < number < math.inf, name, "a finite number", number)
    if rule == "relative":
        require(0 < threshold <= 1, "threshold", "a number in (0, 1] (rule 'relative')", threshold)


def _check_padding(mask, shape, query):
    if mask is None:
        return
    wanted = (shape[0], shape[3])
    if not (isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == wanted):
        require(False, "key_padding_mask", f"bool tensor {list(wanted)}", describe(mask))
    if mask.device != query.device:
        require(False, "key_padding_mask", f"a tensor on {query.device}, like query", f"one on {mask.device}")
