"""Which keys fed which query: what thresholded attention found."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from compsparse_kernels.layouts.checks import check_compressed, check_positive_int, describe, require


@dataclass(frozen=True, eq=False)
class AttentionSupport:
    """The support of an attention, with its weights, by rows (CSR over all queries).

    Row ``(b * H + h) * Tq + i`` belongs to query ``i`` of head ``h``. It keeps the keys ``col_idx[row_ptr[row] :
    row_ptr[row + 1]]``, ascending, and ``weights`` has their attention weights, which add up to 1 (a row may be empty).

    Args:
        row_ptr: int64 ``[B * H * Tq + 1]``.
        col_idx: int32 ``[nnz]``.
        weights: float ``[nnz]``, without gradient.
        shape: ``(B, H, Tq, Tk)``; ``B`` is the product of the dimensions before the heads.
        log_sum: float ``[B, H, Tq]`` or None: the logarithm of the sum of ``exp(score)`` over a row's support, -inf
            where it is empty.
        visible: int64 broadcastable to ``[B, H, Tq]``: the keys that each query may see, kept or not; None where it
            sees all. A key that only a bias of -inf hides counts as seen.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import AttentionSupport
        >>> AttentionSupport(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]).int(), torch.ones(3) / 2, (1, 1, 2, 4))
        AttentionSupport(1 x 1 x 2 x 4, 3 kept, density 0.375)
    """

    row_ptr: torch.Tensor
    col_idx: torch.Tensor
    weights: torch.Tensor
    shape: tuple[int, int, int, int]
    log_sum: torch.Tensor | None = None
    visible: torch.Tensor | None = None

    def __post_init__(self):
        if torch.compiler.is_compiling():
            return  # the values are not there to be looked at; the op makes them well-formed
        four = isinstance(self.shape, tuple) and len(self.shape) == 4
        require(four, "shape", "a tuple (B, H, Tq, Tk)", self.shape, TypeError)
        for name, size in zip(("B", "H", "Tq", "Tk"), self.shape, strict=True):
            if size != 0:
                check_positive_int(f"shape: {name}", size)
        check_compressed(self.row_ptr, self.col_idx, math.prod(self.shape[:3]), self.shape[3], ("row_ptr", "col_idx"))
        ok = isinstance(self.weights, torch.Tensor) and self.weights.is_floating_point()
        ok = ok and self.weights.shape == self.col_idx.shape
        require(ok, "weights", f"float tensor [{len(self.col_idx)}]", describe(self.weights))
        devices = {tensor.device for tensor in (self.row_ptr, self.col_idx, self.weights)}
        require(
            len(devices) == 1, "weights", f"a tensor on {self.row_ptr.device}, like row_ptr", sorted(map(str, devices))
        )
        self._check_of_rows()

    def _check_of_rows(self):
        rows = self.shape[:3]
        if self.log_sum is not None:
            ok = isinstance(self.log_sum, torch.Tensor) and self.log_sum.is_floating_point()
            require(ok and self.log_sum.shape == rows, "log_sum", f"float tensor {list(rows)}", describe(self.log_sum))
        if self.visible is not None:
            ok = isinstance(self.visible, torch.Tensor) and self.visible.dtype == torch.int64
            ok = ok and self.visible.dim() == 3
            ok = ok and all(have in (1, want) for have, want in zip(self.visible.shape, rows, strict=True))
            wanted = f"int64 tensor broadcastable to {list(rows)}, of as many dimensions"
            require(ok, "visible", wanted, describe(self.visible))

    @property
    def nnz(self) -> int:
        """Kept pairs of a query and a key."""
        return len(self.col_idx)

    @property
    def density(self) -> float:
        """Kept share of all pairs of a query and a key, hidden ones included."""
        return self.nnz / max(1, math.prod(self.shape))

    @property
    def share_kept(self) -> float:
        """Kept share of the pairs of a query and a key that it may see."""
        if self.visible is None:
            return self.density
        return self.nnz / max(1, int(self.visible.expand(self.shape[:3]).sum()))

    @cached_property
    def degree(self) -> torch.Tensor:
        """int64 ``[B, H, Tq]``: kept keys of each query."""
        return self.row_ptr.diff().view(self.shape[:3])

    def to_mask(self) -> torch.Tensor:
        """bool ``[B, H, Tq, Tk]``."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.col_idx.device)
        mask.view(len(self.row_ptr) - 1, self.shape[3])[self._rows(), self.col_idx.long()] = True
        return mask

    def to_dense(self) -> torch.Tensor:
        """The weights ``[B, H, Tq, Tk]``, zero outside the support."""
        dense = self.weights.new_zeros(self.shape)
        dense.view(len(self.row_ptr) - 1, self.shape[3])[self._rows(), self.col_idx.long()] = self.weights
        return dense

    def _rows(self) -> torch.Tensor:
        return torch.arange(len(self.row_ptr) - 1, device=self.row_ptr.device).repeat_interleave(self.row_ptr.diff())

    def __repr__(self) -> str:
        return f"AttentionSupport({' x '.join(map(str, self.shape))}, {self.nnz} kept, density {self.density:.3f})"
