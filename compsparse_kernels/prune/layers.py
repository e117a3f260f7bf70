"""The layers of a model that pruning knows: ``nn.Linear`` and :class:`MaskedLinear`."""

from collections.abc import Callable, Collection

from torch import nn

from compsparse_kernels.layouts import MaskLayout
from compsparse_kernels.layouts.checks import require
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


def chosen_layers(
    model: nn.Module, skip: Collection[str] | Callable[[str, nn.Module], bool], include_last: bool
) -> dict[str, nn.Module]:
    """The layers to prune: all but the last, which ``include_last`` adds, and but those that ``skip`` names, whose
    modules it names, or for which it says True of ``(name, layer)``."""
    layers = prunable_layers(model)
    names = list(layers)
    if callable(skip):
        skipped = {name for name in names if skip(name, layers[name])}
    else:
        is_collection = isinstance(skip, Collection) and not isinstance(skip, str)
        require(is_collection, "skip", "a collection of names or a function", repr(skip), TypeError)
        wanted = f"names of linear layers or of modules that hold them ({', '.join(names)})"
        for module in skip:
            require(any(_is_under(name, module) for name in names), "skip", wanted, repr(module))
        skipped = {name for name in names if any(_is_under(name, module) for module in skip)}
    if not include_last:
        skipped.update(names[-1:])
    chosen = {name: layer for name, layer in layers.items() if name not in skipped}
    hint = "a linear layer to prune (include_last=True takes the last one too)"
    require(len(chosen) > 0, "model", hint, f"{len(names)} linear layers, all of them left out")
    return chosen


def _is_under(name, module):
    return name == module or name.startswith(f"{module}.")
