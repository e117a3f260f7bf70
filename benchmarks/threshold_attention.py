"""Threshold attention against SDPA, flex_attention and sparse attention made of torch ops.

Beside the rule relative on random tokens: causal, clustered tokens, the rules that the sparse peers compute, and one
query that reads a cache of keys.
"""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import attention_kinds as kinds
from benchmarks.attention_kinds import HEADS, WIDTH, Attention
from benchmarks.inputs import differentiated, fastest, leaves
from benchmarks.registry import Case, Entry, Side
from compsparse_kernels import KVCache

OP = "threshold_attention"
LENGTHS = (1024, 2048, 4096)
KEPT = {0.01: 0.009, 0.05: 0.045, 0.2: 0.15}  # the bars' "<= 1 %, <= 5 %, 10 to 20 %", and the share aimed at
BARS = {
    "forward": {0.01: 4.0, 0.05: 2.5, 0.2: 0.9, 0.4: 0.9, 0.9: 0.9},
    "forward+backward": {0.01: 5.0, 0.05: 5.0, 0.2: 2.5, 0.4: 0.9, 0.9: 0.9},
}
SPARSE_PEERS = ("entmax-1.5", "sparsemax", "top-k")
CACHED, DECODING_BAR = 16384, 2.0


def entries() -> Iterator[Entry]:
    for length in LENGTHS:
        for direction, bars in BARS.items():
            for share, bar in bars.items():
                suites = {"bars": bar}
                if length == 1024 and share in KEPT and direction == "forward":
                    suites["quick"] = bar
                if (direction, length, share) == ("forward+backward", 2048, 0.05):
                    suites["foundation"] = 3.0
                yield _entry(direction, length, share, "SDPA", suites)
    for direction, bars in BARS.items():
        for share in (0.01, 0.05, 0.2):
            for kind in ("causal", "clustered"):
                yield _entry(direction, 2048, share, "SDPA", {"bars": bars[share]}, **{kind: True})
        for peer in SPARSE_PEERS:
            yield _entry(direction, 1024, 0.05, peer, {"bars": 20.0})
            yield _entry(direction, 1024, 0.05, peer, {"bars": None}, rule=peer)
    yield _entry("forward", 2048, 0.05, "flex_attention", {"bars": None})
    for share in (0.01, 0.05):
        for indexed in (True, False):
            yield _decoding_entry(share, indexed)


def _entry(direction: str, length: int, share: float, peer: str, suites: dict, **options) -> Entry:
    variant = f"rule {peer}" if "rule" in options else ", ".join([f"kept <= {share:.0%}", *options])
    make = partial(_case, direction, length, KEPT.get(share, share), peer, **options)
    return Entry(OP, variant, f"B1 H{HEADS} T{length} D{WIDTH}", share, direction, peer, make, suites)


def _decoding_entry(share: float, indexed: bool) -> Entry:
    variant = f"decoding, {'index' if indexed else 'no index'} in the cache"
    make = partial(_decoding_case, CACHED, KEPT[share], indexed)
    shape = f"B1 H{HEADS} T1 of {CACHED} D{WIDTH}"
    return Entry(OP, variant, shape, share, "forward", "SDPA", make, {"bars": DECODING_BAR if indexed else None})


def _case(
    direction: str,
    length: int,
    share: float,
    peer: str,
    rule: str = "relative",
    causal: bool = False,
    clustered: bool = False,
) -> Case:
    ours = kinds.ours(rule, length, is_causal=causal)
    query, key, value = kinds.tokens(length, clustered)
    # The rule top-k keeps as many keys of any scores, so there the rule relative says how peaked they are.
    edge = kinds.above_threshold if rule == "top-k" else ours.edge
    query *= kinds.sharpness(query, key, share, edge, causal)
    grad = torch.randn_like(query) if direction == "forward+backward" else None
    return _compared(ours, kinds.peers(length, causal)[peer], (query, key, value), grad, causal)


def _decoding_case(length: int, share: float, indexed: bool) -> Case:
    query, key, value = kinds.tokens(length, clustered=False, queries=1)
    query *= kinds.sharpness(query, key, share, kinds.above_threshold)
    cache = KVCache(1, HEADS, length + 64, WIDTH)  # room is left, as there is while a model writes
    key, value, index = cache.append(key, value)
    ours = kinds.ours(index=index if indexed else None)
    return _compared(ours, kinds.peers(length)["SDPA"], (query, key, value), None, causal=False)


def _compared(ours: Attention, peer: Attention, tensors: tuple, grad: torch.Tensor | None, causal: bool) -> Case:
    _, support = ours.ways[0](*tensors, return_support=True)
    head = kinds.OneHead(tensors, grad, (ours, peer), causal)
    sides = []
    for attention in (ours, peer):
        runs = runs_of(attention, tensors, grad)
        run = fastest(runs) if len(runs) > 1 else runs[0]
        sides.append(Side(run, partial(head.check, attention)))
    return Case(*sides, density=support.share_kept)


def runs_of(attention: Attention, tensors: tuple, grad: torch.Tensor | None) -> list:
    """A call for each way to compute it: forward, or with the gradients of query, key and value too."""
    if grad is None:
        return [partial(way, *tensors) for way in attention.ways]
    wanting = leaves(*tensors)
    return [differentiated(way, wanting, grad) for way in attention.ways]
