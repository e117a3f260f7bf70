"""Block-sparse patterns: which blocks of a weight matrix exist, in both orders."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from compsparse_kernels.layouts import index
from compsparse_kernels.layouts.checks import (
    check_bool_matrix,
    check_compressed,
    check_integers,
    check_positive_int,
    describe,
    own,
    require,
)

LARGEST_BLOCK = 128


class BlockOrder(NamedTuple):
    """Entries in one order: row r of blocks holds entries ptr[r]..ptr[r + 1]; entry p sits in column idx[p] of blocks
    and has the values of slot[p]."""

    ptr: torch.Tensor  # int64 [block rows + 1]
    idx: torch.Tensor  # int32 [entries]
    slot: torch.Tensor  # int32 [entries]


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Pattern of a block-sparse weight ``[out_features, in_features]`` (BSR, both orders, rectangular blocks).

    The weight is cut into blocks of ``block_shape = (block_out, block_in)``; the last row and column of blocks may be
    ragged. Entry ``p`` of the pattern has its values in ``values[slot[p]]``, so entries may share a slot (weight
    tying). Values have shape ``[num_slots, block_out, block_in]``; without sharing there are as many slots as entries.

    Usually built by :meth:`from_mask`, :meth:`from_dense`, :meth:`from_entries`, :meth:`from_bsr` or
    :meth:`from_scipy`.

    Args:
        out_features, in_features: shape of the weight.
        block_shape: rows and columns of a block, 1..128 each.
        by_output: the entries by row of blocks: offsets int64 ``[ceil(out / block_out) + 1]``, columns int32
            ``[entries]`` strictly ascending in each row, slots int32 ``[entries]``. The order by input is derived.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import BlockLayout
        >>> layout = BlockLayout.from_mask(torch.eye(4, dtype=torch.bool), block_shape=(16, 8))
        >>> layout
        BlockLayout(64 x 32, blocks 16 x 8, 4 entries, density 0.250)
        >>> values = layout.pack(torch.randn(64, 32))
        >>> values.shape, layout.unpack(values).shape
        (torch.Size([4, 16, 8]), torch.Size([64, 32]))
    """

    out_features: int
    in_features: int
    block_shape: tuple[int, int]
    by_output: BlockOrder
    by_input: BlockOrder = field(init=False)
    num_slots: int = field(init=False)
    nnz_blocks: int = field(init=False)
    values_shape: tuple[int, int, int] = field(init=False)
    transposed: bool = field(init=False, default=False)  # values are stored [block_in, block_out]

    def __post_init__(self):
        check_positive_int("out_features", self.out_features)
        check_positive_int("in_features", self.in_features)
        check_block_shape(self.block_shape)
        three = isinstance(self.by_output, tuple) and len(self.by_output) == 3
        require(three, "by_output", "(row_ptr, col_idx, slot)", describe(self.by_output), TypeError)
        ptr, idx, slot = self.by_output
        rows, columns = self.grid
        check_compressed(ptr, idx, rows, columns, ("row_ptr", "col_idx"))
        num_slots = _count_slots(slot, len(idx))
        ptr, idx, slot = own(ptr), own(idx), own(slot)
        by_column, row_idx, perm = index.transpose(ptr.numpy(), idx.numpy(), columns)
        by_input = BlockOrder(
            torch.from_numpy(by_column), torch.from_numpy(row_idx), slot[torch.from_numpy(perm).long()]
        )
        for name, value in (
            ("num_slots", num_slots),
            ("nnz_blocks", len(idx)),
            ("values_shape", (num_slots, *self.block_shape)),
            ("by_output", BlockOrder(ptr, idx, slot)),
            ("by_input", by_input),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def from_mask(
        cls,
        block_mask: torch.Tensor,
        block_shape: tuple[int, int],
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> "BlockLayout":
        """From a bool mask over blocks, ``[ceil(out / block_out), ceil(in / block_in)]``.

        ``in_features`` and ``out_features`` are given where the last block is ragged; by default every block is whole.
        """
        check_bool_matrix("block_mask", block_mask)
        check_block_shape(block_shape)
        shape = []
        for name, given, blocks, size in (
            ("out_features", out_features, block_mask.shape[0], block_shape[0]),
            ("in_features", in_features, block_mask.shape[1], block_shape[1]),
        ):
            features = blocks * size if given is None else given
            check_positive_int(name, features)
            require(
                -(-features // size) == blocks, name, f"{blocks} blocks of {size}, the last perhaps ragged", features
            )
            shape.append(features)
        ptr, idx = index.compress(np.ascontiguousarray(block_mask.cpu().numpy()))
        return cls(*shape, tuple(block_shape), _own_slots(torch.from_numpy(ptr), torch.from_numpy(idx)))

    @classmethod
    def from_entries(
        cls,
        rows: torch.Tensor,
        columns: torch.Tensor,
        block_shape: tuple[int, int],
        out_features: int,
        in_features: int,
        slot: torch.Tensor | None = None,
    ) -> "BlockLayout":
        """From coordinates of blocks in any order, each at most once; ``slot`` names the value block of each."""
        check_positive_int("out_features", out_features)
        check_positive_int("in_features", in_features)
        check_block_shape(block_shape)
        grid = (-(-out_features // block_shape[0]), -(-in_features // block_shape[1]))
        for name, value, limit in (("rows", rows, grid[0]), ("columns", columns, grid[1])):
            check_integers(name, value)
            ok = len(value) == 0 or (int(value.min()) >= 0 and int(value.max()) < limit)
            require(ok, name, f"values in 0..{limit - 1}", value.tolist()[:8])
        require(len(rows) == len(columns), "columns", f"{len(rows)} values, as many as rows", len(columns))
        ptr, idx, order = index.sort_entries(rows.cpu().numpy(), columns.cpu().numpy(), grid[0])
        ptr, idx = torch.from_numpy(ptr), torch.from_numpy(idx)
        if slot is None:
            by_output = _own_slots(ptr, idx)
        else:
            check_integers("slot", slot)
            require(slot.shape == rows.shape, "slot", f"{len(rows)} values, as many as rows", describe(slot))
            _check_slot_range(slot, len(rows))  # before int32 wraps
            by_output = BlockOrder(ptr, idx, slot.cpu()[torch.from_numpy(order)].to(torch.int32))
        return cls(out_features, in_features, tuple(block_shape), by_output)

    @classmethod
    def from_dense(cls, weight: torch.Tensor, block_shape: tuple[int, int]) -> "BlockLayout":
        """The blocks of a dense ``weight [out, in]`` (or of a bool mask of that shape) that hold any non-zero."""
        ok = isinstance(weight, torch.Tensor) and weight.dim() == 2
        require(ok, "weight", "2-D tensor", describe(weight))
        check_block_shape(block_shape)
        mask = np.ascontiguousarray((weight.detach() != 0).cpu().numpy())
        blocks = torch.from_numpy(index.block_any(mask, *block_shape))
        return cls.from_mask(blocks, block_shape, in_features=weight.shape[1], out_features=weight.shape[0])

    @classmethod
    def from_bsr(cls, weight: torch.Tensor) -> tuple["BlockLayout", torch.Tensor]:
        """Layout and values of a ``torch.sparse_bsr`` matrix."""
        ok = isinstance(weight, torch.Tensor) and weight.layout == torch.sparse_bsr and weight.dim() == 2
        require(ok, "weight", "2-D sparse BSR tensor", describe(weight))
        values = weight.values()
        ptr, idx = weight.crow_indices().long().cpu(), weight.col_indices().int().cpu()
        layout = cls(*weight.shape, tuple(values.shape[1:]), _own_slots(ptr, idx))
        return layout, own(values)

    @classmethod
    def from_scipy(cls, weight) -> tuple["BlockLayout", torch.Tensor]:
        """Layout and values of a ``scipy.sparse`` BSR matrix or array."""
        require(getattr(weight, "format", None) == "bsr", "weight", "scipy.sparse BSR matrix", type(weight).__name__)
        weight = weight.copy()
        weight.sum_duplicates()
        weight.sort_indices()
        ptr, idx = torch.from_numpy(weight.indptr.astype(np.int64)), torch.from_numpy(weight.indices.astype(np.int32))
        layout = cls(*map(int, weight.shape), tuple(map(int, weight.blocksize)), _own_slots(ptr, idx))
        return layout, torch.from_numpy(weight.data.copy())

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return -(-self.out_features // self.block_shape[0]), -(-self.in_features // self.block_shape[1])

    @property
    def shared(self) -> bool:
        """Do several entries have the same values?"""
        return self.num_slots != self.nnz_blocks

    @property
    def device(self) -> torch.device:
        return self.by_output.idx.device

    @cached_property
    def density(self) -> float:
        """Share of the weight's elements that the blocks hold."""
        return self._stored() / (self.out_features * self.in_features)

    def _stored(self) -> int:
        rows, columns = (entry.long() for entry in self.coordinates())
        height = (self.out_features - rows * self.block_shape[0]).clamp(max=self.block_shape[0])
        width = (self.in_features - columns * self.block_shape[1]).clamp(max=self.block_shape[1])
        return int((height * width).sum())

    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of blocks of each entry, by output."""
        ptr, idx, _ = self.by_output
        rows = torch.arange(len(ptr) - 1, device=idx.device).repeat_interleave(ptr.diff())
        return rows, idx

    def block_mask(self) -> torch.Tensor:
        """bool ``[ceil(out / block_out), ceil(in / block_in)]``: which blocks exist."""
        rows, columns = self.coordinates()
        mask = torch.zeros(self.grid, dtype=torch.bool, device=self.device)
        mask[rows, columns.long()] = True
        return mask

    def to_mask(self) -> torch.Tensor:
        """bool ``[out, in]``: which elements of the weight exist."""
        block_out, block_in = self.block_shape
        mask = self.block_mask().repeat_interleave(block_out, 0).repeat_interleave(block_in, 1)
        return mask[: self.out_features, : self.in_features].contiguous()

    @cached_property
    def T(self) -> "BlockLayout":
        """Layout of the transposed weight, over the same values: no copy of them is made."""
        other = copy.copy(self)
        for name, value in (
            ("out_features", self.in_features),
            ("in_features", self.out_features),
            ("block_shape", self.block_shape[::-1]),
            ("by_output", self.by_input),
            ("by_input", self.by_output),
            ("transposed", not self.transposed),
        ):
            object.__setattr__(other, name, value)
        other.__dict__["T"] = self
        return other

    def to(self, device: torch.device | str) -> "BlockLayout":
        """The same layout with its index tensors on ``device``."""
        if torch.device(device) == self.device:
            return self
        other = copy.copy(self)
        other.__dict__.pop("T", None)
        for name in ("by_output", "by_input"):
            object.__setattr__(other, name, BlockOrder(*(part.to(device) for part in getattr(self, name))))
        return other

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """``[out, in]`` -> values ``[num_slots, block_out, block_in]``; what lies outside the blocks is dropped.

        Raises:
            ValueError: if entries that share a slot hold different values.
        """
        require(
            isinstance(weight, torch.Tensor) and weight.shape == (self.out_features, self.in_features),
            "weight",
            f"tensor [{self.out_features}, {self.in_features}]",
            describe(weight),
        )
        (block_out, block_in), (rows, columns) = self.block_shape, self.grid
        padding = (0, columns * block_in - self.in_features, 0, rows * block_out - self.out_features)
        blocks = torch.nn.functional.pad(weight, padding).view(rows, block_out, columns, block_in).transpose(1, 2)
        row_of, column_of = self.coordinates()
        entries = blocks[row_of, column_of.long()]
        if self.transposed:
            entries = entries.mT
        if not self.shared:
            return entries[_inverse(self.by_output.slot)].contiguous()
        values = entries.new_empty(self.values_shape).index_copy(0, self.by_output.slot.long(), entries)
        same = torch.equal(values[self.by_output.slot.long()], entries)
        require(same, "weight", "equal values in blocks that share a slot", "different ones")
        return values

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``[num_slots, block_out, block_in]`` -> dense ``[out, in]``, zero outside the blocks."""
        self._check_values(values)
        (block_out, block_in), (rows, columns) = self.block_shape, self.grid
        entries = values[self.by_output.slot.long()]
        if self.transposed:
            entries = entries.mT
        row_of, column_of = self.coordinates()
        blocks = values.new_zeros(rows, columns, block_out, block_in).index_put((row_of, column_of.long()), entries)
        dense = blocks.transpose(1, 2).reshape(rows * block_out, columns * block_in)
        return dense[: self.out_features, : self.in_features].contiguous()

    def _check_values(self, values: torch.Tensor) -> None:
        ok = isinstance(values, torch.Tensor) and values.shape == self.values_shape
        require(ok, "values", f"tensor {list(self.values_shape)}", describe(values))

    def to_bsr(self, values: torch.Tensor) -> torch.Tensor:
        """As ``torch.sparse_bsr``; that format has whole blocks only."""
        whole = self.out_features % self.block_shape[0] == 0 and self.in_features % self.block_shape[1] == 0
        require(whole, "layout", "whole blocks (torch.sparse_bsr has no ragged ones)", self)
        self._check_values(values)
        entries = values[self.by_output.slot.long()]
        ptr, idx, _ = self.by_output
        entries = entries.mT if self.transposed else entries
        shape = (self.out_features, self.in_features)
        return torch.sparse_bsr_tensor(ptr, idx.long(), entries, size=shape, check_invariants=False)  # checked already

    def to_scipy(self, values: torch.Tensor):
        """As a ``scipy.sparse.bsr_array``."""
        from scipy.sparse import bsr_array

        bsr = self.to_bsr(values.detach().cpu())
        parts = (bsr.values(), bsr.col_indices(), bsr.crow_indices())
        return bsr_array(tuple(part.numpy() for part in parts), shape=tuple(bsr.shape))

    def __repr__(self) -> str:
        block = " x ".join(map(str, self.block_shape))
        shared = f", {self.num_slots} slots" if self.shared else ""
        return (
            f"BlockLayout({self.out_features} x {self.in_features}, blocks {block}, {self.nnz_blocks} entries{shared},"
            f" density {self.density:.3f})"
        )


def _own_slots(ptr: torch.Tensor, idx: torch.Tensor) -> BlockOrder:
    return BlockOrder(ptr, idx, torch.arange(len(idx), dtype=torch.int32, device="cpu"))


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty(len(permutation), dtype=torch.long, device=permutation.device)
    inverse[permutation.long()] = torch.arange(len(permutation), device=permutation.device)
    return inverse


def _count_slots(slot: torch.Tensor, entries: int) -> int:
    ok = isinstance(slot, torch.Tensor) and slot.dtype == torch.int32 and slot.shape == (entries,)
    require(ok, "slot", f"int32 tensor [{entries}]", describe(slot))
    if entries == 0:
        return 0
    _check_slot_range(slot, entries)
    high = int(slot.max())
    unused = int((torch.bincount(slot.long(), minlength=high + 1) == 0).sum())
    require(unused == 0, "slot", f"every number from 0 to the largest, {high}", f"{unused} of them unused")
    return high + 1


def _check_slot_range(slot: torch.Tensor, entries: int) -> None:
    if entries:
        low, high = int(slot.min()), int(slot.max())
        require(low >= 0 and high < entries, "slot", f"values in 0..{entries - 1}", f"{low}..{high}")


def check_block_shape(block_shape: object) -> None:
    pair = isinstance(block_shape, (tuple, list)) and len(block_shape) == 2
    require(pair, "block_shape", "a pair (block_out, block_in)", block_shape, TypeError)
    for name, size in zip(("block_shape[0]", "block_shape[1]"), block_shape, strict=True):
        check_positive_int(name, size, most=LARGEST_BLOCK)
