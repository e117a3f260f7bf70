r"""The meaning of thresholded attention, in dense torch: any device, any dtype, differentiable. Correct first.

With the scores s of a row, its largest m, its support S, and u >= 0 on S the weights are w = u / U, U = sum u:

  softmax            u = exp(s - m)                                       slope r = 0
  shrink, relative   u = exp(s - m) - t                                   r = t / U
  shrink, absolute   u = exp(s - m) - exp(t - m)                          r = exp(t - m) / U
  rectified          u = s - m - log t (relative), s - t (absolute)       r = 1 / U
  entmax             w = relu((alpha - 1) s - tau)^(1 / (alpha - 1))      r = 0

A row where U = 0 (nothing kept, or nothing above the cut) has weights, slope and gradients 0.

With the gradients d of the weights and c = sum w d (entmax: sum sigma d / sum sigma), those of the scores on S are
sigma (d - c), where sigma = w, w + r, r, w^(2 - alpha) for softmax, shrink, rectified, entmax; that of the cut (log t
of the relative rule, t of the absolute one) is -r sum (d - c). Where u depends on m, the row's largest scores share
what makes the gradients of the row add up to 0.
"""

import math

import torch

from compsparse_kernels.ops.threshold_attention.dropout import kept_by_dropout

INDEX_PANEL = 64  # keys; of the screen's index, csrc/cpu/threshold_attention/index.h


def threshold_attention(query, key, value, *options):
    """The output alone; the arguments of the op of the same name."""
    return threshold_attention_support(query, key, value, *options)[0]


def threshold_attention_support(
    query,
    key,
    value,
    attn_bias,
    key_padding_mask,
    alibi_slopes,
    thresholds,
    cu_seqlens_q,
    cu_seqlens_k,
    index,
    threshold,
    rule,
    weighting,
    is_causal,
    window_left,
    window_right,
    query_offset,
    scale,
    dropout_p,
    seed,
):
    """Output, and the support with its weights by rows (b, h, i)."""
    dtype = sum_dtype(query)
    lengths = query.shape[2], key.shape[2]
    positions = _positions(*lengths, cu_seqlens_q, cu_seqlens_k, query_offset, query.device)
    visible = _visible(*positions, is_causal, window_left, window_right)
    key, value = key.to(dtype), value.to(dtype)
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask[:, None, None, :]
        hidden = key_padding_mask[:, None, :, None]  # may hold anything, NaN too
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    scores = scale * query.to(dtype) @ _for_each_head(key, query).mT
    scores = _biased(scores, attn_bias, alibi_slopes, positions).masked_fill(~visible, -math.inf)
    if thresholds is None:
        thresholds = torch.tensor(threshold, dtype=torch.float64, device=query.device)
    else:
        thresholds = thresholds.unsqueeze(-1)  # [B or 1, H or 1, Tq or 1, 1]
    kept = _kept(scores.detach(), thresholds.detach(), threshold, rule)
    weights, slope = _weights(scores, kept, thresholds, threshold, rule, weighting)
    row_ptr = torch.zeros(slope.numel() + 1, dtype=torch.int64, device=query.device)
    torch.cumsum(kept.sum(-1).flatten(), 0, out=row_ptr[1:])
    rows, columns = kept.flatten(0, 2).nonzero(as_tuple=True)
    log_sum = scores.detach().masked_fill(~kept, -math.inf).logsumexp(-1)
    shares = weights
    if dropout_p > 0:
        entries = _dropped(weights[kept], rows, columns, dropout_p, seed)
        shares = torch.zeros_like(weights).flatten(0, 2).index_put((rows, columns), entries).view(weights.shape)
    out = shares @ _for_each_head(value, query)
    return out.to(query.dtype), row_ptr, columns.to(torch.int32), weights[kept], log_sum, slope


def threshold_attention_backward(
    grad, query, key, value, row_ptr, col_idx, weights, slope, threshold, rule, weighting, scale, dropout_p, seed
):
    """Gradients of query, key, value, of the kept scores and of the cuts, from the support that the forward found."""
    dtype = weights.dtype
    wide_grad, wide_query = grad.to(dtype), query.to(dtype)
    shape = (*query.shape[:3], key.shape[2])
    rows = torch.arange(len(row_ptr) - 1, device=query.device).repeat_interleave(row_ptr.diff())
    kept = rows, col_idx.long()

    def row_sum(entries):  # one after another, so in float64
        sums = entries.new_zeros(len(row_ptr) - 1, dtype=torch.float64)
        return sums.index_add(0, rows, entries.double()).to(dtype)

    def spread(entries):
        return entries.new_zeros(math.prod(shape[:3]), shape[3]).index_put(kept, entries).view(shape)

    read = spread(torch.ones_like(weights)).any(2)  # [B, H, Tk]; other keys may hold anything, NaN too
    wide_key, wide_value = (
        _for_each_head(tensor.to(dtype), query).masked_fill(~read.unsqueeze(-1), 0) for tensor in (key, value)
    )
    weight_grad = (wide_grad @ wide_value.mT).flatten(0, 2)[kept]
    shares = weights
    if dropout_p > 0:
        shares = _dropped(weights, *kept, dropout_p, seed)
        weight_grad = _dropped(weight_grad, *kept, dropout_p, seed)
    if rule == "entmax":
        steepness = weights ** (2 - threshold)
        center = row_sum(steepness * weight_grad) / row_sum(steepness)
    else:
        steepness = {"softmax": weights, "shrink": weights + slope.flatten()[rows], "rectified": slope.flatten()[rows]}
        steepness = steepness[weighting]
        center = row_sum(weights * weight_grad)
    centered = weight_grad - center[rows]
    score_grad = steepness * centered
    cut_grad = (-slope.flatten() * row_sum(centered)).view(slope.shape)
    if rule == "relative" and weighting != "softmax":
        top = weights.new_zeros(len(row_ptr) - 1).scatter_reduce(0, rows, weights, "amax", include_self=False)
        largest = weights == top[rows]
        share = row_sum(score_grad) / row_sum(largest.to(dtype))
        score_grad = score_grad - share[rows] * largest
    dense_grad = spread(score_grad)
    query_grad = scale * dense_grad @ wide_key
    key_grad = _sum_of_group(scale * dense_grad.mT @ wide_query, key)
    value_grad = _sum_of_group(spread(shares).mT @ wide_grad, value)
    return query_grad.to(query.dtype), key_grad.to(key.dtype), value_grad.to(value.dtype), score_grad, cut_grad


def threshold_attention_is_dense(*arguments):
    """Never: to store the support is what the reference is for."""
    return False


def threshold_attention_bits(query, key, value, *options):
    """Output; a bit for each key kept; the largest score of each row, and the weight that it has."""
    out, row_ptr, col_idx, weights, log_sum, _ = threshold_attention_support(query, key, value, *options)
    rows = torch.arange(len(row_ptr) - 1, device=query.device).repeat_interleave(row_ptr.diff())
    bits = torch.ones_like(rows) << col_idx.long() % 64
    words = bits.new_zeros(len(row_ptr) - 1, words_for(key.shape[2]))
    words = words.index_put((rows, col_idx.long() // 64), bits, accumulate=True)
    inverse = weights.new_zeros(len(row_ptr) - 1).scatter_reduce(0, rows, weights, "amax").view(log_sum.shape)
    top = torch.where(inverse == 0, 0, log_sum + inverse.log())
    return out, words.view(*log_sum.shape, -1), top, inverse


def threshold_attention_bits_backward(grad, out, kept, top, inverse, query, key, value, *options):
    """Gradients of query, key and value, from the support computed again."""
    threshold, rule, weighting, *_, scale, dropout_p, seed = options[7:]
    _, *support, _, slope = threshold_attention_support(query, key, value, *options)
    options = threshold, rule, weighting, scale, dropout_p, seed
    return threshold_attention_backward(grad, query, key, value, *support, slope, *options)[:3]


def words_for(keys):
    """Of 64 bits, one for each key."""
    return -(-keys // 64)


def threshold_attention_index(key):
    """No index: the reference screens nothing."""
    return torch.zeros(index_shape(key), dtype=torch.uint8, device=key.device)


def threshold_attention_index_(index, key, first):
    """Nothing to write."""


def index_shape(key):
    """Panels of keys, each with codes of four numbers together, three floats a key, and three bounds in float64."""
    batch, heads, keys, width = key.shape
    numbers = INDEX_PANEL * (-(-width // 4) * 4 + 12)
    return batch, heads, -(-keys // INDEX_PANEL), numbers + 64


def sum_dtype(query):
    """What numbers of the query's dtype are summed in."""
    return torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype


def visible_keys(queries, keys, cu_seqlens_q, cu_seqlens_k, is_causal, window_left, window_right, query_offset, device):
    """Of each query the first key that it may see, and the one after the last: int64 ``[Tq]`` each."""
    first = torch.zeros(queries, dtype=torch.int64, device=device)
    end = first + keys
    position = torch.arange(queries, device=device) + query_offset
    if cu_seqlens_q is not None:
        starts, key_starts = cu_seqlens_q.to(device), cu_seqlens_k.to(device)
        sequence = torch.searchsorted(starts, torch.arange(queries, device=device), right=True) - 1
        first, end = key_starts[sequence], key_starts[sequence + 1]
        position = position - starts[sequence] + first
    last = end - 1
    if is_causal:
        last = torch.minimum(last, position)
    if window_right >= 0:
        last = torch.minimum(last, position + window_right)
    low = first if window_left < 0 else torch.maximum(first, position - window_left)
    return low, torch.maximum(low, last + 1)


def _positions(queries, keys, cu_seqlens_q, cu_seqlens_k, query_offset, device):
    """Sequence and position of each query ``[Tq, 1]`` and each key ``[Tk]``."""
    query_at, key_at = torch.arange(queries, device=device), torch.arange(keys, device=device)
    if cu_seqlens_q is None:
        return torch.zeros_like(query_at)[:, None], query_at[:, None] + query_offset, torch.zeros_like(key_at), key_at
    starts, key_starts = cu_seqlens_q.to(device), cu_seqlens_k.to(device)
    sequence = torch.searchsorted(starts, query_at, right=True) - 1
    key_sequence = torch.searchsorted(key_starts, key_at, right=True) - 1
    position = query_at - starts[sequence] + query_offset
    return sequence[:, None], position[:, None], key_sequence, key_at - key_starts[key_sequence]


def _visible(sequence, position, key_sequence, key_position, is_causal, window_left, window_right):
    """bool ``[Tq, Tk]``"""
    visible = sequence == key_sequence
    distance = key_position - position
    if is_causal:
        visible = visible & (distance <= 0)
    if window_left >= 0:
        visible = visible & (distance >= -window_left)
    if window_right >= 0:
        visible = visible & (distance <= window_right)
    return visible


def _biased(scores, attn_bias, alibi_slopes, positions):
    if attn_bias is not None and attn_bias.dtype != torch.bool:
        scores = scores + attn_bias.to(scores.dtype)
    elif attn_bias is not None:
        scores = scores.masked_fill(~attn_bias, -math.inf)
    if alibi_slopes is not None:
        _, position, _, key_position = positions
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * (position - key_position).abs()
    return scores


def _kept(scores, thresholds, threshold, rule):
    """The support. A row with undefined scores keeps exactly those, so that its output is undefined too."""
    if scores.shape[3] == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    undefined = scores.isnan()
    kept = _entmax_kept(scores, threshold) if rule == "entmax" else scores >= _cut(scores, thresholds, threshold, rule)
    kept = kept & (scores > -math.inf)
    return torch.where(undefined.any(-1, keepdim=True), undefined, kept)


def _cut(scores, thresholds, threshold, rule):
    """The score from which on a key of the row is kept."""
    if rule == "absolute":
        return thresholds.to(scores.dtype)
    if rule == "relative":
        return scores.amax(-1, keepdim=True) + thresholds.log().to(scores.dtype)
    ordered = scores.sort(-1, descending=True).values
    if rule == "topk":
        return ordered[..., min(int(threshold), scores.shape[3]) - 1].unsqueeze(-1)
    mass = ordered.softmax(-1).nan_to_num(0).cumsum(-1)
    enough = (mass >= threshold) & (threshold < 1)  # rounding may reach 1 before the last key
    fewest = torch.where(enough.any(-1), enough.int().argmax(-1), scores.shape[3] - 1)
    return ordered.gather(-1, fewest.unsqueeze(-1))


def _entmax_kept(scores, alpha):
    """Where relu((alpha - 1) s - tau) is positive: found from the scores in descending order (Peters et al.,
    "Sparse sequence-to-sequence models", 2019, algorithms 1 and 2)."""
    below = (alpha - 1) * scores
    below = below - below.amax(-1, keepdim=True)
    # The largest alone has tau = -1, so nothing at -1 or below is kept, and -2 stands for all below that.
    ordered = below.clamp(min=-2).sort(-1, descending=True).values
    ranks = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    mean = ordered.cumsum(-1) / ranks
    tau = _entmax_tau(mean, ordered.square().cumsum(-1) - ranks * mean.square(), ranks, alpha)
    size = (ordered > tau).sum(-1, keepdim=True)
    # A score of +inf is undefined here, as in softmax: it is kept and shows.
    return (below > tau.gather(-1, (size - 1).clamp(min=0))) | below.isnan()


def _entmax_tau(mean, spread, number, alpha):
    """tau of sum relu(x - tau)^(1 / (alpha - 1)) = 1 over so many numbers with this mean and sum (x - mean)^2."""
    if alpha == 2:
        return mean - 1 / number
    return mean - ((1 - spread) / number).clamp(min=0).sqrt()


def _weights(scores, kept, thresholds, threshold, rule, weighting):
    """Weights ``[B, H, Tq, Tk]`` and slopes ``[B, H, Tq]``; a row without any key has weights 0 and gradient 0."""
    if scores.shape[3] == 0:
        return scores, scores.new_zeros(scores.shape[:3])
    if rule == "entmax":
        return _entmax_weights(scores, kept, threshold), scores.new_zeros(scores.shape[:3])
    some = kept.any(-1, keepdim=True)
    top = scores.masked_fill(~kept, -math.inf).amax(-1, keepdim=True).masked_fill(~some, 0)
    relative = rule == "relative"
    if weighting == "softmax" or not relative:
        top = top.detach()
    # What is not kept is replaced before exp, so that its gradient is 0 and never NaN.
    below = (scores - top).masked_fill(~kept, 0)
    thresholds = thresholds.to(scores.dtype)
    if weighting == "rectified":
        height = below - thresholds.log() if relative else scores.masked_fill(~kept, 0) - thresholds
        slope = torch.ones_like(top)
    elif weighting == "shrink":
        slope = thresholds if relative else (thresholds - top).masked_fill(~some, 0).exp()
        height = below.exp() - slope
    else:
        height, slope = below.exp(), torch.zeros_like(top)
    height = height.masked_fill(~kept, 0)
    height = torch.where(height < 0, 0, height)  # rounding at the cut; NaN stays
    total = height.sum(-1, keepdim=True)
    slope = torch.where(total == 0, 0, slope.detach() / total.detach()).expand_as(top).squeeze(-1)
    return (height / total.masked_fill(total == 0, 1)).masked_fill(total == 0, 0), slope.contiguous()


def _entmax_weights(scores, kept, alpha):
    scaled = (alpha - 1) * scores.masked_fill(~kept, 0)
    top = scaled.detach().masked_fill(~kept, -math.inf).amax(-1, keepdim=True)
    below = (scaled - top).masked_fill(~kept, 0)
    number = kept.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
    mean = below.sum(-1, keepdim=True) / number
    spread = (below - mean).masked_fill(~kept, 0).square().sum(-1, keepdim=True)
    tau = _entmax_tau(mean, spread, number, alpha)
    above = (below - tau).masked_fill(~kept, 0)
    above = torch.where(above < 0, 0, above)  # rounding at the cut; NaN stays
    return above if alpha == 2 else above.square()


def _dropped(entries, rows, columns, dropout_p, seed):
    return entries * kept_by_dropout(rows, columns, dropout_p, seed) / (1 - dropout_p)


def _for_each_head(shared, query):
    """Key-value heads, each repeated for its group of query heads."""
    if shared.shape[1] == query.shape[1]:
        return shared
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], 1)


def _sum_of_group(per_head, shared):
    if per_head.shape == shared.shape:
        return per_head
    return per_head.unflatten(1, (shared.shape[1], -1)).sum(2)
