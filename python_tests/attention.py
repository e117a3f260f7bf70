"""What the tests of thresholded attention share: rules, the arguments of the ops, each row by definition."""

import math
from inspect import signature

import torch

from compsparse_kernels.ops.backends import cpu_isa
from compsparse_kernels.ops.threshold_attention import reference

# Every rule with every weighting that it has.
CHOICES = [
    (rule, threshold, weighting)
    for rule, threshold in (("relative", 0.3), ("absolute", 0.4))
    for weighting in ("softmax", "shrink", "rectified")
] + [("topk", 3.0, "softmax"), ("topp", 0.7, "softmax"), ("entmax", 1.5, "softmax"), ("entmax", 2.0, "softmax")]
CHOICE_NAMES = [f"{rule}-{threshold:g}-{weighting}" for rule, threshold, weighting in CHOICES]
LEARNABLE = [choice for choice in CHOICES if choice[2] != "softmax"]
LEARNABLE_NAMES = [f"{rule}-{weighting}" for rule, _, weighting in LEARNABLE]

_HAS_KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("compsparse::threshold_attention", "CPU")
NO_KERNELS = None if cpu_isa() and _HAS_KERNELS else "compiled kernels of threshold_attention are not there"

_DEFAULTS = {
    "threshold": 0.3,
    "rule": "relative",
    "weighting": "softmax",
    "is_causal": False,
    "window_left": -1,
    "window_right": -1,
    "query_offset": 0,
    "scale": 0.7,
    "dropout_p": 0.0,
    "seed": 0,
}


def op_arguments(query, key, value, **options):
    """The arguments of the ops threshold_attention and threshold_attention_support, in their order."""
    names = list(signature(reference.threshold_attention_support).parameters)[3:]
    assert set(options) <= set(names), set(options) - set(names)
    return (query, key, value, *((_DEFAULTS | options).get(name) for name in names))


def backward_arguments(grad, arguments, support):
    """The arguments of threshold_attention_backward after these of the forward; ``support`` as the op returns it."""
    given = dict(zip(signature(reference.threshold_attention_support).parameters, arguments, strict=True))
    row_ptr, col_idx, weights, _, slope = support
    names = ("threshold", "rule", "weighting", "scale", "dropout_p", "seed")
    return (grad, *arguments[:3], row_ptr, col_idx, weights, slope, *(given[name] for name in names))


def row_by_definition(scores, rule, threshold, weighting):
    """Support (positions among the given scores) and weights of one row of float64 scores, all of visible keys."""
    scores = [float(score) for score in scores]
    if not scores:
        return [], []
    top = max(scores)
    if rule == "entmax":
        return _entmax_by_bisection(scores, threshold)
    if rule == "relative":
        cut = top + math.log(threshold)
    elif rule == "absolute":
        cut = threshold
    else:
        cut = _cut_of_the_strongest(scores, rule, threshold)
    kept = [j for j, score in enumerate(scores) if score >= cut]
    if weighting == "softmax":
        heights = [math.exp(scores[j] - top) for j in kept]
    elif weighting == "shrink":
        heights = [math.exp(scores[j]) - math.exp(cut) for j in kept]
    else:
        heights = [scores[j] - cut for j in kept]
    total = sum(heights)
    return kept, [height / total if total > 0 else 0.0 for height in heights]


def _cut_of_the_strongest(scores, rule, threshold):
    """The least score of the fewest strongest keys that are ``threshold`` many, or have that mass."""
    ordered = sorted(scores, reverse=True)
    if rule == "topk":
        return ordered[min(int(threshold), len(ordered)) - 1]
    masses = [math.exp(score - ordered[0]) for score in ordered]
    count = 1
    while count < len(ordered) and (sum(masses[:count]) < threshold * sum(masses) or threshold == 1):
        count += 1
    return ordered[count - 1]


def _entmax_by_bisection(scores, alpha):
    """The tau at which the weights add up to 1, halving an interval; nothing is sorted."""

    top = max(scores)

    def weights(tau):
        return [max((alpha - 1) * (score - top) - tau, 0.0) ** (1 / (alpha - 1)) for score in scores]

    low, high = -1.0, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(weights(middle)) >= 1 else (low, middle)
    kept = [j for j, weight in enumerate(weights(low)) if weight > 0]
    return kept, [weights(low)[j] for j in kept]
