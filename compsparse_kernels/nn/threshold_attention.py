"""Multi-head attention in which each query attends only to the keys that pass a threshold."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from compsparse_kernels.layouts import AttentionSupport
from compsparse_kernels.layouts.checks import check_positive_int, describe, require
from compsparse_kernels.ops import threshold_attention

RULES = ("relative", "absolute")


class ThresholdAttention(nn.Module):
    r"""Multi-head attention over the keys that matter, exactly: a drop-in for ``nn.MultiheadAttention``.

    Query i attends to key j where :math:`p_{ij} \ge \text{threshold} \cdot \max_j p_{ij}` (``rule="relative"``), or
    where the score :math:`q_i \cdot k_j / \sqrt{d}` plus masks is at least ``threshold`` (``rule="absolute"``); the
    softmax runs over these keys alone, and only they cost in the backward pass. At ``threshold -> 0`` (relative) it is
    ``nn.MultiheadAttention``, with the same parameters, initialisation and state dict.

    Args:
        embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype: as in ``nn.MultiheadAttention``.
        dropout: only 0.0 for now.
        add_bias_kv, add_zero_attn: only False for now.
        threshold: in (0, 1] for ``"relative"``, any finite score for ``"absolute"``. May be set later.
        rule: ``"relative"`` or ``"absolute"``.

    A query that may attend to no key (all are masked, or none passes an absolute threshold) gets attention 0, so its
    output is ``out_proj.bias``, and its gradients are 0; ``nn.MultiheadAttention`` gives NaN there.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 5.2 (transformers).

    Example:
        >>> import torch
        >>> from compsparse_kernels import ThresholdAttention
        >>> attn = ThresholdAttention(64, num_heads=4, batch_first=True, threshold=0.05)
        >>> x = torch.randn(2, 10, 64)
        >>> output, weights = attn(x, x, x)
        >>> output.shape, weights.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
        >>> attn.support(x).shape
        (2, 4, 10, 10)
    """

    # nn.TransformerEncoderLayer asks for this before its fused inference path, which would leave the threshold out.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        threshold: float = 0.01,
        rule: str = "relative",
    ):
        super().__init__()
        check_positive_int("embed_dim", embed_dim)
        check_positive_int("num_heads", num_heads)
        require(embed_dim % num_heads == 0, "embed_dim", f"a multiple of num_heads, {num_heads}", embed_dim)
        require(dropout == 0, "dropout", "0.0 (dropout of attention weights is not supported)", dropout)
        require(not add_bias_kv, "add_bias_kv", "False (not supported)", add_bias_kv)
        require(not add_zero_attn, "add_zero_attn", "False (not supported)", add_zero_attn)
        require(rule in RULES, "rule", "'relative' or 'absolute'", repr(rule))
        _check_threshold(threshold, rule)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = (embed_dim if dim is None else dim for dim in (kdim, vdim))
        self.dropout, self.batch_first = 0.0, batch_first
        self.threshold, self.rule = float(threshold), rule
        options = {"device": device, "dtype": dtype}
        shapes = dict.fromkeys(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"))
        if self.kdim == self.vdim == embed_dim:
            shapes["in_proj_weight"] = (3 * embed_dim, embed_dim)
        else:
            for name, dim in (("q", embed_dim), ("k", self.kdim), ("v", self.vdim)):
                shapes[f"{name}_proj_weight"] = (embed_dim, dim)
        if bias:
            shapes["in_proj_bias"] = (3 * embed_dim,)
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, **options)))
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        self.reset_parameters()

    def reset_parameters(self):
        """As ``nn.MultiheadAttention`` does: Xavier uniform for the input projections, biases 0."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    @classmethod
    def from_multihead_attention(
        cls, mha: nn.MultiheadAttention, threshold: float = 0.01, rule: str = "relative"
    ) -> "ThresholdAttention":
        """With a copy of the parameters of a dense layer; its dropout must be 0."""
        require(isinstance(mha, nn.MultiheadAttention), "mha", "nn.MultiheadAttention", type(mha).__name__, TypeError)
        wanted = "dropout 0.0 (dropout of attention weights is not supported; set mha.dropout = 0.0 to go without)"
        require(mha.dropout == 0, "mha", wanted, mha.dropout)
        plain = mha.bias_k is None and not mha.add_zero_attn
        require(plain, "mha", "one without add_bias_kv and add_zero_attn", "one with")
        options = {"kdim": mha.kdim, "vdim": mha.vdim, "batch_first": mha.batch_first}
        options |= {"bias": mha.in_proj_bias is not None, "threshold": threshold, "rule": rule}
        return _copy_parameters(mha, cls, mha.embed_dim, mha.num_heads, **options)

    def to_multihead_attention(self) -> nn.MultiheadAttention:
        """The dense layer with a copy of the parameters: the limit of a relative threshold at 0."""
        options = {"kdim": self.kdim, "vdim": self.vdim, "batch_first": self.batch_first}
        options["bias"] = self.in_proj_bias is not None
        return _copy_parameters(self, nn.MultiheadAttention, self.embed_dim, self.num_heads, **options)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Shapes as in ``nn.MultiheadAttention``: ``[T, B, E]``, ``[B, T, E]`` with ``batch_first``, or ``[T, E]``.

        Args:
            query, key, value: what attends, what it is compared with, what is averaged.
            key_padding_mask: ``[B, Tk]`` (``[Tk]`` unbatched): bool, True = ignore the key; or float, added to scores.
            need_weights: return the weights as a dense tensor too; False is faster.
            attn_mask: ``[Tq, Tk]`` or ``[B * num_heads, Tq, Tk]``: bool, True = may not attend; or float, added.
            average_attn_weights: the weights' mean over heads, or each head's.
            is_causal: query i sees keys 0..i. Needs no ``attn_mask``; with one, both apply.

        Returns:
            The output in the shape of ``query``, and the weights ``[B, Tq, Tk]`` or ``[B, num_heads, Tq, Tk]`` (no B
            where unbatched), or None. The weights carry no gradient.
        """
        q, k, v = self._heads(query, key, value)
        masks = _masks(attn_mask, key_padding_mask, q, k, query.dim() == 3)
        result = self._attend(q, k, v, masks, is_causal, return_support=need_weights)
        output, support = result if need_weights else (result, None)
        output = self.out_proj(output.transpose(1, 2).flatten(2))  # [B, Tq, E]
        weights = None if support is None else support.to_dense()
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if query.dim() == 2:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    @torch.no_grad()
    def support(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> AttentionSupport:
        """Which keys each query keeps, and with which weights; ``key`` is ``query`` by default (self-attention).

        Example:
            >>> import torch
            >>> from compsparse_kernels import ThresholdAttention
            >>> attn = ThresholdAttention(64, num_heads=4, threshold=0.5)
            >>> support = attn.support(torch.randn(10, 64))
            >>> share_kept = len(support.col_idx) / (4 * 10 * 10)
        """
        key = query if key is None else key
        q, k = self._heads(query, key)
        masks = _masks(attn_mask, key_padding_mask, q, k, query.dim() == 3)
        return self._attend(q, k, k, masks, is_causal, return_support=True)[1]

    def _attend(self, q, k, v, masks, is_causal, return_support):
        options = {"threshold": self.threshold, "rule": self.rule, "return_support": return_support}
        return threshold_attention(q, k, v, **masks, **options, is_causal=is_causal)

    def _heads(self, *inputs):
        """Query, key and perhaps value, projected and split: ``[B, num_heads, T, head_dim]`` each."""
        self._check_inputs(*inputs)
        weights, bias = self.in_proj_weight, self.in_proj_bias
        if weights is not None and len(inputs) == 3 and all(x is inputs[0] for x in inputs):
            return [self._split(x) for x in F.linear(inputs[0], weights, bias).chunk(3, -1)]
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = separate if weights is None else weights.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [self._split(F.linear(*each)) for each in zip(inputs, weights, biases, strict=False)]

    def _split(self, x):
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _check_inputs(self, query, *others):
        batch = 0 if self.batch_first else 1
        names, sizes = ("query", "key", "value"), (self.embed_dim, self.kdim, self.vdim)
        for name, x, features in zip(names, (query, *others), sizes, strict=False):
            if isinstance(x, torch.Tensor) and x.is_nested:
                wanted = "a tensor that is not nested (nn.TransformerEncoder: enable_nested_tensor=False)"
                require(False, name, wanted, "a nested one")
            ok = isinstance(x, torch.Tensor) and x.dim() in (2, 3) and x.shape[-1] == features
            require(ok, name, f"2-D or 3-D tensor [..., {features}]", describe(x))
            require(x.dim() == query.dim(), name, f"{query.dim()}-D, like query", describe(x))
            ok = x.dim() == 2 or x.shape[batch] == query.shape[batch]
            require(ok, name, f"batch {query.shape[batch]}, like query", describe(x))
        if len(others) == 2:
            key, value = others
            ok = key.shape[:-1] == value.shape[:-1]
            require(ok, "value", f"as many tokens as key, {list(key.shape[:-1])}", describe(value))

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, threshold={self.threshold:g}, rule={self.rule}"


def _masks(attn_mask, key_padding_mask, q, k, batched):
    """The masks of ``nn.MultiheadAttention`` as the op's: ``attn_bias`` (float, or True = may attend) and padding."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    bias = padding = None
    if attn_mask is not None:
        shapes = ((queries, keys), (batch * heads, queries, keys))
        _check_mask("attn_mask", attn_mask, shapes)
        bias = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads))
        bias = ~bias if bias.dtype == torch.bool else bias.to(q.dtype)
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, [(batch, keys)] if batched else [(keys,)])
        padding = key_padding_mask.view(batch, keys)
        if padding.dtype != torch.bool:
            added = padding.to(q.dtype)[:, None, None]  # [B, 1, 1, Tk]
            if bias is None:
                bias = added
            else:
                bias = added.where(bias, -torch.inf) if bias.dtype == torch.bool else bias + added
            padding = None
    return {"attn_bias": bias, "key_padding_mask": padding}


def _check_mask(name, mask, shapes):
    ok = isinstance(mask, torch.Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())
    ok = ok and tuple(mask.shape) in shapes
    wanted = f"bool or float tensor {' or '.join(str(list(shape)) for shape in shapes)}"
    require(ok, name, wanted, describe(mask), ValueError if isinstance(mask, torch.Tensor) else TypeError)


def _check_threshold(threshold, rule):
    wanted = "a number in (0, 1]" if rule == "relative" else "a finite number"
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    require(is_number, "threshold", wanted, repr(threshold), TypeError)
    ok = 0 < threshold <= 1 if rule == "relative" else math.isfinite(threshold)
    require(ok, "threshold", wanted, threshold)


def _copy_parameters(source, cls, *args, **options):
    """A module made by ``cls(*args)`` with the parameters of ``source``, which have the same names, on their device."""
    weight = source.out_proj.weight
    target = cls(*args, **options, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    target.load_state_dict(source.state_dict())
    for name, parameter in source.named_parameters():
        target.get_parameter(name).requires_grad_(parameter.requires_grad)
    return target.train(source.training)
