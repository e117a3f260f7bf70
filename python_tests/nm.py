"""What the tests of N:M sparsity share: masks that satisfy a pattern, full or with groups that hold less."""

import torch

from compsparse_kernels import MaskLayout

# Each way of storing positions, groups that vectors hold whole and others, one slot and as many as columns.
PATTERNS = ((1, 2), (2, 4), (1, 4), (3, 3), (4, 8), (2, 7), (2, 16), (5, 16), (3, 17), (1, 256), (200, 256))


def nm_mask(out_features, in_features, n, m, missing=0.0, seed=0):
    """bool ``[out, in]`` with ``n`` survivors in each group of ``m`` (all columns, in a ragged one that has
    fewer), each of which is missing with this probability."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // m)
    scores = torch.rand(out_features, groups * m, generator=generator)
    scores[:, in_features:] = -1  # past the last column
    grouped = scores.view(out_features, groups, m)
    chosen = torch.zeros_like(grouped, dtype=torch.bool).scatter(-1, grouped.topk(n, dim=-1).indices, True)
    mask = chosen.view(out_features, -1)[:, :in_features]
    return mask & (torch.rand(mask.shape, generator=generator) >= missing)


def nm_layout(out_features, in_features, n, m, missing=0.0, seed=0):
    return MaskLayout.from_mask(nm_mask(out_features, in_features, n, m, missing, seed), "nm", nm=(n, m))
