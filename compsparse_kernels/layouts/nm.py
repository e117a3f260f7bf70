"""N:M patterns: of every M consecutive inputs of an output at most N have a weight."""

import copy
from dataclasses import dataclass, field
from functools import cached_property

import torch

from compsparse_kernels.layouts.checks import check_bool_matrix, check_positive_int, describe, own, require

LARGEST_GROUP = 256  # a position is at most a byte

# Cheapest first: by density, then by the size of a group (shorter positions, stronger structure).
COMMON = ((1, 16), (1, 8), (2, 16), (1, 4), (2, 8), (4, 16), (1, 2), (2, 4), (4, 8))


@dataclass(frozen=True, eq=False)
class NMLayout:
    """Pattern of an N:M sparse weight ``[out_features, in_features]``: a row is cut into groups of ``m`` consecutive
    columns, and each group has ``n`` slots, at different columns.

    Values have shape ``[out_features, groups, n]`` with ``groups = ceil(in_features / m)``; the slots of a group lie by
    column. Only where in its group each slot lies is stored, in 2 bits for m <= 4, 4 bits for m <= 16, else 8. The last
    group is ragged where ``m`` does not divide ``in_features``; its slots past the last column hold nothing: packed
    they are 0, and products leave them out.

    Every group has exactly ``n`` slots. A mask with fewer survivors somewhere has its spare slots at columns that it
    drops (:meth:`from_mask`); :class:`MaskLayout` of kind nm keeps what is in those at zero.

    Usually built by :meth:`from_mask`.

    Args:
        out_features, in_features: shape of the weight.
        n, m: slots and columns of a group, ``1 <= n <= m <= 256``.
        positions: uint8 ``[out_features, bytes]``: of slot s of a row (s = group * n + number in the group) the column
            in its group, the first in the lowest bits of a byte; strictly ascending in each group. Unused bits are 0.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021), section 3 (2:4); Zhou et al., "Learning
    N:M Fine-grained Structured Sparse Neural Networks From Scratch" (2021).

    Example:
        >>> import torch
        >>> from compsparse_kernels.layouts import NMLayout
        >>> weight = torch.tensor([[1.0, 0, 0, 2, 0, 3, 0, 4]])
        >>> layout = NMLayout.from_mask(weight != 0, 2, 4)
        >>> layout
        NMLayout(1 x 8, 2:4, density 0.500)
        >>> layout.pack(weight).tolist(), layout.positions.tolist()
        ([[[1.0, 2.0], [3.0, 4.0]]], [[220]])
    """

    out_features: int
    in_features: int
    n: int
    m: int
    positions: torch.Tensor
    values_shape: tuple[int, int, int] = field(init=False)

    def __post_init__(self):
        check_positive_int("out_features", self.out_features)
        check_positive_int("in_features", self.in_features)
        check_nm((self.n, self.m))
        object.__setattr__(self, "values_shape", (self.out_features, self.groups, self.n))
        shape = [self.out_features, -(-self.groups * self.n * self.bits // 8)]
        ok = isinstance(self.positions, torch.Tensor) and self.positions.dtype == torch.uint8
        ok = ok and list(self.positions.shape) == shape
        require(ok, "positions", f"uint8 tensor {shape}", describe(self.positions))
        object.__setattr__(self, "positions", own(self.positions))
        offsets = self.offsets()
        largest = int(offsets.max())
        require(largest < self.m, "positions", f"values in 0..{self.m - 1}", largest)
        ascending = bool((offsets.diff(dim=-1) > 0).all())
        require(ascending, "positions", "strictly ascending values in each group", "duplicate or unsorted values")
        clean = torch.equal(pack_offsets(offsets, self.bits), self.positions)
        require(clean, "positions", "0 in the bits that no slot uses", "1")

    @classmethod
    def from_mask(cls, mask: torch.Tensor, n: int, m: int) -> "NMLayout":
        """From a bool mask ``[out, in]`` with at most ``n`` survivors in each group, all of which get a slot; spare
        slots lie at the first columns of the group that have none."""
        check_bool_matrix("mask", mask)
        require(mask.numel() > 0, "mask", "at least one row and one column", describe(mask))
        check_nm((n, m))
        grouped = group(mask.detach().cpu(), m)
        counts = grouped.sum(-1)
        if int(counts.max()) > n:
            row, number = (counts > n).nonzero()[0].tolist()
            wanted = f"at most {n} survivors in each {m} columns of a row"
            came = f"{int(counts[row, number])} in {_place(row, number, m, mask.shape[1])}"
            require(False, "mask", wanted, came)
        # Survivors first, then the others, each by column: of these the first n, by column again.
        order = (~grouped).to(torch.uint8).argsort(dim=-1, stable=True)[..., :n].sort(dim=-1).values
        return cls(*mask.shape, n, m, pack_offsets(order, bits_of(m)))

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.in_features // self.m)

    @property
    def bits(self) -> int:
        """Bits of a stored position."""
        return bits_of(self.m)

    @property
    def nbytes(self) -> int:
        """Bytes of the pattern."""
        return self.positions.numel()

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @cached_property
    def nnz(self) -> int:
        """Number of the weight's elements that have a slot."""
        return int(self.inside().sum())

    @property
    def density(self) -> float:
        """Share of the weight's elements that have a slot."""
        return self.nnz / (self.out_features * self.in_features)

    def offsets(self) -> torch.Tensor:
        """int64 ``[out, groups, n]``: the column of each slot in its group."""
        return unpack_offsets(self.positions, self.groups, self.n, self.bits)

    def columns(self) -> torch.Tensor:
        """int64 ``[out, groups, n]``: the column of each slot; ``in_features`` or more in a ragged group's surplus."""
        return columns_of(self.offsets(), self.m)

    def inside(self) -> torch.Tensor:
        """bool ``[out, groups, n]``: which slots lie in the weight, and not past the end of a ragged group."""
        return self.columns() < self.in_features

    def to_mask(self) -> torch.Tensor:
        """bool ``[out, in]``: which elements of the weight have a slot."""
        return self.unpack(torch.ones(self.values_shape, dtype=torch.bool, device=self.device))

    def to(self, device: torch.device | str) -> "NMLayout":
        """The same layout with its positions on ``device``."""
        if torch.device(device) == self.device:
            return self
        other = copy.copy(self)
        object.__setattr__(other, "positions", self.positions.to(device))
        return other

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """``[out, in]`` -> values ``[out, groups, n]``; what has no slot is dropped."""
        shape = [self.out_features, self.in_features]
        ok = isinstance(weight, torch.Tensor) and list(weight.shape) == shape
        require(ok, "weight", f"tensor {shape}", describe(weight))
        return group(weight, self.m).gather(-1, self.offsets())

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``[out, groups, n]`` -> dense ``[out, in]``, zero where there is no slot."""
        ok = isinstance(values, torch.Tensor) and values.shape == self.values_shape
        require(ok, "values", f"tensor {list(self.values_shape)}", describe(values))
        return spread(values, self.offsets(), self.m, self.in_features)

    def __repr__(self) -> str:
        return f"NMLayout({self.out_features} x {self.in_features}, {self.n}:{self.m}, density {self.density:.3f})"


def tightest(mask: torch.Tensor) -> tuple[int, int] | None:
    """The cheapest ``(n, m)`` of ``COMMON`` that a mask ``[out, in]`` satisfies, or None."""
    check_bool_matrix("mask", mask)
    largest = {m: int(group(mask, m).sum(-1).max()) for m in {m for _, m in COMMON}}
    return next(((n, m) for n, m in COMMON if largest[m] <= n), None)


def require_tightest(mask: torch.Tensor) -> tuple[int, int]:
    """What :func:`tightest` finds; where it finds nothing, an error that names a group too full for the last of
    ``COMMON``."""
    found = tightest(mask)
    if found is None:
        n, m = COMMON[-1]
        counts = group(mask, m).sum(-1)
        row, number = (counts > n).nonzero()[0].tolist()
        *most, last = (f"{n}:{m}" for n, m in COMMON)
        wanted = f"a mask that is {', '.join(most)} or {last} (or give nm=(n, m))"
        came = f"{int(counts[row, number])} survivors in {_place(row, number, m, mask.shape[1])}"
        require(False, "mask", wanted, came)
    return found


def check_nm(nm: object) -> None:
    """``(n, m)`` with ``1 <= n <= m <= 256``."""
    pair = isinstance(nm, tuple) and len(nm) == 2
    require(pair, "nm", "(n, m)", repr(nm), TypeError)
    check_positive_int("m", nm[1], LARGEST_GROUP)
    check_positive_int("n", nm[0], nm[1])


def bits_of(m: int) -> int:
    """Bits in which a position in a group of ``m`` is stored: a divisor of 8, so that no position straddles bytes."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


def group(dense: torch.Tensor, m: int) -> torch.Tensor:
    """``[out, in]`` -> ``[out, groups, m]``, zero past the last column."""
    padded = torch.nn.functional.pad(dense, (0, -dense.shape[1] % m))
    return padded.view(dense.shape[0], -1, m)


def spread(values: torch.Tensor, offsets: torch.Tensor, m: int, in_features: int) -> torch.Tensor:
    """Values and offsets ``[out, groups, n]`` -> dense ``[out, in]``."""
    grouped = values.new_zeros(*values.shape[:2], m).scatter(-1, offsets, values)
    return grouped.flatten(1)[:, :in_features].contiguous()


def columns_of(offsets: torch.Tensor, m: int) -> torch.Tensor:
    """Offsets in their groups ``[out, groups, n]`` -> columns."""
    return offsets + m * torch.arange(offsets.shape[1], device=offsets.device)[:, None]


def pack_offsets(offsets: torch.Tensor, bits: int) -> torch.Tensor:
    """``[out, groups, n]`` -> uint8 ``[out, ceil(groups * n * bits / 8)]``."""
    per_byte = 8 // bits
    slots = offsets.flatten(1).to(torch.uint8)
    padded = torch.nn.functional.pad(slots, (0, -slots.shape[1] % per_byte)).view(len(slots), -1, per_byte)
    shifted = padded << torch.arange(0, 8, bits, dtype=torch.uint8, device=offsets.device)
    return shifted.sum(-1, dtype=torch.uint8)  # the fields do not overlap, so the sum is their union


def unpack_offsets(positions: torch.Tensor, groups: int, n: int, bits: int) -> torch.Tensor:
    """The inverse of :func:`pack_offsets`, int64."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=positions.device)
    fields = (positions[..., None] >> shifts) & ((1 << bits) - 1)  # [out, bytes, 8 / bits]
    return fields.flatten(1)[:, : groups * n].reshape(-1, groups, n).long()


def _place(row: int, number: int, m: int, in_features: int) -> str:
    return f"row {row}, columns {number * m}..{min((number + 1) * m, in_features) - 1}"
