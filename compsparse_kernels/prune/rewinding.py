"""Rewinding: weights and optimizer back to an earlier point of training, within the masks of now."""

import copy

import torch
from torch import nn

from compsparse_kernels.layouts.checks import describe, require
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.prune.layers import masked_layers
from compsparse_kernels.prune.state import check_optimizer, check_state, parameters_of, remap_entry, state_of

PARTS = {"model", "optimizer"}


@torch.no_grad()
def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """A copy of parameters, persistent buffers and optimizer as they are, whatever masks come later.

    :class:`MaskedLinear` layers are written down as dense ``nn.Linear`` ones, their optimizer state as well.

    Args:
        model: any module.
        optimizer: its state and the options of its groups (learning rate and so on) are copied too.

    Returns:
        ``{"model": state dict of the dense model, "optimizer": None or its groups and states}``: tensors in dicts and
        lists, which ``torch.save`` writes and ``torch.load(weights_only=True)`` reads. For :func:`rewind`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (2020),
    section 4 (rewinding to iteration k).

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> start = prune.snapshot(model)
        >>> mask = torch.rand(8, 8) < 0.5
        >>> model = prune.convert(model, {"0": mask})
        >>> torch.nn.init.zeros_(model[0].values).sum().item()
        0.0
        >>> model = prune.rewind(model, start)
        >>> torch.equal(model[0].weight, start["model"]["0.weight"] * mask)
        True
    """
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    check_optimizer(optimizer)
    state = {name: copy.deepcopy(value) for name, value in model.state_dict().items()}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, MaskedLinear):
            prefix = f"{name}." if name else ""
            for stored in ("values", *layer.PATTERN):
                state.pop(prefix + stored, None)
            state[f"{prefix}weight"] = layer.weight
    return {"model": state, "optimizer": optimizer_snapshot(model, optimizer)}


@torch.no_grad()
def rewind(model: nn.Module, snapshot: dict, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Put the weights, buffers and optimizer of a :func:`snapshot` back, in place; masks stay as they are now.

    A :class:`MaskedLinear` layer takes what its mask keeps of the snapshot's weight and of its optimizer state; what
    the model of the snapshot had not stored is 0. Gradients are dropped: they belong to other weights.

    Args:
        model: of the same dense architecture as the snapshot's; which layers are :class:`MaskedLinear` may differ.
        snapshot: what :func:`snapshot` returned.
        optimizer: one over the same parameters in the same order, if the snapshot was taken with one. The options of
            its groups go back too, the learning rate among them.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source and example: see :func:`snapshot`.
    """
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    ok = isinstance(snapshot, dict) and snapshot.keys() == PARTS
    require(ok, "snapshot", "what prune.snapshot returned", describe(snapshot), TypeError)
    check_optimizer(optimizer)
    if optimizer is not None:
        check_same_groups(optimizer, snapshot["optimizer"])
    try:
        model.load_state_dict(snapshot["model"])
    except RuntimeError as error:
        raise ValueError(f"snapshot: expected one of a model like this, got another: {error}") from error
    for parameter in model.parameters():
        parameter.grad = None
    if optimizer is not None:
        restore_optimizer(model, optimizer, snapshot["optimizer"])
    return model


def optimizer_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict | None:
    """Options of the groups, and state with dense weights; plain data and tensors."""
    if optimizer is None:
        return None
    layouts = _layouts_of_values(model)
    for name, layer in masked_layers(model).items():
        check_state(optimizer, name, layer.values)
    groups = [
        {name: copy.deepcopy(option) for name, option in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    states = []  # of each parameter, in the optimizer's order
    for parameter in parameters_of(optimizer):
        layout = layouts.get(parameter)
        state = state_of(optimizer, parameter)
        states.append({key: _copied(key, value, parameter.shape, layout, None) for key, value in state.items()})
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return {"groups": groups, "sizes": sizes, "states": states}


def check_same_groups(optimizer, saved):
    require(saved is not None, "snapshot", "one taken with an optimizer", "one without")
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    require(sizes == saved["sizes"], "optimizer", f"groups of {saved['sizes']} parameters, as in the snapshot", sizes)


@torch.no_grad()
def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """What :func:`optimizer_snapshot` returned, within the masks of now."""
    for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(copy.deepcopy(options))
    layouts = _layouts_of_values(model)
    for parameter, state in zip(parameters_of(optimizer), saved["states"], strict=True):
        layout = layouts.get(parameter)
        shape = parameter.shape if layout is None else (layout.out_features, layout.in_features)
        optimizer.state.pop(parameter, None)
        if state:
            optimizer.state[parameter] = {key: _copied(key, value, shape, None, layout) for key, value in state.items()}


def _layouts_of_values(model):
    return {layer.values: layer.layout for layer in masked_layers(model).values()}


def _copied(key, value, shape, source, target):
    """As :func:`remap_entry`, never the same object: optimizers write into their state."""
    moved = remap_entry(key, value, shape, source, target)
    return copy.deepcopy(moved) if moved is value else moved
