"""Linear layer whose weight lives on the block edges of a known graph."""

import torch
from torch import nn

from compsparse_kernels.graphs import LevelEdges
from compsparse_kernels.layouts import BlockLayout
from compsparse_kernels.layouts.block import LARGEST_BLOCK
from compsparse_kernels.layouts.checks import check_bool_matrix, check_positive_int, require
from compsparse_kernels.nn.sparse_linear import SparseLinear, block_layout_of, block_pattern
from compsparse_kernels.ops import block_sparse_linear, sampled_block_matmul
from compsparse_kernels.ops.block_sparse_linear.api import ACTIVATIONS


class SparseDAGLinear(SparseLinear):
    r"""Linear layer on one level of a sparse graph: :math:`y = \mathrm{act}(x W^\top + b)`, W block-sparse.

    A drop-in for ``nn.Linear`` where it is known which groups of inputs each group of outputs depends on. Only the
    blocks are stored, computed and trained.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        layout: a :class:`BlockLayout`; one level of a graph (:meth:`FunctionGraph.level_edges`), a block for each edge;
            or a bool mask over equal blocks ``[r, c]``. For a level of r nodes that reads c vertices, and for a mask,
            the weight is cut into r by c blocks of ``(out_features / r, in_features / c)`` each, whole and at most 128
            a side. Nodes of a level that share weights share their blocks, not the bias. (A mask ``[out, in]`` means
            1 x 1 blocks; :class:`MaskedLinear` serves such patterns faster.)
        bias: with a bias, or without.
        activation: None, ``"relu"``, ``"gelu"`` or ``"silu"``, computed with the product.
        device, dtype: of the parameters.

    Parameters are ``values [num_slots, block_out, block_in]`` and ``bias [out_features]``, drawn from
    U(-1/sqrt(n), 1/sqrt(n)), where n is the number of inputs that an output has in the graph; with shared blocks, the
    bounds of the blocks that share are averaged.

    Its state dict holds the parameters and the pattern, as tensors: ``values``, ``bias``, ``row_ptr``, ``col_idx``,
    ``slot``. ``load_state_dict`` takes such a dict and adopts its pattern (``values`` changes shape if need be: restore
    the optimizer's state with it), or the dict of an ``nn.Linear``, of which it keeps the blocks.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 4 (the graph is known).

    Example:
        >>> import torch
        >>> from compsparse_kernels import FunctionGraph, SparseDAGLinear
        >>> two_parents = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, 0)
        >>> layer = SparseDAGLinear(32, 64, two_parents, activation="relu")
        >>> layer
        SparseDAGLinear(in_features=32, out_features=64, bias=True, density=0.500, block=(16, 8), activation=relu)
        >>> layer(torch.randn(5, 32)).shape
        torch.Size([5, 64])
        >>> SparseDAGLinear(32, 64, FunctionGraph.tree(4).level_edges(1))
        SparseDAGLinear(in_features=32, out_features=64, bias=True, density=0.500, block=(32, 8))
    """

    PATTERN = ("row_ptr", "col_idx", "slot")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layout: BlockLayout | LevelEdges | torch.Tensor,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_positive_int("in_features", in_features)
        check_positive_int("out_features", out_features)
        require(activation in ACTIVATIONS, "activation", "None, 'relu', 'gelu' or 'silu'", repr(activation))
        layout = _block_layout(layout, in_features, out_features)
        super().__init__(in_features, out_features, layout, bias, device, dtype)
        self.activation = activation

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, layout: BlockLayout | LevelEdges | torch.Tensor, activation: str | None = None
    ) -> "SparseDAGLinear":
        """The blocks of a dense layer; what lies outside them is dropped."""
        return cls._copy_of(linear, layout, activation=activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        return block_sparse_linear(x, self.values, self.layout, self.bias, self.activation)

    def _product(self, x, values, bias):
        return block_sparse_linear(x, values, self.layout, bias)

    def _sampled(self, a, b):
        return sampled_block_matmul(a, b, self.layout)

    def _pattern(self):
        return block_pattern(self.layout)

    def _layout_of(self, pattern, values):
        return block_layout_of(pattern, values, self.out_features, self.in_features)

    def extra_repr(self) -> str:
        shared = f", slots={self.layout.num_slots}" if self.layout.shared else ""
        activation = "" if self.activation is None else f", activation={self.activation}"
        return f"{super().extra_repr()}, block={self.layout.block_shape}{shared}{activation}"


def _block_layout(layout, in_features, out_features):
    if isinstance(layout, BlockLayout):
        if not layout.transposed:
            return layout
        # A layer's values are its own, so they are stored [block_out, block_in] even where a transposed layout came.
        layout = layout.to("cpu")
        return BlockLayout(layout.out_features, layout.in_features, layout.block_shape, layout.by_output)
    if isinstance(layout, LevelEdges):
        block_shape = _equal_blocks(len(layout.nodes), len(layout.columns), out_features, in_features)
        rows, columns, slot = (torch.from_numpy(numbers) for numbers in (layout.rows, layout.cols, layout.slot))
        return BlockLayout.from_entries(rows, columns, block_shape, out_features, in_features, slot=slot)
    check_bool_matrix("layout", layout)
    return BlockLayout.from_mask(layout, _equal_blocks(*layout.shape, out_features, in_features))


def _equal_blocks(rows, columns, out_features, in_features):
    """Shape of the blocks where a weight ``[out_features, in_features]`` is cut into rows by columns of them."""
    wanted = f"a mask or graph level over equal blocks of at most {LARGEST_BLOCK} a side"
    wanted += f" of a weight [{out_features}, {in_features}]"
    whole = rows > 0 and columns > 0 and out_features % rows == 0 and in_features % columns == 0
    require(whole, "layout", wanted, f"{rows} by {columns} blocks")
    block_shape = (out_features // rows, in_features // columns)
    require(max(block_shape) <= LARGEST_BLOCK, "layout", wanted, "blocks of {} by {}".format(*block_shape))
    return block_shape
