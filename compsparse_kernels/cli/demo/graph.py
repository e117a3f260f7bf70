"""Part (b): the graph is known. Pixels that lie together feed one group of units, groups that lie together the next."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn

from compsparse_kernels import BlockLayout, SparseDAGLinear
from compsparse_kernels.cli.demo import figures
from compsparse_kernels.cli.demo.data import CLASSES, SIDE, Digits
from compsparse_kernels.cli.demo.report import Figure, Section, accuracy_row, size_row, time_row
from compsparse_kernels.cli.demo.training import (
    Effort,
    Stage,
    accuracy,
    median_ms,
    speedup,
    time_steps,
    train,
    training_step,
)

PATCH = 4  # pixels per side
TIMED_BATCH = 256
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Level:
    """``groups x groups`` groups of ``units``; each sees the groups below whose centres are within ``reach`` of its
    own, in each direction."""

    groups: int
    units: int
    reach: float


LEVELS = (Level(7, 32, 1.1), Level(4, 64, 1.6), Level(2, 64, 1.6))

TITLE = "Known graph: a hierarchy of image patches"
TEXT = (
    f"The pixels are ordered by patches of {PATCH} x {PATCH}. Each group of units sees the patches around its own"
    " place, each group of the next level sees the groups around it, and so on: a directed graph of local functions,"
    " whose weights are blocks. <code>SparseDAGLinear</code> stores and computes these blocks only. No weights are"
    " shared: it is the graph of a convolutional network, but not its symmetry.",
    "Two peers, trained alike: the dense network with the same widths, and the same graph (same blocks, same number of"
    " parameters) over pixels in random order, which destroys locality. If the graph matters and not just the density,"
    " the local one must beat the permuted one.",
)


@dataclass
class Outcome:
    accuracies: list[float] = field(default_factory=list)  # by seed
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None

    @property
    def mean(self) -> float:
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def run(digits: Digits, seed: int, effort: Effort, stage: Stage) -> Section:
    layouts = local_layouts()
    order = patch_order()
    shuffled = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
    kinds = {
        "local graph": (digits.reorder(order), partial(_sparse_net, layouts)),
        "permuted graph": (digits.reorder(shuffled), partial(_sparse_net, layouts)),
        "dense": (digits.reorder(order), partial(_dense_net, layouts)),
    }
    outcomes = {name: Outcome() for name in kinds}
    for name, (ordered, build) in kinds.items():
        stage.begin(f"(b) {name}", effort.graph_epochs * effort.graph_seeds)
        outcome = outcomes[name]
        for each in range(seed, seed + effort.graph_seeds):
            torch.manual_seed(each)
            outcome.model = build()
            outcome.optimizer = train(
                outcome.model, ordered, effort.graph_epochs, lr=LEARNING_RATE, seed=each, tick=stage.tick
            )
            outcome.accuracies.append(accuracy(outcome.model, ordered))
    stage.begin("(b) timing", 1)
    x, y = kinds["local graph"][0].train_x[:TIMED_BATCH], digits.train_y[:TIMED_BATCH]
    steps = {name: partial(training_step, o.model, o.optimizer, x, y) for name, o in outcomes.items()}
    seconds = time_steps(steps, effort.timing_rounds)
    stage.tick()
    return _section(layouts, order, shuffled, outcomes, seconds, digits)


def patch_order() -> torch.Tensor:
    """The pixels ``[784]`` patch after patch, so that a patch is a block of inputs."""
    side = SIDE // PATCH
    return torch.arange(SIDE * SIDE).view(side, PATCH, side, PATCH).transpose(1, 2).flatten()


def neighbours(groups: int, below: int, reach: float) -> torch.Tensor:
    """bool ``[groups^2, below^2]``: which groups of a grid below each group of a grid sees."""
    ours = (torch.arange(groups) + 0.5) * below / groups
    theirs = torch.arange(below) + 0.5
    near = (ours[:, None] - theirs).abs() <= reach
    return (near[:, None, :, None] & near[None, :, None, :]).reshape(groups**2, below**2)


def local_layouts() -> list[BlockLayout]:
    layouts, below, size = [], SIDE // PATCH, PATCH * PATCH
    for level in LEVELS:
        mask = neighbours(level.groups, below, level.reach)
        layouts.append(BlockLayout.from_mask(mask, block_shape=(level.units, size)))
        below, size = level.groups, level.units
    return layouts


def _sparse_net(layouts: list[BlockLayout]) -> nn.Module:
    levels = [SparseDAGLinear(each.in_features, each.out_features, each, activation="relu") for each in layouts]
    return nn.Sequential(*levels, nn.Linear(layouts[-1].out_features, CLASSES))


def _dense_net(layouts: list[BlockLayout]) -> nn.Module:
    levels = [part for each in layouts for part in (nn.Linear(each.in_features, each.out_features), nn.ReLU())]
    return nn.Sequential(*levels, nn.Linear(layouts[-1].out_features, CLASSES))


def fields(layouts: list[BlockLayout], order: torch.Tensor, group: tuple[float, float]) -> list[torch.Tensor]:
    """For each level, the pixels (bool ``[784]``) that reach the group at a relative place ``(row, column)``."""
    reached = torch.eye(layouts[0].grid[1]).repeat_interleave(PATCH * PATCH, 1)  # [patches, pixels in patch order]
    images = []
    for level, layout in zip(LEVELS, layouts, strict=True):
        reached = layout.block_mask().float() @ reached  # > 0 where there is a path
        row, column = (int(place * level.groups) for place in group)
        seen = torch.zeros(len(order), dtype=torch.bool)
        seen[order] = reached[row * level.groups + column] > 0
        images.append(seen)
    return images


def _section(layouts, order, shuffled, outcomes, seconds, digits) -> Section:
    ours, peers = "local graph", ("permuted graph", "dense")
    local = outcomes[ours]
    section = Section("b", TITLE, TEXT)
    seeds = len(local.accuracies)
    measure = f"test accuracy, mean of {seeds} seeds" if seeds > 1 else "test accuracy"
    section.rows += [accuracy_row(measure, local.mean, name, outcomes[name].mean) for name in peers]
    section.rows += [
        size_row("parameters", local.parameters / 1e6, "dense", outcomes["dense"].parameters / 1e6, "million"),
        time_row(f"training step, batch {TIMED_BATCH}", seconds[ours], "dense", seconds["dense"]),
    ]
    section.figures += [
        Figure(
            "What one group of units sees at each level of the local graph (top) and of the permuted one (bottom), over"
            " a test digit: inputs it depends on are bright.",
            _field_figure(layouts, order, shuffled, digits.test_x[digits.test_y == 3][0]),
        ),
        Figure(
            "Test accuracy (one dot per seed), parameters, time of a training step.", _cost_figure(outcomes, seconds)
        ),
    ]
    section.numbers = {
        "accuracy": {name: outcome.accuracies for name, outcome in outcomes.items()},
        "parameters": {name: outcome.parameters for name, outcome in outcomes.items()},
        "density": [layout.density for layout in layouts],
        "step_ms": {name: median_ms(times) for name, times in seconds.items()},
        "step_speedup": {name: speedup(seconds[ours], seconds[name]) for name in peers},
    }
    return section


def _field_figure(layouts, order, shuffled, digit) -> bytes:
    figure = figures.canvas(4.9)
    grid = figure.subplots(2, len(layouts) + 1)
    ink = figures.image(digit)
    ink = (ink - ink.min()) / (ink.max() - ink.min())
    for line, (name, each) in zip(grid, (("local", order), ("permuted", shuffled)), strict=True):
        line[0].imshow(ink, cmap="gray_r")
        figures.bare(line[0], "digit")
        line[0].set_ylabel(f"{name} graph", fontsize=10)
        for number, (axes, seen) in enumerate(zip(line[1:], fields(layouts, each, (0.5, 0.4)), strict=True), start=1):
            shade = np.stack([1 - 0.85 * ink] * 3, -1)  # [28, 28, 3]
            hidden = ~figures.image(seen)
            shade[hidden] = 0.35 * shade[hidden] + 0.08
            axes.imshow(shade)
            level = LEVELS[number - 1]
            figures.bare(
                axes,
                f"level {number}: {level.groups}x{level.groups} groups of {level.units}\n"
                f"one group sees {int(seen.sum())} pixels",
                8,
            )
    return figures.to_png(figure)


def _cost_figure(outcomes, seconds) -> bytes:
    figure = figures.canvas(2.0)
    left, middle, right = figure.subplots(1, 3)
    names, colors = list(outcomes), (figures.OURS, figures.SECOND_PEER, figures.PEER)
    for place, (name, color) in enumerate(zip(names, colors, strict=True)):
        values = [100 * value for value in outcomes[name].accuracies]
        left.plot(values, [place] * len(values), "o", color=color, alpha=0.55)
        left.plot(100 * outcomes[name].mean, place, "|", color=color, markersize=22, markeredgewidth=2.5)
    left.set_yticks(range(len(names)), names, fontsize=9)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_title("test accuracy, %", fontsize=10)
    left.grid(axis="x", alpha=0.3)
    figures.light_frame(left)
    figures.bars(middle, names, [outcomes[name].parameters / 1e6 for name in names], colors, "parameters", "M")
    figures.bars(right, names, [median_ms(seconds[name]) for name in names], colors, "training step", "ms")
    for axes in (middle, right):
        axes.set_yticks([])
    return figures.to_png(figure)
