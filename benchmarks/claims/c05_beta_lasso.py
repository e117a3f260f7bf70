"""C5: an l1 pressure with a threshold finds sparse, local supports while it trains; weight decay zeroes nothing.

Two things are measured beside the criteria, because they limit the claim: the largest weights of weight decay, cut
afterwards to the same number, are local too; and at three times the learning rate the supports of l1 hardly are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.claims.common import Claim, Criterion, SeedResult
from benchmarks.claims.ring import GAIN, LENGTHS, ring_data, ring_net
from benchmarks.claims.training import accuracy, batches, loss_step
from compsparse_kernels import prune, theory


@dataclass(frozen=True)
class Size:
    ring: int = 48
    hidden: int = 96
    train: int = 4000
    test: int = 4000
    steps: int = 3000
    batch: int = 128
    learning_rate: float = 0.1
    strength: float = 3e-3
    weight_decay: float = 1e-3


QUICK = Size(ring=12, hidden=16, train=200, test=100, steps=30, batch=32)

SGD, DECAY, LASSO, BETA, FAST = "SGD", "l2", "l1, β=0", "l1, β=1", "l1, β=1, 3x rate"


def run(seed: int, size: Size, tick) -> SeedResult:
    data = ring_data(size.ring, size.train, size.test, seed)
    distance = theory.ring_distance(size.ring)
    models = {name: _train(name, data, seed, size, tick) for name in (SGD, DECAY, LASSO, BETA, FAST)}
    masks = {name: model[0].weight.detach() != 0 for name, model in models.items()}
    # What weight decay has made largest, as many as β=1 has left.
    cut = _largest(models[DECAY][0].weight.detach(), int(masks[BETA].sum()))
    lift = {name: theory.adjacency_lift(mask, distance).tolist() for name, mask in {**masks, "l2, cut": cut}.items()}
    found = {name: accuracy(model, data.test_x, data.test_y) for name, model in models.items()}
    compact = _compacted_difference(models[BETA], data.test_x)
    measures = {
        "density, l1, β=1": _density(masks[BETA]),
        "lift(1), l1, β=1": lift[BETA][1],
        "accuracy lost against SGD, points": 100 * (found[SGD] - found[BETA]),
        "density, SGD": _density(masks[SGD]),
        "density, l1, β=0": _density(masks[LASSO]),
        "compacted against dense, relative": compact,
        "density, l2": _density(masks[DECAY]),
        "lift(1), l2 cut to the same density": lift["l2, cut"][1],
        f"density, {FAST}": _density(masks[FAST]),
        f"lift(1), {FAST}": lift[FAST][1],
        **{f"accuracy, {name}": value for name, value in found.items()},
    }
    magnitudes = {name: model[0].weight.detach().abs().flatten().sort().values for name, model in models.items()}
    return SeedResult(measures, details={"lift": lift}, pictures={"mask": masks[BETA], "magnitudes": magnitudes})


def _train(name: str, data, seed: int, size: Size, tick):
    """Pressure is on the first layer alone; biases and the read-out follow the gradient."""
    model = ring_net(size.ring, size.hidden, seed)
    rate = size.learning_rate * (3 if name == FAST else 1)
    weight = model[0].weight
    others = [parameter for parameter in model.parameters() if parameter is not weight]
    if name in (SGD, DECAY):
        decay = size.weight_decay if name == DECAY else 0.0
        optimizer = torch.optim.SGD([{"params": [weight], "weight_decay": decay}, {"params": others}], lr=rate)
    else:
        groups = [{"params": [weight]}, {"params": others, "strength": 0.0}]
        beta = 0.0 if name == LASSO else 1.0
        optimizer = prune.BetaLasso(groups, lr=rate, strength=size.strength, beta=beta)
    for rows in batches(size.train, size.steps, size.batch, seed):
        loss_step(model, data.train_x[rows], data.train_y[rows], optimizer)
    tick()
    return model


def _largest(weight: torch.Tensor, count: int) -> torch.Tensor:
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().topk(count).indices] = True
    return mask.view_as(weight)


def _density(mask: torch.Tensor) -> float:
    return mask.sum().item() / mask.numel()


@torch.no_grad()
def _compacted_difference(model, x) -> float:
    """Largest difference between the net and the one that stores only its survivors, over the largest output."""
    dense = model(x)
    compact = prune.freeze(model, kind="csr")(x)  # auto may store so small a layer dense
    return ((compact - dense).abs().max() / dense.abs().max()).item()


def draw(figure, results: Sequence[SeedResult]) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    first = results[0]
    for name, sizes in first.pictures["magnitudes"].items():
        share = torch.linspace(1, 0, len(sizes))
        left.plot(sizes, share, label=name)
    left.set_xscale("symlog", linthresh=1e-4)  # zeros are seen
    left.set_title("share of weights of at least this magnitude (seed 0)", fontsize=9)
    for name, lift in first.details["lift"].items():
        middle.plot(range(1, len(lift[1:13]) + 1), lift[1:13], "o-", markersize=4, label=name)
    middle.axhline(1, color="black", linewidth=0.8)
    middle.set_title("pairs kept by one unit, over chance (seed 0)", fontsize=9)
    middle.set_xlabel("distance on the ring", fontsize=8)
    for axes in (left, middle):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    prune.draw_supports(first.pictures["mask"], (1, first.pictures["mask"].shape[1]), ax=right)


CLAIM = Claim(
    key="C5",
    stem="c05_beta_lasso",
    title="l1 with a threshold finds sparse, local supports; weight decay keeps everything",
    source="Neyshabur 2020 (arXiv 2007.13657), beta-LASSO",
    text=(
        f"The task of C3 (ring, erf-saturated Gaussian processes, gain {GAIN:g}, correlation lengths {LENGTHS[0]:g} and"
        f" {LENGTHS[1]:g}). The first layer is trained by w -= lr (g + λ sign w), then w *= (|w| >= βλ); peers are SGD,"
        " SGD with weight decay, and β=0. The support is what is not 0."
    ),
    criteria=(
        Criterion("density, l1, β=1", "<=", 0.20),
        Criterion("lift(1), l1, β=1", ">=", 2),
        Criterion("accuracy lost against SGD, points", "<=", 1.5),
        Criterion("density, SGD", ">=", 0.95),
        Criterion("density, l1, β=0", ">=", 0.95),
        Criterion("compacted against dense, relative", "<=", 1e-5),
    ),
    size=Size(),
    quick=QUICK,
    parts=lambda size: 5,
    run=run,
    draw=draw,
)
