"""Kinds of attention that are compared: ways to compute each, its meaning as a function of the scores, and its inputs.

The share of keys kept comes from how peaked the scores are: queries are scaled until the wanted share survives. Peers
compute another function than ours (all keys, or another choice of them), so each kind has its own reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F

from benchmarks import attention_peers
from benchmarks.inputs import compare, differentiated, leaves
from compsparse_kernels import threshold_attention

HEADS, WIDTH = 8, 64
THRESHOLD = 0.01  # relative to the strongest key
TOPK_SHARE = 0.045  # of the keys
CLUSTERS, NEARNESS = 16, 0.8  # of a head; the share of a token's variance that is its cluster's
# A score this near to the edge of the support may fall on either side of it in float32: such queries are not compared.
UNDECIDED = 1e-4
SAMPLED_QUERIES = 32  # of each head


@dataclass(frozen=True)
class Attention:
    """One kind of attention: ways to compute it, and its meaning as a function of the scores."""

    ways: tuple[Callable, ...]
    weights: Callable[[torch.Tensor], torch.Tensor]
    edge: Callable[[torch.Tensor], torch.Tensor] | None = None  # how far each score is from the edge of the support


def ours(rule: str = "relative", length: int = 0, **options) -> Attention:
    """``threshold_attention``, by the rule relative or by the one that a peer of that name computes."""
    kept = round(TOPK_SHARE * length)
    meanings = {
        "relative": ({"threshold": THRESHOLD}, thresholded, above_threshold),
        "entmax-1.5": ({"rule": "entmax", "threshold": 1.5}, *_entmax_meaning(2)),
        "sparsemax": ({"rule": "entmax", "threshold": 2}, *_entmax_meaning(1)),
        "top-k": ({"rule": "topk", "threshold": kept}, *_topk_meaning(kept)),
    }
    arguments, weights, edge = meanings[rule]
    return Attention((partial(threshold_attention, **arguments, **options),), weights, edge)


def peers(length: int, causal: bool = False) -> dict[str, Attention]:
    sdpa = Attention((partial(F.scaled_dot_product_attention, is_causal=causal),), softmax)
    if causal:
        return {"SDPA": sdpa}
    kept = round(TOPK_SHARE * length)
    topk = partial(attention_peers.topk_attention, kept=kept)
    return {
        "SDPA": sdpa,
        "flex_attention": Attention((lambda *tensors: _compiled_flex_attention()(*tensors),), softmax),
        "sparsemax": _entmax(attention_peers.sparsemax_attention, power=1),
        "entmax-1.5": _entmax(attention_peers.entmax15_attention, power=2),
        "top-k": Attention((topk,), *_topk_meaning(kept)),
    }


def _entmax(attention: Callable, power: int) -> Attention:
    ways = tuple(partial(attention, by_sorting=by_sorting) for by_sorting in (True, False))
    return Attention(ways, *_entmax_meaning(power))


def _entmax_meaning(power: int) -> tuple[Callable, Callable]:
    return partial(_entmax_weights, power=power), partial(_above_tau, power=power)


def _topk_meaning(kept: int) -> tuple[Callable, Callable]:
    return partial(_topk_weights, kept=kept), partial(_topk_gap, kept=kept)


@cache
def _compiled_flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1)


def thresholded(scores: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(above_threshold(scores) < 0, -torch.inf).softmax(-1)


def above_threshold(scores: torch.Tensor) -> torch.Tensor:
    return scores - scores.amax(-1, keepdim=True) - torch.tensor(THRESHOLD, dtype=scores.dtype).log()


def _topk_weights(scores: torch.Tensor, kept: int) -> torch.Tensor:
    return scores.masked_fill(scores < scores.topk(kept).values[..., -1:], -torch.inf).softmax(-1)


def _topk_gap(scores: torch.Tensor, kept: int) -> torch.Tensor:
    largest = scores.topk(kept + 1).values
    return largest[..., -2:-1] - largest[..., -1:]


def _entmax_weights(scores: torch.Tensor, power: int) -> torch.Tensor:
    z = scores / power
    above = _above_tau(scores.detach(), power)
    slope = above.clamp(min=0) ** (power - 1) * (above > 0)
    # The gradient of tau by the implicit function theorem, from sum relu(z - tau)^power = 1.
    shift = (slope * (z - z.detach())).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
    return (above + (z - z.detach()) - shift).relu() ** power


def _above_tau(scores: torch.Tensor, power: int) -> torch.Tensor:
    z = scores.double() / power
    return (z - attention_peers.bisected_tau(z, power, bisections=60)).to(scores.dtype)


def tokens(length: int, clustered: bool, queries: int | None = None) -> list[torch.Tensor]:
    """Random query, key and value ``[1, HEADS, length, WIDTH]``. Clustered: queries and keys lie around the same few
    centres in each head, in a random order."""
    shapes = [(1, HEADS, count, WIDTH) for count in (queries or length, length, length)]
    query, key, value = (torch.randn(shape) for shape in shapes)
    if clustered:
        centres = torch.randn(HEADS, CLUSTERS, WIDTH)
        query, key = (_around(centres, tensor) for tensor in (query, key))
    return [query, key, value]


def _around(centres: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    chosen = torch.randint(CLUSTERS, (HEADS, noise.shape[2], 1)).expand(-1, -1, WIDTH)
    return NEARNESS**0.5 * centres.gather(1, chosen) + (1 - NEARNESS) ** 0.5 * noise


def sharpness(query: torch.Tensor, key: torch.Tensor, share: float, edge: Callable, causal: bool = False) -> float:
    """The factor of the queries at which this share of the visible keys survives (bisection on some queries)."""
    step = max(1, query.shape[2] // SAMPLED_QUERIES)
    scores = _scores(query[:, :, ::step], key)
    if causal:
        scores = _hide_later(scores, step)
    visible = (scores > -torch.inf).sum()
    low, high = 0.05, 50.0
    for _ in range(20):
        middle = (low * high) ** 0.5
        kept = (edge(middle * scores) >= 0).sum() / visible
        low, high = (middle, high) if kept > share else (low, middle)
    return high


def _hide_later(scores: torch.Tensor, step: int = 1) -> torch.Tensor:
    """Scores of every ``step``-th query, those of keys that come after it at -inf."""
    places = torch.arange(0, scores.shape[-2] * step, step).unsqueeze(-1)
    return scores.masked_fill(torch.arange(scores.shape[-1]) > places, -torch.inf)


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query @ key.mT * WIDTH**-0.5


class OneHead:
    """Compares one head, taken at random: outputs, and the gradients of query, key and value where ``grad`` is given.

    Args:
        tensors: query, key and value; ``grad``: that of the output. What is not compared becomes 0 in it, in place: it
            must not reach the gradients of keys and values.
        attentions: the kinds to compare. Only queries that all of them decide are.
    """

    def __init__(self, tensors, grad, attentions, causal: bool = False):
        self.causal = causal
        for head in torch.randperm(HEADS).tolist():
            self.query, self.key, self.value = (tensor[0, head].detach() for tensor in tensors)
            scores = self._scores(self.query.double(), self.key.double())
            distances = [attention.edge(scores) for attention in attentions if attention.edge]
            clear = [(distance.abs() > UNDECIDED).all(-1, keepdim=True) for distance in distances]
            self.decided = torch.stack(clear).all(0)  # [T, 1]
            if self.decided.any():
                break
        else:
            raise RuntimeError("every query has a score at the edge of its support: there is nothing to compare")
        self.head = head
        self.grad = None if grad is None else grad[0, head].mul_(self.decided)
        self.references: dict[Attention, list] = {}

    def check(self, attention: Attention, result) -> None:
        output, *gradients = (result,) if self.grad is None else result
        ours = [output[0, self.head] * self.decided, *(gradient[0, self.head] for gradient in gradients)]
        if attention not in self.references:
            self.references[attention] = [self._dense(attention, dtype) for dtype in (torch.float64, torch.float32)]
        compare(ours, *self.references[attention])

    def _dense(self, attention, dtype) -> list[torch.Tensor]:
        inputs = [tensor.to(dtype) for tensor in (self.query, self.key, self.value)]
        attend = partial(self._attend, attention.weights)
        if self.grad is None:
            return [attend(*inputs)]
        return differentiated(attend, leaves(*inputs), self.grad.to(dtype))()

    def _attend(self, weights, query, key, value) -> torch.Tensor:
        return weights(self._scores(query, key)) @ value * self.decided

    def _scores(self, query, key) -> torch.Tensor:
        return _hide_later(_scores(query, key)) if self.causal else _scores(query, key)
