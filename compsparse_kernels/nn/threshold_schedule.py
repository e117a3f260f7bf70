"""Annealing: a threshold that changes while the model trains."""

import math

from torch import nn

from compsparse_kernels.layouts.checks import describe, require
from compsparse_kernels.nn.threshold_attention import ThresholdAttention


class ThresholdSchedule:
    r"""Moves the thresholds of a model's attention from ``initial`` to ``final`` while it trains.

    .. math:: t_k = t_0 (t_1 / t_0)^x \ \text{(geometric)}, \quad t_0 + (t_1 - t_0) x \ \text{(linear)}, \qquad
        x = \frac{k - \text{begin}}{\text{end} - \text{begin}} \ \text{clipped to}\ [0, 1]

    Call :meth:`step` after each ``optimizer.step()``, as a scheduler of the learning rate. A relative threshold is a
    ratio of weights, so it goes by default in equal factors; an absolute one is a score and goes in equal steps.

    Args:
        model: every :class:`ThresholdAttention` in it takes part; all have one rule, relative, absolute or topp, and no
            learned thresholds.
        initial, final: thresholds at step ``begin`` and before, at step ``end`` and after.
        begin, end: steps, ``0 <= begin < end``; the k-th call of :meth:`step` is step k, and ``__init__`` sets that of
            step 0.
        kind: ``"geometric"``, ``"linear"``, or None: geometric for rule relative, else linear.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> from compsparse_kernels import ThresholdAttention
        >>> from compsparse_kernels.nn import ThresholdSchedule
        >>> attn = ThresholdAttention(64, num_heads=4)
        >>> schedule = ThresholdSchedule(attn, initial=1e-4, final=1e-2, end=4)
        >>> for _ in range(5):
        ...     print(f"{attn.threshold:.2g}")
        ...     _ = schedule.step()
        0.0001
        0.00032
        0.001
        0.0032
        0.01
    """

    def __init__(
        self, model: nn.Module, *, initial: float, final: float, end: int, begin: int = 0, kind: str | None = None
    ):
        self._modules = attentions_of(model)
        rules = {module.rule for module in self._modules}
        known = len(rules) == 1 and rules <= {"relative", "absolute", "topp"}
        require(known, "model", "attention of one rule, relative, absolute or topp", ", ".join(sorted(rules)))
        learned = any(module.threshold_parameter is not None for module in self._modules)
        require(not learned, "model", "thresholds that are not learned", "learned ones")
        for name, value in (("begin", begin), ("end", end)):
            is_int = isinstance(value, int) and not isinstance(value, bool)
            require(is_int, name, "an int", describe(value), TypeError)
        require(begin >= 0, "begin", "a step of at least 0", begin)
        require(end > begin, "end", f"a step after begin, {begin}", end)
        kind = ("geometric" if rules == {"relative"} else "linear") if kind is None else kind
        require(kind in ("geometric", "linear"), "kind", "'geometric', 'linear' or None", repr(kind))
        for name, value in (("initial", initial), ("final", final)):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(is_number and math.isfinite(value), name, "a finite number", repr(value), TypeError)
            require(kind == "linear" or value > 0, name, "a positive number (kind 'geometric')", value)
        self._ends, self._times, self._kind, self._steps = (initial, final), (begin, end), kind, 0
        for value in (final, initial):  # both are seen to be good before training begins
            self._set(value)

    @property
    def threshold(self) -> float:
        """That of the steps so far."""
        (initial, final), (begin, end) = self._ends, self._times
        if self._steps >= end:
            return final  # exactly
        x = max(0, self._steps - begin) / (end - begin)
        return initial * (final / initial) ** x if self._kind == "geometric" else initial + (final - initial) * x

    def step(self) -> float:
        """Counts a step, sets the thresholds and returns what they are."""
        self._steps += 1
        self._set(self.threshold)
        return self.threshold

    def _set(self, threshold):
        for module in self._modules:
            module.threshold = threshold

    def state_dict(self) -> dict:
        """The number of steps so far; the rest is what it was made with."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict) -> None:
        """Also sets the thresholds, which are not in the model's state dict."""
        self._steps = state["steps"]
        self._set(self.threshold)


def attentions_of(model: nn.Module) -> list[ThresholdAttention]:
    """Every one in the model; at least one."""
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    found = [module for module in model.modules() if isinstance(module, ThresholdAttention)]
    require(len(found) > 0, "model", "at least one ThresholdAttention", "none")
    return found
