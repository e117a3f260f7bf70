"""Models from dense to sparse layers and back, in place."""

from collections.abc import Mapping

import torch
from torch import nn

from compsparse_kernels.layouts.checks import check_bool_matrix, describe, require
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.prune.layers import prunable_layers


def convert(model: nn.Module, masks: Mapping[str, torch.Tensor], kind: str = "auto") -> nn.Module:
    """Replace linear layers by :class:`MaskedLinear` layers that hold what the masks keep, in place.

    The model then computes ``F.linear(x, W * M, b)`` in these layers. A layer that is a :class:`MaskedLinear` already
    is stored anew on its mask (entries that it did not have start at 0). ``training`` and ``requires_grad`` are kept;
    hooks on the replaced layers and the state of an optimizer made before are not.

    Args:
        model: any module; a linear layer itself is converted too, then use what is returned.
        masks: ``{name: bool [out, in]}``, as :func:`magnitude_masks` returns; names as in ``named_modules``.
        kind: how to store the masks, see :meth:`MaskLayout.from_mask`.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came. Nothing is replaced then.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
        >>> model = prune.convert(model, prune.magnitude_masks(model, sparsity=0.9), kind="csr")
        >>> type(model[0]).__name__, model[0].values.numel() < 600
        ('MaskedLinear', True)
        >>> type(prune.to_dense(model)[0]).__name__
        'Linear'
    """
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    require(isinstance(masks, Mapping), "masks", "dict of name: mask", type(masks).__name__, TypeError)
    layers = dict(model.named_modules(remove_duplicate=False))
    known = prunable_layers(model)
    for name, mask in masks.items():
        argument = f"masks[{name!r}]"
        require(name in layers, argument, f"the name of a linear layer ({', '.join(known)})", "an unknown name")
        layer = layers[name]
        is_known = any(layer is other for other in known.values())
        require(is_known, argument, "a name of an nn.Linear or MaskedLinear", type(layer).__name__)
        check_bool_matrix(argument, mask)
        shape = (layer.out_features, layer.in_features)
        require(mask.shape == shape, argument, f"bool tensor {list(shape)}", describe(mask))
        _check_untied(model, layer, argument)
    return _replace(model, {layers[name]: _masked(layers[name], mask, kind) for name, mask in masks.items()})


def to_dense(model: nn.Module) -> nn.Module:
    """Replace each :class:`MaskedLinear` by the ``nn.Linear`` of the same function and name, in place.

    Returns:
        The model (for a model that is a :class:`MaskedLinear` itself, the new layer).
    """
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    masked = [module for module in model.modules() if isinstance(module, MaskedLinear)]
    return _replace(model, {module: module.to_linear() for module in masked})


def _masked(layer, mask, kind):
    if isinstance(layer, nn.Linear):
        return MaskedLinear.from_linear(layer, mask, kind)
    return MaskedLinear.from_linear(layer.to_linear(), mask, kind)


def _check_untied(model, layer, argument):
    """A dense weight that another module uses too would silently become two."""
    if isinstance(layer, MaskedLinear):
        return
    for name, module in model.named_modules():
        tied = module is not layer and any(weight is layer.weight for weight in module.parameters(recurse=False))
        require(not tied, argument, "a layer with a weight of its own", f"one tied to a weight of {name!r}")


def _replace(model, replacements):
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a layer's second name
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)
