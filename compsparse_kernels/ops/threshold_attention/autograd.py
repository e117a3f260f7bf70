"""Gradients of thresholded attention from the support that its forward found, or, where that would be most keys, from
scores computed again; a second derivative is refused."""

import math

import torch

from compsparse_kernels.ops.threshold_attention import contract  # noqa: F401  (defines the ops)

_support = torch.ops.compsparse.threshold_attention_support.default
_backward = torch.ops.compsparse.threshold_attention_backward.default
_is_dense = torch.ops.compsparse.threshold_attention_is_dense.default
_bits = torch.ops.compsparse.threshold_attention_bits.default
_bits_backward = torch.ops.compsparse.threshold_attention_bits_backward.default

# Places of the differentiable ones among the arguments of the op, and of all of them their number.
BIAS, THRESHOLDS, ARGUMENTS = 3, 6, 20


def attend(arguments, with_support):
    """``(out, ...)``: output, and row_ptr, col_idx, weights and log_sum of the support where it is stored.

    (What a trace would have to know of the numbers to choose, ``torch.compile`` can't: it stores the support.)
    """
    query, bias = arguments[0], arguments[BIAS]
    stored = with_support or query.device.type != "cpu" or torch.compiler.is_compiling()
    if not stored and not (bias is not None and bias.requires_grad) and _is_dense(*arguments):
        return (RecomputedAttention.apply(*arguments),)
    return ThresholdAttention.apply(*arguments)


class ThresholdAttention(torch.autograd.Function):
    """The arguments of the op; output, and row_ptr, col_idx, weights and log_sum of the support."""

    @staticmethod
    def forward(ctx, *arguments):
        out, row_ptr, col_idx, weights, log_sum, slope = _support(*arguments)
        ctx.save_for_backward(*arguments[:4], arguments[THRESHOLDS], *(row_ptr, col_idx, weights, slope))
        threshold, rule, weighting, *_, scale, dropout_p, seed = arguments[10:]
        ctx.options = threshold, rule, weighting, scale, dropout_p, seed
        ctx.mark_non_differentiable(row_ptr, col_idx, weights, log_sum)
        ctx.set_materialize_grads(False)  # zeros in place of their gradients would cost as much as the support
        return out, row_ptr, col_idx, weights, log_sum

    @staticmethod
    def backward(ctx, grad, *_):
        query, key, value, bias, thresholds, *support = ctx.saved_tensors
        grads = dict.fromkeys(range(ARGUMENTS))
        if grad is None:
            return tuple(grads.values())
        with torch.no_grad():
            *grads_of_three, score_grad, cut_grad = _backward(grad, query, key, value, *support, *ctx.options)
            grads |= enumerate(grads_of_three)
            if ctx.needs_input_grad[BIAS]:
                grads[BIAS] = _bias_grad(score_grad, *support[:2], query.shape[:3], bias)
            if ctx.needs_input_grad[THRESHOLDS]:
                grads[THRESHOLDS] = _thresholds_grad(cut_grad, thresholds, ctx.options[1])
        return _once_differentiable(grads, grad, query, key, value, bias, thresholds)


class RecomputedAttention(torch.autograd.Function):
    """The arguments of the op, softmax without dropout; the output alone.

    What a caller may change in place where the support is stored, it may change here: the output and what is not
    differentiable are copied, or not needed again, since the bits know of masks.
    """

    @staticmethod
    def forward(ctx, *arguments):
        out, *kept = _bits(*arguments)
        *inputs, bias, _, alibi_slopes, thresholds, cu_seqlens_q, cu_seqlens_k, _ = arguments[:10]
        bias = None if bias is None or bias.dtype == torch.bool else bias
        ctx.save_for_backward(out.clone(), *kept, *inputs, bias, thresholds)
        small = (alibi_slopes, cu_seqlens_q, cu_seqlens_k)
        ctx.copies = [None if tensor is None else tensor.clone() for tensor in small]
        ctx.options = arguments[10:]
        return out

    @staticmethod
    def backward(ctx, grad):
        *kept, query, key, value, bias, thresholds = ctx.saved_tensors
        alibi_slopes, *cu_seqlens = ctx.copies
        grads = dict.fromkeys(range(ARGUMENTS))
        arguments = (query, key, value, bias, None, alibi_slopes, thresholds, *cu_seqlens, None, *ctx.options)
        with torch.no_grad():
            grads |= enumerate(_bits_backward(grad, *kept, *arguments))
            if ctx.needs_input_grad[THRESHOLDS]:  # constant almost everywhere
                grads[THRESHOLDS] = torch.zeros_like(thresholds)
        return _once_differentiable(grads, grad, query, key, value, thresholds)


def _once_differentiable(grads, *of):
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
        there = [place for place, tensor in grads.items() if tensor is not None]
        marked = _OnceDifferentiable.apply(len(there), *[grads[place] for place in there], *of)
        grads |= zip(there, marked, strict=True)
    return tuple(grads.values())


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


def _bias_grad(score_grad, row_ptr, col_idx, rows_shape, bias):
    """The gradient of the scores, added up where the bias was broadcast, in the order of the support."""
    rows = torch.arange(len(row_ptr) - 1, device=row_ptr.device)
    shape = bias.shape
    strides = [0 if size == 1 else math.prod(shape[d + 1 :]) for d, size in enumerate(shape)]
    _, heads, queries = rows_shape
    start = rows // (heads * queries) * strides[0] + rows // queries % heads * strides[1] + rows % queries * strides[2]
    start = start.repeat_interleave(row_ptr.diff(), output_size=len(col_idx))
    flat = score_grad.new_zeros(math.prod(shape), dtype=torch.float64)  # sums may be long
    flat = flat.index_add(0, start + col_idx * strides[3], score_grad.double())
    return flat.view(shape).to(bias.dtype)


def _thresholds_grad(cut_grad, thresholds, rule):
    """The gradient of the cuts ``[B, H, Tq]``, added up where thresholds were broadcast. (The relative rule's cut is
    log t.) A running sum has one order, whatever the number of threads, which ``sum`` has not."""
    total = cut_grad.double()
    for dim, size in enumerate(thresholds.shape):
        if size == 1 and total.shape[dim] > 0:
            total = total.cumsum(dim).narrow(dim, total.shape[dim] - 1, 1)
    total = total.sum_to_size(thresholds.shape)  # of nothing at all
    return total / thresholds if rule == "relative" else total
