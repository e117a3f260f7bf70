"""Triton kernels of N:M products, for CUDA and ROCm: float32, float16 and bfloat16, accumulation in float32.

product   one program owns a tile of y. It walks the groups of its rows of the weight; or, for a product with the
          transposed weight, the rows of the weight, in the groups whose columns it owns.
sampled   one program owns the slots of a tile of the weight. It walks the batch, and keeps what has a slot.

The weight is read packed. A step makes a tile of it dense in registers, as each slot's position is compared with the
columns of its group; tensor cores then multiply as for a dense weight. What is saved is memory traffic: n of m numbers
and their positions are read. So this pays where a product waits for the weight, that is with few rows in the batch.

Every output has one owner and one order of steps, and there are no atomics: results are the same run to run. Groups
whose size is no power of two are padded in registers, never in memory.
"""

import triton
import triton.language as tl

from compsparse_kernels.layouts.nm import bits_of
from compsparse_kernels.ops import triton_launch
from compsparse_kernels.ops.triton_launch import (
    CONFIGS,
    ENOUGH_PROGRAMS,
    LEAST_TILE,
    Launch,
    Tile,
    dot_precision,
    padded,
    step_of,
    tuned,
)

LARGEST_SIDE, LEAST_SIDE = 64, 32  # of a tile of the weight, but for groups that are longer
LARGEST_TILE = LARGEST_SIDE**2  # numbers of it, or of a tile of y
MOST_NUMBERS = 64  # of a tile of the weight, that a thread holds; and half as many sums
AT_ONCE = (1, 2, 4, 8)  # slots of a group: what a thread reads with one load


def nm_linear(x, values, bias, positions, m):
    """The op of the same name at key CUDA."""
    y = x.new_empty(x.shape[0], values.shape[0])
    if y.numel():
        product_launch(x, values, bias, positions, m, False, y)()
    return y


def nm_linear_transposed(x, values, bias, positions, m, in_features):
    """The op of the same name at key CUDA."""
    y = x.new_empty(x.shape[0], in_features)
    if y.numel():
        product_launch(x, values, bias, positions, m, True, y)()
    return y


def nm_sampled(a, b, positions, n, m):
    """The op of the same name at key CUDA."""
    values = a.new_empty(a.shape[1], triton.cdiv(b.shape[1], m), n)
    if values.numel():
        sampled_launch(a, b, positions, m, values)()
    return values


def product_launch(x, values, bias, positions, m, transposed, y) -> Launch:
    """How ``y = x W^T + b``, or ``y = x W + b`` where ``transposed``, is launched."""
    batch, step = x.shape[0], step_of(x.dtype)
    tile_batch = min(LARGEST_SIDE, padded(batch))
    side = LARGEST_SIDE  # of the tile along a row of y
    while triton.cdiv(batch, tile_batch) * triton.cdiv(y.shape[1], side) < ENOUGH_PROGRAMS:
        if tile_batch > LEAST_TILE:
            tile_batch //= 2
        elif side > LEAST_SIDE:
            side //= 2
        else:
            break
    in_features, rows, columns = (y.shape[1], step, side) if transposed else (x.shape[1], side, step)
    weight = _weight(positions, values.shape, m, in_features, rows, columns)
    if transposed:
        tile_batch = min(tile_batch, LARGEST_TILE // (weight["GROUPS"] * weight["TILE_M"]))
    tiles = triton.cdiv(y.shape[1], weight["GROUPS"] * m if transposed else weight["TILE_OUT"])
    arguments = {
        "x": x.contiguous(),
        "values": values.contiguous(),
        "bias": x if bias is None else bias.contiguous(),
        "y": y,
        "batch": batch,
        "TILE_BATCH": tile_batch,
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias is not None,
        "PRECISION": dot_precision(x.dtype),
    }
    return Launch(product_kernel, arguments | weight, tiles * triton.cdiv(batch, tile_batch))


def sampled_launch(a, b, positions, m, values) -> Launch:
    """How the slots of ``a^T b`` are launched."""
    weight = _weight(positions, values.shape, m, b.shape[1], LARGEST_SIDE, LARGEST_SIDE)
    tile_batch = step_of(a.dtype)
    arguments = {
        "a": a.contiguous(),
        "b": b.contiguous(),
        "values": values,
        "batch": a.shape[0],
        "TILE_BATCH": tile_batch,
        "EVEN_BATCH": a.shape[0] % tile_batch == 0,
        "PRECISION": dot_precision(a.dtype),
    }
    programs = triton.cdiv(values.shape[0], weight["TILE_OUT"]) * triton.cdiv(values.shape[1], weight["GROUPS"])
    return Launch(sampled_kernel, arguments | weight, programs)


def _weight(positions, shape, m: int, in_features: int, most_rows: int, columns: int) -> dict[str, object]:
    """What the kernels get of the weight, and the tile of it that is dense at a time: at most so many rows, and groups
    with so many columns, or one longer group."""
    out_features, groups, n = shape
    tile_m = triton.next_power_of_2(m)
    tile_groups = max(columns, LEAST_TILE, tile_m) // tile_m
    tile_out = min(most_rows, padded(out_features), LARGEST_TILE // (tile_groups * tile_m))
    even = n in AT_ONCE and m == tile_m and tile_groups * n * bits_of(m) % 8 == 0
    return {
        "positions": positions,
        "row_bytes": positions.shape[1],
        "out_features": out_features,
        "in_features": in_features,
        "groups": groups,
        "N": n,
        "M": m,
        "BITS": bits_of(m),
        "TILE_M": tile_m,
        "GROUPS": tile_groups,
        "TILE_OUT": tile_out,
        "EVEN": even and in_features % (tile_groups * m) == 0 and out_features % tile_out == 0,
    }


def suitable(configs: list[triton.Config], arguments: dict, shared_memory: int) -> list[triton.Config]:
    """The configurations to choose from, of a product or of a sampled one."""
    batch, out, columns = arguments["TILE_BATCH"], arguments["TILE_OUT"], arguments["GROUPS"] * arguments["TILE_M"]
    if "a" in arguments:
        sides, size = (out, columns, batch), arguments["a"].element_size()
    else:
        sides = (batch, columns, out) if arguments["TRANSPOSED"] else (batch, out, columns)
        size = arguments["x"].element_size()
    most = MOST_NUMBERS if arguments["EVEN"] else MOST_NUMBERS // 4  # masks and addresses take the other registers
    configs = [one for one in configs if out * columns <= most * 32 * one.num_warps] or configs[-1:]
    tile = Tile(*sides, size, most // 2, arguments["PRECISION"] == "ieee")
    return triton_launch.suitable(configs, tile, shared_memory)


@triton.jit
def slot_offset(positions, o, slot, row_bytes, exists, BITS: tl.constexpr):
    """Where in its group slot ``slot`` [groups] of row ``o`` [rows] lies, int32 [rows, groups]."""
    at = positions + o.to(tl.int64)[:, None] * row_bytes + (slot // (8 // BITS))[None, :]
    byte = tl.load(at, mask=exists, other=0).to(tl.int32)
    return (byte >> (slot % (8 // BITS) * BITS)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def slot_by_slot(
    values, positions, o, g, out_features, groups, row_bytes, N: tl.constexpr, BITS: tl.constexpr, TILE_M: tl.constexpr
):
    """``[rows, groups, TILE_M]`` of any pattern, 0 where there is no slot."""
    exists = (o < out_features)[:, None] & (g < groups)[None, :]
    c = tl.arange(0, TILE_M)
    w = tl.zeros((o.shape[0], g.shape[0], TILE_M), values.dtype.element_ty)
    for s in range(N):
        slot = g * N + s
        value = tl.load(values + o.to(tl.int64)[:, None] * (groups * N) + slot[None, :], mask=exists, other=0.0)
        offset = slot_offset(positions, o, slot, row_bytes, exists, BITS)
        w = tl.where(offset[:, :, None] == c[None, None, :], value[:, :, None], w)
    return w


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def at_once(
    values, positions, o, group, groups, row_bytes, N: tl.constexpr, BITS: tl.constexpr,
    TILE_M: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The same, as bits, of the groups from ``group`` on: all of them exist, and their slots fill whole bytes. Numbers
    and positions are read as they lie in memory."""
    ROWS: tl.constexpr = o.shape[0]
    BYTES: tl.constexpr = GROUPS * N * BITS // 8
    slots = group * N + tl.arange(0, GROUPS * N)
    value = tl.load(values + o.to(tl.int64)[:, None] * (groups * N) + slots[None, :])
    bytes = group * (N * BITS) // 8 + tl.arange(0, BYTES)
    byte = tl.load(positions + o.to(tl.int64)[:, None] * row_bytes + bytes[None, :]).to(tl.int32)
    fields = (byte[:, :, None] >> (tl.arange(0, 8 // BITS) * BITS)[None, None, :]) & ((1 << BITS) - 1)
    offset = tl.reshape(fields, (ROWS, GROUPS, N, 1))
    number = tl.reshape(
        value.to(tl.int16 if value.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True), (ROWS, GROUPS, N, 1)
    )
    # At most one slot of a group is in a column: its bits, or none.
    return tl.reduce(tl.where(offset == tl.arange(0, TILE_M)[None, None, None, :], number, 0), 2, either)


@triton.jit
def dense_tile(
    values,
    positions,
    o,
    group,
    out_features,
    in_features,
    groups,
    row_bytes,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    TILE_M: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows ``o`` of the weight, at the columns of the groups from ``group`` on: ``[rows, GROUPS * TILE_M]``."""
    # An operand that is nothing but another shape of what was computed breaks Triton's layouts of tf32 on sm_90, so the
    # shape changes one operation earlier.
    if EVEN:
        bits = at_once(values, positions, o, group, groups, row_bytes, N, BITS, TILE_M, GROUPS)
        return tl.reshape(bits, (o.shape[0], GROUPS * TILE_M)).to(values.dtype.element_ty, bitcast=True)
    g = group + tl.arange(0, GROUPS)
    w = slot_by_slot(values, positions, o, g, out_features, groups, row_bytes, N, BITS, TILE_M)
    inside = columns_of(group, M, TILE_M, GROUPS) < in_features  # slots past the last column count as 0
    return tl.where(inside[None, :], tl.reshape(w, (o.shape[0], GROUPS * TILE_M)), 0.0)


@triton.jit
def columns_of(group, M: tl.constexpr, TILE_M: tl.constexpr, GROUPS: tl.constexpr):
    """``[GROUPS * TILE_M]``: the columns of the groups from ``group`` on; a large number for those of the padding."""
    if M == TILE_M:
        return group * M + tl.arange(0, GROUPS * TILE_M)  # known to be contiguous
    c = tl.arange(0, TILE_M)
    column = (group + tl.arange(0, GROUPS))[:, None] * M + tl.where(c < M, c, 2**30)[None, :]
    return tl.reshape(column, (GROUPS * TILE_M,))


@tuned(
    CONFIGS,
    ["N", "M", "GROUPS", "TILE_BATCH", "TILE_OUT", "EVEN", "TRANSPOSED", "PRECISION", "in_features", "out_features"],
    suitable,
)
@triton.jit
def product_kernel(
    x,  # [batch, in_features], or [batch, out_features] where TRANSPOSED
    values,  # [out_features, groups, N]
    positions,  # [out_features, row_bytes], uint8
    bias,  # of a row of y, where HAS_BIAS
    y,  # [batch, out_features], or [batch, in_features] where TRANSPOSED
    batch,
    row_bytes,
    out_features,
    in_features,
    groups,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    TILE_M: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    EVEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tiles of the batch are next to each other, so that the weight is read once from memory.
    pid = tl.program_id(0)
    tiles = tl.cdiv(batch, TILE_BATCH)
    n = pid % tiles * TILE_BATCH + tl.arange(0, TILE_BATCH)
    mine = pid // tiles
    o = tl.arange(0, TILE_OUT)
    existing = tl.minimum(n, batch - 1).to(tl.int64)[:, None]  # what is past the batch is not stored
    if TRANSPOSED:
        acc = tl.zeros((TILE_BATCH, GROUPS * TILE_M), tl.float32)
        for first in range(0, out_features, TILE_OUT):
            row = first + o
            at = x + existing * out_features + row[None, :]
            a = tl.load(at) if EVEN else tl.load(at, mask=(row < out_features)[None, :], other=0.0)
            w = dense_tile(
                values, positions, row, mine * GROUPS, out_features, in_features, groups, row_bytes,
                N, M, BITS, TILE_M, GROUPS, EVEN,
            )  # fmt: skip
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        column = columns_of(mine * GROUPS, M, TILE_M, GROUPS)
        columns = in_features
    else:
        o += mine * TILE_OUT
        acc = tl.zeros((TILE_BATCH, TILE_OUT), tl.float32)
        for first in range(0, groups, GROUPS):
            column = columns_of(first, M, TILE_M, GROUPS)
            at = x + existing * in_features + column[None, :]
            a = tl.load(at) if EVEN else tl.load(at, mask=(column < in_features)[None, :], other=0.0)
            w = dense_tile(
                values, positions, o, first, out_features, in_features, groups, row_bytes,
                N, M, BITS, TILE_M, GROUPS, EVEN,
            )  # fmt: skip
            acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
        column = o
        columns = out_features

    stored = column < columns
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=stored, other=0.0).to(tl.float32)[None, :]
    tile = y + n.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(tile, acc.to(y.dtype.element_ty), mask=(n < batch)[:, None] & stored[None, :])


@tuned(
    CONFIGS,
    ["N", "M", "TILE_OUT", "EVEN", "EVEN_BATCH", "PRECISION", "in_features", "out_features"],
    suitable,
)
@triton.jit
def sampled_kernel(
    a,  # [batch, out_features]
    b,  # [batch, in_features]
    values,  # [out_features, groups, N]
    positions,  # [out_features, row_bytes], uint8
    batch,
    row_bytes,
    out_features,
    in_features,
    groups,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    TILE_M: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(out_features, TILE_OUT)
    o = pid % tiles * TILE_OUT + tl.arange(0, TILE_OUT)
    group = pid // tiles * GROUPS
    column = columns_of(group, M, TILE_M, GROUPS)
    n = tl.arange(0, TILE_BATCH)
    acc = tl.zeros((TILE_OUT, GROUPS * TILE_M), tl.float32)
    for start in range(0, batch, TILE_BATCH):
        row = (start + n).to(tl.int64)
        at_a = a + row[None, :] * out_features + o[:, None]
        at_b = b + row[:, None] * in_features + column[None, :]
        if EVEN and EVEN_BATCH:
            left, right = tl.load(at_a), tl.load(at_b)
        elif EVEN:
            left = tl.load(at_a, mask=(n < batch - start)[None, :], other=0.0)
            right = tl.load(at_b, mask=(n < batch - start)[:, None], other=0.0)
        else:
            inside = n < batch - start
            left = tl.load(at_a, mask=(o < out_features)[:, None] & inside[None, :], other=0.0)
            right = tl.load(at_b, mask=inside[:, None] & (column < in_features)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)

    g = group + tl.arange(0, GROUPS)
    c = tl.arange(0, TILE_M)
    exists = (o < out_features)[:, None] & (g < groups)[None, :]
    products = tl.reshape(acc, (TILE_OUT, GROUPS, TILE_M))
    for s in range(N):
        slot = g * N + s
        offset = slot_offset(positions, o, slot, row_bytes, exists, BITS)
        value = tl.sum(tl.where(offset[:, :, None] == c[None, None, :], products, 0.0), 2)
        value = tl.where(g[None, :] * M + offset < in_features, value, 0.0)
        at = values + o.to(tl.int64)[:, None] * (groups * N) + slot[None, :]
        tl.store(at, value.to(values.dtype.element_ty), mask=exists)
