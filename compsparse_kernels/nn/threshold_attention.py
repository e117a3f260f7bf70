"""Multi-head attention in which each query attends only to the keys that pass a threshold."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from compsparse_kernels.layouts import AttentionSupport
from compsparse_kernels.layouts.checks import check_positive_int, describe, require
from compsparse_kernels.nn.attention_inputs import add_bias, check_inputs, masks_of, pack, padded_weights, unpack
from compsparse_kernels.nn.attention_stats import Attended, AttentionStats, stats_of
from compsparse_kernels.nn.kv_cache import KVCache
from compsparse_kernels.ops import threshold_attention
from compsparse_kernels.ops.threshold_attention import choices

SCORES = ("dot", "mahalanobis")


class ThresholdAttention(nn.Module):
    r"""Multi-head attention over the keys that matter, exactly: a drop-in for ``nn.MultiheadAttention``.

    Query i attends to key j where :math:`p_{ij} \ge \text{threshold} \cdot \max_j p_{ij}` (``rule="relative"``), or
    where the score :math:`q_i \cdot k_j / \sqrt{d}` plus masks is at least ``threshold`` (``rule="absolute"``), or as
    another rule of :func:`threshold_attention` says; only the keys kept cost in the backward pass. At
    ``threshold -> 0`` (relative, softmax weights) it is ``nn.MultiheadAttention``, with the same parameters,
    initialisation and state dict.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as in ``nn.MultiheadAttention``.
        add_bias_kv, add_zero_attn: only False.
        threshold: what the rule wants, in (0, 1] for ``"relative"``. May be set later; reading it gives a number, or
            where it is learned the tensor ``[num_heads]``.
        rule, weights, shrink, window: as in :func:`threshold_attention`.
        learn_threshold: one threshold a head, learned, from ``threshold`` on: a Parameter ``threshold_parameter
            [num_heads]``, whose sigmoid is the threshold (``"relative"``: it stays inside (0, 1)), or which is it
            (``"absolute"``). It needs weights that are continuous at the cut: ``shrink=True`` or
            ``weights="rectified"``; with others the output does not change with the threshold until a key drops out.
        alibi: True for a bias of -slope times the distance, the slopes a geometric sequence over the heads [1]_; or
            the slopes, ``num_heads`` numbers.
        score: ``"dot"``, or ``"mahalanobis"``: :math:`-\frac12 \text{scale} |q_i - k_j|^2` in place of the dot product,
            where the projections learn the metric. The keys' part, :math:`-\frac12 \text{scale} |k_j|^2`, is added as
            an ``attn_bias [B, H, 1, Tk]`` (rounded to the dtype of the input); the query's is constant in a row, so it
            changes no weight, and shifts an absolute threshold, which takes it in.
        track_stats: keep what :meth:`stats` reads: references, no copies, to query and key of the last forward. A
            training step holds them anyway; inference holds them longer than it must.

    A query that may attend to no key (all are masked, or none passes an absolute threshold) gets attention 0, so its
    output is ``out_proj.bias``, and its gradients are 0; ``nn.MultiheadAttention`` gives NaN there.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 5.2 (transformers).

    References:
        .. [1] Press, Smith, Lewis, "Train short, test long", 2022.

    Example:
        >>> import torch
        >>> from compsparse_kernels import ThresholdAttention
        >>> attn = ThresholdAttention(64, num_heads=4, batch_first=True, threshold=0.05)
        >>> x = torch.randn(2, 10, 64)
        >>> output, weights = attn(x, x, x)
        >>> output.shape, weights.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
        >>> attn.support(x).shape, 0 < attn.stats().mass_kept <= 1
        ((2, 4, 10, 10), True)
        >>> learned = ThresholdAttention(64, num_heads=4, shrink=True, learn_threshold=True, threshold=0.05)
        >>> learned(x, x, x)[0].square().sum().backward()
        >>> learned.threshold_parameter.grad.shape
        torch.Size([4])
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
        weights: str = "softmax",
        shrink: bool = False,
        learn_threshold: bool = False,
        window: int | tuple[int, int] | None = None,
        alibi: bool | list[float] | tuple[float, ...] = False,
        score: str = "dot",
        track_stats: bool = True,
    ):
        super().__init__()
        check_positive_int("embed_dim", embed_dim)
        check_positive_int("num_heads", num_heads)
        require(embed_dim % num_heads == 0, "embed_dim", f"a multiple of num_heads, {num_heads}", embed_dim)
        is_number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
        require(is_number, "dropout", "a number in [0, 1)", describe(dropout), TypeError)
        require(0 <= dropout < 1, "dropout", "a number in [0, 1)", dropout)
        require(not add_bias_kv, "add_bias_kv", "False (not supported)", add_bias_kv)
        require(not add_zero_attn, "add_zero_attn", "False (not supported)", add_zero_attn)
        require(score in SCORES, "score", "'dot' or 'mahalanobis'", repr(score))
        choices.window_of(window)
        choices.check_flags(
            bias=bias, batch_first=batch_first, learn_threshold=learn_threshold, track_stats=track_stats
        )
        for name, dim in (("kdim", kdim), ("vdim", vdim)):
            if dim is not None:
                check_positive_int(name, dim)
        require(dtype is None or dtype.is_floating_point, "dtype", "a floating-point dtype", dtype)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = (embed_dim if dim is None else dim for dim in (kdim, vdim))
        self.dropout, self.batch_first, self.window = float(dropout), batch_first, window
        self.rule, self.weights, self.shrink, self.score = rule, weights, shrink, score
        self.alibi_slopes, self.track_stats = _slopes(alibi, num_heads), track_stats
        self._last = None
        options = {"device": device, "dtype": dtype}
        self._make_projections(bias, options)
        self._make_threshold(threshold, learn_threshold, options)
        self.reset_parameters()

    def _make_projections(self, bias, options):
        embed_dim = self.embed_dim
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

    def _make_threshold(self, threshold, learn, options):
        weighting = choices.weighting_of(self.rule, self.weights, self.shrink)
        self.register_parameter("threshold_parameter", None)
        if learn:
            wanted = (
                "False (the output is piecewise constant in it; shrink=True or weights='rectified' make it continuous)"
            )
            require(weighting != "softmax", "learn_threshold", wanted, learn)
            precise = options | {"dtype": torch.float64 if options["dtype"] == torch.float64 else torch.float32}
            self.threshold_parameter = nn.Parameter(torch.empty(self.num_heads, **precise))
        self.threshold = threshold

    @property
    def threshold(self) -> float | int | torch.Tensor:
        """A number, or where it is learned the tensor ``[num_heads]``, with its gradient. Setting it sets all heads."""
        raw = self.threshold_parameter
        if raw is None:
            return self._threshold
        raw = raw if raw.dtype == torch.float64 else raw.float()
        if self.rule == "absolute":
            return raw
        limits = torch.finfo(raw.dtype)
        return raw.sigmoid().clamp(limits.tiny, 1 - limits.eps)  # far out the sigmoid rounds to 0 and 1

    @threshold.setter
    def threshold(self, value: float | int):
        choices.check_threshold(value, self.rule, choices.weighting_of(self.rule, self.weights, self.shrink))
        self._threshold = value
        if self.threshold_parameter is not None:
            raw = value if self.rule == "absolute" else math.log(value / (1 - value))
            nn.init.constant_(self.threshold_parameter, raw)

    def reset_parameters(self):
        """As ``nn.MultiheadAttention`` does: Xavier uniform for the input projections, biases 0. A learned threshold
        goes back to what was set last."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        self.threshold = self._threshold

    @classmethod
    def from_multihead_attention(
        cls, mha: nn.MultiheadAttention, threshold: float = 0.01, rule: str = "relative", **options
    ) -> "ThresholdAttention":
        """With a copy of the parameters of a dense layer, and its dropout; ``options`` are those of this class."""
        require(isinstance(mha, nn.MultiheadAttention), "mha", "nn.MultiheadAttention", type(mha).__name__, TypeError)
        plain = mha.bias_k is None and not mha.add_zero_attn
        require(plain, "mha", "one without add_bias_kv and add_zero_attn", "one with")
        options |= {"kdim": mha.kdim, "vdim": mha.vdim, "batch_first": mha.batch_first, "dropout": mha.dropout}
        options |= {"bias": mha.in_proj_bias is not None, "threshold": threshold, "rule": rule}
        module = _copy_parameters(mha, cls, mha.embed_dim, mha.num_heads, **options)
        module.threshold = threshold  # the copy knows no learned ones
        return module

    def to_multihead_attention(self) -> nn.MultiheadAttention:
        """The dense layer with a copy of the parameters: the limit of a relative threshold at 0. What makes other
        scores than ``nn.MultiheadAttention`` has is refused; the threshold is left behind."""
        why = "(nn.MultiheadAttention has none)"
        require(self.score == "dot", "score", f"'dot' {why}", repr(self.score))
        require(self.window is None, "window", f"None {why}", self.window)
        require(self.alibi_slopes is None, "alibi", f"False {why}", "slopes")
        options = {"kdim": self.kdim, "vdim": self.vdim, "batch_first": self.batch_first, "dropout": self.dropout}
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
        *,
        cache: KVCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Shapes as in ``nn.MultiheadAttention``: ``[T, B, E]``, ``[B, T, E]`` with ``batch_first``, or ``[T, E]``.

        Args:
            query, key, value: what attends, what it is compared with, what is averaged. With ``batch_first`` all three
                may be nested ``[B, tokens, E]`` (either layout), and then without masks.
            key_padding_mask: ``[B, Tk]`` (``[Tk]`` unbatched): bool, True = ignore the key; or float, added to scores.
            need_weights: return the weights as a dense tensor too; False is faster.
            attn_mask: ``[Tq, Tk]`` or ``[B * num_heads, Tq, Tk]``: bool, True = may not attend; or float, added.
            average_attn_weights: the weights' mean over heads, or each head's.
            is_causal: query i sees keys 0..i. Needs no ``attn_mask``; with one, both apply.
            cache: the keys and values of the tokens so far, to which those of these tokens are appended: queries see
                all of them, and are at the positions after the last; masks are over all keys. Without gradients.

        Returns:
            The output in the shape of ``query``, and the weights ``[B, Tq, Tk]`` or ``[B, num_heads, Tq, Tk]`` (no B
            where unbatched; of nested inputs padded with 0), or None. They carry no gradient and are those before
            dropout.
        """
        inputs = (query, key, value)
        self._check_inputs(*inputs)
        choices.check_flags(need_weights=need_weights, is_causal=is_causal)
        require(cache is None or isinstance(cache, KVCache), "cache", "a KVCache or None", describe(cache), TypeError)
        nested, extra, bounds = query, {}, None
        if query.is_nested:
            inputs, bounds, extra = self._pack(inputs, attn_mask, key_padding_mask, cache)
        q, k, v = self._heads(*inputs)
        if cache is not None:
            extra["query_offset"], (k, v, extra["index"]) = cache.length, cache.append(k, v)
        masks = masks_of(attn_mask, key_padding_mask, q, k, query.dim() == 3)
        options = self._options(q, k, masks | extra, is_causal)
        if self.track_stats and not torch.compiler.is_compiling():
            self._last = Attended.of(q, k, options, is_self=query is key)
        result = threshold_attention(q, k, v, **options, return_support=need_weights)
        output, support = result if need_weights else (result, None)
        output = self.out_proj(output.transpose(1, 2).flatten(2))  # [B, Tq, E]
        weights = None
        if support is not None:
            weights = support.to_dense() if bounds is None else padded_weights(support, *bounds)
            weights = weights.mean(1) if average_attn_weights else weights
        if bounds is not None:
            return unpack(output, nested, bounds[0]), weights
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
            >>> share_kept = attn.support(torch.randn(10, 64)).share_kept
        """
        key = query if key is None else key
        self._check_inputs(query, key)
        require(not query.is_nested, "query", "a tensor that is not nested", "a nested one")
        q, k = self._heads(query, key)
        masks = masks_of(attn_mask, key_padding_mask, q, k, query.dim() == 3)
        return Attended.of(q, k, self._options(q, k, masks, is_causal), is_self=False).support()

    def make_cache(self, batch: int, max_tokens: int) -> KVCache:
        """An empty cache for this layer, of the device and dtype of its weights."""
        weight = self.out_proj.weight
        return KVCache(batch, self.num_heads, max_tokens, self.head_dim, device=weight.device, dtype=weight.dtype)

    def stats(self) -> AttentionStats:
        """Share kept and mass kept of the last forward pass.

        What is not kept was never computed, so the mass takes a second look: this call, and not the forward, costs two
        passes over query and key, one of which keeps every key, and memory for the pairs of one element of the batch.

        Raises:
            ValueError: where there was no forward (or only a compiled one), or ``track_stats`` is False.
        """
        why = "True and a forward pass that was not compiled before stats()"
        require(self._last is not None, "track_stats", why, f"{self.track_stats} and none")
        return stats_of(self._last)

    def _options(self, q, k, given, is_causal):
        """The arguments of the op: rule, threshold and scores of this module, masks and positions of this call."""
        options = {"threshold": self.threshold, "rule": self.rule, "weights": self.weights, "shrink": self.shrink}
        options |= {"window": self.window, "is_causal": is_causal, "index": None} | given
        options["dropout_p"] = self.dropout if self.training else 0.0
        if self.alibi_slopes is not None:
            options["alibi_slopes"] = torch.tensor(self.alibi_slopes, device=q.device)
        if self.score == "mahalanobis":
            self._compare_distances(q, k, options)
        return options

    def _compare_distances(self, q, k, options):
        """Scores -scale |q - k|^2 / 2: the keys' norms are a bias, the queries' a shift of an absolute threshold."""
        half_scale = 0.5 / math.sqrt(self.head_dim)
        added = -half_scale * _square_norms(k).unsqueeze(2)  # [B, H, 1, Tk]
        if not torch.is_autocast_enabled(q.device.type):  # where it is, scores are float32 whatever the inputs
            added = added.to(q.dtype)
        options["attn_bias"] = add_bias(options["attn_bias"], added)
        if self.rule == "absolute":
            shift = half_scale * _square_norms(q).unsqueeze(3)  # [B, H, Tq, 1]
            threshold = options["threshold"]
            threshold = threshold.view(-1, 1, 1) if isinstance(threshold, torch.Tensor) else threshold
            softmax = self.weights == "softmax" and not self.shrink  # the support is piecewise constant in the shift
            options["threshold"] = threshold + (shift.detach() if softmax else shift)

    def _pack(self, inputs, attn_mask, key_padding_mask, cache):
        """Nested inputs as one batch of sequences: inputs, the bounds of queries and keys, options of the op."""
        for name, given in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask), ("cache", cache)):
            require(given is None, name, "None, with nested tensors", type(given).__name__)
        packed = pack(*inputs)
        query, key, value = (each.bounds for each in packed)
        same = value is key or torch.compiler.is_compiling() or torch.equal(value, key)
        require(same, "value", "sequences as long as those of key", "others")
        return [each.tokens for each in packed], (query, key), {"cu_seqlens_q": query, "cu_seqlens_k": key}

    def _heads(self, *inputs):
        """Query, key and perhaps value, projected and split: ``[B, num_heads, T, head_dim]`` each."""
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

    def _check_inputs(self, *inputs):
        check_inputs(*inputs, sizes=(self.embed_dim, self.kdim, self.vdim), batch_first=self.batch_first)

    def __getstate__(self):
        return self.__dict__ | {"_last": None}  # copies and files take no activations along

    def extra_repr(self) -> str:
        learned = self.threshold_parameter is not None
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        parts += ["threshold=learned" if learned else f"threshold={self.threshold:g}", f"rule={self.rule}"]
        if self.weights != "softmax" or self.shrink:
            parts.append("shrink=True" if self.shrink else f"weights={self.weights}")
        parts += ["score=mahalanobis"] * (self.score == "mahalanobis") + ["alibi"] * (self.alibi_slopes is not None)
        parts += [f"window={self.window}"] * (self.window is not None)
        return ", ".join(parts + [f"dropout={self.dropout:g}"] * (self.dropout > 0))


def _square_norms(x):
    """float32 or wider, ``[B, H, T]``"""
    return (x if x.dtype == torch.float64 else x.float()).square().sum(-1)


def _slopes(alibi, heads):
    """A slope for each head, or None: 2^(-8 i / n) for n a power of two; other numbers of heads fill in between."""
    if isinstance(alibi, bool):
        if not alibi:
            return None
        power = 2 ** int(math.log2(heads))
        slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
        return (*slopes, *(2.0 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)))
    wanted = f"a bool, or {heads} finite slopes"
    is_sequence = isinstance(alibi, (list, tuple))
    require(is_sequence, "alibi", wanted, describe(alibi), TypeError)
    ok = len(alibi) == heads and all(isinstance(slope, (int, float)) and math.isfinite(slope) for slope in alibi)
    require(ok, "alibi", wanted, alibi)
    return tuple(map(float, alibi))


def _copy_parameters(source, cls, *args, **options):
    """A module made by ``cls(*args)`` with the parameters of ``source`` that it has too, on their device."""
    weight = source.out_proj.weight
    target = cls(*args, **options, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    wanted = dict(target.named_parameters())
    state = {name: value for name, value in source.state_dict().items() if name in wanted}
    target.load_state_dict(state, strict=False)
    for name, parameter in source.named_parameters():
        if name in wanted:
            wanted[name].requires_grad_(parameter.requires_grad)
    return target.train(source.training)
