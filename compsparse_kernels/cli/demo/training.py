"""What the three parts share: a training loop, accuracy, paired timing, bytes counted from the tensors themselves."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import nn
from torch.nn import functional as F

from compsparse_kernels.cli.demo.data import SIDE, Digits
from compsparse_kernels.prune.memory import storage_bytes, tensors_in

Tick = Callable[[], object]  # called after each epoch


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much each part does. ``QUICK`` shows that all of it runs; its numbers mean nothing."""

    digits_per_class: int = 500
    dense_epochs: int = 8
    round_epochs: int = 5
    graph_epochs: int = 10
    graph_seeds: int = 3
    attention_epochs: int = 20
    timing_rounds: int = 15


QUICK = Effort(
    digits_per_class=30,
    dense_epochs=2,
    round_epochs=1,
    graph_epochs=1,
    graph_seeds=1,
    attention_epochs=1,
    timing_rounds=3,
)


def progress_bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


class Stage:
    """One progress bar per stage of the demo."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._task: TaskID | None = None

    def begin(self, title: str, ticks: int) -> None:
        self._task = self._progress.add_task(title, total=ticks)

    def tick(self) -> None:
        self._progress.advance(self._task)


def train(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    *,
    lr: float,
    seed: int,
    tick: Tick,
    batch: int = 128,
    shift: int = 0,
) -> torch.optim.Optimizer:
    """Adam with one cycle of the learning rate. The seed fixes the batches, and by how much each is moved at random, up
    to ``shift`` pixels in each direction."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    count = len(digits.train_x)
    steps = epochs * -(-count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=generator).split(batch):
            down, right = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
            x = digits.train_x[rows].view(-1, SIDE, SIDE).roll((down, right), (1, 2)).flatten(1)
            training_step(model, optimizer, x, digits.train_y[rows])
            schedule.step()
        tick()
    return optimizer


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the test digits that are named correctly."""
    model.eval()
    guesses = [model(x).argmax(-1) for x in digits.test_x.split(250)]
    return (torch.cat(guesses) == digits.test_y).double().mean().item()


def time_steps(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, all of them in turn in every round (ABCABC...), so that pairs share the machine's mood."""
    for step in steps.values():
        step()
        step()
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)


def speedup(ours: list[float], peer: list[float]) -> float:
    """Median of the paired ratios; above 1 is faster than the peer."""
    return statistics.median(b / a for a, b in zip(ours, peer, strict=True))


def stored_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes a training run holds between steps: parameters, gradients, optimizer state, and masks or index arrays.

    Each storage counts once, whoever refers to it.
    """
    seen: set[int] = set()
    parameters = list(model.parameters())
    return {
        "weights": storage_bytes(parameters, seen),
        "gradients": storage_bytes((p.grad for p in parameters if p.grad is not None), seen),
        "optimizer": storage_bytes((t for state in optimizer.state.values() for t in tensors_in(state)), seen),
        "indices": storage_bytes((t for module in model.modules() for t in _pattern(module)), seen),
    }


def _pattern(module: nn.Module) -> Iterator[torch.Tensor]:
    """Masks (buffers) and the index tensors of a layout."""
    yield from module.buffers(recurse=False)
    yield from tensors_in(getattr(module, "layout", None))
