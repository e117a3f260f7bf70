"""C3: iterative magnitude pruning uncovers locality that nobody told the network of."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.claims.common import Claim, Criterion, SeedResult
from benchmarks.claims.ring import GAIN, LENGTHS, ring_data, ring_net
from benchmarks.claims.training import accuracy, batches, loss_step
from compsparse_kernels import MaskedLinear, prune, theory


@dataclass(frozen=True)
class Size:
    ring: int = 48
    hidden: int = 96
    train: int = 4000
    test: int = 4000
    steps: int = 1000
    rewind_step: int = 50
    batch: int = 128
    learning_rate: float = 3e-3
    rounds: int = 9
    fraction: float = 0.3


QUICK = Size(ring=12, hidden=16, train=200, test=100, steps=20, rewind_step=5, batch=32, rounds=2)

# One-shot pruning removes at once what the rounds remove one after the other. The Gaussian control has the covariance
# of the data and nothing beyond.
ARMS = {
    "IMP": {},
    "one-shot": {"one_shot": True},
    "shuffled labels": {"shuffle": True},
    "Gaussian control": {"gaussian": True},
}


def run(seed: int, size: Size, tick) -> SeedResult:
    arms = {name: _prune(seed, size, tick, **options) for name, options in ARMS.items()}
    lift = {name: arm["lift"][1] for name, arm in arms.items()}
    found = arms["IMP"]
    measures = {
        "density of the first layer": found["density"][-1],
        "lift(1)": lift["IMP"],
        "lift(1) / one-shot": _ratio(lift["IMP"], lift["one-shot"]),
        "lift(1) / shuffled labels": _ratio(lift["IMP"], lift["shuffled labels"]),
        "accuracy lost, points": 100 * (found["accuracy"][0] - found["accuracy"][-1]),
        "accuracy, dense": found["accuracy"][0],
        "accuracy, IMP": found["accuracy"][-1],
        "accuracy, one-shot": arms["one-shot"]["accuracy"][-1],
        **{f"lift(1), {name}": value for name, value in lift.items() if name != "IMP"},
        "accuracy, Gaussian control": arms["Gaussian control"]["accuracy"][-1],
    }
    masks = {name: arm.pop("mask") for name, arm in arms.items()}
    return SeedResult(measures, details=arms, pictures=masks)


def _prune(seed: int, size: Size, tick, one_shot=False, shuffle=False, gaussian=False) -> dict:
    """Density, accuracy, lift(1) by round (round 0 is dense); lift(d) and mask of the first layer at the end."""
    data = ring_data(size.ring, size.train, size.test, seed, gaussian, shuffle)
    model = ring_net(size.ring, size.hidden, seed)
    rows = batches(size.train, size.steps, size.batch, seed)
    distance = theory.ring_distance(size.ring)
    masks = []

    def step(model, optimizer, k):
        loss_step(model, data.train_x[rows[k]], data.train_y[rows[k]], optimizer)

    def evaluate(model):
        masks.append(_mask(model[0]))
        tick()
        return accuracy(model, data.test_x, data.test_y)

    rounds, fraction = size.rounds, size.fraction
    if one_shot:
        rounds, fraction = 1, 1 - (1 - fraction) ** rounds
    optimizer = torch.optim.Adam(model.parameters(), lr=size.learning_rate)
    plan = {"steps": size.steps, "rounds": rounds, "fraction": fraction, "rewind_step": size.rewind_step}
    history = prune.IMP(model, optimizer, step, **plan, evaluate=evaluate).run()
    lifts = [theory.adjacency_lift(mask, distance).tolist() for mask in masks]
    return {
        "density": [done.layer_density["0"] for done in history],
        "accuracy": [done.evaluation for done in history],
        "lift_1": [lift[1] for lift in lifts],
        "lift": lifts[-1],
        "mask": masks[-1],
    }


def _mask(layer) -> torch.Tensor:
    if isinstance(layer, MaskedLinear):
        return layer.layout.to_mask()
    return torch.ones_like(layer.weight, dtype=torch.bool)


def _ratio(ours: float, other: float) -> float:
    return ours / other if other else math.inf


def draw(figure, results: Sequence[SeedResult]) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for number, name in enumerate(ARMS):
        style = {"color": f"C{number}", "marker": "o", "markersize": 4, "label": name}
        lifts = [result.details[name]["lift"][1:13] for result in results]
        medians = [statistics.median(column) for column in zip(*lifts, strict=True)]
        left.plot(range(1, 1 + len(medians)), medians, **style)
        if name != "one-shot":
            arms = [result.details[name] for result in results]
            curve = [statistics.median(column) for column in zip(*(arm["lift_1"] for arm in arms), strict=True)]
            middle.plot(arms[0]["density"], curve, **style)
    for axes in (left, middle):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    left.set_title("pairs kept by one unit, over chance", fontsize=9)
    left.set_xlabel("distance on the ring", fontsize=8)
    middle.set_title("lift(1) over the rounds", fontsize=9)
    middle.set_xlabel("density of the first layer", fontsize=8)
    middle.set_xscale("log")
    middle.invert_xaxis()
    mask = results[0].pictures["IMP"]
    prune.draw_supports(mask, (1, mask.shape[1]), ax=right)


CLAIM = Claim(
    key="C3",
    stem="c03_imp_locality",
    title="IMP uncovers locality",
    source="Pellegrini and Biroli 2021 (arXiv 2104.13343); data of Ingrosso and Goldt 2022",
    text=(
        f"Two classes of patterns on a ring, erf-saturated Gaussian processes (gain {GAIN:g}) of correlation lengths"
        f" {LENGTHS[0]:g} and {LENGTHS[1]:g}; a fully connected net with one hidden layer of ReLU, Adam. IMP with"
        " rewinding prunes the first layer; lift(d) is how much likelier than chance two inputs at distance d are kept"
        " by one hidden unit (theory.adjacency_lift). Controls: the same density in one shot, shuffled labels, and"
        " Gaussian data of the same covariance."
    ),
    criteria=(
        Criterion("density of the first layer", "<=", 0.06),
        Criterion("lift(1)", ">=", 4),
        Criterion("lift(1) / one-shot", ">=", 2),
        Criterion("lift(1) / shuffled labels", ">=", 2.5),
        Criterion("accuracy lost, points", "<=", 1),
    ),
    size=Size(),
    quick=QUICK,
    parts=lambda size: 3 * (size.rounds + 1) + 2,
    run=run,
    draw=draw,
)
