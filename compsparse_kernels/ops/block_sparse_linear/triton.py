"""Triton kernels of the block-sparse ops, for CUDA and ROCm: float32, float16 and bfloat16, accumulation in float32.

product   one program owns a tile [TILE_BATCH, one block row] of y and walks the entries of that row. Either order of a
          layout and either storage of a block serve, so the gradient of the input is the same kernel.
sampled   one program owns one value block and walks the batch (and the entries that share the block).

Every output has one owner and one order of steps, and there are no atomics: results are the same run to run. Inside a
step the tensor cores add up, and which of their instructions does may depend on the configuration that was tuned.
Blocks whose sides are no power of two, or below 16, are padded in registers, never in memory.
"""

import torch
import triton
import triton.language as tl

from compsparse_kernels.layouts.checks import require
from compsparse_kernels.ops import triton_launch
from compsparse_kernels.ops.triton_launch import (
    CONFIGS,
    ENOUGH_PROGRAMS,
    LARGEST_EXACT_TILE,
    LARGEST_TILE,
    LEAST_TILE,
    Launch,
    Tile,
    activate,
    dot_precision,
    kept,
    padded,
    step_of,
    tuned,
)

LARGEST_BATCH_TILE = 256
GROUP = 8  # block rows that walk the batch together, so that they find its inputs in the second-level cache


def block_sparse_linear(x, values, bias, ptr, idx, slot, out_features, transposed, activation):
    """The op of the same name at key CUDA."""
    y = x.new_empty(x.shape[0], out_features)
    if y.numel():
        product_launch(x, values, bias, ptr, idx, slot, transposed, activation, y)()
    return y


def sampled_block_matmul(a, b, ptr, idx, slot, num_slots, shared, block_out, block_in):
    """The op of the same name at key CUDA."""
    values = a.new_empty(num_slots, block_out, block_in)
    if num_slots:
        sampled_launch(a, b, ptr, idx, slot, shared, values)()
    return values


def product_launch(x, values, bias, ptr, idx, slot, transposed, activation, y) -> Launch:
    """How ``y = act(x W^T + b)`` is launched."""
    batch, in_features = x.shape
    rows = len(ptr) - 1
    block_out, block_in = values.shape[2 if transposed else 1], values.shape[1 if transposed else 2]
    even_in = block_in == padded(block_in) and in_features % block_in == 0
    largest = LARGEST_TILE if even_in else LARGEST_TILE // 2
    most_rows = LARGEST_EXACT_TILE if dot_precision(x.dtype) == "ieee" else LARGEST_BATCH_TILE
    tile_batch = batch_tile(batch, rows, in_features, min(most_rows, largest // padded(block_out)))
    arguments = {
        "x": x.contiguous(),
        "values": values.contiguous(),
        "bias": x if bias is None else bias.contiguous(),
        "y": y,
        "ptr": ptr,
        "idx": idx,
        "slot": slot,
        "order": longest_first(ptr),
        "batch": batch,
        "in_features": in_features,
        "out_features": y.shape[1],
        "rows": rows,
        "BLOCK_OUT": block_out,
        "BLOCK_IN": block_in,
        "TILE_OUT": padded(block_out),
        "TILE_IN": min(padded(block_in), step_of(x.dtype)),
        "TILE_BATCH": tile_batch,
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias is not None,
        "ACTIVATION": activation,
        "EVEN_IN": even_in,
        "PRECISION": dot_precision(x.dtype),
        "GROUP": GROUP,
    }
    return Launch(product_kernel, arguments, rows * triton.cdiv(batch, tile_batch))


def sampled_launch(a, b, ptr, idx, slot, shared, values) -> Launch:
    """How the blocks of ``a^T b`` are launched."""
    num_slots, block_out, block_in = values.shape
    slot_ptr, entry_row, entry_column = entries_by_slot(ptr, idx, slot, num_slots if shared else None)
    batch, out_features, in_features = a.shape[0], a.shape[1], b.shape[1]
    even = block_out == padded(block_out) and block_in == padded(block_in)
    tile_batch = step_of(a.dtype)
    arguments = {
        "a": a.contiguous(),
        "b": b.contiguous(),
        "values": values,
        "slot": slot,
        "slot_ptr": slot_ptr,
        "entry_row": entry_row,
        "entry_column": entry_column,
        "batch": batch,
        "out_features": out_features,
        "in_features": in_features,
        "BLOCK_OUT": block_out,
        "BLOCK_IN": block_in,
        "TILE_OUT": padded(block_out),
        "TILE_IN": padded(block_in),
        "TILE_BATCH": tile_batch,
        "SHARED": shared,
        "EVEN_BATCH": batch % tile_batch == 0,
        "EVEN_BLOCKS": even and out_features % block_out == 0 and in_features % block_in == 0,
        "PRECISION": dot_precision(a.dtype),
    }
    return Launch(sampled_kernel, arguments, num_slots)


def batch_tile(batch: int, rows: int, in_features: int, most: int) -> int:
    """Batch rows of a tile of the product: many, so that blocks are read seldom, but enough programs for a GPU, and
    offsets inside the tile that 32 bits hold."""
    tile = min(most, padded(batch))
    while tile > LEAST_TILE and (rows * triton.cdiv(batch, tile) < ENOUGH_PROGRAMS or tile * in_features >= 2**31):
        tile //= 2
    if tile * in_features >= 2**31:
        wanted = f"fewer than {2**31 // LEAST_TILE} features, as offsets inside a tile have 32 bits"
        require(False, "x", wanted, in_features)
    return tile


def longest_first(ptr: torch.Tensor) -> torch.Tensor:
    """int32 ``[rows]``: block rows by falling number of entries, so that no long one starts last."""
    return kept(ptr, "longest_first", (), lambda: ptr.diff().argsort(descending=True, stable=True).int())


def entries_by_slot(ptr, idx, slot, num_slots: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(offsets of each slot int64, block row and block column of each entry int32), entries sorted by slot; as they
    come where no slots are shared (``num_slots`` None)."""

    def make():
        lengths = ptr.diff()
        row = torch.arange(len(lengths), dtype=torch.int32, device=ptr.device)
        row = row.repeat_interleave(lengths, output_size=len(idx))
        if num_slots is None:
            return None, row, idx
        slots, entries = slot.sort(stable=True)
        offsets = torch.searchsorted(slots, torch.arange(num_slots + 1, dtype=slot.dtype, device=slot.device))
        return offsets, row[entries], idx[entries]

    offsets, row, column = kept(ptr, "entries_by_slot", (idx, slot), make)
    return ptr if offsets is None else offsets, row, column


def suitable(configs: list[triton.Config], arguments: dict, shared_memory: int) -> list[triton.Config]:
    """The configurations to choose from, of a product or of a sampled one."""
    product = "x" in arguments
    size = arguments["x" if product else "a"].element_size()
    tile = Tile(
        *(arguments[name] for name in (_PRODUCT_TILE if product else _SAMPLED_TILE)),
        size,
        _most_sums(arguments, size),
        arguments["PRECISION"] == "ieee",
    )
    return triton_launch.suitable(configs, tile, shared_memory)


def _most_sums(arguments: dict, size: int) -> int:
    """What was found to spill nowhere (python_tests/gpu)."""
    if "x" in arguments:
        return 64 if arguments["EVEN_IN"] else 32
    if arguments["SHARED"]:
        return 32
    return 128 if size == 2 and arguments["EVEN_BLOCKS"] and arguments["EVEN_BATCH"] else 64


_PRODUCT_TILE = ("TILE_BATCH", "TILE_OUT", "TILE_IN")
_SAMPLED_TILE = ("TILE_OUT", "TILE_IN", "TILE_BATCH")


@tuned(
    CONFIGS,
    ["BLOCK_OUT", "BLOCK_IN", "TILE_BATCH", "TRANSPOSED", "EVEN_IN", "PRECISION", "in_features", "out_features"],
    suitable,
)
@triton.jit
def product_kernel(
    x,  # [batch, in_features]
    values,  # [slots, BLOCK_OUT, BLOCK_IN], or [slots, BLOCK_IN, BLOCK_OUT] where TRANSPOSED
    bias,  # [out_features] where HAS_BIAS
    y,  # [batch, out_features]
    ptr,  # [rows + 1], int64
    idx,  # [entries], int32
    slot,  # [entries], int32
    order,  # [rows], int32: block rows, those with most entries first
    batch,
    in_features,
    out_features,
    rows,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(batch, TILE_BATCH)
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles) * GROUP
    together = min(rows - first, GROUP)
    inside = pid % (GROUP * tiles)
    row = tl.load(order + first + inside % together)

    first_n = inside // together * TILE_BATCH
    n = first_n + tl.arange(0, TILE_BATCH)
    o = tl.arange(0, TILE_OUT)
    k = tl.arange(0, TILE_IN)
    # Offsets inside a tile are 32-bit and the same at every step; what moves is one 64-bit base. Rows past the batch
    # are read as its last row, and not stored.
    x += first_n.to(tl.int64) * in_features
    x_tile = tl.minimum(tl.arange(0, TILE_BATCH), batch - 1 - first_n)[:, None] * in_features + k[None, :]
    W_OUT: tl.constexpr = 1 if TRANSPOSED else BLOCK_IN
    W_IN: tl.constexpr = BLOCK_OUT if TRANSPOSED else 1
    w_tile = k[:, None] * W_IN + o[None, :] * W_OUT
    SLICES: tl.constexpr = (BLOCK_IN + TILE_IN - 1) // TILE_IN

    begin = tl.load(ptr + row)
    steps = (tl.load(ptr + row + 1) - begin).to(tl.int32) * SLICES
    idx += begin
    slot += begin
    # An entry's indices are read one step ahead: were they read in the step that needs them, Triton's pipeline would
    # spend its stages on them and keep fewer tiles in flight.
    last = tl.maximum(steps - 1, 0)
    next_column = tl.load(idx, mask=steps > 0, other=0) * BLOCK_IN
    next_block = tl.load(slot, mask=steps > 0, other=0).to(tl.int64) * (BLOCK_OUT * BLOCK_IN)
    acc = tl.zeros((TILE_BATCH, TILE_OUT), tl.float32)
    for step in range(steps):
        start = step % SLICES * TILE_IN  # of this slice, inside the block
        column = next_column
        w = values + next_block + start * W_IN
        entry = tl.minimum(step + 1, last) // SLICES
        next_column = tl.load(idx + entry) * BLOCK_IN
        next_block = tl.load(slot + entry).to(tl.int64) * (BLOCK_OUT * BLOCK_IN)
        x_step = x + (column + start)
        if EVEN_IN:
            a = tl.load(x_step + x_tile)
            if TILE_OUT == BLOCK_OUT:
                b = tl.load(w + w_tile)
            else:
                b = tl.load(w + w_tile, mask=o[None, :] < BLOCK_OUT, other=0.0)
        else:
            inside_in = start + k < min(BLOCK_IN, in_features - column)
            a = tl.load(x_step + x_tile, mask=inside_in[None, :], other=0.0)
            b = tl.load(w + w_tile, mask=inside_in[:, None] & (o[None, :] < BLOCK_OUT), other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    out = row * BLOCK_OUT + o
    stored = (o < BLOCK_OUT) & (out < out_features)
    if HAS_BIAS:
        acc += tl.load(bias + out, mask=stored, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    y_tile = y + n.to(tl.int64)[:, None] * out_features + out[None, :]
    tl.store(y_tile, acc.to(y.dtype.element_ty), mask=(n[:, None] < batch) & stored[None, :])


@triton.jit
def _add_over_batch(
    acc,
    a,
    b,
    row,
    column,
    batch,
    out_features,
    in_features,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    EVEN_BATCH: tl.constexpr,
    EVEN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.arange(0, TILE_BATCH)
    o = tl.arange(0, TILE_OUT)
    k = tl.arange(0, TILE_IN)
    has_o = o < min(BLOCK_OUT, out_features - row * BLOCK_OUT)
    has_k = k < min(BLOCK_IN, in_features - column * BLOCK_IN)
    a_tile = a + n.to(tl.int64)[None, :] * out_features + (row * BLOCK_OUT + o)[:, None]
    b_tile = b + n.to(tl.int64)[:, None] * in_features + (column * BLOCK_IN + k)[None, :]
    rows = tl.full((), TILE_BATCH, tl.int64)
    for start in range(0, batch, TILE_BATCH):
        if EVEN_BATCH and EVEN_BLOCKS:
            left = tl.load(a_tile)
            right = tl.load(b_tile)
        elif EVEN_BLOCKS:
            has_n = n < batch - start
            left = tl.load(a_tile, mask=has_n[None, :], other=0.0)
            right = tl.load(b_tile, mask=has_n[:, None], other=0.0)
        else:
            has_n = n < batch - start
            left = tl.load(a_tile, mask=has_o[:, None] & has_n[None, :], other=0.0)
            right = tl.load(b_tile, mask=has_n[:, None] & has_k[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        a_tile += rows * out_features
        b_tile += rows * in_features
    if not EVEN_BLOCKS:  # what reaches past the edge is 0, even where it was NaN times 0
        acc = tl.where(has_o[:, None] & has_k[None, :], acc, 0.0)
    return acc


@tuned(
    CONFIGS,
    ["BLOCK_OUT", "BLOCK_IN", "SHARED", "EVEN_BATCH", "EVEN_BLOCKS", "PRECISION"],
    suitable,
)
@triton.jit
def sampled_kernel(
    a,  # [batch, out_features]
    b,  # [batch, in_features]
    values,  # [slots, BLOCK_OUT, BLOCK_IN]
    slot,  # [entries], int32: the block that entry `pid` fills; unused where SHARED
    slot_ptr,  # [slots + 1], int64: entries of each slot where SHARED
    entry_row,  # [entries], int32; sorted by slot where SHARED
    entry_column,  # the same
    batch,
    out_features,
    in_features,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    SHARED: tl.constexpr,
    EVEN_BATCH: tl.constexpr,
    EVEN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    acc = tl.zeros((TILE_OUT, TILE_IN), tl.float32)
    if SHARED:
        target = pid.to(tl.int64)
        for entry in range(tl.load(slot_ptr + pid), tl.load(slot_ptr + pid + 1)):
            begun = acc if EVEN_BLOCKS else tl.zeros((TILE_OUT, TILE_IN), tl.float32)  # each is cut by its own edge
            row, column = tl.load(entry_row + entry), tl.load(entry_column + entry)
            sums = _add_over_batch(
                begun, a, b, row, column, batch, out_features, in_features,
                BLOCK_OUT, BLOCK_IN, TILE_OUT, TILE_IN, TILE_BATCH, EVEN_BATCH, EVEN_BLOCKS, PRECISION,
            )  # fmt: skip
            acc = sums if EVEN_BLOCKS else acc + sums
    else:
        target = tl.load(slot + pid).to(tl.int64)
        acc = _add_over_batch(
            acc, a, b, tl.load(entry_row + pid), tl.load(entry_column + pid), batch, out_features, in_features,
            BLOCK_OUT, BLOCK_IN, TILE_OUT, TILE_IN, TILE_BATCH, EVEN_BATCH, EVEN_BLOCKS, PRECISION,
        )  # fmt: skip
    o = tl.arange(0, TILE_OUT)[:, None]
    k = tl.arange(0, TILE_IN)[None, :]
    tile = values + target * (BLOCK_OUT * BLOCK_IN) + o * BLOCK_IN + k
    tl.store(tile, acc.to(values.dtype.element_ty), mask=(o < BLOCK_OUT) & (k < BLOCK_IN))
