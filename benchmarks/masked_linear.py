"""Masked (unstructured) linear against dense torch, ``W * M`` and torch.sparse CSR."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from benchmarks.inputs import differentiated, fastest, leaves, mask_of_density, side
from benchmarks.registry import Case, Entry
from compsparse_kernels import MaskLayout, masked_linear

OP = "masked_linear"
SHAPES = ((256, 1024, 1024), (64, 1024, 1024), (256, 784, 300), (256, 4096, 1024))  # batch, in, out
DENSE_BARS = {0.2: 2.2, 0.1: 4.5, 0.05: 9.0, 0.02: 18.0}
MASKED_DENSE_BARS = {0.1: 2.5, 0.05: 5.0}
ONE_ROW_BARS = {0.1: 4.0, 0.05: 8.0}
GPU_SHAPES = ((4096, 4096, 4096), (256, 4096, 4096))
AUTO_DENSITIES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def entries() -> Iterator[Entry]:
    for shape in SHAPES:
        yield from _of_shape(shape)
    for density, bar in ONE_ROW_BARS.items():
        yield _entry("forward", (1, 1024, 1024), "csr", density, "dense", {"bars": bar})
    for density in AUTO_DENSITIES:
        for direction in ("forward", "forward+backward"):
            yield _entry(direction, SHAPES[0], "auto", density, "dense", {"bars": 0.95})


def cuda_entries() -> Iterator[Entry]:
    """Rows for whoever has a GPU, in float32: against cuBLAS and cuSPARSE."""
    for shape, density, direction in product(GPU_SHAPES, DENSE_BARS, ("forward", "forward+backward")):
        peers = ("dense", "CSR, best layout") if direction == "forward" else ("F.linear(x, W*M)",)
        suites = {"bars": None, "foundation": None, **({"quick": None} if density == 0.05 else {})}
        for peer in peers:
            yield _entry(direction, shape, "csr", density, peer, suites, "cuda")


def _of_shape(shape: tuple) -> Iterator[Entry]:
    for density, bar in DENSE_BARS.items():
        suites = {"bars": bar}
        if density == 0.1:
            suites["foundation"] = 3.0
        if shape == SHAPES[0]:
            suites["quick"] = bar
        yield _entry("forward", shape, "csr", density, "dense", suites)
    for density in (0.1, 0.05):
        yield _entry("forward", shape, "csr", density, "CSR, best layout", {"bars": 2.5})
    yield _entry("forward", shape, "csr", 0.1, "F.linear(x, CSR)", {"bars": 10.0})
    for density, bar in MASKED_DENSE_BARS.items():
        yield _entry("forward+backward", shape, "csr", density, "F.linear(x, W*M)", {"bars": bar})
    yield _entry("forward+backward", shape, "csr", 0.1, "CSR autograd", {"bars": 4.0})


def _entry(
    direction: str, shape: tuple, kind: str, density: float, peer: str, suites: dict, device: str = "cpu"
) -> Entry:
    make_case = _backward_case if direction == "forward+backward" else _forward_case
    make = partial(make_case, *shape, kind, density, peer, device)
    batch, in_features, out_features = shape
    return Entry(OP, kind, f"({batch}, {in_features}->{out_features})", density, direction, peer, make, suites)


def _inputs(batch: int, in_features: int, out_features: int, kind: str, density: float, device: str):
    mask = mask_of_density(out_features, in_features, density)
    layout = MaskLayout.from_mask(mask, kind=kind).to(device)
    x, weight = torch.randn(batch, in_features, device=device), torch.randn(out_features, in_features, device=device)
    mask = mask.to(device)
    return mask, layout, x, weight * mask


def _forward_case(
    batch: int, in_features: int, out_features: int, kind: str, density: float, peer: str, device: str
) -> Case:
    _, layout, x, weight = _inputs(batch, in_features, out_features, kind, density, device)
    values = layout.pack(weight)
    exact, dense = [x.double() @ weight.double().T], [F.linear(x, weight)]
    ours = side(lambda: masked_linear(x, values, layout), exact, dense)
    if peer == "dense":
        return Case(ours, side(lambda: F.linear(x, weight), exact, dense), device=device)
    csr = weight.to_sparse_csr()
    if peer == "F.linear(x, CSR)":
        return Case(ours, side(lambda: F.linear(x, csr), exact, dense))
    columns = x.T.contiguous()  # not part of torch's time: its best case is an input that is already so
    run = fastest((lambda: csr @ x.T, lambda: csr @ columns))
    return Case(ours, side(run, exact, dense, lambda y: [y.T]), device=device)


def _backward_case(
    batch: int, in_features: int, out_features: int, kind: str, density: float, peer: str, device: str
) -> Case:
    mask, layout, x, weight = _inputs(batch, in_features, out_features, kind, density, device)
    bias, grad = torch.randn(out_features, device=device), torch.randn(batch, out_features, device=device)

    def packed(outputs):
        y, grad_x, grad_weight, grad_bias = outputs
        return [y, grad_x, layout.pack(grad_weight.to_dense() * mask), grad_bias]

    double = leaves(x.double(), weight.double(), bias.double())
    exact = packed(differentiated(F.linear, double, grad.double())())
    dense = packed(differentiated(F.linear, leaves(x, weight, bias), grad)())
    sparse = lambda x, values, bias: masked_linear(x, values, layout, bias)  # noqa: E731
    ours = side(differentiated(sparse, leaves(x, layout.pack(weight), bias), grad), exact, dense)
    if peer == "CSR autograd":
        theirs = _csr_autograd(x, weight.to_sparse_csr(), bias, grad)
    elif peer == "dense":
        theirs = differentiated(F.linear, leaves(x, weight, bias), grad)
    else:
        masked = lambda x, weight, bias: F.linear(x, weight * mask, bias)  # noqa: E731
        theirs = differentiated(masked, leaves(x, weight, bias), grad)
    return Case(ours, side(theirs, exact, dense, packed), device=device)


def _csr_autograd(x: torch.Tensor, csr: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor):
    """torch's own ways to train a CSR weight: the faster one."""
    inputs = leaves(x, csr, bias)
    return fastest(
        differentiated(forward, inputs, grad)
        for forward in (
            lambda x, weight, bias: torch.sparse.mm(weight, x.T).T + bias,
            lambda x, weight, bias: (weight @ x.T).T + bias,
        )
    )
