"""How many keys a query may see, kept or not: what a share kept is a share of."""

import torch
import torch.nn.functional as F

from compsparse_kernels.ops.threshold_attention.reference import visible_keys


def visible_counts(queries, keys, attn_bias, key_padding_mask, *sight, device):
    """int64, broadcastable to ``[B, H, Tq]``. ``sight`` as for ``visible_keys``; only a bool bias hides keys here."""
    begin, end = visible_keys(queries, keys, *sight, device)
    hiding = [] if key_padding_mask is None else [~key_padding_mask[:, None, None]]
    if attn_bias is not None and attn_bias.dtype == torch.bool:
        hiding.append(attn_bias)
    if not hiding:
        return (end - begin)[None, None]
    allowed = hiding[0] if len(hiding) == 1 else hiding[0] & hiding[1]  # [B or 1, H or 1, Tq or 1, Tk or 1]
    before = F.pad(allowed.expand(*allowed.shape[:3], keys).cumsum(-1), (1, 0))  # of each key, how many allowed ones
    before = before.expand(-1, -1, queries, -1)
    begin, end = (at.clamp(max=keys)[:, None].expand(*before.shape[:2], queries, 1) for at in (begin, end))
    return (before.gather(-1, end) - before.gather(-1, begin)).squeeze(-1)
