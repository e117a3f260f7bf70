"""The two kernels of the backward: work in proportion to the survivors. For a row with gradients d of its weights,

rows    one program for a row of the support: d from the rows of V that it kept, the gradients of its scores (formulas
        in reference.py), of its cut, and of its query.
keys    one program for a key, with the list of the entries that kept it, in the order of rows: the gradients of key and
        value. The lists are the support sorted by keys, made by torch.

A program gathers a few rows at a time and sums them in float32. Sums have one order, and there are no atomics. A key
that all queries keep is the work of one program.
"""

import triton
import triton.language as tl

from compsparse_kernels.ops.triton_launch import MOST_REGISTERS, tuned

CONFIGS = [triton.Config({}, num_warps=warps, num_stages=1, maxnreg=MOST_REGISTERS) for warps in (1, 2, 4)]
MOST_NUMBERS = 32  # of a tile of gathered rows, that a thread holds


def suitable(configs: list[triton.Config], arguments: dict, shared_memory: int) -> list[triton.Config]:
    """The configurations to choose from: enough registers for the sums of two tiles and for what is gathered."""
    tile = arguments["CHUNK"] * max(arguments["BLOCK_D"], arguments["BLOCK_V"])
    return [one for one in configs if tile <= MOST_NUMBERS * 32 * one.num_warps] or configs[-1:]


@triton.jit
def gathered(matrix, i, exists, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``i`` in float32, ``[entries, BLOCK]``; 0 for what does not exist."""
    d = tl.arange(0, BLOCK)
    mask = exists[:, None] & (d < WIDTH)[None, :]
    return tl.load(matrix + i.to(tl.int64)[:, None] * WIDTH + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def kept_share(column, row, seed, dropped_below, kept_factor):
    """By what dropout multiplies the weights of entries: 0, or 1 / (1 - p)."""
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, column, low, (row >> 32).to(tl.uint32), tl.zeros_like(low))
    return tl.where(word.to(tl.int64) >= dropped_below, kept_factor, 0.0)


@triton.jit
def steepness(w, slope, WEIGHTING: tl.constexpr):
    """sigma of reference.py."""
    if WEIGHTING == "shrink":
        sigma = w + slope
    elif WEIGHTING == "rectified":
        sigma = tl.zeros_like(w) + slope
    else:
        sigma = w
    return sigma


@tuned(CONFIGS, ["WIDTH", "VALUE_WIDTH", "CHUNK", "DROPOUT", "LARGEST_SHARE"], suitable)
@triton.jit
def rows_kernel(
    grad,  # [rows, VALUE_WIDTH]
    key,  # [batch, kv_heads, keys, WIDTH]
    value,  # [batch, kv_heads, keys, VALUE_WIDTH]
    row_ptr,  # [rows + 1]
    col_idx,  # [survivors]; and so weights, weight_grad (room) and score_grad
    weights,
    slopes,  # [rows]; and so cut_grad
    weight_grad,
    score_grad,
    cut_grad,
    query_grad,  # [rows, WIDTH]
    queries, keys, heads, group, scale, seed, dropped_below, kept_factor,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    WEIGHTING: tl.constexpr, LARGEST_SHARE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = row // queries
    kv_head = head // heads * (heads // group) + head % heads // group
    key += kv_head * keys * WIDTH
    value += kv_head * keys * VALUE_WIDTH
    begin, end = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    slope = tl.load(slopes + row)
    c = tl.arange(0, CHUNK)
    d = tl.arange(0, BLOCK_V)
    g = tl.load(grad + row * VALUE_WIDTH + d, mask=d < VALUE_WIDTH, other=0.0).to(tl.float32)
    center = tl.zeros((CHUNK,), tl.float32)
    largest = tl.zeros((CHUNK,), tl.float32)
    for first in range(begin, end, CHUNK):
        exists = c < end - first
        column = tl.load(col_idx + first + c, mask=exists, other=0)
        w = tl.load(weights + first + c, mask=exists, other=0.0)
        of_weight = tl.sum(gathered(value, column, exists, VALUE_WIDTH, BLOCK_V) * g[None, :], 1)
        if DROPOUT:
            of_weight *= kept_share(column, row, seed, dropped_below, kept_factor)
        tl.store(weight_grad + first + c, of_weight, mask=exists)
        center += w * of_weight
        largest = tl.maximum(largest, w)
    center = tl.sum(center, 0)
    largest = tl.max(largest, 0)
    tl.debug_barrier()  # other threads read what these have stored

    share = 0.0
    if LARGEST_SHARE:
        total = tl.zeros((CHUNK,), tl.float32)
        number = tl.zeros((CHUNK,), tl.float32)
        for first in range(begin, end, CHUNK):
            exists = c < end - first
            w = tl.load(weights + first + c, mask=exists, other=0.0)
            of_weight = tl.load(weight_grad + first + c, mask=exists, other=0.0)
            total += tl.where(exists, steepness(w, slope, WEIGHTING) * (of_weight - center), 0.0)
            number += tl.where(exists & (w == largest), 1.0, 0.0)
        share = tl.sum(total, 0) / tl.sum(number, 0)

    acc = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    centered = tl.zeros((CHUNK,), tl.float32)
    for first in range(begin, end, CHUNK):
        exists = c < end - first
        column = tl.load(col_idx + first + c, mask=exists, other=0)
        w = tl.load(weights + first + c, mask=exists, other=0.0)
        of_weight = tl.load(weight_grad + first + c, mask=exists, other=0.0) - center
        of_score = steepness(w, slope, WEIGHTING) * of_weight
        if LARGEST_SHARE:
            of_score -= tl.where(w == largest, share, 0.0)
        tl.store(score_grad + first + c, of_score, mask=exists)
        centered += tl.where(exists, of_weight, 0.0)
        k = gathered(key, column, exists, WIDTH, BLOCK_D)
        acc += tl.where(exists, of_score, 0.0)[:, None] * k
    tl.store(cut_grad + row, -slope * tl.sum(centered, 0))
    e = tl.arange(0, BLOCK_D)
    result = tl.sum(acc, 0) * scale
    tl.store(query_grad + row * WIDTH + e, result.to(query_grad.dtype.element_ty), mask=e < WIDTH)


@tuned(CONFIGS, ["WIDTH", "VALUE_WIDTH", "CHUNK", "DROPOUT"], suitable)
@triton.jit
def keys_kernel(
    grad,  # [rows, VALUE_WIDTH]
    query,  # [rows, WIDTH]
    key_ptr,  # [kv_heads of all batches * keys + 1]
    entries,  # [survivors], int64: those of each key, by rows
    entry_row,  # [survivors], int64: the row of an entry of the support; and so weights, score_grad
    weights,
    score_grad,
    key_grad,  # [kv_heads of all batches * keys, WIDTH]
    value_grad,
    keys, scale, seed, dropped_below, kept_factor,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    owner = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(key_ptr + owner), tl.load(key_ptr + owner + 1)
    c = tl.arange(0, CHUNK)
    of_key = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    of_value = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    for first in range(begin, end, CHUNK):
        exists = c < end - first
        entry = tl.load(entries + first + c, mask=exists, other=0)
        row = tl.load(entry_row + entry, mask=exists, other=0)
        w = tl.load(weights + entry, mask=exists, other=0.0)
        of_score = tl.load(score_grad + entry, mask=exists, other=0.0)
        if DROPOUT:
            column = (tl.zeros_like(entry) + owner % keys).to(tl.int32)
            w *= kept_share(column, row, seed, dropped_below, kept_factor)
        of_value += w[:, None] * gathered(grad, row, exists, VALUE_WIDTH, BLOCK_V)
        of_key += of_score[:, None] * gathered(query, row, exists, WIDTH, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    result = tl.sum(of_key, 0) * scale
    tl.store(key_grad + owner * WIDTH + d, result.to(key_grad.dtype.element_ty), mask=d < WIDTH)
    d = tl.arange(0, BLOCK_V)
    result = tl.sum(of_value, 0)
    tl.store(value_grad + owner * VALUE_WIDTH + d, result.to(value_grad.dtype.element_ty), mask=d < VALUE_WIDTH)
