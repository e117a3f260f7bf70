"""Paired timing: both sides in turn, so that whatever slows the machine down slows both."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.registry import Case, Side

LEAST_ROUNDS = 7
LEAST_SAMPLE = 0.008  # seconds; a shorter sample would show the clock and the scheduler


@dataclass(frozen=True)
class Timing:
    ours_ms: float
    peer_ms: float | None
    ratio: float | None  # median of peer / ours, round by round
    spread: float | None  # interquartile range of those ratios


def measure(case: Case, rounds: int) -> Timing:
    """Times ours and the peer in turn (ABAB...), each sample long enough to be read."""
    sampler = _sampler if case.device == "cpu" else _gpu_sampler
    sides = [sampler(side) for side in (case.ours, case.peer) if side is not None]
    samples = [[sample() for sample in sides] for _ in range(rounds)]
    ours = [sample[0] for sample in samples]
    if case.peer is None:
        return Timing(1e3 * statistics.median(ours), None, None, None)
    peer = [sample[1] for sample in samples]
    ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(1e3 * statistics.median(ours), 1e3 * statistics.median(peer), statistics.median(ratios), high - low)


def seconds_per_call(call: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def _sampler(side: Side) -> Callable[[], float]:
    if side.seconds is not None:
        return side.seconds
    repeats = _repeats(side.run)
    return lambda: seconds_per_call(side.run, repeats)


def _gpu_sampler(side: Side) -> Callable[[], float]:
    """Time on the device itself, with its second-level cache cleared before each call."""
    from triton.testing import do_bench

    return lambda: do_bench(side.run, return_mode="median") / 1e3


def _repeats(call: Callable[[], object]) -> int:
    """How many calls make a sample; finding out is the warm-up."""
    repeats = 1
    while True:
        took = repeats * seconds_per_call(call, repeats)
        if took >= LEAST_SAMPLE:
            return repeats
        repeats = max(2 * repeats, min(1 + int(repeats * LEAST_SAMPLE / max(took, 1e-9)), 1000 * repeats))
