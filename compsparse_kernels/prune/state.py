"""What belongs to a weight and moves with it when its storage changes: gradient and optimizer state."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from compsparse_kernels.layouts import MaskLayout
from compsparse_kernels.layouts.checks import describe, require

# Means of squared gradients, by the names that torch's optimizers give them: an update is divided by their root.
SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}

# Optimizers of torch that take a weight's shape into account: factored or orthogonalised per matrix, or all in one.
WHOLE_TENSOR = {"LBFGS", "Muon", "Adafactor"}


def check_optimizer(optimizer: object) -> None:
    ok = optimizer is None or isinstance(optimizer, torch.optim.Optimizer)
    require(ok, "optimizer", "torch.optim.Optimizer or None", type(optimizer).__name__, TypeError)


def check_holds_any(optimizer: torch.optim.Optimizer | None, weights: list[nn.Parameter]) -> None:
    """Refuses the optimizer of another model, whose state would be left behind without a word."""
    if optimizer is None or not weights:
        return
    held = set(parameters_of(optimizer))
    ok = any(weight in held for weight in weights)
    require(ok, "optimizer", "one that holds a weight of these layers", "one that holds none of them")


def check_steps_by_weight(optimizer: torch.optim.Optimizer | None) -> None:
    """Refuses optimizers whose steps see more than one weight at a time, even while they have no state that tells."""
    whole = [one.__name__ for one in type(optimizer).__mro__ if one.__module__.startswith("torch.optim")]
    whole = WHOLE_TENSOR.intersection(whole)
    wanted = "one that treats each weight by itself, as SGD, Adam, AdamW and RMSprop do"
    require(not whole, "optimizer", wanted, type(optimizer).__name__)


def check_state(optimizer: torch.optim.Optimizer | None, name: str, parameter: nn.Parameter) -> None:
    """Every entry is one number per weight, or one for all of them; only such state can follow the weights."""
    for key, value in state_of(optimizer, parameter).items():
        is_single = value is None or isinstance(value, (bool, int, float))
        is_tensor = isinstance(value, torch.Tensor) and (value.dim() == 0 or value.shape == parameter.shape)
        wanted = f"state {key!r} of {name!r} to be a number, None or a tensor {list(parameter.shape)} or []"
        require(is_single or is_tensor, "optimizer", wanted, describe(value))


def state_of(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> dict:
    # Indexing would create an entry: the state is a defaultdict.
    return {} if optimizer is None or parameter not in optimizer.state else optimizer.state[parameter]


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def remap(
    tensor: torch.Tensor,
    source: MaskLayout | None,
    target: MaskLayout | None,
    fill: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """One number per weight, from the storage of one layout to that of another; None stands for dense ``[out, in]``.

    Entries of both keep their bits; those that ``source`` lacks are 0, or ``fill`` (a number or ``[out, in]``).
    """
    dense = tensor if source is None else source.unpack(tensor)  # [out, in]
    if fill is not None and source is not None:
        dense = torch.where(source.to_mask(), dense, torch.as_tensor(fill, dtype=dense.dtype, device=dense.device))
    return dense if target is None else target.pack(dense)


def move(
    old: nn.Parameter,
    new: nn.Parameter,
    source: MaskLayout | None,
    target: MaskLayout | None,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Gives ``new`` the gradient, the place in the optimizer and the state of ``old``, all remapped."""
    if old.grad is not None:
        new.grad = remap(old.grad, source, target)
    if optimizer is None:
        return
    for group in optimizer.param_groups:  # the lists stay the same objects: others may hold them
        for place, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][place] = new
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        optimizer.state[new] = {key: remap_entry(key, value, old.shape, source, target) for key, value in state.items()}


def remap_entry(
    key: str, value: object, shape: torch.Size, source: MaskLayout | None, target: MaskLayout | None
) -> object:
    """An entry of optimizer state; what is one number for all weights (a step count) stays as it is."""
    per_weight = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == shape
    if not per_weight:
        return value
    moved = remap(value, source, target)
    if key in SECOND_MOMENTS and target is not None and target.drops:
        # Gradient and momentum are 0 where the mask drops, and so is the update, whatever it is divided by: 1 keeps
        # it from the slow path that 0 (6 times as long) takes through MKL's square root. Nobody reads what is there:
        # unpack leaves it out, so an entry that grows again starts at 0.
        moved.masked_fill_(~target.mask, 1)
    return moved


def starts_at_zero(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    """Is the state yet to be made? Then it will be 0 where a mask drops; what is there already is moved instead."""
    return not state_of(optimizer, parameter)


def steps_in(state: object) -> int:
    """Of the state dict of what counts steps."""
    ok = isinstance(state, Mapping) and isinstance(state.get("steps"), int)
    require(ok, "state", "what state_dict() returned, with the number of steps", _keys(state))
    return state["steps"]


def _keys(state):
    return f"a dict of {sorted(map(str, state))}" if isinstance(state, Mapping) else describe(state)
