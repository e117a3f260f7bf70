r"""Scores of a tile of queries and keys: quickly with a bound of the error, and of single pairs in float64.

**The bound.** A tile's scores x are products of float32 sums. With n terms, an error of at most u = 2^-22 of the sum of
the terms' sizes for each addition (a tensor core truncates to 24 bits, twice for a step: twice 2^-23) and, for tf32, an
error of 2^-9 of each product (both factors lose at most 2^-10),

    |x - s| <= error |q_i| |k_j| + 8 u' (|bias| + |alibi|)  =: e,    error = |scale| ((width + 16) u + 2^-9 if tf32),

by Cauchy-Schwarz; u' = 2^-24. The 16 stand for the rounding of the scale, of the additions of bias and ALiBi, of e and
of x + e. Norms are rounded upward, and 2^-50 is added to each: so e covers underflow, is never 0 times infinity, and is
NaN only where a number of the query, the key or the bias is NaN, that is where the score is undefined for sure. Where
float32 overflows e is made infinite, no comparison holds, and the pair counts as undecided: never as dropped.

**Undecided pairs** are few. They are taken one a row at a time, and their scores added up in float64, in which products
of the given numbers are exact.
"""

import triton
import triton.language as tl


@triton.jit
def tile_places(pid, queries, heads, BLOCK_M: tl.constexpr):
    """Queries ``[BLOCK_M]`` (some may be past the last), batch and head of a program."""
    tiles = tl.cdiv(queries, BLOCK_M)
    head = pid // tiles
    return pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M), head // heads, head % heads


@triton.jit
def visible_range(i, queries, low, end):
    """First visible key of each query, and the one after the last; none for queries past the last."""
    exists = i < queries
    return tl.load(low + i, mask=exists, other=0), tl.load(end + i, mask=exists, other=0)


@triton.jit
def rows_of(matrix, i, count, stride, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``i`` of a matrix, 0 past their width; in place of rows past the last, the last."""
    d = tl.arange(0, BLOCK_D)
    at = matrix + tl.minimum(i, count - 1).to(tl.int64)[:, None] * stride + d[None, :]
    if WIDTH == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)


@triton.jit
def products(
    q, query, key, i, j, queries, keys, query_stride, key_stride,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q k^T ``[queries, keys]``. Products without tensor cores hold operands in registers: a few columns a step."""
    if STEP == BLOCK_D:
        k = rows_of(key, j, keys, key_stride, WIDTH, BLOCK_D)
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)
    acc = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    rows = query + tl.minimum(i, queries - 1).to(tl.int64)[:, None] * query_stride
    columns = key + tl.minimum(j, keys - 1).to(tl.int64)[:, None] * key_stride
    for first in range(0, BLOCK_D, STEP):
        d = first + tl.arange(0, STEP)
        inside = (d < WIDTH)[None, :]
        a = tl.load(rows + d[None, :], mask=inside, other=0.0)
        b = tl.load(columns + d[None, :], mask=inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_scores(
    product, i, j, low_i, end_i, query_norm, queries, keys, key_norm, bias, bias_strides, padding, diagonal, slope,
    scale, error, BIAS: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Scores, bounds of their errors, and what is visible: ``[queries, keys]`` each. Pointers are those of the head.

    What a bias of -inf hides is not visible, unless the product may be undefined or infinite.
    """
    exists = j < keys
    norms = tl.load(key_norm + j, mask=exists, other=0.0)
    e = error * query_norm[:, None] * norms[None, :]
    x = product * scale
    e = tl.where(x - x == 0, e, e + float("inf"))  # the bound holds where nothing overflowed; NaN stays
    visible = (j[None, :] >= low_i[:, None]) & (j[None, :] < end_i[:, None])
    if PADDING:
        visible = visible & (tl.load(padding + j, mask=exists, other=1) == 0)[None, :]
    if BIAS != "none":
        at = bias + i.to(tl.int64)[:, None] * bias_strides[0] + j.to(tl.int64)[None, :] * bias_strides[1]
        given = tl.load(at, mask=(i < queries)[:, None] & exists[None, :], other=0)
        if BIAS == "bool":
            visible = visible & (given != 0)
        else:
            given = given.to(tl.float32)
            visible = visible & ~((given == float("-inf")) & (e < float("inf")))
            x += given
            e += 4.76837158203125e-07 * tl.abs(given)  # 8 u'
    if ALIBI:
        place = tl.load(diagonal + i, mask=i < queries, other=0)
        away = slope * tl.abs(place[:, None] - j[None, :]).to(tl.float32)
        x -= away
        e += 4.76837158203125e-07 * tl.abs(away)
    return x, e, visible


@triton.jit
def exact_scores(
    query, key, i, j, queries, query_stride, key_stride, bias, bias_strides, diagonal, slope, exact_scale, width,
    BIAS: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Scores in float64 of queries ``i`` and one existing key ``j`` each, ``[queries]``."""
    CHUNK: tl.constexpr = 16  # ``width`` is no constant, so that this rare loop is not unrolled and takes few registers
    rows = query + tl.minimum(i, queries - 1).to(tl.int64)[:, None] * query_stride
    columns = key + j.to(tl.int64)[:, None] * key_stride
    total = tl.zeros((i.shape[0],), tl.float64)
    for first in range(0, width, CHUNK):
        d = first + tl.arange(0, CHUNK)
        inside = (d < width)[None, :]
        a = tl.load(rows + d[None, :], mask=inside, other=0.0).to(tl.float64)
        b = tl.load(columns + d[None, :], mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(a * b, 1)
    total *= exact_scale
    if BIAS == "float":
        at = bias + i.to(tl.int64) * bias_strides[0] + j.to(tl.int64) * bias_strides[1]
        total += tl.load(at, mask=i < queries, other=0.0).to(tl.float64)
    if ALIBI:
        place = tl.load(diagonal + i, mask=i < queries, other=0)
        total -= slope.to(tl.float64) * tl.abs(place - j).to(tl.float64)
    return total


@triton.jit
def under(number):
    """A float32 number that is certainly not over a float64 one."""
    near = number.to(tl.float32)
    near = tl.where(near > 3.4e38, 3.4e38, near)
    return near - tl.abs(near) * 2.384185791015625e-07 - 1e-37


@triton.jit
def over(number):
    """A float32 number that is certainly not under a float64 one, or NaN, which decides nothing."""
    near = number.to(tl.float32)
    return near + tl.abs(near) * 2.384185791015625e-07 + 1e-37


@triton.jit
def any_of(condition):
    return tl.max(condition.to(tl.int32)) > 0


@triton.jit
def any_in_row(condition):
    return tl.max(condition.to(tl.int32), 1) > 0


@triton.jit
def unnormalised(x, top, cut, threshold, RULE: tl.constexpr, WEIGHTING: tl.constexpr):
    """u of reference.py for scores ``x`` of the support (the others give anything)."""
    top, cut, threshold = top[:, None], cut[:, None], threshold[:, None]
    if WEIGHTING == "rectified":
        u = x - top - cut if RULE == "relative" else x - cut
    else:
        u = tl.exp(x - top)
        if WEIGHTING == "shrink":
            u -= threshold if RULE == "relative" else tl.exp(cut - top)
    return tl.where(u < 0, 0.0, u)  # rounding at the cut; NaN stays
