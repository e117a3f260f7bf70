"""N:M sparse linear (MaskLayout of kind nm) against dense torch, ``W * M``, and the same mask in kind csr.

The variant names what values and pattern take in memory, as a share of the dense weight.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.inputs import differentiated, leaves, side
from benchmarks.registry import Case, Entry
from compsparse_kernels import MaskLayout, masked_linear
from compsparse_kernels.layouts import NMLayout

OP = "nm_linear"
SHAPES = ((256, 1024, 1024), (64, 1024, 1024), (256, 4096, 1024), (1, 1024, 1024))  # batch, in, out
PATTERNS = ((2, 4), (1, 4), (4, 8))


def entries() -> Iterator[Entry]:
    for shape in SHAPES:
        for nm in PATTERNS:
            suites = {"bars": None, **({"quick": None} if shape == SHAPES[0] and nm == PATTERNS[0] else {})}
            yield _entry("forward", shape, nm, "dense", _forward_case, suites)
            yield _entry("forward", shape, nm, "kind csr", _forward_case, {"bars": None})
            if shape[0] > 1:
                yield _entry("forward+backward", shape, nm, "dense", _backward_case, suites)
                yield _entry("forward+backward", shape, nm, "F.linear(x, W*M)", _backward_case, {"bars": None})


def share_of_dense_bytes(layout: NMLayout) -> float:
    """Bytes of float32 values and their positions, as a share of the dense weight's."""
    return (4 * layout.out_features * layout.groups * layout.n + layout.nbytes) / (
        4 * layout.out_features * layout.in_features
    )


def mask_of_pattern(out_features: int, in_features: int, n: int, m: int) -> torch.Tensor:
    """bool ``[out, in]`` with n survivors, at random places, of each m consecutive columns."""
    scores = torch.rand(out_features, in_features // m, m)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(n).indices, True).flatten(1)


def _entry(direction: str, shape: tuple, nm: tuple[int, int], peer: str, make, suites: dict) -> Entry:
    batch, in_features, out_features = shape
    n, m = nm
    one_row = NMLayout.from_mask(torch.arange(in_features)[None] % m < n, n, m)
    variant = f"{n}:{m}, {share_of_dense_bytes(one_row):.2f} of the bytes"
    case = partial(make, *shape, nm, peer)
    return Entry(OP, variant, f"({batch}, {in_features}->{out_features})", n / m, direction, peer, case, suites)


def _inputs(batch: int, in_features: int, out_features: int, nm: tuple[int, int]):
    mask = mask_of_pattern(out_features, in_features, *nm)
    layout = MaskLayout.from_mask(mask, "nm", nm=nm)
    return mask, layout, torch.randn(batch, in_features), torch.randn(out_features, in_features) * mask


def _forward_case(batch: int, in_features: int, out_features: int, nm: tuple[int, int], peer: str) -> Case:
    mask, layout, x, weight = _inputs(batch, in_features, out_features, nm)
    values = layout.pack(weight)
    exact, dense = [x.double() @ weight.double().T], [F.linear(x, weight)]
    ours = side(lambda: masked_linear(x, values, layout), exact, dense)
    if peer == "dense":
        return Case(ours, side(lambda: F.linear(x, weight), exact, dense))
    csr = MaskLayout.from_mask(mask, "csr")
    survivors = csr.pack(weight)
    return Case(ours, side(lambda: masked_linear(x, survivors, csr), exact, dense))


def _backward_case(batch: int, in_features: int, out_features: int, nm: tuple[int, int], peer: str) -> Case:
    mask, layout, x, weight = _inputs(batch, in_features, out_features, nm)
    bias, grad = torch.randn(out_features), torch.randn(batch, out_features)

    def packed(outputs):
        y, grad_x, grad_weight, grad_bias = outputs
        return [y, grad_x, layout.pack(grad_weight), grad_bias]

    double = leaves(x.double(), weight.double(), bias.double())
    exact = packed(differentiated(F.linear, double, grad.double())())
    dense = packed(differentiated(F.linear, leaves(x, weight, bias), grad)())
    sparse = lambda x, values, bias: masked_linear(x, values, layout, bias)  # noqa: E731
    ours = side(differentiated(sparse, leaves(x, layout.pack(weight), bias), grad), exact, dense)
    masked = lambda x, weight, bias: F.linear(x, weight * mask, bias)  # noqa: E731
    theirs = differentiated(F.linear if peer == "dense" else masked, leaves(x, weight, bias), grad)
    return Case(ours, side(theirs, exact, dense, packed))
