"""Part (a): a dense MLP is pruned in rounds, and the sparse training runs on the survivors alone."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from compsparse_kernels import MaskedLinear, prune
from compsparse_kernels.cli.demo import figures
from compsparse_kernels.cli.demo.data import CLASSES, PIXELS, Digits
from compsparse_kernels.cli.demo.report import Figure, Section, accuracy_row, size_row, time_row
from compsparse_kernels.cli.demo.training import (
    Effort,
    Stage,
    accuracy,
    median_ms,
    speedup,
    stored_bytes,
    time_steps,
    train,
    training_step,
)

HIDDEN = 1024
DENSITIES = (0.4, 0.2, 0.1, 0.05)  # after each round
LEARNING_RATE = 1e-3
TIMED_BATCH = 256
MIB = 2**20

TITLE = "Unknown graph: a pruned MLP that trains sparse"
TEXT = (
    f"A dense network {PIXELS}-{HIDDEN}-{HIDDEN}-{CLASSES} is trained; then, in {len(DENSITIES)} rounds, the weights of"
    " smallest magnitude in the whole network are removed and the rest is trained on (iterative magnitude pruning),"
    f" until {DENSITIES[-1]:.0%} of the weights are left.",
    "After each round <code>prune.convert</code> puts <code>MaskedLinear</code> layers in place of the dense ones: the"
    " product and both gradients touch surviving weights only, and weights, gradients and Adam's state exist only for"
    " them. The peer <code>W*M</code> is torch's own <code>torch.nn.utils.prune</code>, with the same masks and the"
    " same start: it multiplies a dense weight by a 0/1 mask, so it keeps, computes and updates everything.",
)


@dataclass
class Trained:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    accuracy: float


def run(digits: Digits, seed: int, effort: Effort, stage: Stage) -> Section:
    torch.manual_seed(seed)
    stage.begin("(a) dense MLP", effort.dense_epochs)
    dense = _fit(_mlp(), digits, effort.dense_epochs, seed, stage)
    model, rounds = copy.deepcopy(dense.model), [{"density": 1.0, "accuracy": dense.accuracy}]
    for number, density in enumerate(DENSITIES, start=1):
        stage.begin(f"(a) pruned to {density:.0%}", effort.round_epochs)
        model = prune.convert(model, prune.magnitude_masks(model, 1 - density, scope="global", include_last=True))
        cut = accuracy(model, digits)
        start = copy.deepcopy(model)
        pruned = _fit(model, digits, effort.round_epochs, seed + number, stage)
        rounds.append({"density": _density(model), "accuracy_after_cut": cut, "accuracy": pruned.accuracy})
    stage.begin("(a) the same with W*M", effort.round_epochs)
    simulated = _fit(_simulate(start), digits, effort.round_epochs, seed + len(DENSITIES), stage)
    nets = {"dense": dense, "W*M": simulated, "MaskedLinear": pruned}
    stage.begin("(a) timing", 1)
    picture = _mask_figure(pruned.model[0])  # before the timed steps, which go on training
    seconds = _time(nets, digits, effort.timing_rounds)
    memory = {name: stored_bytes(net.model, net.optimizer) for name, net in nets.items()}
    stage.tick()
    return _section(nets, rounds, seconds, memory, picture)


def _mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )


def _fit(model, digits, epochs, seed, stage) -> Trained:
    optimizer = train(model, digits, epochs, lr=LEARNING_RATE, seed=seed, tick=stage.tick)
    return Trained(model, optimizer, accuracy(model, digits))


def _simulate(sparse: nn.Module) -> nn.Module:
    """The dense twin of a pruned model: same weights, same masks, applied as ``W * M`` in every forward."""
    layers = {name: layer for name, layer in sparse.named_modules() if isinstance(layer, MaskedLinear)}
    twin = prune.to_dense(copy.deepcopy(sparse))
    for name, layer in layers.items():
        torch_prune.custom_from_mask(twin.get_submodule(name), "weight", layer.layout.to_mask())
    return twin


def _density(model: nn.Module) -> float:
    layouts = [layer.layout for layer in model.modules() if isinstance(layer, MaskedLinear)]
    return sum(layout.nnz for layout in layouts) / sum(layout.out_features * layout.in_features for layout in layouts)


def _time(nets: dict[str, Trained], digits: Digits, rounds: int) -> dict[str, list[float]]:
    x, y = digits.train_x[:TIMED_BATCH].contiguous(), digits.train_y[:TIMED_BATCH]
    return time_steps(
        {name: partial(training_step, net.model, net.optimizer, x, y) for name, net in nets.items()}, rounds
    )


def _section(nets, rounds, seconds, memory, picture) -> Section:
    total = {name: sum(parts.values()) for name, parts in memory.items()}
    ours, peers = "MaskedLinear", ("W*M", "dense")
    section = Section("a", TITLE, TEXT)
    section.rows += [
        accuracy_row(
            f"test accuracy at {rounds[-1]['density']:.0%} density", nets[ours].accuracy, name, nets[name].accuracy
        )
        for name in peers
    ]
    section.rows += [
        size_row("weights + gradients + Adam + indices", total[ours] / MIB, name, total[name] / MIB, "MiB")
        for name in peers
    ]
    section.rows += [
        time_row(f"training step, batch {TIMED_BATCH}", seconds[ours], name, seconds[name]) for name in peers
    ]
    section.figures += [
        Figure(
            "First layer after the last round. Left: how many of the surviving weights look at each pixel; the borders,"
            " where digits have no ink, are pruned away without being told so. Right: the surviving weights of nine"
            " hidden units (blue negative, red positive, white pruned).",
            picture,
        ),
        Figure("Test accuracy and density over the rounds of pruning.", _round_figure(rounds)),
        Figure("One training step and the memory it keeps: smaller is better.", _cost_figure(seconds, total)),
    ]
    section.numbers = {
        "rounds": rounds,
        "accuracy": {name: net.accuracy for name, net in nets.items()},
        "step_ms": {name: median_ms(times) for name, times in seconds.items()},
        "step_speedup": {name: speedup(seconds[ours], seconds[name]) for name in peers},
        "bytes": memory,
        "layer_density": [layer.layout.density for layer in nets[ours].model if isinstance(layer, MaskedLinear)],
    }
    return section


def _mask_figure(layer: MaskedLinear) -> bytes:
    mask = layer.layout.to_mask()
    weight = layer.to_linear().weight.detach()
    figure = figures.canvas(3.6)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    axes = left.subplots()
    shown = axes.imshow(figures.image(mask.sum(0)), cmap="magma")
    figures.bare(axes, f"surviving weights per pixel (of {mask.shape[0]})", 10)
    left.colorbar(shown, shrink=0.9).ax.tick_params(labelsize=8)
    busiest = mask.sum(1).argsort(descending=True)[:9]
    for axes, unit in zip(right.subplots(3, 3).flat, busiest.tolist(), strict=True):
        limit = weight[unit].abs().max()
        axes.imshow(figures.image(weight[unit]), cmap="RdBu_r", vmin=-limit, vmax=limit)
        figures.bare(axes, f"unit {unit}: {int(mask[unit].sum())} inputs", 7)
    return figures.to_png(figure)


def _round_figure(rounds: list[dict]) -> bytes:
    figure = figures.canvas(2.8)
    axes = figure.subplots()
    places = range(len(rounds))
    axes.plot(places, [100 * r["accuracy"] for r in rounds], "o-", color=figures.OURS, label="after retraining")
    cut = [100 * r["accuracy_after_cut"] for r in rounds[1:]]
    axes.plot(places[1:], cut, "o--", color=figures.PEER, label="just after the cut")
    axes.set_xticks(places, ["dense"] + [f"{r['density']:.0%} of weights" for r in rounds[1:]])
    axes.set_ylabel("test accuracy, %", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    axes.grid(axis="y", alpha=0.3)
    figures.light_frame(axes)
    return figures.to_png(figure)


def _cost_figure(seconds, total) -> bytes:
    figure = figures.canvas(1.9)
    left, right = figure.subplots(1, 2)
    names = list(seconds)
    colors = [figures.OURS if name == "MaskedLinear" else figures.PEER for name in names]
    figures.bars(left, names, [median_ms(seconds[name]) for name in names], colors, "training step", "ms")
    figures.bars(
        right, names, [total[name] / MIB for name in names], colors, "weights, gradients, Adam, indices", "MiB"
    )
    return figures.to_png(figure)
