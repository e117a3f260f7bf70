"""Thresholded attention on GPUs: rules relative and absolute, float32, float16 and bfloat16, heads up to 256 wide.

Forward: three kernels, see triton_forward.py. Scores near a cut are decided in float64 by the rigorous bound of
triton_scores.py, so the support is that of exact arithmetic in every dtype, whatever the tiles; the weights come from
float32 sums. Backward: rows of the support for queries, and a transposed list for keys; see triton_backward.py.

No atomics; every output has one owner and one order of steps. The host waits twice for a number that sizes an
allocation: that of tiles with candidates, and that of survivors where the support is wanted.
"""

import math

import torch
import triton

from compsparse_kernels.ops.threshold_attention import reference, triton_backward, triton_forward
from compsparse_kernels.ops.threshold_attention.triton_backward import keys_kernel, rows_kernel
from compsparse_kernels.ops.threshold_attention.triton_forward import attend_kernel, decide_kernel, screen_kernel
from compsparse_kernels.ops.triton_launch import Launch, dot_precision, padded

MOST_ROWS, KEYS = 64, 32  # of a tile of scores; a mask has 32 bits
FEW_ROWS, EXACT_STEP = 32, 32  # where products are exact float32: registers hold the operands
WIDE = 128  # wider heads have as few rows
GATHERED = 1024  # numbers of the rows that a program of the backward gathers at a time
SQUEEZED = 2.0**-9  # of a product of numbers rounded to tf32


def threshold_attention(*arguments):
    """The op of the same name at key CUDA."""
    return _forward(*arguments, with_support=False)[0]


def threshold_attention_support(*arguments):
    """The op of the same name at key CUDA."""
    return _forward(*arguments, with_support=True)


def threshold_attention_backward(
    grad, query, key, value, row_ptr, col_idx, weights, slope, threshold, rule, weighting, scale, dropout_p, seed
):
    """The op of the same name at key CUDA."""
    grad, query, key, value = (tensor.contiguous() for tensor in (grad, query, key, value))
    of_query, of_key, of_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    of_score = torch.empty_like(weights)
    of_cut = weights.new_empty(query.shape[:3])
    given = gathering(query, key, value, scale, dropout_p, seed)
    support = {"row_ptr": row_ptr, "col_idx": col_idx, "weights": weights}
    if of_cut.numel():
        rows_launch(given, grad, key, value, support, slope, rule, weighting, of_score, of_cut, of_query)()
    if of_key.shape[:3].numel():
        keys_launch(given, grad, query, key, support, of_score, of_key, of_value)()
    return of_query, of_key, of_value, of_score, of_cut


def rows_launch(given, grad, key, value, support, slope, rule, weighting, of_score, of_cut, of_query) -> Launch:
    more = {
        "grad": grad,
        "key": key,
        "value": value,
        "slopes": slope.contiguous(),
        "weight_grad": torch.empty_like(of_score),
        "score_grad": of_score,
        "cut_grad": of_cut,
        "query_grad": of_query,
        "WEIGHTING": weighting,
        "LARGEST_SHARE": rule == "relative" and weighting != "softmax",
    }
    return _launch(rows_kernel, given | support | more, of_cut.numel())


def keys_launch(given, grad, query, key, support, of_score, of_key, of_value) -> Launch:
    row_ptr, col_idx = support["row_ptr"], support["col_idx"].long()
    batch, heads, queries, _ = query.shape
    _, kv_heads, keys, _ = key.shape
    entry_row = torch.arange(len(row_ptr) - 1, device=query.device)
    entry_row = entry_row.repeat_interleave(row_ptr.diff(), output_size=len(col_idx))
    head = entry_row // queries
    owner = (head // heads * kv_heads + head % heads // (heads // kv_heads)) * keys + col_idx
    owner, entries = owner.sort(stable=True)  # by rows among those of one key
    owners = batch * kv_heads * keys
    more = {
        "grad": grad,
        "query": query,
        "key_ptr": torch.searchsorted(owner, torch.arange(owners + 1, device=query.device)),
        "entries": entries,
        "entry_row": entry_row,
        "score_grad": of_score,
        "key_grad": of_key,
        "value_grad": of_value,
    }
    return _launch(keys_kernel, given | support | more, owners)


def gathering(query, key, value, scale, dropout_p, seed) -> dict[str, object]:
    width, value_width = query.shape[3], value.shape[3]
    block_d, block_v = triton.next_power_of_2(width), triton.next_power_of_2(value_width)
    return {
        "queries": query.shape[2],
        "keys": key.shape[2],
        "heads": query.shape[1],
        "group": query.shape[1] // key.shape[1],
        "scale": float(scale),
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
        "CHUNK": max(2, min(32, GATHERED // max(block_d, block_v))),
        **dropping(dropout_p, seed),
    }


def suitable(configs: list[triton.Config], arguments: dict, shared_memory: int) -> list[triton.Config]:
    """The configurations to choose from, of any of the kernels."""
    room = triton_backward if "CHUNK" in arguments else triton_forward
    return room.suitable(configs, arguments, shared_memory)


def _forward(
    query, key, value, attn_bias, key_padding_mask, alibi_slopes, thresholds, cu_seqlens_q, cu_seqlens_k, index,
    threshold, rule, weighting, is_causal, window_left, window_right, query_offset, scale, dropout_p, seed, *,
    with_support,
):  # fmt: skip
    batch, heads, queries, keys = *query.shape[:3], key.shape[2]
    rows = batch * heads * queries
    out = query.new_empty(batch, heads, queries, value.shape[3])
    made = {name: query.new_empty(batch, heads, queries, dtype=torch.float32) for name in ("log_sum", "slope_out")}
    row_ptr = torch.zeros(rows + 1, dtype=torch.int64, device=query.device)
    if rows == 0 or keys == 0:
        empty = query.new_empty(0, dtype=torch.float32)
        made["log_sum"].fill_(-math.inf), made["slope_out"].zero_()
        return out.zero_(), row_ptr, empty.to(torch.int32), empty, *made.values()
    given = scoring(
        query, key, value, attn_bias, key_padding_mask, alibi_slopes, thresholds, cu_seqlens_q, cu_seqlens_k,
        threshold, rule, weighting, is_causal, window_left, window_right, query_offset, scale,
    )  # fmt: skip
    screen = screen_launch(given)
    screen()
    found = {name: screen.arguments[name] for name in ("tiles", "tile_count", "top_column", "top")}
    decide = decide_launch(given, found, **made)
    decide()
    torch.cumsum(decide.arguments["degree"].flatten(), 0, out=row_ptr[1:])
    survivors = int(row_ptr[-1]) if with_support else 0
    col_idx = torch.empty(survivors, dtype=torch.int32, device=query.device)
    weights = query.new_empty(survivors, dtype=torch.float32)
    support = (row_ptr, col_idx, weights) if with_support else None
    attend_launch(given, decide.arguments, value, out, support, dropout_p, seed)()
    return out, row_ptr, col_idx, weights, *made.values()


def scoring(
    query, key, value, attn_bias, key_padding_mask, alibi_slopes, thresholds, cu_seqlens_q, cu_seqlens_k,
    threshold, rule, weighting, is_causal, window_left, window_right, query_offset, scale,
) -> dict[str, object]:  # fmt: skip
    """What all three kernels get: the inputs with their strides, what is visible, cuts, norms, and tiles."""
    device, lengths = query.device, (query.shape[2], key.shape[2])
    query, key = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key))
    if thresholds is None:
        thresholds = torch.full((1, 1, 1), threshold, dtype=torch.float64, device=device)
    thresholds = thresholds.contiguous()
    low, end = reference.visible_keys(
        *lengths, cu_seqlens_q, cu_seqlens_k, is_causal, window_left, window_right, query_offset, device
    )
    alibi = alibi_slopes is not None
    diagonal = _diagonal(lengths[0], cu_seqlens_q, cu_seqlens_k, query_offset, device) if alibi else low
    is_bool = attn_bias is not None and attn_bias.dtype == torch.bool
    bias = query if attn_bias is None else attn_bias.view(torch.uint8) if is_bool else attn_bias
    return {
        "query": query,
        "key": key,
        "bias": bias,
        "padding": low if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8),
        "slopes": alibi_slopes.contiguous() if alibi else low,
        "low": low.to(torch.int32),
        "end": end.to(torch.int32),
        "diagonal": diagonal.to(torch.int32),
        "cuts": thresholds.log() if rule == "relative" else thresholds,
        "thresholds": thresholds,
        "exact_scale": torch.full((1,), scale, dtype=torch.float64, device=device),
        "query_norm": _norm_above(query),
        "key_norm": _norm_above(key),
        **_strides("q", query),
        **_strides("k", key),
        **_bias_strides(attn_bias),
        **_threshold_strides(thresholds),
        "queries": lengths[0],
        "keys": lengths[1],
        "heads": query.shape[1],
        "group": query.shape[1] // key.shape[1],
        "width": query.shape[3],
        "scale": float(scale),
        "error": _error(query, scale),
        "BIAS": "none" if attn_bias is None else "bool" if is_bool else "float",
        "PADDING": key_padding_mask is not None,
        "ALIBI": alibi,
        "RULE": rule,
        "WEIGHTING": weighting,
        **_tiles(query, value.shape[3], attn_bias is not None),
    }


def screen_launch(given) -> Launch:
    programs, most = _programs(given), triton.cdiv(given["keys"], given["BLOCK_N"])
    device = given["low"].device
    results = {
        "tiles": torch.empty(programs, most, dtype=torch.int32, device=device),
        "tile_count": torch.empty(programs, dtype=torch.int32, device=device),
        "top_column": torch.empty(given["query"].shape[:3], dtype=torch.int32, device=device),
        "top": torch.empty(given["query"].shape[:3], dtype=torch.float32, device=device),
        "most_tiles": most,
    }
    return _launch(screen_kernel, given | results, programs)


def decide_launch(given, found, log_sum, slope_out) -> Launch:
    """``found``: what the screen wrote."""
    programs, device = _programs(given), given["low"].device
    tile_ptr = torch.zeros(programs + 1, dtype=torch.int64, device=device)
    torch.cumsum(found["tile_count"], 0, out=tile_ptr[1:])
    candidates = int(tile_ptr[-1])
    results = {
        "tile_ptr": tile_ptr,
        "kept_tiles": torch.empty(candidates, dtype=torch.int32, device=device),
        "kept_count": torch.empty(programs, dtype=torch.int32, device=device),
        "masks": torch.empty(candidates, given["BLOCK_M"], dtype=torch.int32, device=device),
        "total": torch.empty_like(log_sum),
        "log_sum": log_sum,
        "slope_out": slope_out,
        "degree": torch.empty(log_sum.shape, dtype=torch.int64, device=device),
        "most_tiles": found["tiles"].shape[1],
    }
    return _launch(decide_kernel, given | found | results, programs)


def attend_launch(given, decided, value, out, support, dropout_p, seed) -> Launch:
    """``decided``: the arguments of the launch before; ``support``: row_ptr, col_idx and weights, or None."""
    value = value.contiguous()
    finite = value.isfinite()
    kept = {name: decided[name] for name in ("tile_ptr", "kept_tiles", "kept_count", "masks", "top", "total")}
    row_ptr, col_idx, weights = support or (given["low"],) * 3
    more = {
        "values": value.where(finite, 0),
        "value": value,
        "odd": (~finite.all(-1)).to(torch.int32),
        "out": out,
        "row_ptr": row_ptr,
        "col_idx": col_idx,
        "weights": weights,
        "SUPPORT": support is not None,
        **dropping(dropout_p, seed),
    }
    return _launch(attend_kernel, given | kept | more, _programs(given))


def dropping(dropout_p, seed) -> dict[str, object]:
    """What the kernels need to know which weights are dropped (dropout.py)."""
    factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return {
        "seed": seed,
        "dropped_below": round(dropout_p * 2**32),
        "kept_factor": factor,
        "DROPOUT": dropout_p > 0,
    }


def _launch(kernel, given, programs) -> Launch:
    return Launch(kernel, {name: given[name] for name in kernel.arg_names}, programs)


def _programs(given) -> int:
    batch, heads, queries, _ = given["query"].shape
    return batch * heads * triton.cdiv(queries, given["BLOCK_M"])


def _tiles(query, value_width, biased) -> dict[str, object]:
    width, precision = query.shape[3], dot_precision(query.dtype)
    exact = precision == "ieee"
    block_d, block_v = padded(width), padded(value_width)
    aligned = width == block_d and value_width == block_v  # else each number has an address of its own, in registers
    wide = max(block_d, block_v) > (WIDE if aligned else WIDE // 2)
    # Each score of a bias has an address of its own.
    most_rows = FEW_ROWS if exact or wide or biased else MOST_ROWS
    return {
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
        "STEP": min(block_d, EXACT_STEP) if exact else block_d,
        "BLOCK_M": min(most_rows, padded(query.shape[2])),
        "BLOCK_N": KEYS,
        "PRECISION": precision,
    }


def _error(query, scale) -> float:
    """Of the bound of triton_scores.py, what stands before the norms."""
    unit = (query.shape[3] + 16) * 2.0**-22
    squeezed = SQUEEZED if query.dtype == torch.float32 and dot_precision(query.dtype) == "tf32" else 0.0
    return max(abs(scale), 2.0**-100) * (unit + squeezed)


def _norm_above(tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float64)
    return (norm * (1 + 2.0**-20) + 2.0**-50).float()


def _diagonal(queries, cu_seqlens_q, cu_seqlens_k, query_offset, device) -> torch.Tensor:
    """The column at which each query stands."""
    i = torch.arange(queries, device=device)
    if cu_seqlens_q is None:
        return i + query_offset
    starts, key_starts = cu_seqlens_q.to(device), cu_seqlens_k.to(device)
    sequence = torch.searchsorted(starts, i, right=True) - 1
    return i + query_offset - starts[sequence] + key_starts[sequence]


def _strides(letter, tensor) -> dict[str, int]:
    names = f"batch_stride_{letter}", f"head_stride_{letter}", f"stride_{letter}"
    return dict(zip(names, tensor.stride(), strict=False))


def _bias_strides(bias) -> dict[str, int]:
    names = "batch_stride_b", "head_stride_b", "stride_b", "column_stride_b"
    if bias is None:
        return dict.fromkeys(names, 0)
    return dict(zip(names, _broadcast_strides(bias), strict=True))


def _threshold_strides(thresholds) -> dict[str, int]:
    names = "batch_stride_t", "head_stride_t", "stride_t"
    return dict(zip(names, _broadcast_strides(thresholds), strict=True))


def _broadcast_strides(tensor) -> list[int]:
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
