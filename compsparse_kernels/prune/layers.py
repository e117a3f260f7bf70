"""The layers of a model that pruning knows: ``nn.Linear`` and :class:`MaskedLinear`."""

from torch import nn

from compsparse_kernels.nn import MaskedLinear


def is_prunable(module: nn.Module) -> bool:
    # Subclasses of nn.Linear are left alone: their owners read the weight directly (nn.MultiheadAttention does).
    return type(module) is nn.Linear or isinstance(module, MaskedLinear)


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """By name, in order of definition; a layer used under several names comes once, under the first."""
    return {name: module for name, module in model.named_modules() if is_prunable(module)}
