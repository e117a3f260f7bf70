"""What thresholded attention kept of its last forward pass, and how much of the softmax that was."""

import sys
from dataclasses import dataclass

import torch

from compsparse_kernels.layouts import AttentionSupport
from compsparse_kernels.ops import threshold_attention

EVERY_KEY = sys.float_info.min  # as a relative threshold: no key that softmax can see is below it


@dataclass(frozen=True)
class AttentionStats:
    """Shares in [0, 1]; nothing carries a gradient.

    Attributes:
        share_kept: kept pairs of a query and a key over those that may see each other.
        mass_kept: the mean over queries of the softmax mass (of all visible keys) that lies on the kept ones. Queries
            that see no key do not count.
        keys_kept: kept keys of a query, the mean.
        share_by_head, mass_by_head: the same of each head, float64 ``[H]``.
    """

    share_kept: float
    mass_kept: float
    keys_kept: float
    share_by_head: torch.Tensor
    mass_by_head: torch.Tensor


@dataclass(frozen=True)
class Attended:
    """A call of the op as it was, without gradients: ``query [B, H, Tq, D]``, ``key [B, H, Tk, D]``, its options."""

    query: torch.Tensor
    key: torch.Tensor
    options: dict
    is_self: bool
    autocast: bool  # then the op computes in float32, whatever the dtype of query and key

    @classmethod
    def of(cls, query, key, options, is_self):
        kept = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        autocast = torch.is_autocast_enabled(query.device.type)
        return cls(query.detach(), key.detach(), kept | {"dropout_p": 0.0, "index": None}, is_self, autocast)

    def example(self, number: int) -> "Attended":
        """The same call for one element of the batch."""
        options = dict(self.options)
        for name, dimensions in (("attn_bias", 4), ("threshold", 4), ("key_padding_mask", 2)):
            x = options[name]
            if isinstance(x, torch.Tensor) and x.dim() == dimensions and len(x) > 1:
                options[name] = x[number : number + 1]
        query, key = self.query[number : number + 1], self.key[number : number + 1]
        return Attended(query, key, options, self.is_self, self.autocast)

    @torch.no_grad()
    def support(self, **changed) -> AttentionSupport:
        """With other options if given. The values do not matter to it: one column of the keys stands for them."""
        options = self.options | changed
        with torch.autocast(self.query.device.type, enabled=self.autocast):
            return threshold_attention(self.query, self.key, self.key[..., :1], **options, return_support=True)[1]

    def every_key(self) -> AttentionSupport:
        """The support that keeps all there is to keep: the weights are those of softmax attention."""
        return self.support(threshold=EVERY_KEY, rule="relative", weights="softmax", shrink=False)


def stats_of(attended: Attended) -> AttentionStats:
    """One element of the batch at a time: the pairs of one are in memory at once."""
    heads = attended.query.shape[1]
    kept, visible, mass, rows = (torch.zeros(heads, dtype=torch.float64) for _ in range(4))
    queries = 0
    for number in range(len(attended.query)):
        example = attended.example(number)
        support, whole = example.support(), example.every_key()
        kept += _by_head(support.degree)
        seen = whole.degree if whole.visible is None else whole.visible.expand(whole.shape[:3])
        visible += _by_head(seen)
        share = (support.log_sum.double() - whole.log_sum.double()).exp()  # NaN where there was nothing to see
        mass += _by_head(share.nan_to_num(0).clamp(max=1))
        rows += _by_head(whole.log_sum > -torch.inf)
        queries += support.shape[2]
    return AttentionStats(
        share_kept=(kept.sum() / visible.sum().clamp(min=1)).item(),
        mass_kept=(mass.sum() / rows.sum().clamp(min=1)).item(),
        keys_kept=kept.sum().item() / max(1, queries * heads),
        share_by_head=kept / visible.clamp(min=1),
        mass_by_head=mass / rows.clamp(min=1),
    )


def _by_head(rows: torch.Tensor) -> torch.Tensor:
    """The sum over batch and queries of ``[B, H, Tq]``: float64 ``[H]``, on the CPU."""
    return rows.sum((0, 2), dtype=torch.float64).cpu()
