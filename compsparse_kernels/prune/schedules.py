"""Gradual pruning: sparsity that rises while the model trains."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from compsparse_kernels.layouts.checks import check_positive_int, require
from compsparse_kernels.prune.convert import check_storage, convert
from compsparse_kernels.prune.magnitude import check_share, magnitude_masks
from compsparse_kernels.prune.state import steps_in


def cubic_sparsity(t: float, *, begin: float, end: float, final: float, initial: float = 0.0) -> float:
    r"""Sparsity at time t: :math:`s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3`.

    It rises fast at first, when many weights are redundant, and slowly at last.

    Args:
        t: time, in any unit (steps, epochs); before ``begin`` the sparsity is ``initial``, after ``end`` it is
            ``final``.
        begin, end: :math:`t_0 < t_1`.
        final, initial: :math:`s_f` and :math:`s_i`, shares in [0, 1), ``initial <= final``.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Zhu and Gupta, "To prune, or not to prune" (2017), equation 1.

    Example:
        >>> from compsparse_kernels import prune
        >>> [round(prune.cubic_sparsity(t, begin=100, end=500, final=0.9), 3) for t in (0, 100, 200, 300, 500, 800)]
        [0.0, 0.0, 0.52, 0.787, 0.9, 0.9]
    """
    for name, value in (("t", t), ("begin", begin), ("end", end)):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(is_number, name, "a number", repr(value), TypeError)
        require(math.isfinite(value), name, "a finite number", value)
    require(begin < end, "end", f"a time after begin, {begin}", end)
    check_share("final", final)
    check_share("initial", initial)
    require(initial <= final, "initial", f"a share of at most final, {final}", initial)
    left = (1 - (min(max(t, begin), end) - begin) / (end - begin)) ** 3
    return initial * left + final * (1 - left)  # exact at both ends


class GradualPruner:
    r"""Prunes while the model trains, along :func:`cubic_sparsity`.

    Call :meth:`step` after each ``optimizer.step()``. At steps ``begin, begin + every, ..., end`` it removes the
    weights of smallest magnitude, so that the sparsity is the schedule's; weights, gradients and optimizer state of the
    rest stay as they are.

    Args:
        model: pruned in place. A model that is one linear layer becomes another object: use the attribute ``model``.
        optimizer: over the model's parameters; its state is remapped.
        begin, end: first and last step that prunes, counted from 1: the k-th call of :meth:`step` is step k.
        every: steps between prunings; divides ``end - begin``.
        final, initial: sparsities, see :func:`cubic_sparsity`.
        select: ``select(model, sparsity)`` gives the masks, :func:`magnitude_masks` by default.
        kind, block_shape: as in :func:`convert`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Zhu and Gupta, "To prune, or not to prune" (2017), section 3.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Linear(20, 1))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> pruner = prune.GradualPruner(model, optimizer, begin=2, end=6, every=2, final=0.8)
        >>> for _ in range(6):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 20)).square().mean().backward()
        ...     optimizer.step()
        ...     if pruner.step():
        ...         print(model[0].layout.nnz)
        400
        120
        80
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        begin: int,
        end: int,
        every: int,
        final: float,
        initial: float = 0.0,
        select: Callable[[nn.Module, float], Mapping[str, torch.Tensor]] = magnitude_masks,
        kind: str = "auto",
        block_shape: tuple[int, int] | None = None,
    ):
        require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
        is_optimizer = isinstance(optimizer, torch.optim.Optimizer)
        require(is_optimizer, "optimizer", "torch.optim.Optimizer", type(optimizer).__name__, TypeError)
        require(callable(select), "select", "a function", type(select).__name__, TypeError)
        for name, value in (("begin", begin), ("end", end), ("every", every)):
            check_positive_int(name, value)
        self._schedule = {"begin": begin, "end": end, "final": final, "initial": initial}
        cubic_sparsity(begin, **self._schedule)  # checks them
        divides = (end - begin) % every == 0
        require(divides, "every", f"a divisor of end - begin, {end - begin}", every)
        check_storage(kind, block_shape)
        self.model, self.optimizer = model, optimizer
        self._every, self._select = every, select
        self._storage = {"kind": kind, "block_shape": block_shape}
        self._steps = 0

    @property
    def sparsity(self) -> float:
        """What the schedule asks for after the steps so far."""
        return cubic_sparsity(self._steps, **self._schedule)

    def step(self) -> bool:
        """Counts a step; True if it pruned."""
        self._steps += 1
        begin, end = self._schedule["begin"], self._schedule["end"]
        if not begin <= self._steps <= end or (self._steps - begin) % self._every:
            return False
        masks = self._select(self.model, self.sparsity)
        self.model = convert(self.model, masks, optimizer=self.optimizer, **self._storage)
        return True

    def state_dict(self) -> dict:
        """The number of steps so far; masks lie in the model's own state dict."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict) -> None:
        self._steps = steps_in(state)
