"""Sparse attention as it is made of torch ops today: sparsemax, entmax-1.5 and top-k over dense scores.

sparsemax:   p = relu(z - tau),        sum p = 1   (Martins and Astudillo, 2016)
entmax-1.5:  p = relu(z / 2 - tau)^2,  sum p = 1   (Peters, Niculae and Martins, 2019)

Both have the usual hand-written backward: autograd through the search for tau would make a straw man of the peer.
"""

import torch
import torch.nn.functional as F

BISECTIONS = 24  # to float32's precision


class Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: torch.Tensor, by_sorting: bool) -> torch.Tensor:
        tau = sparsemax_tau(z) if by_sorting else bisected_tau(z, 1)
        p = (z - tau).relu_()
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        support = p > 0
        mean = (grad * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        return (grad - mean) * support, None


class Entmax15(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: torch.Tensor, by_sorting: bool) -> torch.Tensor:
        half = z / 2
        tau = entmax15_tau(half) if by_sorting else bisected_tau(half, 2)
        root = half.sub_(tau).relu_()
        ctx.save_for_backward(root)
        return root * root

    @staticmethod
    def backward(ctx, grad):
        (root,) = ctx.saved_tensors
        weighted = grad * root
        return weighted - weighted.sum(-1, keepdim=True) / root.sum(-1, keepdim=True) * root, None


def sparsemax_tau(z: torch.Tensor) -> torch.Tensor:
    """The threshold of sparsemax, from sorted scores."""
    ordered = z.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    candidates = (ordered.cumsum(-1) - 1) / ranks
    size = (ordered > candidates).sum(-1, keepdim=True)
    return candidates.gather(-1, size - 1)


def entmax15_tau(half: torch.Tensor) -> torch.Tensor:
    """The threshold of entmax-1.5, from sorted halved scores."""
    ordered = half.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, half.shape[-1] + 1, dtype=half.dtype)
    top = ordered[..., :1]  # moments of what lies below the largest: squares of large scores would cancel
    mean = (ordered - top).cumsum(-1) / ranks
    spread = (ordered - top).square().cumsum(-1) - ranks * mean.square()
    candidates = top + mean - ((1 - spread) / ranks).clamp_(min=0).sqrt()
    size = (candidates <= ordered).sum(-1, keepdim=True)
    return candidates.gather(-1, size - 1)


def bisected_tau(z: torch.Tensor, power: int, bisections: int = BISECTIONS) -> torch.Tensor:
    """tau with sum relu(z - tau)^power = 1: it lies within 1 below the largest score."""
    high = z.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(bisections):
        middle = (low + high) / 2
        enough = (z - middle).relu_().pow_(power).sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def sparsemax_attention(query, key, value, by_sorting: bool = True) -> torch.Tensor:
    return Sparsemax.apply(_scores(query, key), by_sorting) @ value


def entmax15_attention(query, key, value, by_sorting: bool = True) -> torch.Tensor:
    return Entmax15.apply(_scores(query, key), by_sorting) @ value


def topk_attention(query, key, value, kept: int) -> torch.Tensor:
    """Softmax over the ``kept`` largest scores of each query; the rest is masked out."""
    scores = _scores(query, key)
    least = scores.detach().topk(kept, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return F.softmax(scores.masked_fill(scores.detach() < least, -torch.inf), dim=-1) @ value


def _scores(query, key):
    return query @ key.mT * query.shape[-1] ** -0.5
