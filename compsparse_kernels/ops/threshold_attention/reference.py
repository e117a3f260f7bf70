"""The meaning of thresholded attention, in dense torch: any device, any dtype, differentiable. Correct first."""

import math

import torch


def threshold_attention(query, key, value, attn_bias, key_padding_mask, threshold, rule, is_causal, scale):
    """The output alone; the arguments of the op of the same name."""
    scores = _scores(query, key, attn_bias, key_padding_mask, is_causal, scale)
    return _softmax(scores, _kept(scores, threshold, rule)) @ _for_each_head(value, query)


def threshold_attention_support(query, key, value, attn_bias, key_padding_mask, threshold, rule, is_causal, scale):
    """Output, and the support with its weights by rows (b, h, i)."""
    scores = _scores(query, key, attn_bias, key_padding_mask, is_causal, scale)
    kept = _kept(scores, threshold, rule)
    weights = _softmax(scores, kept)
    row_ptr = torch.zeros(scores[..., 0].numel() + 1, dtype=torch.int64, device=query.device)
    torch.cumsum(kept.sum(-1).flatten(), 0, out=row_ptr[1:])
    col_idx = kept.nonzero()[:, -1].to(torch.int32)
    return weights @ _for_each_head(value, query), row_ptr, col_idx, weights[kept]


def threshold_attention_backward(grad, query, key, value, row_ptr, col_idx, weights, scale):
    """Gradients of query, key, value and of the kept scores, from the support that the forward found."""
    shape = (*query.shape[:3], key.shape[2])
    rows = torch.arange(len(row_ptr) - 1, device=query.device).repeat_interleave(row_ptr.diff())
    kept = rows * shape[3] + col_idx
    dense = weights.new_zeros(shape).flatten().index_put((kept,), weights).view(shape)
    weight_grad = grad @ _for_each_head(value, query).mT
    inner = (dense * weight_grad).flatten().index_select(0, kept)
    row_sum = inner.new_zeros(len(row_ptr) - 1).index_add(0, rows, inner)
    score_grad = inner - weights * row_sum[rows]
    dense_grad = score_grad.new_zeros(shape).flatten().index_put((kept,), score_grad).view(shape)
    query_grad = scale * dense_grad @ _for_each_head(key, query)
    key_grad, value_grad = scale * dense_grad.mT @ query, dense.mT @ grad
    return query_grad, _sum_of_group(key_grad, key), _sum_of_group(value_grad, value), score_grad


def _for_each_head(shared, query):
    """Key-value heads, each repeated for its group of query heads."""
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], 1)


def _sum_of_group(per_head, shared):
    return per_head.unflatten(1, (shared.shape[1], -1)).sum(2)


def _scores(query, key, attn_bias, key_padding_mask, is_causal, scale):
    """Scores ``[B, H, Tq, Tk]``; -inf where a mask forbids."""
    scores = scale * query @ _for_each_head(key, query).mT
    if attn_bias is not None and attn_bias.dtype != torch.bool:
        scores = scores + attn_bias
    elif attn_bias is not None:
        scores = scores.masked_fill(~attn_bias, -math.inf)
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None, :], -math.inf)
    if is_causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores


def _kept(scores, threshold, rule):
    """The support. A row with undefined scores keeps exactly those, so that its output is undefined too."""
    scores = scores.detach()
    cut = threshold
    if rule == "relative" and scores.shape[3] > 0:
        cut = scores.amax(-1, keepdim=True) + math.log(threshold)
    undefined = scores.isnan()
    return torch.where(undefined.any(-1, keepdim=True), undefined, (scores >= cut) & (scores > -math.inf))


def _softmax(scores, kept):
    """Softmax over the support; a row without any has weights 0 and gradient 0."""
    if scores.shape[3] == 0:
        return scores
    top = scores.detach().masked_fill(~kept, -math.inf).amax(-1, keepdim=True)
    top = top.masked_fill(~kept.any(-1, keepdim=True), 0)
    # What is not kept is replaced before exp, so that its gradient is 0 and never NaN.
    weights = (scores - top).masked_fill(~kept, 0).exp().masked_fill(~kept, 0)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)
