"""Running a model and looking at what its attention did."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn

from compsparse_kernels.layouts.checks import require
from compsparse_kernels.nn.attention_stats import Attended
from compsparse_kernels.nn.threshold_attention import ThresholdAttention
from compsparse_kernels.nn.threshold_schedule import attentions_of

Watcher = Callable[[ThresholdAttention, Attended], object]


@contextmanager
def watched(model: nn.Module, watch: Watcher):
    """Calls ``watch(module, call)`` after each forward of each attention in the model; in eval mode, without gradient,
    and with everything as it was afterwards."""
    modules = attentions_of(model)
    before = [(module, module.track_stats, module._last) for module in modules]
    training = [(module, module.training) for module in model.modules()]
    hooks = [module.register_forward_hook(lambda module, *_: watch(module, _call_of(module))) for module in modules]
    model.eval()
    for module in modules:
        module.track_stats, module._last = True, None
    try:
        with torch.no_grad():
            yield modules
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training:
            module.training = mode
        for module, tracks, last in before:
            module.track_stats, module._last = tracks, last


def _call_of(module):
    require(module._last is not None, "model", "one that is not compiled", "a compiled one")
    return module._last


def run(model: nn.Module, inputs) -> None:
    """``model(*inputs)``; one tensor stands for itself, which attention alone takes as query, key and value."""
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    if isinstance(model, ThresholdAttention) and len(inputs) == 1:
        inputs = inputs * 3
    model(*inputs)
