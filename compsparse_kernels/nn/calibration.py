"""Thresholds that keep a wanted share of the keys on given data."""

from collections.abc import Iterable

import torch
from torch import nn

from compsparse_kernels.layouts.checks import require
from compsparse_kernels.nn.attention_runs import run, watched

SMALLEST = 1e-30  # a relative threshold; no float32 weight below it matters beside the largest


def calibrate(model: nn.Module, data: torch.Tensor | Iterable, *, density: float) -> dict[str, float]:
    """Sets each attention's threshold so that it keeps ``density`` of the keys that its queries may see, on the data.

    The layers are set in the order in which the model runs them, each on what reaches it from those before with their
    new thresholds; so the shares hold for the model as it is afterwards, up to scores that rounding can't tell apart
    (equal ones are kept together). It costs a pass over the data for each layer and one more, in eval mode and without
    gradients, and memory for one number per pair of a query and a key that see each other, of one layer on all the
    data: take some batches, not a whole data set.

    Args:
        model: a module with :class:`ThresholdAttention` in it, of rule relative or absolute.
        data: a batch, ``model(batch)``, or an iterable of batches: tensors, or tuples of arguments. Attention itself
            takes a tensor as query, key and value.
        density: in (0, 1]. A relative threshold keeps at least one key a query, so a smaller share is refused.

    Returns:
        The thresholds by the names of the modules.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import ThresholdAttention
        >>> from compsparse_kernels.nn import calibrate
        >>> attn, x = ThresholdAttention(64, num_heads=4, batch_first=True), torch.randn(8, 50, 64)
        >>> thresholds = calibrate(attn, x, density=0.1)
        >>> _ = attn(x, x, x)
        >>> round(attn.stats().share_kept, 3)
        0.1
    """
    is_number = isinstance(density, (int, float)) and not isinstance(density, bool)
    require(is_number and 0 < density <= 1, "density", "a number in (0, 1]", repr(density))
    batches = [data] if isinstance(data, torch.Tensor) else list(data)
    require(len(batches) > 0, "data", "at least one batch", "none")
    order = _order(model, batches)
    names = {module: name for name, module in model.named_modules()}
    for module in order:
        require(module.rule in ("relative", "absolute"), "model", "rules relative or absolute", repr(module.rule))
    for module in order:
        _calibrate(model, module, batches, density)
    return {names[module]: module._threshold for module in order}


def _order(model, batches):
    """The attention modules as they first run."""
    order = []
    with watched(model, lambda module, call: order.append(module)) as modules:
        run(model, batches[0])
    missing = [module for module in modules if module not in order]
    require(not missing, "model", "attention that runs on the data", f"{len(missing)} that do not")
    return list(dict.fromkeys(order))


def _calibrate(model, module, batches, density):
    heights, counts = [], []  # what the threshold cuts, of every visible pair; how many those are, and queries

    def watch(runs, call):
        if runs is not module:
            return
        for number in range(len(call.query)):
            support = call.example(number).every_key()
            seen = support.degree if support.visible is None else support.visible.expand(support.shape[:3])
            heights.append(_heights(support, call.example(number), module))
            counts.append((int(seen.sum()), int((support.degree > 0).sum())))

    with watched(model, watch):
        for batch in batches:
            run(model, batch)
    pairs, queries = (sum(column) for column in zip(*counts, strict=True))
    kept = round(density * pairs)
    least = queries if module.rule == "relative" else 1
    wanted = f"at least {least / max(1, pairs):.3g}, {'a key a query' if module.rule == 'relative' else 'one key'}"
    require(kept >= least, "density", wanted, density)
    heights = torch.cat(heights)
    cut = heights.kthvalue(len(heights) - min(kept, len(heights)) + 1).values.item()
    module.threshold = _below(cut, module)


def _heights(support, call, module):
    """Of each pair the weight over the row's largest (relative), or its score (absolute), float64."""
    weights, rows = support.weights.double(), support._rows()
    if module.rule == "relative":
        largest = weights.new_zeros(len(support.row_ptr) - 1).scatter_reduce(0, rows, weights, "amax")
        return weights / largest[rows]
    scores = weights.log() + support.log_sum.double().flatten()[rows]
    cut = call.options["threshold"]
    if not (isinstance(cut, torch.Tensor) and cut.dim() == 4):
        return scores
    threshold = module.threshold  # the rest of the cut, [1, H, Tq, 1], is the queries' part of a Mahalanobis score
    shift = cut - (threshold.view(-1, 1, 1) if isinstance(threshold, torch.Tensor) else threshold)
    return scores - shift.double().expand(*support.shape[:3], 1).flatten()[rows]


def _below(cut, module):
    """A little lower than the last score that is to be kept, which has been through a logarithm and back."""
    precision = torch.finfo(module.out_proj.weight.dtype).eps
    if module.rule == "absolute":
        return cut - 8 * precision * max(1.0, abs(cut))
    top = 1.0 if module.weights == "softmax" and not module.shrink else 1 - 2**-20
    return min(max(cut * (1 - 8 * precision), SMALLEST), top)
