"""N:M products for the kernels of masked_linear, and how near to the float64 reference their results must be."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from compsparse_kernels.layouts import NMLayout
from compsparse_kernels.ops.masked_linear import reference
from compsparse_kernels.ops.masked_linear import triton as shipped
from compsparse_kernels.testing import assert_within_budget, random_tensor
from python_tests.gpu.interpreter.cases import PRECISIONS
from python_tests.gpu.interpreter.rounding import to_tf32
from python_tests.nm import nm_mask

OPS = ("nm_linear", "nm_linear_transposed", "nm_sampled")


@dataclass(frozen=True)
class Case:
    """``integers``: numbers so small that every product and sum is exact, so that a result has one right rounding."""

    n: int = 2
    m: int = 4
    features: tuple[int, int] = (70, 101)  # out, in
    batch: int = 19
    precision: str = "ieee"
    with_bias: bool = True
    integers: bool = False
    fewest_programs: int = 264  # tiles are made smaller until there are as many
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def layout(self) -> NMLayout:
        return NMLayout.from_mask(nm_mask(*self.features, self.n, self.m, seed=self.seed), self.n, self.m)

    def tensor(self, *shape: int, seed: int) -> torch.Tensor:
        drawn = random_tensor(*shape, seed=self.seed + seed)
        return (drawn.mul(20).round() if self.integers else drawn).to(self.dtype)

    @contextmanager
    def settings(self, kernels=shipped):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        try:
            with mock.patch.object(kernels, "ENOUGH_PROGRAMS", self.fewest_programs):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True)
class Product:
    """What an op gets: tensors, and what comes after them."""

    op: str
    tensors: tuple[torch.Tensor | None, ...]
    rest: tuple

    def run(self, ops, change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> torch.Tensor:
        tensors = [tensor if tensor is None else change(tensor) for tensor in self.tensors]
        return getattr(ops, self.op)(*tensors, *self.rest)


def products(case: Case) -> list[Product]:
    """Of each op. Slots past the last column hold NaN, which no product may see."""
    layout = case.layout()
    out_features, in_features = case.features
    x, grad = case.tensor(case.batch, in_features, seed=1), case.tensor(case.batch, out_features, seed=2)
    values = case.tensor(*layout.values_shape, seed=3).where(layout.inside(), float("nan"))
    biases = (case.tensor(size, seed=4) if case.with_bias else None for size in case.features)
    return [
        Product(OPS[0], (x, values, next(biases)), (layout.positions, case.m)),
        Product(OPS[1], (grad, values, next(biases)), (layout.positions, case.m, in_features)),
        Product(OPS[2], (grad, x), (layout.positions, case.n, case.m)),
    ]


def check(case: Case, product: Product, ours: torch.Tensor, name: str, cut=None) -> None:
    """``ours`` is within the budget of the product; ``cut`` makes a tensor tf32, as tensor cores do."""
    assert ours.dtype == case.dtype and ours.is_contiguous()
    exact = product.run(reference, torch.Tensor.double)
    if case.integers:
        assert torch.equal(ours, exact.to(case.dtype)), f"{name}: not rounded correctly"
        return
    dense = product.run(reference, cut or as_multiplied(case))
    terms = product.run(reference, lambda tensor: tensor.double().abs())
    # Sums are in float32 and rounded once to the dtype: what no order of summation can avoid.
    shrink = torch.finfo(torch.float32).eps / torch.finfo(case.dtype).eps
    assert_within_budget(ours, dense, exact, name, terms if shrink == 1 else exact.abs() + shrink * terms)


def as_multiplied(case: Case) -> Callable[[torch.Tensor], torch.Tensor]:
    """Dense torch on a CPU has no tf32; on rounded inputs it computes the same."""
    if case.precision != "tf32":
        return lambda tensor: tensor
    return lambda tensor: torch.from_numpy(to_tf32(tensor.numpy()))
