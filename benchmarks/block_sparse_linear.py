"""Block-sparse linear against dense torch and torch.sparse BSR."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.inputs import differentiated, fastest, leaves, mask_of_density, side
from benchmarks.registry import Case, Entry
from compsparse_kernels import BlockLayout, block_sparse_linear

OP = "block_sparse_linear"
SHAPES = ((256, 1024, 1024), (512, 2048, 2048), (1024, 1024, 1024), (256, 4096, 1024))  # batch, in, out
DENSITIES = (0.5, 0.2, 0.1, 0.05)
FORWARD_BARS = {4: 0.5, 8: 0.9, 16: 1.0, 32: 1.0, 64: 1.0}  # times 1 / density
BACKWARD_BLOCKS = (16, 32, 64)


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
    weight, grad = layout.unpack(values), torch.randn(batch, out_features)

    def packed(outputs):
        y, grad_x, grad_weight, grad_bias = outputs
        return [y, grad_x, layout.pack(grad_weight), grad_bias]

    theirs = differentiated(F.linear, leaves(x, weight, bias), grad)
    double = leaves(x.double(), weight.double(), bias.double())
    exact, dense = packed(differentiated(F.linear, double, grad.double())()), packed(theirs())
    sparse = lambda x, values, bias: block_sparse_linear(x, values, layout, bias)  # noqa: E731
    ours = side(differentiated(sparse, leaves(x, values, bias), grad), exact, dense)
    return Case(ours, side(theirs, exact, dense, packed))
