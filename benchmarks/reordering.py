"""``python -m benchmarks.reordering``: do rows and columns in another order make blocks of what IMP keeps?

IMP prunes 784-1024-1024-10 on real digits. Then the rows and columns of its masks are sorted: by how many survivors
they have, or by the second singular vectors of the degree-normalised mask (Dhillon 2001, spectral co-clustering), which
bring together what is connected. A permutation is free, since it can be folded into indices; so it pays if the blocks
that it makes take less time, by the costs measured on this machine, than the faster of csr and dense.
"""

import argparse
import sys

import torch
from rich.progress import Progress
from rich.table import Table
from torch import nn

from benchmarks.claims.training import batches, loss_step
from benchmarks.system import describe_run
from compsparse_kernels import MaskedLinear, prune
from compsparse_kernels.cli.demo.data import CLASSES, PIXELS, Digits, load_digits
from compsparse_kernels.cli.output import add_json_option, console_for, write_json
from compsparse_kernels.layouts.choice import choose_kind, count, elements_of_blocks
from compsparse_kernels.layouts.costs import BLOCK_SIZES, CostModel, this_machine

HIDDEN, BATCH, STEPS, REWIND, ROUNDS, FRACTION = 1024, 128, 160, 32, 10, 0.3
LAYERS = ("0", "2")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reordering", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of IMP (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of a round (%(default)s)")
    parser.add_argument("--digits", type=int, default=500, help="digits of each class (%(default)s)")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    console, costs = console_for(arguments.json), this_machine()
    with Progress(console=console) as progress:
        task = progress.add_task("pruning", total=arguments.rounds + 1)
        digits = load_digits(arguments.digits)
        masks = imp_masks(digits, arguments.rounds, arguments.steps, lambda: progress.advance(task))
    rows = [
        row
        for number, found in enumerate(masks, start=1)
        for layer, mask in found.items()
        for row in describe(number, layer, mask, costs)
    ]
    result = {"machine": describe_run(), "costs": costs.lines, "rows": rows}
    write_json(result, arguments.json)
    console.print(_table(rows))
    return 0


def imp_masks(digits: Digits, rounds: int, steps: int, tick) -> list[dict[str, torch.Tensor]]:
    """The masks of the two hidden layers after each round of pruning."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )
    rows = batches(len(digits.train_x), steps, BATCH, 0)
    masks: list[dict[str, torch.Tensor]] = []

    def step(model, optimizer, k):
        loss_step(model, digits.train_x[rows[k]], digits.train_y[rows[k]], optimizer)

    def evaluate(model):
        layers = {name: model.get_submodule(name) for name in LAYERS}
        if all(isinstance(layer, MaskedLinear) for layer in layers.values()):
            masks.append({name: layer.layout.to_mask() for name, layer in layers.items()})
        tick()
        return 0.0

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    plan = {"steps": steps, "rounds": rounds, "fraction": FRACTION, "rewind_step": min(REWIND, steps - 1)}
    prune.IMP(model, optimizer, step, **plan, evaluate=evaluate).run()
    return masks


def orders(mask: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Permutations of rows and columns, by name."""
    weights = mask.double()
    degrees = weights.sum(1), weights.sum(0)
    scaled = weights / degrees[0].clamp(min=1).sqrt()[:, None] / degrees[1].clamp(min=1).sqrt()
    left, _, right = torch.linalg.svd(scaled, full_matrices=False)
    second = min(1, len(right) - 1)
    return {
        "as found": tuple(torch.arange(size) for size in mask.shape),
        "by degree": tuple(degree.argsort(descending=True, stable=True) for degree in degrees),
        "spectral": (left[:, second].argsort(stable=True), right[second].argsort(stable=True)),
    }


def describe(number: int, layer: str, mask: torch.Tensor, costs: CostModel) -> list[dict]:
    """For each order: how full its blocks are, and the time of the best of them against auto's, unsorted."""
    features, survivors = sum(mask.shape), count(mask)
    csr = costs.microseconds("csr", features, survivors)
    dense = costs.microseconds("dense", features, mask.numel())
    choice = choose_kind(mask, None, costs)
    rows = []
    for name, (by_row, by_column) in orders(mask).items():
        stored = {
            size: elements_of_blocks(mask[by_row][:, by_column].contiguous(), (size, size)) for size in BLOCK_SIZES
        }
        best = min(costs.microseconds(f"block {size}", features, elements) for size, elements in stored.items())
        rows.append(
            {
                "round": number,
                "layer": layer,
                "density": survivors / mask.numel(),
                "order": name,
                "fill": {size: survivors / elements for size, elements in stored.items()},
                "unsorted": choice.kind,
                "gain": min(csr, dense) / best,
            }
        )
    return rows


def _table(rows: list[dict]) -> Table:
    table = Table(
        title="what IMP keeps, in other orders (gain: time of the best of csr and dense / of the best blocks)"
    )
    for heading in (
        "round",
        "layer",
        "density",
        "auto, unsorted",
        "order",
        *(f"fill {s}" for s in BLOCK_SIZES),
        "gain",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        fill = (f"{row['fill'][size]:.3f}" for size in BLOCK_SIZES)
        name, gain = row["order"], f"{row['gain']:.2f}x"
        table.add_row(str(row["round"]), row["layer"], f"{row['density']:.3f}", row["unsorted"], name, *fill, gain)
    return table


if __name__ == "__main__":
    sys.exit(main())
