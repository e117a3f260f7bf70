"""Block-sparse linear against dense torch and torch.sparse BSR."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from benchmarks.inputs import differentiated, fastest, leaves, mask_of_density, side
from benchmarks.registry import Case, Entry
from compsparse_kernels import BlockLayout, block_sparse_linear
from compsparse_kernels.ops import cpu_isa

OP = "block_sparse_linear"
SHAPES = ((256, 1024, 1024), (512, 2048, 2048), (1024, 1024, 1024), (256, 4096, 1024))  # batch, in, out
DENSITIES = (0.5, 0.2, 0.1, 0.05)
FORWARD_BARS = {4: 0.5, 8: 0.9, 16: 1.0, 32: 1.0, 64: 1.0}  # times 1 / density
BACKWARD_BLOCKS = (8, 16, 32, 64)
BFLOAT16_BLOCKS = (16, 32, 64)
OURS_IN_FLOAT32 = "ours in float32"
GPU_SHAPES = ((4096, 4096, 4096), (512, 8192, 8192))
GPU_BLOCKS = (16, 32, 64, 128)
GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def entries() -> Iterator[Entry]:
    for shape in SHAPES:
        for density in DENSITIES:
            yield from _against_dense(shape, density)
        for density in (0.1, 0.05):
            yield _entry("forward", shape, 32, density, "BSR, best layout", {"bars": 4.0})
        yield _entry("forward", shape, 32, 0.1, "F.linear(x, BSR)", {"bars": 30.0})
        yield _entry("forward", shape, 32, 1.0, "dense", {"bars": 0.9})
    for _, in_features, out_features in (SHAPES[0], SHAPES[1], SHAPES[3]):
        for density in DENSITIES:
            yield _entry("forward", (1, in_features, out_features), 32, density, "dense", {"bars": 0.7 / density})
    if cpu_isa() == "avx512_bf16":
        yield from _bfloat16_entries()


def _bfloat16_entries() -> Iterator[Entry]:
    for shape, block, density in product(SHAPES, BFLOAT16_BLOCKS, DENSITIES):
        for peer, bar in (("dense", 0.8 / density), (OURS_IN_FLOAT32, 2.0)):
            suites = {"bars": bar}
            yield _typed_entry("forward", shape, block, density, peer, torch.bfloat16, suites, device="cpu")


def cuda_entries() -> Iterator[Entry]:
    """Rows for whoever has a GPU, against cuBLAS and both ways into torch.sparse BSR (the last is Triton)."""
    for shape, block, density, dtype in product(GPU_SHAPES, GPU_BLOCKS, DENSITIES, GPU_DTYPES):
        suites = {"bars": None, "foundation": None} if block in (32, 64) and dtype == torch.bfloat16 else {"bars": None}
        if shape == GPU_SHAPES[0] and block == 64 and dtype == torch.bfloat16:
            suites["quick"] = None
        for direction in ("forward", "forward+backward"):
            yield _typed_entry(direction, shape, block, density, "dense", dtype, suites)
        if dtype != torch.float32:
            for peer in ("F.linear(x, BSR)", "bsr_dense_addmm"):
                yield _typed_entry("forward", shape, block, density, peer, dtype, suites)


def _typed_entry(direction, shape, block, density, peer, dtype, suites, device="cuda") -> Entry:
    make = partial(
        _typed_backward_case if direction == "forward+backward" else _typed_forward_case, *shape, block, density
    )
    batch, in_features, out_features = shape
    name = str(dtype).removeprefix("torch.")
    text = f"({batch}, {in_features}->{out_features}) {name}"
    return Entry(
        OP, f"block {block}", text, density, direction, peer, partial(make, peer, dtype, device), suites, dtype=name
    )


def _against_dense(shape: tuple, density: float) -> Iterator[Entry]:
    for block, factor in FORWARD_BARS.items():
        suites = {"bars": factor / density}
        if block == 32:
            suites["foundation"] = 0.8 / density
            if shape == SHAPES[0]:
                suites["quick"] = suites["bars"]
        yield _entry("forward", shape, block, density, "dense", suites)
    for block in BACKWARD_BLOCKS:
        yield _entry("forward+backward", shape, block, density, "dense", {"bars": 0.8 / density})


def _entry(direction: str, shape: tuple, block: int, density: float, peer: str, suites: dict) -> Entry:
    make = partial(_backward_case if direction == "forward+backward" else _forward_case, *shape, block, density, peer)
    batch, in_features, out_features = shape
    return Entry(
        OP, f"block {block}", f"({batch}, {in_features}->{out_features})", density, direction, peer, make, suites
    )


def _typed_inputs(batch, in_features, out_features, block, density, dtype, device):
    layout, *tensors = _inputs(batch, in_features, out_features, block, density)
    return layout.to(device), *(tensor.to(device, dtype) for tensor in tensors)


def _typed_forward_case(batch, in_features, out_features, block, density, peer, dtype, device) -> Case:
    layout, x, values, bias = _typed_inputs(batch, in_features, out_features, block, density, dtype, device)
    weight = layout.unpack(values)
    dense = [F.linear(x, weight, bias)]
    exact = [F.linear(x.double(), weight.double(), bias.double())]
    ours = side(lambda: block_sparse_linear(x, values, layout, bias), exact, dense)
    if peer == "bsr_dense_addmm":
        from torch.sparse._triton_ops import bsr_dense_addmm

        bsr, columns, offset = layout.to_bsr(values), x.T.contiguous(), bias[:, None].expand(-1, batch).contiguous()
        theirs = side(lambda: bsr_dense_addmm(offset, bsr, columns), exact, dense, lambda y: [y.T])
    elif peer == OURS_IN_FLOAT32:
        wide = [tensor.float() for tensor in (x, values, bias)]
        theirs = side(lambda: block_sparse_linear(*wide[:2], layout, wide[2]), exact, dense)
    else:
        other = layout.to_bsr(values) if peer == "F.linear(x, BSR)" else weight
        theirs = side(lambda: F.linear(x, other, bias), exact, dense)
    return Case(ours, theirs, device=device)


def _typed_backward_case(batch, in_features, out_features, block, density, peer, dtype, device) -> Case:
    layout, x, values, bias = _typed_inputs(batch, in_features, out_features, block, density, dtype, device)
    grad = torch.randn(batch, out_features, device=device, dtype=dtype)
    return _both_directions(layout, x, values, bias, grad)


def _inputs(batch: int, in_features: int, out_features: int, block: int, density: float):
    layout = BlockLayout.from_mask(
        mask_of_density(out_features // block, in_features // block, density), (block, block)
    )
    x, bias = torch.randn(batch, in_features), torch.randn(out_features)
    return layout, x, layout.pack(torch.randn(out_features, in_features)), bias


def _forward_case(batch: int, in_features: int, out_features: int, block: int, density: float, peer: str) -> Case:
    layout, x, values, bias = _inputs(batch, in_features, out_features, block, density)
    weight = layout.unpack(values)
    bias = bias if peer == "dense" else None
    dense = [F.linear(x, weight, bias)]
    exact = [F.linear(x.double(), weight.double(), None if bias is None else bias.double())]
    ours = side(lambda: block_sparse_linear(x, values, layout, bias), exact, dense)
    if peer == "dense":
        return Case(ours, side(lambda: F.linear(x, weight, bias), exact, dense))
    bsr = layout.to_bsr(values)
    if peer == "F.linear(x, BSR)":
        return Case(ours, side(lambda: F.linear(x, bsr), exact, dense))
    columns = x.T.contiguous()  # not part of torch's time: its best case is an input that is already so
    run = fastest((lambda: bsr @ x.T, lambda: bsr @ columns))
    return Case(ours, side(run, exact, dense, lambda y: [y.T]))


def _backward_case(batch: int, in_features: int, out_features: int, block: int, density: float, peer: str) -> Case:
    layout, x, values, bias = _inputs(batch, in_features, out_features, block, density)
    return _both_directions(layout, x, values, bias, torch.randn(batch, out_features))


def _both_directions(layout: BlockLayout, x, values, bias, grad) -> Case:
    weight = layout.unpack(values)

    def packed(outputs):
        y, grad_x, grad_weight, grad_bias = outputs
        return [y, grad_x, layout.pack(grad_weight), grad_bias]

    theirs = differentiated(F.linear, leaves(x, weight, bias), grad)
    double = leaves(x.double(), weight.double(), bias.double())
    exact, dense = packed(differentiated(F.linear, double, grad.double())()), packed(theirs())
    sparse = lambda x, values, bias: block_sparse_linear(x, values, layout, bias)  # noqa: E731
    ours = side(differentiated(sparse, leaves(x, values, bias), grad), exact, dense)
    return Case(ours, side(theirs, exact, dense, packed), device=x.device.type)
