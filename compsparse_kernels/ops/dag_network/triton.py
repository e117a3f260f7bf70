"""Triton kernels of dag_network, for CUDA and ROCm: float32, float16 and bfloat16, accumulation in float32.

forward   one launch a step (nodes of one level and kind); a program owns a tile of a node, [TILE_BATCH, TILE_OUT].
backward  one launch for each step, from the last to the sources; a program owns such a tile of a vertex's gradient.
weight    one launch for each kind; a program owns a tile of a weight's gradient and walks the nodes that share it.

Activations and gradients lie in matrices with a row for each channel and the batch along the row (gather.py). What a
program sums over is a list of rows, so that nodes of any width and any number of parents fill whole steps; and as each
row begins at a multiple of the largest load, they are read 16 bytes at a time, whatever the graph.

Every output has one owner and one order of steps, and there are no atomics: results are the same run to run. What is
derived from a layout is made at its first use, and each kernel is tuned at its first launch. After these nothing waits
for the GPU, so that a call can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

from compsparse_kernels.ops import triton_launch
from compsparse_kernels.ops.dag_network.gather import Backward, Forward, Kind, backward_rows, forward_rows
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
    slope_of,
    step_of,
    tuned,
)

LANES = 64  # rows have a multiple of so many numbers, and the last tile of the batch is read whole
LARGEST_SIDE = 128  # of a tile of a product
LARGEST_WEIGHT_SIDE = 64  # of a tile of a weight's gradient
LEAST_STEPS = 8  # of a part of a weight's gradient
CURVED = ("gelu", "silu")  # activations whose derivative needs more than their value


def dag_network(x, weights, biases, nodes, edge_ptr, edges, steps, linear, columns, out_features, activation):
    """The op of the same name at key CUDA."""
    batch = x.shape[0]
    if not batch * out_features:
        return x.new_empty(batch, out_features)
    rows = _forward_rows(nodes, edge_ptr, edges, steps, weights)
    h = _activations(x, columns)
    for launch in forward_launches(h, None, weights, biases, rows, linear, activation, batch):
        launch()
    return h.index_select(0, rows.outputs)[:, :batch].mT.contiguous()


def dag_network_backward(
    grad,
    x,
    weights,
    biases,
    nodes,
    edge_ptr,
    edges,
    child_ptr,
    children,
    steps,
    linear,
    columns,
    activation,
    needs_x,
    needs_parameters,
):
    """The op of the same name at key CUDA."""
    batch, in_features = x.shape
    if not batch:
        parameters = (*weights, *biases) if needs_parameters else ()
        return [x.new_empty(x.shape if needs_x else 0), *(p.new_zeros(p.shape) for p in parameters)]
    forward = _forward_rows(nodes, edge_ptr, edges, steps, weights)
    backward = _backward_rows(nodes, child_ptr, children, steps, weights, in_features)
    h = _activations(x, columns)
    slopes = torch.empty_like(h) if activation in CURVED else h
    for launch in forward_launches(h, slopes, weights, biases, forward, linear, activation, batch):
        launch()
    gradients = _gradients(grad, forward.outputs, h)
    if not needs_x:
        backward = backward[:-1]
    for launch in backward_launches(gradients, slopes, weights, backward, linear, activation, batch):
        launch()
    grad_x = gradients[1 : 1 + in_features, :batch].mT.contiguous() if needs_x else x.new_empty(0)
    if not needs_parameters:
        return [grad_x]
    sums = gradients.sum(1, dtype=torch.float32) if biases else None
    return [
        grad_x,
        *(_weight_gradient(gradients, h, *pair) for pair in zip(weights, forward.kinds, strict=True)),
        *(_bias_gradient(sums, *pair) for pair in zip(biases, forward.kinds, strict=bool(biases))),
    ]


def forward_launches(h, slopes, weights, biases, rows: Forward, linear, activation, batch) -> list[Launch]:
    """One for each step. ``slopes``: where the derivatives of a curved activation go; None, or ``h``, for nowhere."""
    weights, biases = ([tensor.contiguous() for tensor in tensors] for tensors in (weights, biases))
    launches = []
    for kind, nodes in rows.steps:
        _, out, fan_in = weights[kind].shape
        name = "none" if linear[kind] else activation
        tile, programs = _product(h, len(nodes), out, fan_in, fan_in)
        arguments = {
            "h": h,
            "slopes": h if slopes is None else slopes,
            "weights": weights[kind],
            "bias": biases[kind] if biases else h,
            "nodes": nodes,
            "first": rows.kinds[kind].first,
            "weight": rows.kinds[kind].weight,
            "inputs": rows.kinds[kind].inputs,
            "batch": batch,
            "lanes": h.shape[1],
            "out": out,
            "fan_in": fan_in,
            "HAS_BIAS": bool(biases),
            "ACTIVATION": name,
            "KEEP_SLOPES": slopes is not None and name in CURVED,
        }
        launches.append(Launch(forward_kernel, arguments | tile, programs))
    return launches


def backward_launches(gradients, slopes, weights, rows: list[Backward], linear, activation, batch) -> list[Launch]:
    """One for each step, in order. ``slopes``: what the forward left there; for relu, the activations."""
    flat = torch.cat([weight.reshape(-1) for weight in weights])
    launches = []
    for step in rows:
        tile, programs = _product(gradients, len(step.first), step.channels, step.longest, step.even)
        arguments = {
            "gradients": gradients,
            "slopes": slopes,
            "weights": flat,
            "first": step.first,
            "ptr": step.ptr,
            "row": step.row,
            "weight": step.weight,
            "batch": batch,
            "lanes": gradients.shape[1],
            "channels": step.channels,
            "UNIT": step.unit,
            "ACTIVATION": "none" if step.kind is None or linear[step.kind] else activation,
        }
        launches.append(Launch(backward_kernel, arguments | tile, programs))
    return launches


def weight_launch(gradients, h, shape, kind: Kind) -> Launch:
    """The gradients of a kind's weights, ``sums`` ``[parts, *shape]``. The work on a weight is split in parts where the
    weights alone would not fill a GPU, as those of a convolution."""
    num_weights, out, fan_in = shape
    lanes = h.shape[1]
    tile = {
        "TILE_OUT": min(padded(out), LARGEST_WEIGHT_SIDE),
        "TILE_IN": min(padded(fan_in), LARGEST_WEIGHT_SIDE),
        "TILE_BATCH": min(step_of(h.dtype), lanes),
        "PRECISION": dot_precision(h.dtype),
    }
    programs = num_weights * triton.cdiv(out, tile["TILE_OUT"]) * triton.cdiv(fan_in, tile["TILE_IN"])
    steps = len(kind.first) * (lanes // tile["TILE_BATCH"]) // num_weights  # of a program, on average
    parts = max(1, min(steps // LEAST_STEPS, ENOUGH_PROGRAMS // programs))
    arguments = {
        "gradients": gradients,
        "h": h,
        "sums": h.new_empty(parts, *shape, dtype=h.dtype if parts == 1 else torch.float32),
        "first": kind.first,
        "weight_ptr": kind.weight_ptr,
        "inputs": kind.inputs,
        "num_weights": num_weights,
        "lanes": lanes,
        "out": out,
        "fan_in": fan_in,
        "parts": parts,
    }
    return Launch(weight_kernel, arguments | tile, parts * programs)


def _activations(x: torch.Tensor, columns: int) -> torch.Tensor:
    """``[1 + columns, lanes]``: row 0 and the rows of the sources are filled."""
    batch, in_features = x.shape
    lanes = padded(batch) if batch <= LANES else triton.cdiv(batch, LANES) * LANES
    h = x.new_empty(1 + columns, lanes)
    h[0] = 0
    h[1 : 1 + in_features, :batch] = x.mT
    h[1 : 1 + in_features, batch:] = 0
    return h


def _gradients(grad: torch.Tensor, outputs: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Like ``h``: row 0 and the rows of the outputs are filled."""
    gradients = torch.empty_like(h)
    gradients[0] = 0
    gradients[outputs] = torch.nn.functional.pad(grad.mT, (0, h.shape[1] - len(grad)))
    return gradients


def _weight_gradient(gradients, h, weight, kind):
    launch = weight_launch(gradients, h, weight.shape, kind)
    launch()
    sums = launch.arguments["sums"]
    return sums[0] if len(sums) == 1 else sums.sum(0).to(h.dtype)


def _bias_gradient(sums, bias, kind):
    """``sums`` over the batch, float32 ``[rows]``, of the nodes that share a bias."""
    of_node = sums[kind.first[:, None] + torch.arange(bias.shape[1], device=sums.device)]
    return torch.segment_reduce(of_node, "sum", offsets=kind.weight_ptr, axis=0, unsafe=True).to(bias.dtype)


def _forward_rows(nodes, edge_ptr, edges, steps, weights) -> Forward:
    shapes = [weight.shape for weight in weights]
    return kept(nodes, "forward", (edge_ptr, edges), lambda: forward_rows(nodes, edge_ptr, edges, steps, shapes))


def _backward_rows(nodes, child_ptr, children, steps, weights, in_features) -> list[Backward]:
    shapes = [weight.shape for weight in weights]

    def make():
        return backward_rows(nodes, child_ptr, children, steps, shapes, in_features)

    return kept(nodes, "backward", (child_ptr, children), make)


def _product(matrix, count: int, channels: int, longest: int, even: int) -> tuple[dict[str, object], int]:
    """(tile, programs) of ``count`` products of so many channels, each a sum of at most ``longest`` terms, in a number
    that ``even`` divides. Much of the batch, so that weights are read seldom, but enough programs for a GPU."""
    lanes, precision = matrix.shape[1], dot_precision(matrix.dtype)
    tile_in = min(step_of(matrix.dtype), padded(longest))
    whole = even & -even  # the largest power of two that divides it: with steps of that size none is cut
    if whole >= LEAST_TILE:
        tile_in = min(tile_in, whole)
    even_in = even % tile_in == 0
    tile_out = min(padded(channels), LARGEST_SIDE)
    most = LARGEST_EXACT_TILE if precision == "ieee" else LARGEST_SIDE
    roomy = even_in and matrix.dtype.itemsize == 2  # masks, or operands of 4 bytes, take half of the registers
    tile_batch = min(most, (LARGEST_TILE if roomy else LARGEST_TILE // 2) // tile_out, lanes & -lanes)
    others = count * triton.cdiv(channels, tile_out)
    while tile_batch > LEAST_TILE and others * (lanes // tile_batch) < ENOUGH_PROGRAMS:
        tile_batch //= 2
    tile = {
        "TILE_BATCH": tile_batch,
        "TILE_OUT": tile_out,
        "TILE_IN": tile_in,
        "EVEN_OUT": channels % tile_out == 0,
        "EVEN_IN": even_in,
        "PRECISION": precision,
    }
    return tile, others * (lanes // tile_batch)


def suitable(configs: list[triton.Config], arguments: dict, shared_memory: int) -> list[triton.Config]:
    """The configurations to choose from, of any of the kernels."""
    size = arguments["h" if "h" in arguments else "gradients"].element_size()
    if "sums" in arguments:
        sides, most_sums = ("TILE_OUT", "TILE_IN", "TILE_BATCH"), 64
    else:  # what was found to spill nowhere (python_tests/gpu)
        sides = ("TILE_BATCH", "TILE_OUT", "TILE_IN")
        most_sums = 64 if arguments["EVEN_IN"] and (size == 2 or arguments["TILE_OUT"] <= 32) else 32
    tile = Tile(*(arguments[side] for side in sides), size, most_sums, arguments["PRECISION"] == "ieee")
    return triton_launch.suitable(configs, tile, shared_memory)


@tuned(
    CONFIGS,
    ["TILE_BATCH", "TILE_OUT", "TILE_IN", "EVEN_OUT", "EVEN_IN", "ACTIVATION", "KEEP_SLOPES", "PRECISION"],
    suitable,
)
@triton.jit
def forward_kernel(
    h,  # [rows, lanes]: activations, of which this launch writes those of its nodes
    slopes,  # [rows, lanes] where KEEP_SLOPES: the activation's derivative
    weights,  # [num_weights, out, fan_in]
    bias,  # [num_weights, out] where HAS_BIAS
    nodes,  # [nodes of the step], int32
    first,  # [nodes of the kind], int32: rows of h
    weight,  # [nodes of the kind], int32
    inputs,  # [nodes of the kind, fan_in], int32: rows of h
    batch,
    lanes,
    out,
    fan_in,
    TILE_BATCH: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    EVEN_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP_SLOPES: tl.constexpr,
):
    # Tiles of the batch are next to each other, so that the weights of a node are read once from memory.
    pid = tl.program_id(0)
    tiles = lanes // TILE_BATCH
    out_tiles = tl.cdiv(out, TILE_OUT)
    node = tl.load(nodes + pid // (tiles * out_tiles))
    n = pid % tiles * TILE_BATCH + tl.arange(0, TILE_BATCH)
    o = pid // tiles % out_tiles * TILE_OUT + tl.arange(0, TILE_OUT)
    k = tl.arange(0, TILE_IN)
    of_node = tl.load(weight + node).to(tl.int64)
    existing = tl.minimum(o, out - 1)  # what is past the last output is computed as it is, and not stored
    weights += of_node * out * fan_in
    w_tile = existing.to(tl.int64)[None, :] * fan_in + k[:, None]
    inputs += node.to(tl.int64) * fan_in

    # Rows are read one step ahead: were they read in the step that needs them, Triton's pipeline would spend its
    # stages on them and keep fewer tiles in flight.
    last = (fan_in - 1) // TILE_IN * TILE_IN
    next_rows = tl.load(inputs + k, mask=k < fan_in, other=0)  # row 0 is 0
    acc = tl.zeros((TILE_BATCH, TILE_OUT), tl.float32)
    for start in range(0, fan_in, TILE_IN):
        rows = next_rows
        ahead = tl.minimum(start + TILE_IN, last) + k
        a = tl.load(h + rows.to(tl.int64)[None, :] * lanes + n[:, None])
        if EVEN_IN:
            next_rows = tl.load(inputs + ahead)
            b = tl.load(weights + start + w_tile)
        else:
            next_rows = tl.load(inputs + ahead, mask=ahead < fan_in, other=0)
            b = tl.load(weights + start + w_tile, mask=(k < fan_in - start)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if HAS_BIAS:
        acc += tl.load(bias + of_node * out + existing).to(tl.float32)[None, :]
    tile = (tl.load(first + node) + o).to(tl.int64)[None, :] * lanes + n[:, None]
    stored = (o < out)[None, :]
    within = (n < batch)[:, None]  # lanes past the batch stay 0, so that sums over the batch need no mask
    if KEEP_SLOPES:
        slope = slope_of(acc, ACTIVATION)
        tl.store(slopes + tile, slope.to(slopes.dtype.element_ty), mask=stored)
    value = tl.where(within, activate(acc, ACTIVATION), 0.0)
    tl.store(h + tile, value.to(h.dtype.element_ty), mask=stored)


@tuned(
    CONFIGS,
    ["TILE_BATCH", "TILE_OUT", "TILE_IN", "EVEN_OUT", "EVEN_IN", "UNIT", "ACTIVATION", "PRECISION"],
    suitable,
)
@triton.jit
def backward_kernel(
    gradients,  # [rows, lanes], of which this launch writes those of its vertices
    slopes,  # [rows, lanes]: the activation's derivative; activations where ACTIVATION is relu
    weights,  # of all kinds, one after another
    first,  # [vertices], int32: rows
    ptr,  # [vertices + 1], int64
    row,  # [terms], int32: of gradients
    weight,  # [terms], int64, in UNIT numbers: what stands between that row and the vertex's first channel
    batch,
    lanes,
    channels,
    TILE_BATCH: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    EVEN_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = lanes // TILE_BATCH
    out_tiles = tl.cdiv(channels, TILE_OUT)
    vertex = pid // (tiles * out_tiles)
    n = pid % tiles * TILE_BATCH + tl.arange(0, TILE_BATCH)
    c = pid // tiles % out_tiles * TILE_OUT + tl.arange(0, TILE_OUT)
    k = tl.arange(0, TILE_IN)
    begin = tl.load(ptr + vertex)
    terms = (tl.load(ptr + vertex + 1) - begin).to(tl.int32)
    row += begin
    weight += begin

    last = (terms - 1) // TILE_IN * TILE_IN
    next_rows = tl.load(row + k, mask=k < terms, other=0)
    next_weights = tl.load(weight + k, mask=k < terms, other=0)
    acc = tl.zeros((TILE_BATCH, TILE_OUT), tl.float32)
    for start in range(0, terms, TILE_IN):
        rows = next_rows
        at = next_weights * UNIT
        ahead = tl.minimum(start + TILE_IN, last) + k
        a = tl.load(gradients + rows.to(tl.int64)[None, :] * lanes + n[:, None])
        w_tile = weights + at[:, None] + c[None, :]
        if EVEN_IN:
            next_rows = tl.load(row + ahead)
            next_weights = tl.load(weight + ahead)
            b = tl.load(w_tile) if EVEN_OUT else tl.load(w_tile, mask=(c < channels)[None, :], other=0.0)
        else:
            next_rows = tl.load(row + ahead, mask=ahead < terms, other=0)
            next_weights = tl.load(weight + ahead, mask=ahead < terms, other=0)
            b = tl.load(w_tile, mask=(k < terms - start)[:, None] & (c < channels)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    tile = (tl.load(first + vertex) + c).to(tl.int64)[None, :] * lanes + n[:, None]
    stored = (c < channels)[None, :]
    if ACTIVATION == "relu":
        value = tl.load(slopes + tile, mask=stored, other=0.0)
        acc = tl.where(value <= 0, 0.0, acc)  # NaN lets it through, as in torch
    elif ACTIVATION != "none":
        acc *= tl.load(slopes + tile, mask=stored, other=0.0).to(tl.float32)
    acc = tl.where((n < batch)[:, None], acc, 0.0)
    tl.store(gradients + tile, acc.to(gradients.dtype.element_ty), mask=stored)


@tuned(CONFIGS, ["TILE_BATCH", "TILE_OUT", "TILE_IN", "PRECISION"], suitable)
@triton.jit
def weight_kernel(
    gradients,  # [rows, lanes]
    h,  # [rows, lanes]
    sums,  # [parts, num_weights, out, fan_in]
    first,  # [nodes], int32: rows
    weight_ptr,  # [num_weights + 1], int32: the nodes that share each weight
    inputs,  # [nodes, fan_in], int32: rows
    num_weights,
    lanes,
    out,
    fan_in,
    parts,
    TILE_BATCH: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    in_tiles = tl.cdiv(fan_in, TILE_IN)
    out_tiles = tl.cdiv(out, TILE_OUT)
    k = pid % in_tiles * TILE_IN + tl.arange(0, TILE_IN)
    o = pid // in_tiles % out_tiles * TILE_OUT + tl.arange(0, TILE_OUT)
    target = pid // (in_tiles * out_tiles)
    weight, part = target % num_weights, target // num_weights
    n = tl.arange(0, TILE_BATCH)
    # Rows past the last are read as the last, and not stored.
    of_node = tl.minimum(o, out - 1)
    inputs += tl.minimum(k, fan_in - 1)

    # The steps along the batch of one node after another, of which each part has an equal share.
    begin, end = tl.load(weight_ptr + weight), tl.load(weight_ptr + weight + 1)
    of_each = lanes // TILE_BATCH
    steps = (end - begin).to(tl.int64) * of_each
    share = tl.cdiv(steps, parts)
    before = tl.minimum(part * share, steps)
    node = tl.minimum(begin + (before // of_each).to(tl.int32), end - 1)
    step = (before % of_each).to(tl.int32)
    next_row = tl.load(first + node)
    next_rows = tl.load(inputs + node.to(tl.int64) * fan_in)
    acc = tl.zeros((TILE_OUT, TILE_IN), tl.float32)
    for _ in range(tl.minimum(share, steps - before).to(tl.int32)):
        a_rows, b_rows, lane = next_row + of_node, next_rows, step * TILE_BATCH + n
        step += 1
        node = tl.minimum(node + step // of_each, end - 1)
        step %= of_each
        next_row = tl.load(first + node)
        next_rows = tl.load(inputs + node.to(tl.int64) * fan_in)
        a = tl.load(gradients + a_rows.to(tl.int64)[:, None] * lanes + lane[None, :])
        b = tl.load(h + b_rows.to(tl.int64)[None, :] * lanes + lane[:, None])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tile = sums + target.to(tl.int64) * out * fan_in + o.to(tl.int64)[:, None] * fan_in + k[None, :]
    stored = (o < out)[:, None] & (k < fan_in)[None, :]
    tl.store(tile, acc.to(sums.dtype.element_ty), mask=stored)
