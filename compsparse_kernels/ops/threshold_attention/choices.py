"""Which rules, weightings, thresholds and options of thresholded attention go together, and why the others don't."""

import math
import sys

import torch

from compsparse_kernels.layouts.checks import describe, require

RULES = ("relative", "absolute", "topk", "topp", "entmax")
WEIGHTS = ("softmax", "rectified")
WITH_CUT = RULES[:2]
_INT64 = range(-(2**63), 2**63)
_LARGEST = sys.float_info.max


def weighting_of(rule: str, weights: str, shrink: bool) -> str:
    """What the op calls the weighting: softmax, shrink or rectified."""
    if rule not in RULES:
        require(False, "rule", f"one of {', '.join(RULES)}", repr(rule))
    if weights not in WEIGHTS:
        require(False, "weights", f"one of {', '.join(WEIGHTS)}", repr(weights))
    if not isinstance(shrink, bool):
        require(False, "shrink", "a bool", describe(shrink), TypeError)
    if rule not in WITH_CUT:
        own = "has weights of its own" if rule == "entmax" else "has no cut of its own to measure scores from"
        require(weights == "softmax", "weights", f"'softmax' (rule '{rule}' {own})", repr(weights))
        require(not shrink, "shrink", f"False (rule '{rule}' {own})", shrink)
    if shrink and weights == "rectified":
        require(False, "shrink", "False (weights='rectified' are 0 at the cut without it)", shrink)
    return "shrink" if shrink else weights


def check_threshold(threshold: object, rule: str, weighting: str) -> None:
    """A number in the range of the rule."""
    if not _is_number(threshold):
        require(False, "threshold", wanted_threshold(rule, weighting), describe(threshold), TypeError)
    if rule == "topk":
        ok = isinstance(threshold, int) and 1 <= threshold < 2**63
    elif rule == "entmax":
        ok = threshold in (1.5, 2)
    elif rule == "absolute":
        ok = -_LARGEST <= threshold <= _LARGEST
    else:
        ok = 0 < threshold <= 1 and not (threshold == 1 and rule == "relative" and weighting != "softmax")
    if not ok:
        require(False, "threshold", wanted_threshold(rule, weighting), threshold)


def wanted_threshold(rule: str, weighting: str) -> str:
    if rule == "absolute":
        return "a finite number"
    if rule == "topk":
        return "an int of at least 1 (rule 'topk')"
    if rule == "entmax":
        return "1.5 or 2 (rule 'entmax', where 2 is sparsemax)"
    if rule == "relative" and weighting != "softmax":
        name = "shrink=True" if weighting == "shrink" else "weights='rectified'"
        return f"a number in (0, 1) (rule 'relative' with {name}, whose weights would all be 0 at 1)"
    return f"a number in (0, 1] (rule '{rule}')"


def window_of(window: object) -> tuple[int, int]:
    """How many keys before and after its position a query sees; -1 is no bound."""
    if window is None:
        return -1, -1
    wanted = "an int of at least 0, or a pair of ints of at least -1 (left, right)"
    pair = (window, window) if _is_int(window) else window
    ok = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(_is_int, pair))
    require(ok, "window", wanted, window if isinstance(window, (tuple, list)) else describe(window), TypeError)
    require(min(pair) >= (0 if _is_int(window) else -1), "window", wanted, window)
    _check_int64("window", *pair)
    return tuple(pair)


def check_flags(**flags: object) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            require(False, name, "a bool", describe(flag), TypeError)


def scale_of(scale: object, width: int) -> float:
    if scale is None:
        return 1 / math.sqrt(width)
    if not _is_number(scale):
        require(False, "scale", "a number", describe(scale), TypeError)
    require(-_LARGEST <= scale <= _LARGEST, "scale", "a finite number", scale)
    return float(scale)


def dropout_of(dropout_p: object, seed: object) -> tuple[float, int]:
    """The probability and the seed of dropout; without a seed one is drawn, so that ``torch.manual_seed`` decides."""
    if not _is_number(dropout_p):
        require(False, "dropout_p", "a number in [0, 1)", describe(dropout_p), TypeError)
    require(0 <= dropout_p < 1, "dropout_p", "a number in [0, 1)", dropout_p)
    if seed is not None:
        if not _is_int(seed):
            require(False, "seed", "an int or None", describe(seed), TypeError)
        _check_int64("seed", seed)
    elif dropout_p > 0:
        seed = torch.randint(2**62, ()).item()
    return float(dropout_p), 0 if seed is None else seed


def check_offset(query_offset: object) -> None:
    if not _is_int(query_offset):
        require(False, "query_offset", "an int", describe(query_offset), TypeError)
    _check_int64("query_offset", query_offset)


def check_return_support(return_support: object) -> None:
    ok = isinstance(return_support, bool) or return_support in ("csr", "degree")
    if not ok:
        require(False, "return_support", "False, True, 'csr' or 'degree'", repr(return_support))


def _check_int64(name, *values):
    if not torch.compiler.is_compiling():
        for value in values:
            require(value in _INT64, name, "an int of 64 bits", value)


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
