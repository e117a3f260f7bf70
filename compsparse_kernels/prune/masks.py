"""Masks that do not come from magnitudes: of others' tools, and random ones to start sparse training from."""

import math
from collections.abc import Callable, Collection

import torch
from torch import nn

from compsparse_kernels.layouts.checks import require
from compsparse_kernels.prune.layers import chosen_layers, prunable_layers
from compsparse_kernels.prune.magnitude import check_share

DISTRIBUTIONS = ("erdos_renyi", "uniform")


def masks_from_torch(model: nn.Module) -> dict[str, torch.Tensor]:
    """The masks that ``torch.nn.utils.prune`` has put on the weights of ``nn.Linear`` layers.

    :func:`convert` takes such a model as it is, and its optimizer: no ``prune.remove`` is needed first. Masks of other
    tools are bool tensors ``[out, in]`` by layer name, which :func:`convert` takes directly.

    Args:
        model: any module; pruned layers of other types (convolutions) are passed over.

    Returns:
        ``{name: bool [out, in]}``.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune as torch_prune
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
        >>> module = torch_prune.l1_unstructured(model[0], "weight", amount=0.9)
        >>> model = prune.convert(model, prune.masks_from_torch(model))
        >>> model[0].layout.nnz
        60
    """
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    buffers = {name: layer._buffers.get("weight_mask") for name, layer in prunable_layers(model).items()}
    masks = {name: mask != 0 for name, mask in buffers.items() if mask is not None}
    wanted = "linear layers pruned by torch.nn.utils.prune (weight_mask buffers)"
    require(bool(masks), "model", wanted, f"none among {len(buffers)} linear layers")
    return masks


def random_masks(
    model: nn.Module,
    sparsity: float = 0.9,
    distribution: str = "erdos_renyi",
    skip: Collection[str] | Callable[[str, nn.Module], bool] = (),
    include_last: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    r"""Random masks, from which sparse training starts (:class:`RigL`, :class:`SET`).

    In each layer the number of survivors is fixed and their places are uniform. ``"uniform"`` gives all layers the same
    density; ``"erdos_renyi"`` gives layer l the density :math:`\epsilon\, (n_{in} + n_{out}) / (n_{in} n_{out})`, at
    most 1, with :math:`\epsilon` such that the share ``sparsity`` of all weights is dropped.

    Args:
        model: as for :func:`magnitude_masks`, with ``skip`` and ``include_last``.
        sparsity: share of weights to drop, in [0, 1).
        distribution: ``"erdos_renyi"`` or ``"uniform"``.
        generator: a CPU generator, for masks that can be drawn again; torch's own by default.

    Returns:
        ``{name: bool [out, in]}``, for :func:`convert`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity" (2018),
    equation 1; Evci et al., "Rigging the Lottery" (2020), section 3 (1).

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(*sizes) for sizes in ((100, 100), (100, 20), (20, 5))))
        >>> masks = prune.random_masks(model, 0.9)
        >>> [round(mask.double().mean().item(), 3) for mask in masks.values()]
        [0.075, 0.225]
    """
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    check_share("sparsity", sparsity)
    require(distribution in DISTRIBUTIONS, "distribution", "'erdos_renyi' or 'uniform'", repr(distribution))
    is_generator = generator is None or isinstance(generator, torch.Generator)
    require(is_generator, "generator", "torch.Generator or None", type(generator).__name__, TypeError)
    layers = chosen_layers(model, skip, include_last)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    densities = (_uniform if distribution == "uniform" else _erdos_renyi)(shapes, 1 - sparsity)
    masks = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        places = torch.randperm(size, generator=generator)[: round(densities[name] * size)]
        mask = torch.zeros(size, dtype=torch.bool)
        mask[places] = True
        masks[name] = mask.view(shape).to(next(layers[name].parameters()).device)
    return masks


def _uniform(shapes, density):
    return dict.fromkeys(shapes, density)


def _erdos_renyi(shapes, density):
    """Layers that would get more than all their weights are full, and the others share what is left."""
    wanted = density * sum(map(math.prod, shapes.values()))
    full = set()
    while True:
        rest = {name: sum(shape) for name, shape in shapes.items() if name not in full}
        left = wanted - sum(math.prod(shapes[name]) for name in full)
        epsilon = left / sum(rest.values()) if rest else 0
        over = {name for name, weight in rest.items() if epsilon * weight > math.prod(shapes[name])}
        if not over:
            break
        full |= over
    return {name: 1.0 if name in full else epsilon * sum(shape) / math.prod(shape) for name, shape in shapes.items()}
