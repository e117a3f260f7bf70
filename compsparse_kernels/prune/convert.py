"""Models from dense to sparse layers, from mask to mask, and back, in place; an optimizer's state goes along."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compsparse_kernels.layouts import MaskLayout
from compsparse_kernels.layouts.block import check_block_shape
from compsparse_kernels.layouts.checks import check_bool_matrix, describe, require
from compsparse_kernels.layouts.choice import choose_kind
from compsparse_kernels.layouts.costs import this_machine
from compsparse_kernels.layouts.mask import KINDS
from compsparse_kernels.layouts.nm import check_nm
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.prune.layers import (
    is_prunable,
    masked_layers,
    prunable_layers,
    weight_layout,
    weight_parameter,
)
from compsparse_kernels.prune.state import (
    check_holds_any,
    check_optimizer,
    check_state,
    check_steps_by_weight,
    move,
    remap,
    starts_at_zero,
)


def convert(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor],
    kind: str = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    *,
    block_shape: tuple[int, int] | None = None,
    nm: tuple[int, int] | None = None,
) -> nn.Module:
    """Replace linear layers by :class:`MaskedLinear` layers that hold what the masks keep, in place.

    The model then computes ``F.linear(x, W * M, b)`` in these layers, and training it goes on as training of ``W * M``
    with masked gradients would: gradients and optimizer state of survivors are kept to the bit. A layer that is a
    :class:`MaskedLinear` already gets the new mask, see :func:`update_masks`. ``training``, ``requires_grad`` and the
    bias, as a Parameter, are kept; hooks on the replaced layers are not.

    Args:
        model: any module; a linear layer itself is converted too, then use what is returned. Layers pruned by
            ``torch.nn.utils.prune`` count as their masked weight.
        masks: ``{name: bool [out, in]}``, as :func:`magnitude_masks` returns; names as in ``named_modules``.
        kind: how to store the masks, see :meth:`MaskLayout.from_mask`; ``"auto"`` counts an optimizer's steps in.
        optimizer: its parameters are exchanged in place (``param_groups`` keep identity and order) and its state is
            remapped. Any optimizer serves whose state is one number per weight, or one for all of them: SGD with
            momentum, Adam, AdamW, RMSprop. Without it, make the optimizer after the conversion.
        block_shape: of the blocks of kind ``"block"`` or ``"auto"``, see :meth:`MaskLayout.from_mask`.
        nm: of kind ``"nm"``, (N, M); by default the cheapest common pattern that each mask satisfies.

    ``DistributedDataParallel`` remembers the parameters that it was made with, and would no longer average gradients:
    hand over the module inside it, and wrap that anew.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came. Nothing is replaced then.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model = prune.convert(model, prune.magnitude_masks(model, sparsity=0.9), "csr", optimizer)
        >>> type(model[0]).__name__, model[0].values.numel() < 600
        ('MaskedLinear', True)
        >>> optimizer.param_groups[0]["params"][0] is model[0].values
        True
        >>> type(prune.to_dense(model)[0]).__name__
        'Linear'
    """
    layers = _checked_layers(model, masks)
    _check_parameters(model, layers, optimizer)
    layouts = _layouts(layers, masks, kind, block_shape, nm, optimizer)
    replacements = {}
    for name, layer in layers.items():
        if isinstance(layer, MaskedLinear):
            _store_anew(layer, layouts[name], None, optimizer)
        else:
            replacements[layer] = _to_masked(layer, layouts[name], optimizer)
    return _replace(model, replacements)


def update_masks(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    kind: str = "auto",
    fill: float | Mapping[str, torch.Tensor] = 0.0,
    block_shape: tuple[int, int] | None = None,
    nm: tuple[int, int] | None = None,
) -> nn.Module:
    """New masks for layers that are :class:`MaskedLinear` already: prune further, or regrow, in place.

    An entry of the old and of the new mask keeps its value, gradient and optimizer state to the bit. A regrown one
    starts at ``fill``, with gradient and state 0. The layers stay the same modules, with their hooks; ``values``
    becomes a new Parameter, which takes the old one's place in the optimizer. ``torch.compile`` compiles each new mask
    anew, ``torch._dynamo.config.recompile_limit`` times at most.

    Args:
        model, masks, optimizer, kind, block_shape, nm: as in :func:`convert`.
        fill: a number, or ``{name: [out, in]}`` of the values that regrown entries start from, for each of ``masks``.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came. Nothing is changed then.

    Example:
        >>> import torch
        >>> from compsparse_kernels import MaskedLinear, prune
        >>> model = torch.nn.Sequential(MaskedLinear(4, 4, torch.eye(4, dtype=torch.bool)))
        >>> diagonal = model[0].weight.diagonal()
        >>> model = prune.update_masks(model, {"0": torch.ones(4, 4, dtype=torch.bool)}, fill=0.5)
        >>> torch.equal(model[0].weight.diagonal(), diagonal), model[0].weight[0, 1].item()
        (True, 0.5)
    """
    layers = _checked_layers(model, masks)
    for name, layer in layers.items():
        is_masked = isinstance(layer, MaskedLinear)
        wanted = "a name of a MaskedLinear (prune.convert makes them)"
        require(is_masked, f"masks[{name!r}]", wanted, type(layer).__name__)
    _check_parameters(model, layers, optimizer)
    layouts = _layouts(layers, masks, kind, block_shape, nm, optimizer)
    fills = _checked_fills(layers, fill)
    for name, layer in layers.items():
        _store_anew(layer, layouts[name], fills[name], optimizer)
    return model


def to_dense(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Replace each :class:`MaskedLinear` by the ``nn.Linear`` of the same function and name, in place.

    Args:
        model: any module.
        optimizer: exchanged and remapped as in :func:`convert`; the state of what the masks had dropped is 0.

    Returns:
        The model (for a model that is a :class:`MaskedLinear` itself, the new layer).

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came. Nothing is replaced then.

    Example:
        >>> import torch
        >>> from compsparse_kernels import MaskedLinear, prune
        >>> layer = MaskedLinear(8, 4, torch.rand(4, 8) < 0.3)
        >>> torch.equal(prune.to_dense(layer).weight, layer.weight)
        True
    """
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    layers = masked_layers(model)
    _check_parameters(model, layers, optimizer, "model: layer {!r}")
    return _replace(model, {layer: _to_linear(layer, optimizer) for layer in layers.values()})


def _checked_layers(model, masks):
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    require(isinstance(masks, Mapping), "masks", "dict of name: mask", type(masks).__name__, TypeError)
    layers = dict(model.named_modules(remove_duplicate=False))
    known = ", ".join(prunable_layers(model))
    for name, mask in masks.items():
        argument = f"masks[{name!r}]"
        require(name in layers, argument, f"the name of a linear layer ({known})", "an unknown name")
        layer = layers[name]
        require(is_prunable(layer), argument, "a name of an nn.Linear or MaskedLinear", type(layer).__name__)
        check_bool_matrix(argument, mask)
        shape = (layer.out_features, layer.in_features)
        require(mask.shape == shape, argument, f"bool tensor {list(shape)}", describe(mask))
        twin = next((other for other in masks if layers[other] is layer), name)
        require(twin == name, argument, "one mask for each layer", f"a second one for {twin!r}")
    return {name: layers[name] for name in masks}


def _layouts(layers, masks, kind, block_shape, nm, optimizer):
    """Who brings an optimizer will train, so kind auto counts its steps in."""
    check_storage(kind, block_shape, nm)
    layouts = {}
    for name, layer in layers.items():
        storage = (kind, block_shape, nm)
        if kind == "auto" and optimizer is not None:
            mask = masks[name].detach().cpu().contiguous()
            zeros = starts_at_zero(optimizer, weight_parameter(layer))
            storage = choose_kind(mask, block_shape, this_machine(), with_step=True, state_of_zeros=zeros)
        layouts[name] = _layout(name, masks[name], storage).to(weight_parameter(layer).device)
    return layouts


def _layout(name, mask, storage):
    try:
        return MaskLayout.from_mask(mask, *storage)
    except (TypeError, ValueError) as error:  # which calls it "mask"
        argument, _, rest = str(error).partition(": ")
        if argument != "mask":
            raise
        raise type(error)(f"masks[{name!r}]: {rest}") from error


def _check_parameters(model, layers, optimizer, argument="masks[{!r}]"):
    """Of each layer: a weight of its own, that is an ordinary Parameter, with state that can be remapped."""
    check_optimizer(optimizer)
    if layers:
        check_steps_by_weight(optimizer)
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    wanted = "the module inside DistributedDataParallel (wrap it anew afterwards)"
    require(not wrapped, "model", wanted, "the wrapper, which would not see new parameters")
    owners = {}
    for owner, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(owner)
    weights = []
    for name, layer in layers.items():
        weight, this = weight_parameter(layer), argument.format(name)
        is_plain = weight is not None and "bias" in layer._parameters
        require(is_plain, this, "a layer whose weight and bias are Parameters", "a reparametrised one")
        others = [owner for owner in owners[weight] if model.get_submodule(owner) is not layer]
        tied_to = " and ".join(map(repr, others))
        # A weight that another module uses too would silently become two.
        require(not others, this, "a layer with a weight of its own", f"one tied to a weight of {tied_to}")
        check_state(optimizer, name, weight)
        if weight.requires_grad:
            weights.append(weight)
    check_holds_any(optimizer, weights)


def check_storage(kind: object, block_shape: object, nm: object = None) -> None:
    """What :meth:`MaskLayout.from_mask` would refuse of any mask; for those who convert later."""
    require(kind == "auto" or kind in KINDS, "kind", f"auto or one of {', '.join(KINDS)}", repr(kind))
    if block_shape is not None:
        require(kind in ("auto", "block"), "block_shape", f"None with kind {kind}", block_shape)
        check_block_shape(block_shape)
    if nm is not None:
        require(kind == "nm", "nm", f"None with kind {kind}", nm)
        check_nm(nm)


def _checked_fills(layers, fill):
    if not isinstance(fill, Mapping):
        is_number = isinstance(fill, (int, float)) and not isinstance(fill, bool)
        require(is_number, "fill", "a number or a dict of name: tensor", type(fill).__name__, TypeError)
        return dict.fromkeys(layers, fill)
    for name, layer in layers.items():
        value, shape = fill.get(name), (layer.out_features, layer.in_features)
        ok = isinstance(value, torch.Tensor) and value.shape == shape and not value.is_complex()
        require(ok, f"fill[{name!r}]", f"real tensor {list(shape)}", describe(value))
    return fill


@torch.no_grad()
def _store_anew(layer, layout, fill, optimizer):
    """A new Parameter, not new data in the old one: a graph that is still alive (the last loss, say) holds on to the
    old one's gradient accumulator, which would refuse gradients of the new shape."""
    old, source = layer.values, layer.layout
    new = nn.Parameter(remap(old, source, layout, fill), requires_grad=old.requires_grad)
    move(old, new, source, layout, optimizer)
    layer.values, layer.layout = new, layout


@torch.no_grad()
def _to_masked(linear, layout, optimizer):
    weight, source = weight_parameter(linear), weight_layout(linear)
    layer = MaskedLinear.from_linear(linear, layout)
    layer.values.copy_(remap(weight, source, layout))  # linear.weight lags behind where torch's pruning computes it
    layer.values.requires_grad_(weight.requires_grad)
    move(weight, layer.values, source, layout, optimizer)
    layer.bias = linear.bias
    return layer


@torch.no_grad()
def _to_linear(layer, optimizer):
    linear = layer.to_linear()
    move(layer.values, linear.weight, layer.layout, None, optimizer)
    linear.bias = layer.bias
    return linear


def _replace(model, replacements):
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a layer's second name
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)
