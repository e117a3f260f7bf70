"""Element-wise patterns of pruned weights: which elements exist, and how the survivors are stored."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from compsparse_kernels.layouts import index
from compsparse_kernels.layouts.block import BlockLayout, check_block_shape
from compsparse_kernels.layouts.checks import (
    check_bool_matrix,
    check_compressed,
    check_positive_int,
    describe,
    own,
    require,
)
from compsparse_kernels.layouts.choice import choose_kind, count
from compsparse_kernels.layouts.costs import CostModel, this_machine
from compsparse_kernels.layouts.nm import NMLayout, check_nm, require_tightest

KINDS = ("csr", "block", "nm", "dense")
DEFAULT_BLOCK_SHAPE = (16, 16)
INT16_COLUMNS = 2**15  # the columns that int16 can number
INDEX_DTYPES = (torch.int16, torch.int32)


class MaskOrder(NamedTuple):
    """Survivors in one order: row r holds entries ptr[r]..ptr[r + 1]; entry p sits in column idx[p] and has the value
    of perm[p], or of p itself where perm is None."""

    ptr: torch.Tensor  # int64 [rows + 1]
    idx: torch.Tensor  # [nnz], int16 where the columns are at most 32768, else int32
    perm: torch.Tensor | None  # int32 [nnz], int64 where nnz >= 2^31


@dataclass(frozen=True, eq=False)
class MaskLayout:
    """Pattern of a pruned weight ``[out_features, in_features]``, and the way its survivors are stored:

    ========= ====================================================== ===============================
    kind      the pattern                                            values
    ========= ====================================================== ===============================
    ``csr``   both orders: by output and by input                    ``[nnz]``, by output
    ``block`` a :class:`BlockLayout` of the blocks with survivors,   ``[nnz_blocks, bo, bi]``
              and a bool mask of their elements where some are partly
              filled
    ``nm``    a :class:`NMLayout` of the slots, and a bool mask of   ``[out, groups, n]``
              those that hold a survivor where some do not
    ``dense`` the bool mask                                          ``[out, in]``
    ========= ====================================================== ===============================

    Usually built by :meth:`from_mask`, :meth:`from_dense`, :meth:`from_csr` or :meth:`from_scipy`.

    Args:
        out_features, in_features: shape of the weight.
        kind: ``"csr"``, ``"block"``, ``"nm"`` or ``"dense"``.
        by_output: for csr, the entries by row: offsets int64 ``[out + 1]``, columns int16 or int32 ``[nnz]`` strictly
            ascending in each row, and None. The order by input is derived. What is kept is :attr:`index_dtype`.
        blocks: for block, which blocks are stored; none shared.
        mask: bool, of the shape of the values: for dense which elements survive; for block and nm the same, or None
            where all elements of the blocks, or all slots up to the last column, do.
        nm: for nm, where the slots are.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import MaskLayout
        >>> layout = MaskLayout.from_mask(torch.eye(64, dtype=torch.bool))
        >>> layout
        MaskLayout(64 x 64, csr, 64 survivors, density 0.016)
        >>> values = layout.pack(torch.randn(64, 64))
        >>> values.shape, layout.unpack(values).shape
        (torch.Size([64]), torch.Size([64, 64]))
        >>> MaskLayout.from_mask(torch.arange(8).expand(2, 8) % 4 < 2, kind="nm", nm=(2, 4))
        MaskLayout(2 x 8, 2:4, 8 survivors, density 0.500)
    """

    out_features: int
    in_features: int
    kind: str
    by_output: MaskOrder | None = None
    blocks: BlockLayout | None = None
    mask: torch.Tensor | None = None
    nm: NMLayout | None = None
    by_input: MaskOrder | None = field(init=False, default=None)
    values_shape: tuple[int, ...] = field(init=False)
    transposed: bool = field(init=False, default=False)  # values are stored as those of .T are
    drops: bool = field(init=False, default=False)  # does ``mask`` drop anything?

    def __post_init__(self):
        check_positive_int("out_features", self.out_features)
        check_positive_int("in_features", self.in_features)
        require(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}", repr(self.kind))
        parts = {"by_output": ("csr",), "blocks": ("block",), "nm": ("nm",), "mask": ("block", "nm", "dense")}
        for name, kinds in parts.items():
            unused = self.kind in kinds or getattr(self, name) is None
            require(unused, name, f"None with kind {self.kind}", describe(getattr(self, name)))
        check = {"csr": self._check_csr, "block": self._check_block, "nm": self._check_nm, "dense": self._check_dense}
        object.__setattr__(self, "values_shape", check[self.kind]())
        object.__setattr__(self, "drops", self.mask is not None and not bool(self.mask.all()))

    def _check_csr(self) -> tuple[int, ...]:
        """Checks and takes over what kind csr is made of, as the next three do; returns the values' shape."""
        ok = isinstance(self.by_output, tuple) and len(self.by_output) == 3
        require(ok, "by_output", "(row_ptr, col_idx, None)", describe(self.by_output), TypeError)
        ptr, idx, perm = self.by_output
        check_compressed(ptr, idx, self.out_features, self.in_features, ("row_ptr", "col_idx"), INDEX_DTYPES)
        require(perm is None, "by_output[2]", "None: values lie by output", describe(perm))
        by_input = index.transpose(ptr.numpy(), idx.int().numpy(), self.in_features)
        by_input = MaskOrder(*map(torch.from_numpy, by_input))
        columns, rows = idx.to(_narrowest(self.in_features)), by_input.idx.to(_narrowest(self.out_features))
        object.__setattr__(self, "by_output", MaskOrder(own(ptr), own(columns), None))
        object.__setattr__(self, "by_input", by_input._replace(idx=rows))
        return (len(idx),)

    def _check_part(self, name, part_type):
        part = getattr(self, name)
        require(isinstance(part, part_type), name, part_type.__name__, describe(part), TypeError)
        same = (part.out_features, part.in_features) == (self.out_features, self.in_features)
        require(same, name, f"{self.out_features} x {self.in_features}", part)

    def _check_block(self):
        self._check_part("blocks", BlockLayout)
        plain = not self.blocks.shared and not self.blocks.transposed
        require(plain, "blocks", "neither shared nor transposed", self.blocks)
        if self.mask is not None:
            _check_mask(self.mask, self.blocks.values_shape)
            object.__setattr__(self, "mask", own(self.mask))
        return self.blocks.values_shape

    def _check_nm(self):
        self._check_part("nm", NMLayout)
        if self.mask is not None:
            _check_mask(self.mask, self.nm.values_shape)
            past_the_end = bool((self.mask & ~self.nm.inside()).any())
            require(not past_the_end, "mask", "False past the last column", "True")
            object.__setattr__(self, "mask", own(self.mask))
        return self.nm.values_shape

    def _check_dense(self):
        shape = (self.out_features, self.in_features)
        _check_mask(self.mask, shape)
        object.__setattr__(self, "mask", own(self.mask))
        return shape

    @classmethod
    def from_mask(
        cls,
        mask: torch.Tensor,
        kind: str = "auto",
        block_shape: tuple[int, int] | None = None,
        nm: tuple[int, int] | None = None,
        costs: CostModel | None = None,
    ) -> "MaskLayout":
        """From a bool mask ``[out, in]``, as a given kind, or as the one that trains fastest.

        Args:
            mask: which elements survive.
            kind: ``"csr"``, ``"block"``, ``"nm"``, ``"dense"``; or ``"auto"``: what ``costs`` say is fastest, and dense
                where nothing is faster than a dense layer.
            block_shape: of kind block, (16, 16) by default; with auto the only one to be considered, where 32 x 32,
                16 x 16 and 8 x 8 are otherwise.
            nm: of kind nm, (N, M): at most N survivors among M neighbours of a row; by default the cheapest common
                pattern that the mask satisfies (:func:`layouts.nm.tightest`).
            costs: what auto goes by. None is this machine: the first process that needs it spends a second on measuring
                it, once and for all (a JSON file in the user's cache folder).
                :data:`~compsparse_kernels.layouts.costs.SHIPPED_COSTS` measures nothing, nor does the environment's
                ``COMPSPARSE_CALIBRATE=0``.
        """
        check_bool_matrix("mask", mask)
        require(mask.numel() > 0, "mask", "at least one row and one column", describe(mask))
        require(kind == "auto" or kind in KINDS, "kind", f"auto or one of {', '.join(KINDS)}", repr(kind))
        if block_shape is not None:
            require(kind in ("auto", "block"), "block_shape", f"None with kind {kind}", block_shape)
            check_block_shape(block_shape)
        if costs is not None:
            require(isinstance(costs, CostModel), "costs", "CostModel or None", describe(costs), TypeError)
            require(kind == "auto", "costs", f"None with kind {kind}", "a CostModel")
        if nm is not None:
            require(kind == "nm", "nm", f"None with kind {kind}", nm)
            check_nm(nm)
        mask = mask.detach().cpu().contiguous()
        if kind == "auto":
            kind, block_shape, nm = choose_kind(mask, block_shape, this_machine() if costs is None else costs)
        if kind == "csr":
            ptr, idx = map(torch.from_numpy, index.compress(mask.numpy()))
            return cls(*mask.shape, kind, MaskOrder(ptr, idx, None))
        if kind == "block":
            blocks = BlockLayout.from_dense(mask, block_shape or DEFAULT_BLOCK_SHAPE)
            whole = count(mask) == _elements(blocks)
            return cls(*mask.shape, kind, blocks=blocks, mask=None if whole else blocks.pack(mask))
        if kind == "nm":
            slots = NMLayout.from_mask(mask, *(nm or require_tightest(mask)))
            whole = count(mask) == slots.nnz
            return cls(*mask.shape, kind, nm=slots, mask=None if whole else slots.pack(mask))
        return cls(*mask.shape, kind, mask=mask.clone())

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor,
        kind: str = "auto",
        block_shape: tuple[int, int] | None = None,
        nm: tuple[int, int] | None = None,
        costs: CostModel | None = None,
    ) -> "MaskLayout":
        """The non-zeros of a dense ``weight [out, in]``; the rest as in :meth:`from_mask`."""
        ok = isinstance(weight, torch.Tensor) and weight.dim() == 2
        require(ok, "weight", "2-D tensor", describe(weight))
        return cls.from_mask(weight.detach() != 0, kind, block_shape, nm, costs)

    @classmethod
    def from_csr(cls, weight: torch.Tensor) -> tuple["MaskLayout", torch.Tensor]:
        """Layout (kind csr) and values of a ``torch.sparse_csr`` matrix; stored zeros are survivors."""
        ok = isinstance(weight, torch.Tensor) and weight.layout == torch.sparse_csr and weight.dim() == 2
        require(ok, "weight", "2-D sparse CSR tensor", describe(weight))
        ptr, idx = weight.crow_indices().long().cpu(), weight.col_indices().int().cpu()
        return cls(*weight.shape, "csr", MaskOrder(ptr, idx, None)), own(weight.values())

    @classmethod
    def from_scipy(cls, weight) -> tuple["MaskLayout", torch.Tensor]:
        """Layout (kind csr) and values of a ``scipy.sparse`` CSR matrix or array; stored zeros are survivors."""
        require(getattr(weight, "format", None) == "csr", "weight", "scipy.sparse CSR matrix", type(weight).__name__)
        weight = weight.copy()
        weight.sum_duplicates()
        weight.sort_indices()
        ptr, idx = torch.from_numpy(weight.indptr.astype(np.int64)), torch.from_numpy(weight.indices.astype(np.int32))
        return cls(*map(int, weight.shape), "csr", MaskOrder(ptr, idx, None)), torch.from_numpy(weight.data.copy())

    @cached_property
    def nnz(self) -> int:
        """Number of survivors."""
        if self.kind == "csr":
            return len(self.by_output.idx)
        if self.mask is not None:
            return int(self.mask.sum())
        return _elements(self.blocks) if self.kind == "block" else self.nm.nnz

    @property
    def dropping_mask(self) -> torch.Tensor | None:
        """``mask``, or None where it drops nothing: then values need no masking."""
        return self.mask if self.drops else None

    @property
    def density(self) -> float:
        """Share of the weight's elements that survive."""
        return self.nnz / (self.out_features * self.in_features)

    @property
    def index_dtype(self) -> torch.dtype | None:
        """Dtype of the columns in ``by_output``, of kind csr: int16 up to 32768 ``in_features``, else int32. A layout
        that was pickled when there was int32 alone keeps it."""
        return self.by_output.idx.dtype if self.kind == "csr" else None

    @property
    def device(self) -> torch.device:
        return self._index_tensor().device

    def _index_tensor(self) -> torch.Tensor:
        if self.kind == "nm":
            return self.nm.positions
        return {"csr": self.by_output, "block": self.blocks and self.blocks.by_output}.get(self.kind, (self.mask,))[0]

    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of each survivor, int64, by output; kind csr only."""
        require(self.kind == "csr", "layout", "kind csr", self)
        ptr, idx, _ = self.by_output
        return torch.arange(len(ptr) - 1, device=idx.device).repeat_interleave(ptr.diff()), idx.long()

    def to_mask(self) -> torch.Tensor:
        """bool ``[out, in]``: which elements survive."""
        ones = torch.ones(self.values_shape, dtype=torch.bool, device=self.device)
        return self.unpack(ones)

    @cached_property
    def T(self) -> "MaskLayout":
        """Layout of the transposed weight, over the same values: no copy of them is made."""
        other = copy.copy(self)
        for name, value in (
            ("out_features", self.in_features),
            ("in_features", self.out_features),
            ("by_output", self.by_input),
            ("by_input", self.by_output),
            ("blocks", None if self.blocks is None else self.blocks.T),
            ("transposed", not self.transposed),
        ):
            object.__setattr__(other, name, value)
        other.__dict__["T"] = self
        return other

    def to(self, device: torch.device | str) -> "MaskLayout":
        """The same layout with its index tensors on ``device``."""
        if torch.device(device) == self.device:
            return self
        other = copy.copy(self)
        other.__dict__.pop("T", None)
        for name in ("by_output", "by_input"):
            order = getattr(self, name)
            if order is not None:
                moved = MaskOrder(*(None if part is None else part.to(device) for part in order))
                object.__setattr__(other, name, moved)
        for name in ("blocks", "nm", "mask"):
            if getattr(self, name) is not None:
                object.__setattr__(other, name, getattr(self, name).to(device))
        return other

    def masked(self, values: torch.Tensor) -> torch.Tensor:
        """Values with zero where the mask drops, even if what is there is not finite; kind csr has no such places."""
        return values if self.mask is None else torch.where(self.mask, values, values.new_zeros(()))

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """``[out, in]`` -> values of shape ``values_shape``; what the mask drops is zero there (block, nm, dense) or
        not stored (csr)."""
        shape = (self.out_features, self.in_features)
        ok = isinstance(weight, torch.Tensor) and weight.shape == shape
        require(ok, "weight", f"tensor {list(shape)}", describe(weight))
        if self.transposed:
            return self.T.pack(weight.mT)
        if self.kind == "csr":
            rows, columns = self.coordinates()
            return weight[rows, columns]
        values = weight if self.kind == "dense" else self._slots.pack(weight)
        return values.clone() if self.mask is None else self.masked(values)

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Values of shape ``values_shape`` -> dense ``[out, in]``, zero where the mask drops."""
        ok = isinstance(values, torch.Tensor) and values.shape == self.values_shape
        require(ok, "values", f"tensor {list(self.values_shape)}", describe(values))
        if self.transposed:
            return self.T.unpack(values).mT.contiguous()
        if self.kind == "csr":
            rows, columns = self.coordinates()
            dense = values.new_zeros(self.out_features, self.in_features)
            return dense.index_put((rows, columns), values)
        return self.masked(values) if self.kind == "dense" else self._slots.unpack(self.masked(values))

    @property
    def _slots(self) -> BlockLayout | NMLayout:
        """Of kind block or nm, what says where the values lie."""
        return self.blocks if self.kind == "block" else self.nm

    def to_csr(self, values: torch.Tensor) -> torch.Tensor:
        """As ``torch.sparse_csr``, from any kind."""
        if self.kind != "csr":
            csr = MaskLayout.from_mask(self.to_mask(), "csr").to(self.device)
            return csr.to_csr(csr.pack(self.unpack(values)))
        ok = isinstance(values, torch.Tensor) and values.shape == self.values_shape
        require(ok, "values", f"tensor {list(self.values_shape)}", describe(values))
        ptr, idx, perm = self.by_output
        entries = values if perm is None else values[perm.long()]
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(ptr, idx.long(), entries, size=shape, check_invariants=False)

    def to_scipy(self, values: torch.Tensor):
        """As a ``scipy.sparse.csr_array``."""
        from scipy.sparse import csr_array

        csr = self.to_csr(values.detach()).cpu()
        parts = (csr.values(), csr.col_indices(), csr.crow_indices())
        return csr_array(tuple(part.numpy() for part in parts), shape=tuple(csr.shape))

    def __repr__(self) -> str:
        kind = self.kind
        if kind == "block":
            kind = f"{self.blocks.nnz_blocks} blocks {' x '.join(map(str, self.blocks.block_shape))}"
        elif kind == "nm":
            kind = f"{self.nm.n}:{self.nm.m}{' of the transpose' if self.transposed else ''}"
        return (
            f"MaskLayout({self.out_features} x {self.in_features}, {kind}, {self.nnz} survivors,"
            f" density {self.density:.3f})"
        )


def _narrowest(columns: int) -> torch.dtype:
    """The dtype that numbers so many columns in the fewest bytes."""
    return torch.int16 if columns <= INT16_COLUMNS else torch.int32


def _elements(blocks: BlockLayout) -> int:
    """Elements of the weight that the blocks hold; a ragged block has fewer."""
    return round(blocks.density * blocks.out_features * blocks.in_features)


def _check_mask(mask: object, shape: tuple[int, ...]) -> None:
    ok = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == shape
    require(ok, "mask", f"bool tensor {list(shape)}", describe(mask))
