"""Linear layer of a pruned net: it stores and trains only the weights that survive."""

import torch
from torch import nn

from compsparse_kernels.layouts import MaskLayout, MaskOrder, NMLayout
from compsparse_kernels.layouts.checks import check_positive_int, describe, require
from compsparse_kernels.nn.sparse_linear import SparseLinear, block_layout_of, block_pattern
from compsparse_kernels.ops import masked_linear, sampled_matmul

KIND_OF_VALUES = {1: "csr", 2: "dense", 3: "block"}  # by their number of dimensions


class MaskedLinear(SparseLinear):
    r"""Linear layer of a pruned net: :math:`y = x (W \odot M)^\top + b`, W stored, computed and trained in M only.

    It trains as ``F.linear(x, W * M, b)`` does, at the cost of the entries that survive.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        mask: bool ``[out_features, in_features]``, True where the weight exists; or a :class:`MaskLayout`.
        bias: with a bias, or without.
        kind: how to store a bool mask: ``"auto"``, ``"csr"``, ``"block"``, ``"nm"`` or ``"dense"``
            (:meth:`MaskLayout.from_mask`);
            a :class:`MaskLayout` brings its own.
        device, dtype: of the parameters.

    Parameters are ``values`` (:attr:`MaskLayout.values_shape`) and ``bias [out_features]``, drawn from
    U(-1/sqrt(n), 1/sqrt(n)), where n is the number of inputs that an output has in the mask.

    Its state dict holds the parameters and the pattern, as tensors: ``values``, ``bias``, and ``row_ptr``, ``col_idx``
    (csr), the same with ``slot`` (block; ``mask`` too, where blocks are partly filled), ``positions`` and ``nm``, the
    pair N and M (nm; ``mask`` too, where groups hold less than N), or ``mask`` (dense).
    ``load_state_dict`` takes such a dict, with columns of csr in int16 or int32, and adopts its pattern and kind
    (``values`` changes shape if need be: restore the optimizer's state with it), or the dict of an ``nn.Linear``, of
    which it keeps the mask's entries.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 5.1 (sparsity pressure).

    Example:
        >>> import torch
        >>> from compsparse_kernels import MaskedLinear
        >>> linear = torch.nn.Linear(64, 32)
        >>> layer = MaskedLinear.from_linear(linear, linear.weight.abs() > 0.1)
        >>> x = torch.randn(5, 64)
        >>> torch.allclose(layer(x), layer.to_linear()(x), atol=1e-5)
        True
    """

    PATTERN = ("row_ptr", "col_idx", "slot", "positions", "nm", "mask")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: torch.Tensor | MaskLayout,
        bias: bool = True,
        kind: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_positive_int("in_features", in_features)
        check_positive_int("out_features", out_features)
        super().__init__(in_features, out_features, _mask_layout(mask, kind), bias, device, dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: torch.Tensor | MaskLayout, kind: str = "auto") -> "MaskedLinear":
        """The entries of a dense layer that the mask keeps."""
        return cls._copy_of(linear, mask, kind=kind)

    def _product(self, x, values, bias):
        return masked_linear(x, values, self.layout, bias)

    def _sampled(self, a, b):
        return sampled_matmul(a, b, self.layout)

    def _pattern(self):
        layout = self.layout
        pattern = {} if layout.mask is None else {"mask": layout.mask}
        if layout.kind == "csr":
            pattern |= {"row_ptr": layout.by_output.ptr, "col_idx": layout.by_output.idx}
        elif layout.kind == "block":
            pattern |= block_pattern(layout.blocks)
        elif layout.kind == "nm":
            pattern |= {"positions": layout.nm.positions, "nm": torch.tensor([layout.nm.n, layout.nm.m], device="cpu")}
        return pattern

    def _layout_of(self, pattern, values):
        kind = "nm" if "positions" in pattern else KIND_OF_VALUES.get(values.dim())
        require(kind is not None, "values", "1-D, 2-D or 3-D tensor", describe(values))
        parts = {"mask": pattern.get("mask")}
        if kind == "csr":
            parts["by_output"] = MaskOrder(pattern.get("row_ptr"), pattern.get("col_idx"), None)
        elif kind == "block":
            parts["blocks"] = block_layout_of(pattern, values, self.out_features, self.in_features)
        elif kind == "nm":
            nm = pattern.get("nm")
            require(nm is not None and nm.shape == (2,), "nm", "tensor [2]: N and M", describe(nm))
            parts["nm"] = NMLayout(self.out_features, self.in_features, *nm.tolist(), pattern["positions"])
        return MaskLayout(self.out_features, self.in_features, kind, **parts)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.layout.kind}"


def _mask_layout(mask, kind):
    if not isinstance(mask, MaskLayout):
        return MaskLayout.from_mask(mask, kind)
    if not mask.transposed:
        return mask
    # A layer's values are its own, so they are stored by output even where a transposed layout came.
    block_shape = None if mask.blocks is None else mask.blocks.block_shape
    nm = None if mask.nm is None else (mask.nm.n, mask.nm.m)
    return MaskLayout.from_mask(mask.to_mask(), mask.kind, block_shape, nm)
