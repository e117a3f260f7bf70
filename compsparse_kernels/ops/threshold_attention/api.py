"""What users call: checks, then the op, inside an autograd Function only where a gradient is wanted."""

import torch

from compsparse_kernels.layouts import AttentionSupport
from compsparse_kernels.ops.arguments import autocast_to, autocasts, refuse_forward_mode
from compsparse_kernels.ops.backends import check_backend
from compsparse_kernels.ops.threshold_attention import arguments as given
from compsparse_kernels.ops.threshold_attention import autograd, choices, nested, reference
from compsparse_kernels.ops.threshold_attention.visible import visible_counts

_output = torch.ops.compsparse.threshold_attention.default
_support = torch.ops.compsparse.threshold_attention_support.default


def threshold_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    threshold: float | torch.Tensor,
    rule: str = "relative",
    weights: str = "softmax",
    shrink: bool = False,
    attn_bias: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    query_offset: int = 0,
    index: torch.Tensor | None = None,
    return_support: bool | str = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, AttentionSupport | torch.Tensor]:
    r"""Attention in which a query sees only the keys whose score reaches a threshold (the paper, section 5.2).

    .. math::
        s_{ij} = \mathrm{scale}\; q_i \cdot k_j + \mathrm{bias}_{ij}, \qquad
        o_i = \sum_{j \in S_i} w_{ij} v_j, \qquad w_{ij} = \frac{u_{ij}}{\sum_{l \in S_i} u_{il}}

    The support :math:`S_i`, with :math:`m_i = \max_l s_{il}` and :math:`t` the ``threshold``:

    - ``rule="relative"``: :math:`s_{ij} \ge m_i + \log t`, the keys with at least t times the weight of the strongest,
      :math:`0 < t \le 1`;
    - ``rule="absolute"``: :math:`s_{ij} \ge t`; it may be empty: output 0, gradient 0;
    - ``rule="topk"``: the t strongest keys, an int, and what equals the last of them;
    - ``rule="topp"``: the fewest strongest keys with a softmax mass of at least t, and what equals the last of them;
    - ``rule="entmax"``: the keys that entmax with :math:`\alpha = t` gives a weight: 1.5, or 2 (sparsemax), [1]_ [2]_.

    The weights :math:`u_{ij}` on it:

    - ``weights="softmax"``: :math:`e^{s_{ij}}`; of rule entmax
      :math:`((\alpha - 1) s_{ij} - \tau_i)^{1 / (\alpha - 1)}`, which add up to 1;
    - ``weights="rectified"``: :math:`s_{ij} - m_i - \log t` (relative) or :math:`s_{ij} - t` (absolute), the paper's
      :math:`H_D(x) = x H(x)`;
    - ``shrink=True``: :math:`e^{s_{ij} - m_i} - t` (relative) or :math:`e^{s_{ij}} - e^t` (absolute), soft
      thresholding.

    The last two are 0 at the cut, so the output is continuous in the threshold and has a true gradient to it.

    The support is exact: that of exact arithmetic on the given numbers, but for scores within rounding of the threshold
    in double precision; keys with equal scores are kept or dropped together. On the CPU an 8-bit screen with a proven
    error bound finds the candidates (AVX2, AVX512-VNNI; elsewhere scores in working precision do); what follows, the
    backward and memory cost the survivors only. Where many keys survive dense tiles take over, about as fast as
    ``F.scaled_dot_product_attention``: from about 30 % on training in float32 or float64 (softmax over the rules
    relative and absolute, no dropout, no stored support) keeps a bit for each key and computes scores again.

    Args:
        query, key, value: ``[B, H, Tq, D]``, ``[B, Hkv, Tk, D]``, ``[B, Hkv, Tk, Dv]``, float32, float64, and on the
            CPU float16 or bfloat16 (summed in float32 and rounded once); any number of leading dimensions, as in
            ``F.scaled_dot_product_attention``. Or all three nested (``torch.jagged``, ``[B, H, tokens, width]``).
        threshold: a number; or of the rules relative and absolute a float32 or float64 tensor broadcastable to
            ``[..., H, Tq, 1]``, or ``[H]``, one for each head. It may want a gradient where weights are continuous.
        rule, weights, shrink: see above. Rules without a cut (topk, topp, entmax) have softmax or own weights only.
        attn_bias: broadcastable to ``[B, H, Tq, Tk]``; added to the scores (dtype of ``query``, may want a gradient),
            or bool, true where a query may attend. It is read through its strides and never expanded.
        key_padding_mask: bool ``[B, Tk]``, true where a key is ignored (as in ``nn.MultiheadAttention``); ``B`` is the
            product of the dimensions before the heads.
        is_causal: query ``i`` sees the keys up to its position ``p = i + query_offset``.
        window: a pair ``(left, right)``: query ``i`` sees the keys ``p - left .. p + right`` only, -1 is no bound (as
            in flash-attention); an int n is ``(n, n)``, with ``is_causal`` the n keys before and its own.
        scale: of the scores; ``1 / sqrt(D)`` by default.
        enable_gqa: let ``Hkv`` be a divisor of ``H``: query head ``h`` reads key-value head ``h // (H / Hkv)``.
        alibi_slopes: float32 ``[H]``; ``-slope |p - j|`` is added to the scores [3]_.
        dropout_p: in [0, 1): that share of the weights becomes 0, the others are divided by ``1 - dropout_p``.
        seed: decides, with an entry's row and column alone, whether dropout takes it (Philox-4x32-10): the same for any
            number of threads and any device. None draws one from torch's default generator.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``[S + 1]``, bounds ``0 .. Tq`` and ``0 .. Tk`` of S sequences whose
            tokens lie one after another, with B = 1 (or no B). A query sees the keys of its own sequence; positions
            count from its beginning.
        query_offset: position of the first query among the keys: of a cache of n keys, the last query's is n - 1.
        index: what the screen knows of ``key``: ``torch.ops.compsparse.threshold_attention_index(key)``, kept beside a
            cache of keys; it saves time and changes nothing else. None computes it.
        return_support: True or ``"csr"`` returns ``(out, support)`` with an :class:`AttentionSupport`, ``"degree"``
            ``(out, degree)`` with the number of keys kept, int64 ``[..., H, Tq]``. They carry no gradient, and show
            weights before dropout.
        backend: None lets torch's dispatcher choose; ``"cpu"`` or ``"reference"`` runs that one or says why not.

    Returns:
        ``[..., H, Tq, Dv]``, differentiable once with respect to query, key, value, a float bias and a threshold; the
        support counts as constant, as it is almost everywhere. A row without any key gives 0, a row with an undefined
        (NaN) score NaN.

    Under autocast the inputs are computed in float32 and the output has autocast's dtype. Under ``torch.compile`` the
    values of ``cu_seqlens`` and of a tensor of thresholds are not checked.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    References:
        .. [1] Martins, Astudillo, "From softmax to sparsemax", 2016.
        .. [2] Peters, Niculae, Martins, "Sparse sequence-to-sequence models", 2019.
        .. [3] Press, Smith, Lewis, "Train short, test long", 2022.

    Example:
        >>> import torch
        >>> from compsparse_kernels import threshold_attention
        >>> query, key, value = (torch.randn(2, 4, 32, 16) for _ in range(3))
        >>> out, support = threshold_attention(query, key, value, threshold=0.5, return_support=True)
        >>> out.shape, support.degree.shape, support.density < 1
        (torch.Size([2, 4, 32, 16]), torch.Size([2, 4, 32]), True)
        >>> threshold = torch.full((4,), 0.1, requires_grad=True)  # one a head, learned
        >>> threshold_attention(query, key, value, threshold=threshold, shrink=True).square().sum().backward()
        >>> threshold.grad.shape
        torch.Size([4])
    """
    any_nested = _is_nested(query) or _is_nested(key) or _is_nested(value)
    if any_nested or autocasts(query):
        options = {"threshold": threshold, "rule": rule, "weights": weights, "shrink": shrink, "attn_bias": attn_bias}
        options |= {"key_padding_mask": key_padding_mask, "is_causal": is_causal, "window": window, "scale": scale}
        options |= {"enable_gqa": enable_gqa, "alibi_slopes": alibi_slopes, "dropout_p": dropout_p, "seed": seed}
        options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "query_offset": query_offset}
        options |= {"index": index, "return_support": return_support, "backend": backend}
        wrapper = nested.attend if any_nested else _under_autocast
        return wrapper(threshold_attention, query, key, value, options)
    given.check_tensors(query, key, value, enable_gqa)
    weighting = choices.weighting_of(rule, weights, shrink)
    choices.check_return_support(return_support)
    choices.check_flags(is_causal=is_causal, enable_gqa=enable_gqa)
    choices.check_offset(query_offset)
    if backend is not None:
        check_backend(backend, "threshold_attention", query, key, value, rule=rule)
    leading = query.shape[:-2]
    if len(leading) != 2:
        query, key, value = (given.four_dimensional(tensor) for tensor in (query, key, value))
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    scores_shape = (*leading, queries, keys)
    threshold, thresholds = given.threshold_of(threshold, scores_shape, query, rule, weighting)
    attn_bias = given.bias_of(attn_bias, scores_shape, query)
    given.check_padding(key_padding_mask, batch, keys, query)
    given.check_slopes(alibi_slopes, heads, query)
    given.check_index(index, key)
    cu_seqlens_q, cu_seqlens_k = given.sequences_of(cu_seqlens_q, cu_seqlens_k, query, key)
    left, right = choices.window_of(window)
    scale = choices.scale_of(scale, width)
    dropout_p, seed = choices.dropout_of(dropout_p, seed)
    arguments = (query, key, value, attn_bias, key_padding_mask, alibi_slopes, thresholds, cu_seqlens_q, cu_seqlens_k)
    arguments += (index, threshold, rule, weighting, is_causal, left, right, query_offset, scale, dropout_p, seed)
    out, *support = _run(arguments, bool(return_support), backend)
    if len(leading) != 2:
        out = out.view(*leading, *out.shape[2:])
    if not return_support:
        return out
    if return_support == "degree":
        return out, support[0].diff().view(*leading, queries)
    sight = (cu_seqlens_q, cu_seqlens_k, is_causal, left, right, query_offset)
    visible = visible_counts(queries, keys, attn_bias, key_padding_mask, *sight, device=query.device)
    return out, AttentionSupport(*support[:3], (batch, heads, queries, keys), support[3], visible)


def _run(arguments, with_support, backend):
    """``(out,)``, or output, row_ptr, col_idx, weights, log_sum; through autograd where a gradient is wanted."""
    if backend == "reference":
        if with_support:
            out, *support, _ = reference.threshold_attention_support(*arguments)
            return out, *(tensor.detach() for tensor in support)
        return (reference.threshold_attention(*arguments),)
    differentiable = (*arguments[:4], arguments[autograd.THRESHOLDS])
    names = ("query", "key", "value", "attn_bias", "threshold")
    refuse_forward_mode(*zip(names, differentiable, strict=True))
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        if torch.compiler.is_compiling():  # Dynamo takes no tensor twice, as where query, key and value are one
            arguments = tuple(each.view_as(each) if isinstance(each, torch.Tensor) else each for each in arguments)
        return autograd.attend(arguments, with_support)
    return _support(*arguments)[:5] if with_support else (_output(*arguments),)


def _under_autocast(attention, query, key, value, options):
    """In float32 whatever autocast's dtype: what is kept depends on small differences of large scores."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        query, key, value, options["attn_bias"] = (
            autocast_to(torch.float32, tensor) for tensor in (query, key, value, options["attn_bias"])
        )
        result = attention(query, key, value, **options)
    return (result[0].to(dtype), result[1]) if options["return_support"] else result.to(dtype)


def _is_nested(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.is_nested
