"""Inputs of the block-sparse kernels, and how near to the float64 reference their results must be."""

from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from compsparse_kernels import BlockLayout
from compsparse_kernels.ops.block_sparse_linear import reference
from compsparse_kernels.ops.block_sparse_linear import triton as shipped
from compsparse_kernels.testing import assert_within_budget, random_mask, random_tensor
from python_tests.gpu import ledger
from python_tests.gpu.interpreter.rounding import to_tf32
from python_tests.gpu.interpreter.strict import strict

PRECISIONS = {
    "tf32": torch.float32,
    "ieee": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Case:
    """A layer: a grid of blocks of which the last row and column are cut, and what it is applied to."""

    block_shape: tuple[int, int]
    grid: tuple[int, int] = (2, 2)
    cut: tuple[int, int] = (0, 0)  # features that the last row and column of blocks lack
    batch: int = 5
    precision: str = "ieee"
    transposed: bool = False
    with_bias: bool = True
    activation: str = "none"
    density: float = 0.7
    slots: int | None = None  # entries share this many value blocks
    fewest_programs: int = 264  # batch tiles are made smaller until there are as many
    group: int = 8
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def layout(self) -> BlockLayout:
        mask = random_mask(*self.grid, self.density, self.seed)
        out_features, in_features = (
            blocks * side - cut for blocks, side, cut in zip(self.grid, self.block_shape, self.cut, strict=True)
        )
        if self.transposed:
            layout = self._shared(mask.mT.contiguous(), self.block_shape[::-1], in_features, out_features)
            return layout.T
        return self._shared(mask, self.block_shape, out_features, in_features)

    def _shared(self, mask, block_shape, out_features, in_features) -> BlockLayout:
        rows, columns = mask.nonzero(as_tuple=True)
        slot = None if self.slots is None else torch.arange(len(rows)) % self.slots
        return BlockLayout.from_entries(rows, columns, block_shape, out_features, in_features, slot)

    def tensor(self, *shape: int, seed: int) -> torch.Tensor:
        return random_tensor(*shape, dtype=self.dtype, seed=self.seed + seed)

    @contextmanager
    def settings(self, kernels=shipped):
        """tf32 as torch's setting says; how the work is cut up."""
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        try:
            with mock.patch.multiple(kernels, ENOUGH_PROGRAMS=self.fewest_programs, GROUP=self.group):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def used_part(layout: BlockLayout) -> torch.Tensor:
    """bool, of the shape of values: what does not reach past the edge of the weight, in any entry of its slot."""
    block_out, block_in = layout.block_shape
    used = torch.zeros(layout.num_slots, block_out, block_in, dtype=torch.bool)
    rows, columns = layout.coordinates()
    for row, column, slot in zip(rows.tolist(), columns.tolist(), layout.by_output.slot.tolist(), strict=True):
        used[slot, : layout.out_features - row * block_out, : layout.in_features - column * block_in] = True
    return used.mT if layout.transposed else used


def spoil_unused(values: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """NaN and infinity wherever a value block reaches past the edge of the weight."""
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=values.dtype)
    return torch.where(used_part(layout), values, bad[torch.arange(values.numel()) % 3].view(values.shape))


def check_product(case: Case, kernels=shipped) -> torch.Tensor:
    """The product of ``case`` by ``kernels`` is within its budget; returns it."""
    layout = case.layout()
    x = case.tensor(case.batch, layout.in_features, seed=1)
    values = case.tensor(*layout.values_shape, seed=2)
    bias = case.tensor(layout.out_features, seed=3) if case.with_bias else None
    rest = (*layout.by_output, layout.out_features, layout.transposed)
    with case.settings(kernels), strict(case.seed):
        ours = kernels.block_sparse_linear(x, spoil_unused(values, layout), bias, *rest, case.activation)

    def dense(*inputs, activation=case.activation):
        return reference.block_sparse_linear(*inputs, *rest, activation)

    exact = dense(*_cast(torch.float64, x, values, bias))
    yardstick = dense(_as_multiplied(case, x), _as_multiplied(case, values), bias)
    terms = dense(*(part if part is None else part.double().abs() for part in (x, values, bias)), activation="none")
    _check("product", case, ours, yardstick, exact, terms)
    return ours


def check_sampled(case: Case, kernels=shipped) -> torch.Tensor:
    """The sampled product of ``case`` by ``kernels`` is within its budget; returns it."""
    layout = case.layout()
    a = case.tensor(case.batch, layout.out_features, seed=4)
    b = case.tensor(case.batch, layout.in_features, seed=5)
    if layout.transposed:
        a, b, layout = b, a, layout.T
    rest = (*layout.by_output, layout.num_slots, layout.shared, *layout.block_shape)
    with case.settings(kernels), strict(case.seed):
        ours = kernels.sampled_block_matmul(a, b, *rest)
    exact = reference.sampled_block_matmul(a.double(), b.double(), *rest)
    yardstick = reference.sampled_block_matmul(_as_multiplied(case, a), _as_multiplied(case, b), *rest)
    terms = reference.sampled_block_matmul(a.double().abs(), b.double().abs(), *rest)
    _check("sampled", case, ours, yardstick, exact, terms)
    return ours


def check_sampled_nan(case: Case, kernels=shipped) -> None:
    """NaN in one row of the batch reaches every element of the weight, and nothing past its edge."""
    layout = case.layout()
    a, b = (case.tensor(case.batch, features, seed=4) for features in (layout.out_features, layout.in_features))
    a[case.batch // 2] = b[case.batch // 2] = float("nan")
    with case.settings(kernels), strict(case.seed):
        values = kernels.sampled_block_matmul(
            a, b, *layout.by_output, layout.num_slots, layout.shared, *layout.block_shape
        )
    assert torch.equal(values.isnan(), used_part(layout)) and (values.nan_to_num() == 0).all()


def _cast(dtype, *tensors):
    return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


def _as_multiplied(case: Case, tensor: torch.Tensor) -> torch.Tensor:
    """Dense torch on a CPU has no tf32; on rounded inputs it computes the same."""
    return torch.from_numpy(to_tf32(tensor.numpy())) if case.precision == "tf32" else tensor


def _check(kernel, case, ours, yardstick, exact, terms) -> None:
    """Sums are in float32, and the result is rounded once: that is what no order of summation can avoid."""
    assert ours.dtype == case.dtype
    shrink = torch.finfo(torch.float32).eps / torch.finfo(case.dtype).eps
    rounded_once = terms if case.dtype == torch.float32 else exact.abs() + shrink * terms
    assert_within_budget(ours, yardstick, exact, str(case), magnitude=rounded_once)
    ledger.reached("L1", f"{kernel} {case.precision} {case.block_shape}{' transposed' if case.transposed else ''}")
