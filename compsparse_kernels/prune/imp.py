"""Iterative magnitude pruning with rewinding: train, prune, rewind, again; what is left trains sparse."""

import contextlib
import copy
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compsparse_kernels.layouts.checks import check_positive_int, describe, require
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.prune.checkpoints import random_state, read, set_random_state, write
from compsparse_kernels.prune.convert import check_storage, convert, to_dense
from compsparse_kernels.prune.layers import masked_layers, prunable_layers
from compsparse_kernels.prune.magnitude import check_share, magnitude_masks
from compsparse_kernels.prune.rewinding import (
    check_same_groups,
    optimizer_snapshot,
    restore_optimizer,
    rewind,
    snapshot,
)

SAVED = {"plan", "types", "history", "masked", "model", "optimizer", "stateful", "start", "random"}  # in each file

Evaluation = float | dict[str, float] | None


@dataclasses.dataclass(frozen=True)
class Round:
    """What a round of :class:`IMP` came to. ``density`` is the share of the weights of all linear layers that were
    there to train, ``layer_density`` the same of each; ``seconds`` the round took, evaluation included."""

    number: int
    density: float
    layer_density: dict[str, float]
    evaluation: Evaluation
    seconds: float


class IMP:
    r"""Iterative magnitude pruning with rewinding to step k.

    Round 0 trains the dense model for ``steps`` steps and remembers weights and optimizer as they were after
    ``rewind_step`` of them. Each of ``rounds`` further rounds removes ``fraction`` of the weights that are left, takes
    the others and the optimizer back to step ``rewind_step``, and trains them from there to ``steps``. So round n
    trains at density :math:`(1 - \mathrm{fraction})^n` of what ``select`` prunes. Pruned layers are
    :class:`MaskedLinear`: gradients and optimizer state exist for survivors only. (The state that rounds are rewound to
    is kept as well, and that is dense.)

    Args:
        model: trained in place. A model that is one linear layer becomes another object: use the attribute ``model``.
        optimizer: over the model's parameters.
        step: ``step(model, optimizer, k)`` does training step k, ``0 <= k < steps``: forward, backward, update. Let k
            choose the batch and the learning rate, and rewinding takes them back too.
        steps, rounds: see above.
        fraction: share of the surviving weights that a round removes, in [0, 1).
        rewind_step: k; 0 is the original lottery ticket, rewound to the initialisation.
        select: ``select(model, sparsity)`` gives the masks, :func:`magnitude_masks` by default; ``functools.partial``
            sets its options.
        kind, block_shape: as in :func:`convert`.
        evaluate: ``evaluate(model)`` after each round, in eval mode without gradients: a number or a dict of numbers.
        stateful: what else is to be rewound and saved, by ``state_dict`` and ``load_state_dict``: a scheduler of the
            learning rate, a gradient scaler.
        directory: where to write a file per round, ``round_000.pt`` and so on. A file appears whole or not at all.
            Where some are there, :meth:`run` goes on after the last: give it the model and optimizer as newly made, and
            the result is that of an uninterrupted run on this machine, to the bit, if ``step`` draws its random numbers
            from torch, numpy's global generator or ``random``.
        progress: show a bar (rich).

    Attributes:
        history: a :class:`Round` per finished round, round 0 first.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis" (2019), section 1; Frankle, Dziugaite, Roy, Carbin,
    "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (2020), algorithm 2.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> x = torch.randn(256, 8)
        >>> def step(model, optimizer, k):
        ...     rows = torch.randperm(256, generator=torch.Generator().manual_seed(k))[:64]
        ...     optimizer.zero_grad()
        ...     (model(x[rows]) - x[rows, :1] * x[rows, 1:2]).square().mean().backward()
        ...     optimizer.step()
        >>> imp = prune.IMP(model, optimizer, step, steps=20, rounds=3, fraction=0.5, rewind_step=5)
        >>> [round(done.layer_density["0"], 3) for done in imp.run()]
        [1.0, 0.5, 0.25, 0.125]
        >>> type(model[0]).__name__
        'MaskedLinear'
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: Callable[[nn.Module, torch.optim.Optimizer, int], Any],
        *,
        steps: int,
        rounds: int,
        fraction: float = 0.2,
        rewind_step: int = 0,
        select: Callable[[nn.Module, float], Mapping[str, torch.Tensor]] = magnitude_masks,
        kind: str = "auto",
        block_shape: tuple[int, int] | None = None,
        evaluate: Callable[[nn.Module], float | Mapping[str, float]] | None = None,
        stateful: Sequence[Any] = (),
        directory: str | Path | None = None,
        progress: bool = False,
    ):
        require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
        is_optimizer = isinstance(optimizer, torch.optim.Optimizer)
        require(is_optimizer, "optimizer", "torch.optim.Optimizer", type(optimizer).__name__, TypeError)
        for name, function in (("step", step), ("select", select), ("evaluate", evaluate)):
            ok = callable(function) or (name == "evaluate" and function is None)
            require(ok, name, "a function", type(function).__name__, TypeError)
        check_positive_int("steps", steps)
        check_positive_int("rounds", rounds)
        check_share("fraction", fraction)
        is_int = isinstance(rewind_step, int) and not isinstance(rewind_step, bool)
        require(is_int, "rewind_step", f"an int in 0..{steps - 1}", repr(rewind_step), TypeError)
        require(0 <= rewind_step < steps, "rewind_step", f"an int in 0..{steps - 1}", rewind_step)
        ok = isinstance(stateful, Sequence) and all(
            hasattr(one, name) for one in stateful for name in ("state_dict", "load_state_dict")
        )
        require(ok, "stateful", "a list of objects with state_dict and load_state_dict", repr(stateful), TypeError)
        check_storage(kind, block_shape)
        is_path = directory is None or isinstance(directory, (str, os.PathLike))
        require(is_path, "directory", "a path or None", type(directory).__name__, TypeError)
        self.model, self.optimizer = model, optimizer
        self.history: list[Round] = []
        self._step, self._select, self._evaluate, self._stateful = step, select, evaluate, stateful
        self._storage = {"kind": kind, "block_shape": block_shape}
        self._plan = {"steps": steps, "fraction": fraction, "rewind_step": rewind_step}
        self._rounds, self._progress = rounds, progress
        self._directory = None if directory is None else Path(directory)
        self._start: dict | None = None  # the state that rounds are rewound to
        self._under_way = False

    def run(self) -> list[Round]:
        """All rounds that are not done yet; returns the history."""
        if self._directory is not None:
            is_file = self._directory.exists() and not self._directory.is_dir()
            require(not is_file, "directory", "a folder, there or not", f"the file {str(self._directory)!r}")
            self._directory.mkdir(parents=True, exist_ok=True)
            self._resume()
        wanted = "one with a finished round to go on from, as the last run was interrupted"
        require(not self._under_way, "directory", wanted, self._directory)
        with self._bar() as begin:
            for number in range(len(self.history), self._rounds + 1):
                self._under_way = True
                self._round(number, begin)
                self._under_way = False
        return self.history

    def _round(self, number, begin):
        started = time.perf_counter()
        steps, rewind_step = self._plan["steps"], self._plan["rewind_step"]
        if number > 0:
            tick = begin(f"round {number} of {self._rounds}", steps - rewind_step)
            self._prune(1 - (1 - self._plan["fraction"]) ** number)
        else:
            tick = begin(f"dense, before {self._rounds} rounds", steps)
            self._train(range(rewind_step), tick)
            others = [copy.deepcopy(one.state_dict()) for one in self._stateful]
            self._start = {"training": snapshot(self.model, self.optimizer), "stateful": others}
        self._train(range(rewind_step, steps), tick)
        evaluation = self._evaluated()
        self.history.append(_round_of(self.model, number, evaluation, time.perf_counter() - started))
        if self._directory is not None:
            self._save(number)

    def _train(self, steps, tick):
        for k in steps:
            self._step(self.model, self.optimizer, k)
            tick()

    def _prune(self, sparsity):
        masks = self._select(self.model, sparsity)
        self.model = convert(self.model, masks, optimizer=self.optimizer, **self._storage)
        rewind(self.model, self._start["training"], self.optimizer)
        self._restore_others(self._start["stateful"])

    def _restore_others(self, states):
        for one, saved in zip(self._stateful, states, strict=True):
            one.load_state_dict(copy.deepcopy(saved))

    def _evaluated(self) -> Evaluation:
        if self._evaluate is None:
            return None
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            with torch.no_grad():
                found = self._evaluate(self.model.eval())
        finally:
            for module, mode in modes:
                module.training = mode
        try:
            return {name: float(value) for name, value in found.items()} if isinstance(found, Mapping) else float(found)
        except (TypeError, ValueError) as error:
            wanted = "evaluate: expected a function that returns a number or a dict of numbers"
            raise TypeError(f"{wanted}, got one that returns {type(found).__name__}") from error

    def _save(self, number):
        write(
            self._file(number),
            {
                "plan": self._plan,
                "types": self._types(),
                "history": [dataclasses.asdict(done) for done in self.history],
                "masked": list(masked_layers(self.model)),
                "model": self.model.state_dict(),
                "optimizer": optimizer_snapshot(self.model, self.optimizer),
                "stateful": [one.state_dict() for one in self._stateful],
                "start": self._start if number == 0 else None,  # written once: it is as large as the dense model
                "random": random_state(),
            },
        )

    def _resume(self):
        done = [number for number in range(self._rounds + 1) if self._file(number).exists()]
        if not done:
            return
        saved = self._read(done[-1])
        for name, value in (self._plan | self._types()).items():
            there = (saved["plan"] | saved["types"]).get(name)
            require(value == there, name, f"{there}, as in the run of {str(self._directory)!r}", value)
        require(done[0] == 0, "directory", "one with round_000.pt, where rounds rewind to", str(self._directory))
        self._start = self._read(0)["start"]
        check_same_groups(self.optimizer, saved["optimizer"])
        self._restore_model(saved["masked"], saved["model"])
        self.history[:] = [Round(**entry) for entry in saved["history"]]
        restore_optimizer(self.model, self.optimizer, saved["optimizer"])
        self._restore_others(saved["stateful"])
        set_random_state(saved["random"])
        self._under_way = False

    def _types(self):
        """What must be the same objects when a run goes on; their states would load into others, or almost."""
        return {"optimizer": type(self.optimizer).__name__, "stateful": [type(one).__name__ for one in self._stateful]}

    def _read(self, number):
        saved = read(self._file(number))
        ok = isinstance(saved, dict) and saved.keys() >= SAVED
        require(ok, str(self._file(number)), "what a round of IMP wrote", describe(saved))
        return saved

    def _restore_model(self, masked, state):
        """The state dict brings masks and kinds along: kind auto might choose others today."""
        self.model = to_dense(self.model, self.optimizer)
        layers = prunable_layers(self.model)
        wanted = f"one like that of the run of {str(self._directory)!r}"
        missing = [name for name in masked if name not in layers]
        require(not missing, "model", wanted, f"one without the linear layers {', '.join(missing)}")
        empty = {
            name: torch.zeros(layers[name].out_features, layers[name].in_features, dtype=torch.bool) for name in masked
        }
        self.model = convert(self.model, empty, "csr", self.optimizer)
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"model: expected {wanted}, got another: {error}") from error

    def _file(self, number) -> Path:
        return self._directory / f"round_{number:03}.pt"

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Callable[[str, int], Callable[[], None]]]:
        """A function that begins a bar of so many ticks and returns what ticks it."""
        if not self._progress:
            yield lambda title, ticks: lambda: None
            return
        from rich.progress import Progress

        with Progress() as progress:

            def begin(title, ticks):
                task = progress.add_task(title, total=ticks)
                return lambda: progress.advance(task)

            yield begin


def _round_of(model, number, evaluation, seconds) -> Round:
    layers = prunable_layers(model)
    sizes = {name: layer.out_features * layer.in_features for name, layer in layers.items()}
    kept = {
        name: layer.layout.nnz if isinstance(layer, MaskedLinear) else sizes[name] for name, layer in layers.items()
    }
    densities = {name: kept[name] / sizes[name] for name in layers}
    return Round(number, sum(kept.values()) / max(1, sum(sizes.values())), densities, evaluation, seconds)
