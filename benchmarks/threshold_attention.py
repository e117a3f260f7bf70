"""Threshold attention against SDPA, flex_attention and sparse attention made of torch ops.

The share of keys kept comes from how peaked the scores are: queries are scaled until the wanted share survives. Peers
compute another function than ours (all keys, or another choice of them), so each side has its own reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F

from benchmarks import attention_peers
from benchmarks.inputs import compare, differentiated, fastest, leaves
from benchmarks.registry import Case, Entry, Side
from compsparse_kernels import threshold_attention

OP = "threshold_attention"
HEADS, WIDTH = 8, 64
LENGTHS = (1024, 2048, 4096)
THRESHOLD = 0.01  # relative to the strongest key
KEPT = {0.01: 0.009, 0.05: 0.045, 0.2: 0.15}  # the bars' "<= 1 %, <= 5 %, 10 to 20 %", and the share aimed at
FORWARD_BARS = {0.01: 4.0, 0.05: 2.5, 0.2: 0.9}
BACKWARD_BARS = {0.01: 5.0, 0.05: 5.0, 0.2: 2.5}
NEARLY_ALL = 0.9
# A score this near to the edge of the support may fall on either side of it in float32: such queries are not compared.
UNDECIDED = 1e-4


def entries() -> Iterator[Entry]:
    for length in LENGTHS:
        for share in KEPT:
            suites = {"bars": FORWARD_BARS[share]} | ({"quick": FORWARD_BARS[share]} if length == 1024 else {})
            yield _entry("forward", length, share, "SDPA", suites)
            suites = {"bars": BACKWARD_BARS[share]}
            if length == 2048 and share == 0.05:
                suites["foundation"] = 3.0
            yield _entry("forward+backward", length, share, "SDPA", suites)
    for direction in ("forward", "forward+backward"):
        yield _entry(direction, 2048, NEARLY_ALL, "SDPA", {"bars": 0.9})
        for peer in ("entmax-1.5", "sparsemax", "top-k"):
            yield _entry(direction, 1024, 0.05, peer, {"bars": 20.0})
    yield _entry("forward", 2048, 0.05, "flex_attention", {"bars": None})


def _entry(direction: str, length: int, share: float, peer: str, suites: dict) -> Entry:
    make = partial(_case, direction, length, KEPT.get(share, share), peer)
    return Entry(OP, f"kept <= {share:.0%}", f"B1 H{HEADS} T{length} D{WIDTH}", share, direction, peer, make, suites)


def _case(direction: str, length: int, share: float, peer_name: str) -> Case:
    query, key, value, grad = (torch.randn(1, HEADS, length, WIDTH) for _ in range(4))
    query *= _sharpness(query, key, share)
    _, support = threshold_attention(query, key, value, threshold=THRESHOLD, return_support=True)
    ours, peer = _ours(), _peers(length)[peer_name]
    head = _OneHead((query, key, value), grad, (ours, peer), backward=direction == "forward+backward")
    tensors = leaves(query, key, value) if head.backward else (query, key, value)
    sides = []
    for attention in (ours, peer):
        if head.backward:
            runs = [differentiated(way, tensors, grad) for way in attention.ways]
        else:
            runs = [partial(way, *tensors) for way in attention.ways]
        run = fastest(runs) if len(runs) > 1 else runs[0]
        sides.append(Side(run, partial(head.check, attention)))
    return Case(*sides, density=support.density)


def _sharpness(query: torch.Tensor, key: torch.Tensor, share: float) -> float:
    """The factor of the queries at which this share of keys survives (bisection on some of the queries)."""
    some = query[:, :, :64]
    low, high = 0.05, 50.0
    for _ in range(20):
        middle = (low * high) ** 0.5
        kept = (_above_threshold(middle * _scores(some, key)) >= 0).double().mean()
        low, high = (middle, high) if kept > share else (low, middle)
    return high


@dataclass(frozen=True)
class _Attention:
    """One kind of attention: ways to compute it, and its meaning as a function of the scores."""

    ways: tuple[Callable, ...]
    weights: Callable[[torch.Tensor], torch.Tensor]
    edge: Callable[[torch.Tensor], torch.Tensor] | None = None  # how far each score is from the edge of the support


def _ours() -> _Attention:
    return _Attention((partial(threshold_attention, threshold=THRESHOLD),), _thresholded, _above_threshold)


def _peers(length: int) -> dict[str, _Attention]:
    kept = round(KEPT[0.05] * length)
    topk = partial(attention_peers.topk_attention, kept=kept)
    return {
        "SDPA": _Attention((F.scaled_dot_product_attention,), _softmax),
        "flex_attention": _Attention((lambda *tensors: _compiled_flex_attention()(*tensors),), _softmax),
        "sparsemax": _entmax(attention_peers.sparsemax_attention, power=1),
        "entmax-1.5": _entmax(attention_peers.entmax15_attention, power=2),
        "top-k": _Attention((topk,), partial(_topk_weights, kept=kept), partial(_topk_gap, kept=kept)),
    }


def _entmax(attention: Callable, power: int) -> _Attention:
    ways = tuple(partial(attention, by_sorting=by_sorting) for by_sorting in (True, False))
    return _Attention(ways, partial(_entmax_weights, power=power), partial(_above_tau, power=power))


@cache
def _compiled_flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1)


def _thresholded(scores: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(_above_threshold(scores) < 0, -torch.inf).softmax(-1)


def _above_threshold(scores: torch.Tensor) -> torch.Tensor:
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


class _OneHead:
    """Compares one head, taken at random: outputs, and the gradients of query, key and value."""

    def __init__(self, tensors, grad, attentions, backward):
        self.head = int(torch.randint(HEADS, ()))
        self.query, self.key, self.value = (tensor[0, self.head] for tensor in tensors)
        self.grad, self.backward = grad[0, self.head], backward
        scores = _scores(self.query.double(), self.key.double())
        distances = [attention.edge(scores) for attention in attentions if attention.edge]
        clear = [(distance.abs() > UNDECIDED).all(-1, keepdim=True) for distance in distances]
        self.decided = torch.stack(clear).all(0)  # [T, 1]
        self.references: dict[_Attention, list] = {}
        self.grad *= self.decided  # in place: what is not compared must not reach the gradients of keys and values

    def check(self, attention: _Attention, result) -> None:
        output, *gradients = result if self.backward else (result,)
        ours = [output[0, self.head] * self.decided, *(gradient[0, self.head] for gradient in gradients)]
        if attention not in self.references:
            self.references[attention] = [self._dense(attention, dtype) for dtype in (torch.float64, torch.float32)]
        compare(ours, *self.references[attention])

    def _dense(self, attention, dtype) -> list[torch.Tensor]:
        inputs = [tensor.to(dtype) for tensor in (self.query, self.key, self.value)]
        if not self.backward:
            return [self._attend(attention.weights, *inputs)]
        return differentiated(partial(self._attend, attention.weights), leaves(*inputs), self.grad.to(dtype))()

    def _attend(self, weights, query, key, value) -> torch.Tensor:
        return weights(_scores(query, key)) @ value * self.decided


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query @ key.mT * WIDTH**-0.5
