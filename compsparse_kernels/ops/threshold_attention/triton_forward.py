"""The three kernels of the forward; a program has a tile of the queries of one head.

screen   walks the visible keys: keeps of each row the largest score, decided in float64, and lists the tiles of keys
         that may hold survivors, by the largest score so far.
decide   walks these tiles: decides the support, stores it as masks of bits of the tiles that do hold survivors, and
         adds up what the weights need: the normaliser, the log-sum, the slope.
attend   walks the tiles with survivors: weights, times the values; and the support by rows, where it is wanted.

Where nothing is skipped all tiles are listed, and this is attention by tiles with two products of scores more.
"""

import triton
import triton.language as tl

from compsparse_kernels.ops.threshold_attention.triton_scores import (
    any_in_row,
    any_of,
    exact_scores,
    over,
    products,
    rows_of,
    tile_places,
    tile_scores,
    under,
    unnormalised,
    visible_range,
)
from compsparse_kernels.ops.triton_launch import MOST_REGISTERS, tuned

NONE, UNDEFINED = tl.constexpr(-1), tl.constexpr(-2)  # in place of the column of a row's largest score
DROPPED, OPEN, KEPT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CONFIGS = [
    triton.Config({}, num_warps=warps, num_stages=stages, maxnreg=MOST_REGISTERS)
    for stages in (3, 2)
    for warps in (4, 8)
]
AMD_SHARED_MEMORY = 64 * 1024  # bytes; NVIDIA's have more
AMD_WARPS = 4  # of 64 lanes, which may have 512 registers each; 8 have to make do with 256
MOST_SUMS = 32  # of the output, or numbers of the queries, that a thread holds
KEY = ["WIDTH", "VALUE_WIDTH", "BLOCK_M", "BLOCK_N", "BIAS", "RULE", "PRECISION", "queries", "keys"]


def suitable(configs: list[triton.Config], arguments: dict, shared_memory: int) -> list[triton.Config]:
    """The configurations to choose from: no thread holds too many sums, and tiles in flight fit in shared memory."""
    rows, keys, lanes = arguments["BLOCK_M"], arguments["BLOCK_N"], 32
    if shared_memory <= AMD_SHARED_MEMORY:
        configs, lanes = [one for one in configs if one.num_warps <= AMD_WARPS], 64
    wide = max(arguments["STEP"], arguments["BLOCK_V"])
    in_flight = keys * (arguments["STEP"] + arguments["BLOCK_V"]) * arguments["query"].element_size()
    fitting = [one for one in configs if one.num_stages * in_flight + rows * wide * 4 <= shared_memory]
    most = MOST_SUMS // (2 if arguments["PRECISION"] == "ieee" else 1)  # whose products hold operands in registers
    most = most // 4 if arguments.get("DROPOUT") else most  # four words of Philox for each score
    few = [one for one in fitting or configs[-1:] if rows * max(keys, wide) <= most * lanes * one.num_warps]
    return few or [max(fitting or configs, key=lambda one: one.num_warps)]


@tuned(CONFIGS, KEY, suitable)
@triton.jit
def screen_kernel(
    query, key, bias, padding, slopes, low, end, diagonal, cuts, exact_scale,
    query_norm,  # [batch, heads, queries], float32, rounded upward; and so key_norm
    key_norm,
    tiles,  # [programs, most_tiles], int32: of keys, those with candidates
    tile_count,  # [programs], int32
    top_column,  # [batch, heads, queries], int32: of the largest score
    top,  # [batch, heads, queries], float32: this score as the weights see it, that is not in float64
    batch_stride_q, head_stride_q, stride_q, batch_stride_k, head_stride_k, stride_k,
    batch_stride_b, head_stride_b, stride_b, column_stride_b, batch_stride_t, head_stride_t, stride_t,
    queries, keys, heads, group, width, most_tiles, scale, error,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr,
    RULE: tl.constexpr, WEIGHTING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i, b, h = tile_places(pid, queries, heads, BLOCK_M)
    exists = i < queries
    low_i, end_i = visible_range(i, queries, low, end)
    query += b.to(tl.int64) * batch_stride_q + h.to(tl.int64) * head_stride_q
    key += b.to(tl.int64) * batch_stride_k + (h // group).to(tl.int64) * head_stride_k
    bias += b.to(tl.int64) * batch_stride_b + h.to(tl.int64) * head_stride_b
    row = (b * heads + h).to(tl.int64) * queries + i
    norm_i = tl.load(query_norm + row, mask=exists, other=0.0)
    key_norm += (b * (heads // group) + h // group).to(tl.int64) * keys
    cut_at = b.to(tl.int64) * batch_stride_t + h.to(tl.int64) * head_stride_t + i.to(tl.int64) * stride_t
    cut = tl.load(cuts + cut_at, mask=exists, other=0.0)
    slope = tl.load(slopes + h) if ALIBI else 0.0
    wide_scale = tl.load(exact_scale)
    q = rows_of(query, i, queries, stride_q, WIDTH, BLOCK_D) if STEP == BLOCK_D else 0.0
    best = tl.full((BLOCK_M,), float("-inf"), tl.float64)
    best_column = tl.full((BLOCK_M,), NONE, tl.int32)
    top_i = tl.zeros((BLOCK_M,), tl.float32)
    undefined = best_column > 0
    count = 0
    c = tl.arange(0, BLOCK_N)
    first_tile = tl.min(tl.where(low_i < end_i, low_i, keys)) // BLOCK_N
    for tile in range(first_tile, tl.cdiv(tl.max(end_i), BLOCK_N)):
        j = tile * BLOCK_N + c
        product = products(q, query, key, i, j, queries, keys, stride_q, stride_k, WIDTH, BLOCK_D, STEP, PRECISION)
        x, e, visible = tile_scores(
            product, i, j, low_i, end_i, norm_i, queries, keys, key_norm, bias, (stride_b, column_stride_b),
            padding + b.to(tl.int64) * keys, diagonal, slope, scale, error, BIAS, PADDING, ALIBI,
        )  # fmt: skip
        undefined = undefined | any_in_row(visible & (e != e))
        most = tl.where(visible, x + e, float("-inf"))
        most = tl.where(most == most, most, float("inf"))
        enough = tl.where(undefined | (best == float("inf")), float("inf"), under(best))
        if any_of(most > enough[:, None]):
            while any_of(most > enough[:, None]):
                at = tl.argmax(most, 1)
                some = tl.max(most, 1) > enough
                column = tl.where(some, tile * BLOCK_N + at, 0)
                s = exact_scores(
                    query, key, i, column, queries, stride_q, stride_k, bias, (stride_b, column_stride_b), diagonal,
                    slope, wide_scale, width, BIAS, ALIBI,
                )  # fmt: skip
                undefined = undefined | (some & (s != s))
                better = some & (s > best)
                best = tl.where(better, s, best)
                best_column = tl.where(better, column, best_column)
                here = c[None, :] == at[:, None]
                top_i = tl.where(better, tl.sum(tl.where(here, x, 0.0), 1), top_i)
                enough = tl.where(undefined | (best == float("inf")), float("inf"), under(best))
                # What has been looked at is no more than the best, and as much of a candidate.
                most = tl.where(here & some[:, None], enough[:, None], most)
        least = under(best + cut if RULE == "relative" else cut)
        if any_of(~(most < least[:, None]) & (most > float("-inf"))):
            tl.store(tiles + pid.to(tl.int64) * most_tiles + count, tile)
            count += 1
    tl.store(tile_count + pid, count)
    tl.store(top_column + row, tl.where(undefined, UNDEFINED, best_column), mask=exists)
    tl.store(top + row, tl.where(undefined, 0.0, top_i), mask=exists)


@tuned(CONFIGS, KEY, suitable)
@triton.jit
def decide_kernel(
    query, key, bias, padding, slopes, low, end, diagonal, cuts, thresholds, exact_scale, query_norm, key_norm,
    tiles, tile_count, top_column, top,
    tile_ptr,  # [programs + 1], int64
    kept_tiles,  # [tile_ptr[-1]], int32: of each program those with survivors, and room
    kept_count,  # [programs], int32
    masks,  # [tile_ptr[-1], BLOCK_M], int32: a bit for each key
    total,  # the normaliser, float32 [batch, heads, queries], and so the rest
    log_sum,
    slope_out,
    degree,  # int64: survivors
    batch_stride_q, head_stride_q, stride_q, batch_stride_k, head_stride_k, stride_k,
    batch_stride_b, head_stride_b, stride_b, column_stride_b, batch_stride_t, head_stride_t, stride_t,
    queries, keys, heads, group, width, most_tiles, scale, error,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr,
    RULE: tl.constexpr, WEIGHTING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i, b, h = tile_places(pid, queries, heads, BLOCK_M)
    exists = i < queries
    low_i, end_i = visible_range(i, queries, low, end)
    query += b.to(tl.int64) * batch_stride_q + h.to(tl.int64) * head_stride_q
    key += b.to(tl.int64) * batch_stride_k + (h // group).to(tl.int64) * head_stride_k
    bias += b.to(tl.int64) * batch_stride_b + h.to(tl.int64) * head_stride_b
    row = (b * heads + h).to(tl.int64) * queries + i
    norm_i = tl.load(query_norm + row, mask=exists, other=0.0)
    key_norm += (b * (heads // group) + h // group).to(tl.int64) * keys
    cut_at = b.to(tl.int64) * batch_stride_t + h.to(tl.int64) * head_stride_t + i.to(tl.int64) * stride_t
    cut = tl.load(cuts + cut_at, mask=exists, other=0.0)
    threshold = tl.load(thresholds + cut_at, mask=exists, other=1.0).to(tl.float32)
    slope = tl.load(slopes + h) if ALIBI else 0.0
    wide_scale = tl.load(exact_scale)
    q = rows_of(query, i, queries, stride_q, WIDTH, BLOCK_D) if STEP == BLOCK_D else 0.0

    best_column = tl.load(top_column + row, mask=exists, other=NONE)
    undefined = best_column == UNDEFINED
    # Added up here once more, by the same code as the undecided scores: equal scores have equal bits.
    best = exact_scores(
        query, key, i, tl.maximum(best_column, 0), queries, stride_q, stride_k, bias, (stride_b, column_stride_b),
        diagonal, slope, wide_scale, width, BIAS, ALIBI,
    )  # fmt: skip
    best = tl.where(best_column < 0, float("-inf"), best)
    least = best + cut if RULE == "relative" else cut
    surely_under, surely_over = under(least), over(least)
    top_i = tl.load(top + row, mask=exists, other=0.0)
    cut_i = cut.to(tl.float32)
    sums, powers = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    number = tl.zeros((BLOCK_M,), tl.int32)
    c = tl.arange(0, BLOCK_N)
    bit = tl.full((BLOCK_N,), 1, tl.int32) << c
    tiles += pid.to(tl.int64) * most_tiles
    begin = tl.load(tile_ptr + pid)
    count = 0
    for n in range(tl.load(tile_count + pid)):
        tile = tl.load(tiles + n)
        j = tile * BLOCK_N + c
        product = products(q, query, key, i, j, queries, keys, stride_q, stride_k, WIDTH, BLOCK_D, STEP, PRECISION)
        x, e, visible = tile_scores(
            product, i, j, low_i, end_i, norm_i, queries, keys, key_norm, bias, (stride_b, column_stride_b),
            padding + b.to(tl.int64) * keys, diagonal, slope, scale, error, BIAS, PADDING, ALIBI,
        )  # fmt: skip
        # A row with undefined scores keeps exactly those.
        unsure = tl.where(undefined[:, None], ~((x - x == 0) & (e < float("inf"))), ~(x + e < surely_under[:, None]))
        sure = tl.where(undefined[:, None], e != e, x - e >= surely_over[:, None])
        verdict = tl.where(visible & unsure, tl.where(sure, KEPT, OPEN), DROPPED)
        if any_of(verdict == OPEN):
            while any_of(verdict == OPEN):
                at = tl.argmax((verdict == OPEN).to(tl.int32), 1)
                s = exact_scores(
                    query, key, i, tl.minimum(tile * BLOCK_N + at, keys - 1), queries, stride_q, stride_k, bias,
                    (stride_b, column_stride_b), diagonal, slope, wide_scale, width, BIAS, ALIBI,
                )  # fmt: skip
                yes = tl.where(undefined, s != s, (s >= least) & (s > float("-inf")))
                here = (verdict == OPEN) & (c[None, :] == at[:, None])
                verdict = tl.where(here, tl.where(yes, KEPT, DROPPED)[:, None], verdict)
        kept = verdict == KEPT
        if any_of(kept):
            u = tl.where(kept, unnormalised(x, top_i, cut_i, threshold, RULE, WEIGHTING), 0.0)
            sums += tl.sum(u, 1)
            powers += tl.sum(tl.where(kept, tl.exp(x - top_i[:, None]), 0.0), 1)
            number += tl.sum(kept.to(tl.int32), 1)
            slot = begin + count
            tl.store(masks + slot * BLOCK_M + tl.arange(0, BLOCK_M), tl.sum(tl.where(kept, bit[None, :], 0), 1))
            tl.store(kept_tiles + slot, tile)
            count += 1
    tl.store(kept_count + pid, count)
    if WEIGHTING == "softmax":
        slope_i = 0.0 / sums  # NaN stays
    elif WEIGHTING == "rectified":
        slope_i = 1.0 / sums
    else:
        slope_i = (threshold if RULE == "relative" else tl.exp(cut_i - top_i)) / sums
    tl.store(total + row, tl.where(sums == 0, 1.0, sums), mask=exists)
    power = tl.where(top_i == float("inf"), top_i, top_i + tl.log(powers))
    tl.store(log_sum + row, tl.where(number == 0, float("-inf"), power), mask=exists)
    tl.store(slope_out + row, tl.where(sums == 0, 0.0, slope_i), mask=exists)
    tl.store(degree + row, number.to(tl.int64), mask=exists)


@tuned(CONFIGS, [*KEY, "SUPPORT", "DROPOUT"], suitable)
@triton.jit
def attend_kernel(
    query, key, bias, padding, slopes, low, end, diagonal, cuts, thresholds, query_norm, key_norm,
    values,  # [batch, kv_heads, keys, VALUE_WIDTH] without what is not finite
    value,  # with it
    odd,  # [batch, kv_heads, keys], int32: whether a row differs in these
    tile_ptr, kept_tiles, kept_count, masks, top, total, out,
    row_ptr,  # of the support, where SUPPORT; and col_idx, weights
    col_idx,
    weights,
    batch_stride_q, head_stride_q, stride_q, batch_stride_k, head_stride_k, stride_k,
    batch_stride_b, head_stride_b, stride_b, column_stride_b, batch_stride_t, head_stride_t, stride_t,
    queries, keys, heads, group, scale, error, seed, dropped_below, kept_factor,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr,
    RULE: tl.constexpr, WEIGHTING: tl.constexpr, PRECISION: tl.constexpr, SUPPORT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i, b, h = tile_places(pid, queries, heads, BLOCK_M)
    exists = i < queries
    low_i, end_i = visible_range(i, queries, low, end)
    query += b.to(tl.int64) * batch_stride_q + h.to(tl.int64) * head_stride_q
    key += b.to(tl.int64) * batch_stride_k + (h // group).to(tl.int64) * head_stride_k
    bias += b.to(tl.int64) * batch_stride_b + h.to(tl.int64) * head_stride_b
    row = (b * heads + h).to(tl.int64) * queries + i
    norm_i = tl.load(query_norm + row, mask=exists, other=0.0)
    kv_head = (b * (heads // group) + h // group).to(tl.int64)
    key_norm += kv_head * keys
    odd += kv_head * keys
    values += kv_head * keys * VALUE_WIDTH
    value += kv_head * keys * VALUE_WIDTH
    cut_at = b.to(tl.int64) * batch_stride_t + h.to(tl.int64) * head_stride_t + i.to(tl.int64) * stride_t
    cut_i = tl.load(cuts + cut_at, mask=exists, other=0.0).to(tl.float32)
    threshold = tl.load(thresholds + cut_at, mask=exists, other=1.0).to(tl.float32)
    slope = tl.load(slopes + h) if ALIBI else 0.0
    q = rows_of(query, i, queries, stride_q, WIDTH, BLOCK_D) if STEP == BLOCK_D else 0.0
    top_i = tl.load(top + row, mask=exists, other=0.0)
    total_i = tl.load(total + row, mask=exists, other=1.0)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    c = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_V)
    begin = tl.load(tile_ptr + pid)
    if SUPPORT:
        # Places are counted from the first row's on: those of a program's rows fit in 32 bits.
        base = tl.load(row_ptr + (b * heads + h).to(tl.int64) * queries + pid % tl.cdiv(queries, BLOCK_M) * BLOCK_M)
        entry = (tl.load(row_ptr + row, mask=exists, other=0) - base).to(tl.int32)
        col_idx += base
        weights += base
    else:
        entry = i
    for n in range(tl.load(kept_count + pid)):
        tile = tl.load(kept_tiles + begin + n)
        j = tile * BLOCK_N + c
        product = products(q, query, key, i, j, queries, keys, stride_q, stride_k, WIDTH, BLOCK_D, STEP, PRECISION)
        x, _, _ = tile_scores(
            product, i, j, low_i, end_i, norm_i, queries, keys, key_norm, bias, (stride_b, column_stride_b),
            padding + b.to(tl.int64) * keys, diagonal, slope, scale, error, BIAS, PADDING, ALIBI,
        )  # fmt: skip
        bits = tl.load(masks + (begin + n) * BLOCK_M + tl.arange(0, BLOCK_M))
        kept = (bits[:, None] >> c[None, :]) & 1 != 0
        u = unnormalised(x, top_i, cut_i, threshold, RULE, WEIGHTING)
        w = tl.where(kept, u / total_i[:, None], 0.0)
        if SUPPORT:
            rank = tl.cumsum(kept.to(tl.int32), 1) - 1
            place = entry[:, None] + rank
            tl.store(col_idx + place, tl.broadcast_to(j[None, :], (BLOCK_M, BLOCK_N)), mask=kept)
            tl.store(weights + place, w, mask=kept)
            entry += tl.sum(kept.to(tl.int32), 1)
        if DROPOUT:
            word, _, _, _ = tl.philox(
                seed,
                tl.broadcast_to(j[None, :], (BLOCK_M, BLOCK_N)),
                tl.broadcast_to((row & 0xFFFFFFFF).to(tl.uint32)[:, None], (BLOCK_M, BLOCK_N)),
                tl.broadcast_to((row >> 32).to(tl.uint32)[:, None], (BLOCK_M, BLOCK_N)),
                tl.zeros((BLOCK_M, BLOCK_N), tl.uint32),
            )
            w = tl.where(word.to(tl.int64) >= dropped_below, w * kept_factor, 0.0)
        v = rows_of(values, j, keys, VALUE_WIDTH, VALUE_WIDTH, BLOCK_V)
        acc = tl.dot(w.to(v.dtype), v, acc, input_precision=PRECISION)
        # 0 times what is not finite would be NaN: rows of V count for those alone who keep them.
        is_odd = tl.load(odd + j, mask=j < keys, other=0)
        if tl.max(is_odd) > 0:
            for at in range(BLOCK_N):
                if tl.sum(tl.where(c == at, is_odd, 0)) > 0:
                    share = tl.sum(tl.where(c[None, :] == at, w, 0.0), 1)
                    here = tl.sum(tl.where(c[None, :] == at, kept.to(tl.int32), 0), 1) > 0
                    given = tl.load(
                        value + (tile * BLOCK_N + at).to(tl.int64) * VALUE_WIDTH + d, mask=d < VALUE_WIDTH, other=0.0
                    ).to(tl.float32)
                    wrong = ~(tl.abs(given) < float("inf"))
                    acc += tl.where(here[:, None] & wrong[None, :], share[:, None] * given[None, :], 0.0)
    at = out + row[:, None] * VALUE_WIDTH + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=exists[:, None] & (d < VALUE_WIDTH)[None, :])
