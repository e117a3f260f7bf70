"""Keys and values of the tokens so far, for decoding a token at a time."""

import torch

from compsparse_kernels.layouts.checks import check_positive_int, describe, require
from compsparse_kernels.ops.arguments import check_strided

INDEX_PANEL = 64  # keys; an index is made of whole panels


class KVCache:
    """Room for the keys and values of ``max_tokens`` tokens of one attention layer, made once and filled in place.

    Beside the keys lies what the screen of :func:`threshold_attention` knows of them, so that a new token costs its own
    share of that, and a query of a long cache reads mostly the index. Between calls nothing is copied.

    Args:
        batch, heads: of keys and values: ``[batch, heads, tokens, width]``.
        max_tokens: how many tokens there is room for.
        head_dim: width of a key.
        value_dim: width of a value; that of a key by default.
        device, dtype: as in ``torch.zeros``.

    Attributes:
        length: tokens so far.
        key, value: views of those, ``[batch, heads, length, width]``.
        index: of those keys, the argument ``index`` of :func:`threshold_attention`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import KVCache, ThresholdAttention
        >>> attn = ThresholdAttention(64, num_heads=4, batch_first=True).eval()
        >>> cache, x = attn.make_cache(batch=2, max_tokens=16), torch.randn(2, 5, 64)
        >>> with torch.no_grad():
        ...     whole = attn(x, x, x, is_causal=True)[0]
        ...     rows = [attn(t, t, t, is_causal=True, cache=cache)[0] for t in x.split(1, dim=1)]
        >>> torch.allclose(torch.cat(rows, 1), whole, atol=1e-5), cache.length
        (True, 5)
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        max_tokens: int,
        head_dim: int,
        value_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "heads": heads, "max_tokens": max_tokens, "head_dim": head_dim, "value_dim": value_dim}
        for name, size in sizes.items():
            check_positive_int(name, size)
        self._keys = torch.zeros(batch, heads, max_tokens, head_dim, device=device, dtype=dtype)
        self._values = torch.zeros(batch, heads, max_tokens, value_dim, device=device, dtype=dtype)
        self._index = torch.ops.compsparse.threshold_attention_index(self._keys)
        self.length = 0

    @property
    def max_tokens(self) -> int:
        return self._keys.shape[2]

    @property
    def key(self) -> torch.Tensor:
        return self._keys[:, :, : self.length]

    @property
    def value(self) -> torch.Tensor:
        return self._values[:, :, : self.length]

    @property
    def index(self) -> torch.Tensor:
        return self._index[:, :, : -(-self.length // INDEX_PANEL)]

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Takes the keys and values of the next tokens, ``[batch, heads, new, width]``; returns ``key``, ``value`` and
        ``index`` of all so far. What is appended has no gradient: one that would be lost is refused."""
        for name, given, room in (("key", key, self._keys), ("value", value, self._values)):
            _check(name, given, room, key, self.length)
        first, self.length = self.length, self.length + key.shape[2]
        with torch.no_grad():
            self._keys[:, :, first : self.length] = key
            self._values[:, :, first : self.length] = value
            torch.ops.compsparse.threshold_attention_index_(self._index, self._keys[:, :, first : self.length], first)
        return self.key, self.value, self.index

    def truncate(self, length: int) -> None:
        """Forgets all but the first ``length`` tokens: for another answer to the same prompt."""
        is_int = isinstance(length, int) and not isinstance(length, bool)
        require(is_int, "length", "an int", describe(length), TypeError)
        require(0 <= length <= self.length, "length", f"at most the {self.length} tokens there are", length)
        self.length = length

    def __repr__(self) -> str:
        batch, heads, most, width = self._keys.shape
        return f"KVCache({batch} x {heads} x {width}, {self.length} of {most} tokens)"


def _check(name, given, room, key, length):
    batch, heads, most, width = room.shape
    ok = isinstance(given, torch.Tensor) and given.dim() == 4 and given.dtype == room.dtype
    ok = ok and (*given.shape[:2], given.shape[3]) == (batch, heads, width) and given.shape[2] == key.shape[2]
    dtype = str(room.dtype).removeprefix("torch.")
    if not ok:
        tokens = "new" if given is key or not isinstance(key, torch.Tensor) else key.shape[2]
        error = ValueError if isinstance(given, torch.Tensor) else TypeError
        require(False, name, f"4-D {dtype} tensor [{batch}, {heads}, {tokens}, {width}]", describe(given), error)
    require(given.device == room.device, name, f"a tensor on {room.device}, like the cache", f"one on {given.device}")
    check_strided(name, given)
    lost = torch.is_grad_enabled() and given.requires_grad
    require(not lost, name, "a tensor without gradient (a cache keeps none: use torch.no_grad())", "one with")
    fits = length + given.shape[2] <= most
    require(fits, name, f"at most {most - length} more tokens (max_tokens is {most})", given.shape[2])
