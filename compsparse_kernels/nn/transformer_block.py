"""A transformer block over thresholded attention: serial, or with both halves in parallel."""

from collections.abc import Callable

import torch
from torch import nn

from compsparse_kernels.layouts.checks import check_positive_int, describe, require
from compsparse_kernels.nn.kv_cache import KVCache
from compsparse_kernels.nn.threshold_attention import ThresholdAttention


class TransformerBlock(nn.Module):
    r"""Pre-norm transformer block whose attention is :class:`ThresholdAttention`.

    Serial (GPT-2 and most others): :math:`h = x + \mathrm{attn}(\mathrm{LN}_1(x)),\ y = h +
    \mathrm{mlp}(\mathrm{LN}_2(h))`.
    Parallel (GPT-J, PaLM), with one LayerNorm for both: :math:`y = x + \mathrm{attn}(\mathrm{LN}(x)) +
    \mathrm{mlp}(\mathrm{LN}(x))`. With :math:`\mathrm{mlp}(x) = W_2\, \mathrm{act}(W_1 x + b_1) + b_2`.

    Args:
        dim, heads: width of a token, and attention heads, a divisor of it.
        mlp_ratio: hidden width of the MLP over ``dim``; the hidden width is the product, rounded.
        parallel: which of the two forms.
        activation: makes the module between the layers of the MLP.
        dropout: on the attention weights and on what attention and MLP add to ``x``.
        bias: in all linear layers and norms.
        device, dtype: as in ``nn.Linear``.
        attention: the other options of :class:`ThresholdAttention`: threshold, rule, shrink, window, ...

    Attributes:
        attention: the :class:`ThresholdAttention`.
        norm, mlp_norm: ``nn.LayerNorm``; ``mlp_norm`` is None in parallel form.
        mlp: ``nn.Sequential(Linear, activation, Linear)``.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 5.2; Chowdhery et al., "PaLM" (2022),
        section 2, for the parallel form.

    Example:
        >>> import torch
        >>> from compsparse_kernels import TransformerBlock
        >>> block = TransformerBlock(64, heads=4, parallel=True, threshold=0.02)
        >>> block(torch.randn(2, 10, 64), is_causal=True).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        parallel: bool = False,
        activation: Callable[[], nn.Module] = nn.GELU,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention,
    ):
        super().__init__()
        check_positive_int("dim", dim)
        check_positive_int("heads", heads)
        require(dim % heads == 0, "dim", f"a multiple of heads, {heads}", dim)
        is_number = isinstance(mlp_ratio, (int, float)) and not isinstance(mlp_ratio, bool)
        require(is_number, "mlp_ratio", "a positive number", describe(mlp_ratio), TypeError)
        hidden = round(mlp_ratio * dim) if 0 < mlp_ratio < float("inf") else 0
        require(hidden > 0, "mlp_ratio", "a positive number", mlp_ratio)
        require(isinstance(parallel, bool), "parallel", "a bool", describe(parallel), TypeError)
        require(callable(activation), "activation", "what makes a module, as nn.GELU", describe(activation), TypeError)
        fixed = {"batch_first", "kdim", "vdim"} & attention.keys()
        require(not fixed, "attention", "no batch_first, kdim or vdim (the block sets them)", ", ".join(sorted(fixed)))
        options = {"device": device, "dtype": dtype}
        self.parallel = parallel
        self.norm = nn.LayerNorm(dim, bias=bias, **options)
        self.attention = ThresholdAttention(
            dim, heads, dropout=dropout, bias=bias, batch_first=True, **options, **attention
        )
        self.mlp_norm = None if parallel else nn.LayerNorm(dim, bias=bias, **options)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden, bias=bias, **options), activation(), nn.Linear(hidden, dim, bias=bias, **options)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """``[B, T, dim]`` or ``[T, dim]``, or nested ``[B, tokens, dim]``, to the same; the masks and the cache are
        those of :meth:`ThresholdAttention.forward`."""
        normed = self.norm(x)
        options = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal}
        attended, _ = self.attention(normed, normed, normed, need_weights=False, cache=cache, **options)
        if self.parallel:
            return x + self.dropout(attended + self.mlp(normed))
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def make_cache(self, batch: int, max_tokens: int) -> KVCache:
        """An empty cache for the attention of this block."""
        return self.attention.make_cache(batch, max_tokens)

    def extra_repr(self) -> str:
        return f"parallel={self.parallel}"
