"""Thresholded attention in the models of Hugging Face's ``transformers``, which only :func:`register` imports."""

import importlib
from functools import partial

import torch

from compsparse_kernels.layouts.checks import require
from compsparse_kernels.ops import threshold_attention

NAME = "compsparse_threshold"
OPTIONS = ("threshold", "rule", "weights", "shrink")
# What some models ask of their attention and this one has not.
REFUSED = ("softcap", "s_aux")


def register(name: str = NAME, **options) -> str:
    """Lets every model of ``transformers`` with exchangeable attention run :func:`threshold_attention`, by name.

    A model uses it with ``attn_implementation=name`` (or ``model.set_attn_implementation(name)``), whatever it is:
    encoder or decoder, with grouped heads, padding, sliding windows, a KV cache, ``generate``. Its masks are those of
    ``"sdpa"``. Weights, caches and files stay as they are.

    Which keys are kept comes from ``options``, and where the model's config has an attribute
    ``compsparse_threshold``, a dict of such options, from there: it is saved with the config, and two models in one
    process may differ. Another name may be registered with other options.

    Args:
        name: what to call it.
        options: ``threshold`` (0.01 by default), ``rule``, ``weights``, ``shrink``, as in :func:`threshold_attention`.

    Returns:
        The name.

    Raises:
        ImportError: where ``transformers`` is missing.
        TypeError, ValueError: naming the argument, what was wanted and what came. A model that wants soft-capped scores
            or attention sinks is refused when it runs, as neither is there.

    Example:
        >>> import torch
        >>> from compsparse_kernels.nn import huggingface
        >>> transformers = huggingface.import_transformers()
        >>> name = huggingface.register(threshold=0.05)
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> config = transformers.BertConfig(vocab_size=50, attn_implementation=name, **sizes)
        >>> model = transformers.BertModel(config).eval()
        >>> model(torch.arange(10)[None]).last_hidden_state.shape
        torch.Size([1, 10, 32])
    """
    transformers = import_transformers()
    require(isinstance(name, str), "name", "a string", type(name).__name__, TypeError)
    taken = name in ("eager", "sdpa", "flex_attention") or name.startswith(("flash_attention", "paged|"))
    require(bool(name) and not taken, "name", "one that transformers has not taken itself", repr(name))
    _check("options", options)
    masks = importlib.import_module("transformers.masking_utils")
    transformers.AttentionInterface.register(name, partial(attend, defaults=options))
    transformers.AttentionMaskInterface.register(name, masks.sdpa_mask)
    return name


def import_transformers():
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        message = "transformers is needed here: pip install compsparse_kernels[transformers]"
        raise ImportError(message) from error


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    *,
    defaults: dict | None = None,
    **given,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of ``transformers``: ``query [B, H, Tq, D]``, keys and values ``[B, Hkv, Tk, D]``; returns
    ``[B, Tq, H, D]``, and the weights ``[B, H, Tq, Tk]`` where ``output_attentions`` asks for them."""
    for name in REFUSED:
        require(given.get(name) is None, name, "None (thresholded attention has no such scores)", "one")
    config = getattr(getattr(module, "config", None), NAME, None) or {}
    _check(f"config.{NAME}", config)
    options = {"threshold": 0.01} | (defaults or {}) | config
    queries, keys = query.shape[2], key.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # As for "sdpa": a decoder gives no mask where causality is all of it, and a single query sees every key.
    is_causal = bool(is_causal) and attention_mask is None and queries > 1
    if is_causal and keys > queries:  # a static cache with room behind the first tokens
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    result = threshold_attention(
        query,
        key,
        value,
        **options,
        attn_bias=_bias(attention_mask, position_bias, query, key.shape[2]),
        is_causal=is_causal,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=key.shape[1] != query.shape[1],
        return_support=bool(given.get("output_attentions")),
    )
    output, support = result if given.get("output_attentions") else (result, None)
    return output.transpose(1, 2).contiguous(), None if support is None else support.to_dense()


def _bias(mask, position_bias, query, keys):
    if mask is not None:
        mask = mask[..., :keys]  # models may keep one for all the room of a cache
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    if position_bias is None:
        return mask
    bias = position_bias.to(query.dtype)
    if mask is None:
        return bias
    return bias.where(mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _check(name, options):
    require(isinstance(options, dict), name, f"a dict of {', '.join(OPTIONS)}", type(options).__name__, TypeError)
    unknown = ", ".join(sorted(map(str, set(options) - set(OPTIONS))))
    require(not unknown, name, f"some of {', '.join(OPTIONS)}", unknown)
