"""Sparse training at constant density: the smallest weights are dropped, others grow elsewhere."""

import math
import weakref
from collections.abc import Iterator

import torch
from torch import distributed, nn

from compsparse_kernels.layouts.checks import check_positive_int, require
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.prune.convert import check_storage, update_masks
from compsparse_kernels.prune.layers import masked_layers
from compsparse_kernels.prune.magnitude import DEAD, check_share, largest, magnitude_of
from compsparse_kernels.prune.state import steps_in

CHUNK_ELEMENTS = 2**17  # of the dense gradient at a time: half a MiB in float32, which stays in cache


class _DropAndGrow:
    """Counts steps and, when one is due, gives each layer a mask with as many survivors as it has."""

    def __init__(self, model, optimizer, every_name, every, kind):
        require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
        is_optimizer = isinstance(optimizer, torch.optim.Optimizer)
        require(is_optimizer, "optimizer", "torch.optim.Optimizer", type(optimizer).__name__, TypeError)
        check_positive_int(every_name, every)
        check_storage(kind, None)
        wanted = "one with MaskedLinear layers (prune.convert with prune.random_masks, say)"
        require(bool(masked_layers(model)), "model", wanted, "one without")
        self.model, self.optimizer = model, optimizer
        self._every, self._kind = every, kind
        self._steps = 0

    def _is_due(self, step: int) -> bool:
        return step % self._every == 0

    def _layers(self) -> Iterator[tuple[str, MaskedLinear]]:
        """Those that train and have somewhere to grow."""
        for name, layer in masked_layers(self.model).items():
            if layer.values.requires_grad and layer.layout.nnz < layer.in_features * layer.out_features:
                yield name, layer

    def _new_mask(self, name, layer):
        """bool ``[out, in]`` with ``layer.layout.nnz`` survivors; None leaves the layer as it is."""
        raise NotImplementedError

    def _fill(self, masks):
        return 0.0

    def step(self) -> bool:
        """Counts a step; True if it has changed masks."""
        self._steps += 1
        if not self._is_due(self._steps):
            return False
        masks = {name: self._new_mask(name, layer) for name, layer in self._layers()}
        masks = {name: mask for name, mask in masks.items() if mask is not None}
        if masks:
            update_masks(self.model, masks, self.optimizer, kind=self._kind, fill=self._fill(masks))
        return bool(masks)

    def state_dict(self) -> dict:
        """The number of steps so far; masks lie in the model's own state dict."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict) -> None:
        self._steps = steps_in(state)


class RigL(_DropAndGrow):
    r"""Dynamic sparse training that grows where the loss asks for it: "Rigging the Lottery".

    Every ``delta_t`` steps t, until ``end``, each :class:`MaskedLinear` layer drops the share

    .. math:: f(t) = \frac{\alpha}{2} \left(1 + \cos \frac{\pi t}{t_{end}}\right)

    of its weights, those of least magnitude, and grows as many where the gradient of the *dense* weight is largest in
    magnitude, starting at 0; what was just dropped may grow again, and then stays as it was. The dense gradient is
    computed for these steps only, a few rows at a time, from inputs and output gradients that hooks catch: it is never
    stored whole. Survivors keep value and optimizer state to the bit.

    Call :meth:`step` between ``backward()`` and ``optimizer.step()``. In a step that changes masks the paper leaves the
    weights alone: ``if not rigl.step(): optimizer.step()``.

    Args:
        model: trained in place, with :class:`MaskedLinear` layers; :func:`random_masks` gives the usual start. Masks
            are element-wise: kind ``"block"`` would store mostly empty blocks.
        optimizer: over the model's parameters; its state is remapped.
        end: :math:`t_{end}`, the step from which masks stay; the paper takes 3/4 of the training.
        delta_t: steps between updates.
        alpha: share that the first update would drop, in [0, 1).
        kind: how to store the masks, see :meth:`MaskLayout.from_mask`.
        process_group: of ``torch.distributed``, where its members train one model on parts of a batch: they add up
            their gradients, chunk by chunk, so that all of them choose the same masks.

    Layers that :func:`to_dense` and :func:`convert` put in later are watched from the next :meth:`step` on.
    Gradients of several backward passes before a :meth:`step` add up. A layer that took no part in them is left as it
    is, and so is one whose gradient is not finite, as happens under a gradient scaler.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners" (2020), algorithm 1,
    equation 1.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.ReLU(), torch.nn.Linear(20, 1))
        >>> model = prune.convert(model, prune.random_masks(model, 0.8))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> rigl = prune.RigL(model, optimizer, delta_t=10, end=75)
        >>> before = model[0].layout.to_mask()
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(32, 20)).sub(1).square().mean().backward()
        ...     if not rigl.step():
        ...         optimizer.step()
        >>> model[0].layout.nnz, torch.equal(model[0].layout.to_mask(), before)
        (80, False)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        end: int,
        delta_t: int = 100,
        alpha: float = 0.3,
        kind: str = "auto",
        process_group: "distributed.ProcessGroup | None" = None,
    ):
        super().__init__(model, optimizer, "delta_t", delta_t, kind)
        check_positive_int("end", end)
        check_share("alpha", alpha)
        self._end, self._alpha, self._group = end, alpha, process_group
        self._caught: dict[nn.Module, list] = {}  # of each layer, inputs and output gradients of this step
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._watch()

    def _watch(self):
        """Also layers that were put in since, by to_dense and convert: they lack the hooks of those they replace."""
        for layer in masked_layers(self.model).values():
            if layer not in self._watched:
                layer.register_forward_hook(_ForwardHook(self), with_kwargs=True)
                self._watched.add(layer)

    def _is_due(self, step):
        return super()._is_due(step) and step < self._end

    def catch(self, layer: MaskedLinear, x: torch.Tensor, output: torch.Tensor) -> None:
        if not self._is_due(self._steps + 1) or not output.requires_grad:
            return
        x = x.detach()

        def catch_gradient(gradient):
            self._caught.setdefault(layer, []).append((x, gradient.detach()))

        output.register_hook(catch_gradient)

    def step(self) -> bool:
        """Counts a step; True if it has changed masks: then leave out ``optimizer.step()``."""
        try:
            return super().step()
        finally:
            self._caught.clear()
            self._watch()

    def _new_mask(self, name, layer):
        pairs = self._pairs(layer)
        if not pairs and self._group is None:
            return None
        survivors = layer.layout.nnz
        share = self._alpha / 2 * (1 + math.cos(math.pi * self._steps / self._end))
        count = int(share * survivors)
        magnitude = magnitude_of(name, layer)
        mask = largest(magnitude.flatten(), survivors - count).view_as(magnitude)
        places = _largest_gradients(layer, pairs, mask, count, self._group)
        if places is None:
            return None
        mask.view(-1)[places] = True
        return mask

    def _pairs(self, layer):
        """Inputs ``[n, in]`` and output gradients ``[n, out]``; autocast may have made them of lower precision."""
        dtype = layer.values.dtype
        return [
            (x.reshape(-1, layer.in_features).to(dtype), gradient.reshape(-1, layer.out_features).to(dtype))
            for x, gradient in self._caught.get(layer, ())
        ]


class _ForwardHook:
    """Tells a :class:`RigL` what a layer was given. It does not keep it alive; copies and pickles of the model leave it
    behind."""

    def __init__(self, owner: RigL | None):
        self._owner = (lambda: None) if owner is None else weakref.ref(owner)

    def __call__(self, layer, args, kwargs, output):
        owner = self._owner()
        if owner is not None:
            owner.catch(layer, args[0] if args else kwargs["x"], output)

    def __reduce__(self):
        return _ForwardHook, (None,)


class SET(_DropAndGrow):
    r"""Sparse evolutionary training: connections are dropped by magnitude and grow at random.

    Every ``every`` steps each :class:`MaskedLinear` layer drops the share ``fraction`` of its positive weights, the
    smallest, and of its negative ones, those closest to zero, and grows as many at places drawn uniformly, with values
    drawn as a new layer's are: from U(-1/sqrt(n), 1/sqrt(n)), where n is the number of inputs that the output then has.
    A place that is dropped and drawn again stays as it was. Survivors keep value and optimizer state to the bit.

    Call :meth:`step` after each ``optimizer.step()``.

    Args:
        model, optimizer, kind: as in :class:`RigL`.
        every: steps between updates; the paper takes an epoch.
        fraction: share of each layer's weights that an update drops, :math:`\zeta` in the paper, in [0, 1).
        generator: a CPU generator for places and values; torch's own by default. Processes that train one model need
            generators of the same seed.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
    inspired by Network Science" (2018), algorithm 2.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.ReLU(), torch.nn.Linear(20, 1))
        >>> model = prune.convert(model, prune.random_masks(model, 0.8))
        >>> evolution = prune.SET(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1)
        >>> before = model[0].layout.to_mask()
        >>> evolution.step(), model[0].layout.nnz, torch.equal(model[0].layout.to_mask(), before)
        (True, 80, False)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: int,
        fraction: float = 0.3,
        kind: str = "auto",
        generator: torch.Generator | None = None,
    ):
        super().__init__(model, optimizer, "every", every, kind)
        check_share("fraction", fraction)
        is_generator = generator is None or isinstance(generator, torch.Generator)
        require(is_generator, "generator", "torch.Generator or None", type(generator).__name__, TypeError)
        self._fraction, self._generator = fraction, generator

    def _new_mask(self, name, layer):
        magnitude = magnitude_of(name, layer)  # refuses NaN
        positive = layer.weight.detach() > 0
        mask = torch.zeros_like(positive)
        for side in (positive, ~positive):
            part = torch.where(side, magnitude, DEAD).flatten()
            alive = int((part != DEAD).sum())
            mask |= largest(part, alive - int(self._fraction * alive)).view_as(mask)
        free = (~mask).flatten().nonzero().flatten()
        drawn = torch.randperm(len(free), generator=self._generator)[: layer.layout.nnz - int(mask.sum())]
        mask.view(-1)[free[drawn.to(free.device)]] = True
        return mask

    def _fill(self, masks):
        fills = {}
        for name, mask in masks.items():
            bound = mask.sum(1, keepdim=True).clamp(min=1).rsqrt()  # [out, 1]
            fills[name] = bound * (2 * torch.rand(mask.shape, generator=self._generator).to(mask.device) - 1)
        return fills

    def state_dict(self) -> dict:
        """The number of steps so far, and the generator's state if one was given."""
        state = super().state_dict()
        return state if self._generator is None else state | {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        steps_in(state)
        if self._generator is not None:
            there = isinstance(state.get("generator"), torch.Tensor)
            require(there, "state", "one with a generator's state", "one without")
            self._generator.set_state(state["generator"])
        super().load_state_dict(state)


def _largest_gradients(layer, pairs, taken, count, group):
    """Of the dense gradient's entries outside ``taken [out, in]`` the ``count`` largest in magnitude: their places in
    the flattened weight, of equal ones the earlier. At most ``CHUNK_ELEMENTS`` of it, or a row, are there at a time."""
    if count == 0:
        return taken.new_empty(0, dtype=torch.int64)
    rows = max(1, CHUNK_ELEMENTS // layer.in_features)
    best = layer.values.new_empty(0)
    places = torch.empty(0, dtype=torch.int64, device=best.device)
    for first in range(0, layer.out_features, rows):
        gradient = _gradient_rows(layer, pairs, slice(first, first + rows), group)  # [rows, in]
        size = gradient.abs_().flatten()
        if not size.max().isfinite():  # max passes NaN on
            return None
        size.masked_fill_(taken[first : first + rows].flatten(), DEAD)
        floor = best.min() if len(best) == count else DEAD  # a tie with what came earlier loses
        better = (size > floor).nonzero().flatten()
        merged, where = torch.cat([best, size[better]]), torch.cat([places, first * layer.in_features + better])
        kept = largest(merged, count)
        best, places = merged[kept], where[kept]  # in order of place
    return places


def _gradient_rows(layer, pairs, rows, group):
    count = len(range(*rows.indices(layer.out_features)))
    gradient = layer.values.new_zeros(count, layer.in_features)
    for x, output_gradient in pairs:
        gradient.addmm_(output_gradient[:, rows].mT, x)
    if group is not None:
        distributed.all_reduce(gradient, group=group)
    return gradient
