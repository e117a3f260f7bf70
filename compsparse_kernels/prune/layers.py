"""The layers of a model that pruning knows: ``nn.Linear`` and :class:`MaskedLinear`."""

from torch import nn

from compsparse_kernels.layouts import MaskLayout
from compsparse_kernels.nn import MaskedLinear


def is_prunable(module: nn.Module) -> bool:
    # Subclasses of nn.Linear are left alone: their owners read the weight directly (nn.MultiheadAttention does).
    return type(module) is nn.Linear or isinstance(module, MaskedLinear)


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """By name, in order of definition; a layer used under several names comes once, under the first."""
    return {name: module for name, module in model.named_modules() if is_prunable(module)}


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """The :class:`MaskedLinear` layers alone, named as in :func:`prunable_layers`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def weight_parameter(layer: nn.Module) -> nn.Parameter | None:
    """What an optimizer trains of the layer's weight; None where a reparametrisation computes it.

    ``torch.nn.utils.prune`` is no obstacle: it keeps the weight as ``weight_orig`` and its mask as a buffer.
    """
    if isinstance(layer, MaskedLinear):
        return layer._parameters.get("values")
    return layer._parameters.get("weight_orig" if "weight_mask" in layer._buffers else "weight")


def weight_layout(layer: nn.Module) -> MaskLayout | None:
    """How the parameter of the weight is stored: None for a dense ``[out, in]`` of which every element counts."""
    if isinstance(layer, MaskedLinear):
        return layer.layout
    mask = layer._buffers.get("weight_mask")
    return None if mask is None else MaskLayout.from_mask(mask.bool(), "dense").to(mask.device)
