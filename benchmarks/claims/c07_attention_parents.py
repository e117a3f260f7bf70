"""C7: attention finds the sparse parents: the keys above the threshold are those that the target depends on.

Beside the criteria: the same with four times the tokens, an open case, and a character model trained with softmax, a
fixed and learned thresholds (characters.py).
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.claims import characters
from benchmarks.claims.attention import SoftmaxAttention
from benchmarks.claims.characters import ARMS, FIXED, LEARNED, TextSize
from benchmarks.claims.common import Claim, Criterion, SeedResult
from compsparse_kernels import ThresholdAttention


@dataclass(frozen=True)
class Size:
    tokens: int = 16
    many_tokens: int = 64  # the open case
    dim: int = 32
    heads: int = 2
    hidden: int = 64
    steps: int = 3000
    batch: int = 128
    learning_rate: float = 2e-3
    test: int = 4000
    threshold: float = 0.1
    text: TextSize = field(default_factory=TextSize)


QUICK = Size(tokens=4, many_tokens=6, dim=8, hidden=8, steps=5, batch=8, test=20, text=characters.QUICK)

SWEEP = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 0.9)


class Retrieval(nn.Module):
    """A query that names two keys, attention over the tokens, and an MLP that reads what it found."""

    def __init__(self, tokens: int, size: Size):
        super().__init__()
        self.named = nn.Embedding(tokens, size.dim // 2)  # in the query, in two places
        self.key = nn.Embedding(tokens, size.dim)
        self.value = nn.Linear(1, size.dim)
        self.attention = SoftmaxAttention(size.dim, size.heads, batch_first=True)
        widths = (size.dim, size.hidden, size.hidden, 1)
        layers = [nn.Linear(*pair) for pair in pairwise(widths)]
        self.read = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])

    def inputs(self, values: torch.Tensor, parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query ``[n, 1, dim]`` and tokens ``[n, T, dim]``."""
        return self.named(parents).flatten(1).unsqueeze(1), self.key.weight + self.value(values.unsqueeze(2))

    def forward(self, values: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        query, tokens = self.inputs(values, parents)
        return self.read(self.attention(query, tokens, tokens, need_weights=False)[0]).view(-1)


def problem(count: int, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values ``[n, T]``, two different parents ``[n, 2]``, and y = sin(2 v_i) + v_i v_j."""
    values = torch.randn(count, tokens, generator=generator)
    parents = torch.rand(count, tokens, generator=generator).topk(2).indices
    first, second = values.gather(1, parents).unbind(1)
    return values, parents, torch.sin(2 * first) + first * second


def run(seed: int, size: Size, tick) -> SeedResult:
    found = {}
    for tokens in (size.tokens, size.many_tokens):
        found[tokens] = _find(tokens, seed, size)
        tick()
    few, many = found[size.tokens], found[size.many_tokens]
    text = characters.library_text(size.text.text)
    arms = {}
    for arm in ARMS:
        arms[arm] = characters.run_arm(arm, text, seed, size.text)
        tick()
    at, open_case = few["at_threshold"], f"T={size.many_tokens} (open)"
    measures = {
        "recall": at["recall"],
        "precision": at["precision"],
        "kept / T": at["kept"] / size.tokens,
        "R2 lost at the threshold": few["r2"] - at["r2"],
        "R2, softmax": few["r2"],
        "kept": at["kept"],
        **{f"{open_case}: {name}": many["at_threshold"][name] for name in ("recall", "precision", "kept")},
        f"{open_case}: R2, softmax": many["r2"],
        **{f"characters, {arm}: loss": result["loss"] for arm, result in arms.items()},
        **{f"characters, {arm}: share kept": statistics.mean(arms[arm]["share_kept"]) for arm in (FIXED, LEARNED)},
        **{f"characters, {arm}: mass kept": statistics.mean(arms[arm]["mass_kept"]) for arm in (FIXED, LEARNED)},
        **{f"characters, {arm}: tokens / s": result["tokens_per_second"] for arm, result in arms.items()},
    }
    details = {"sweep": {str(tokens): result["sweep"] for tokens, result in found.items()}, "characters": arms}
    return SeedResult(measures, details=details)


def _find(tokens: int, seed: int, size: Size) -> dict:
    """Trains with softmax over all keys, then looks at what passes thresholds."""
    torch.manual_seed(seed)
    model = Retrieval(tokens, size)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=size.learning_rate)
    for _ in range(size.steps):
        values, parents, y = problem(size.batch, tokens, generator)
        optimizer.zero_grad()
        F.mse_loss(model(values, parents), y).backward()
        optimizer.step()
    test = problem(size.test, tokens, torch.Generator().manual_seed(1000 + seed))
    with torch.no_grad():
        r2 = _r2(model(*test[:2]), test[2])
        sweep = {threshold: _at(model, threshold, test) for threshold in sorted({*SWEEP, size.threshold})}
    return {"r2": r2, "at_threshold": sweep[size.threshold], "sweep": sweep}


def _at(model: Retrieval, threshold: float, test) -> dict:
    """The trained model with keys dropped. A key counts as kept if any head keeps it."""
    values, parents, y = test
    dense = model.attention
    model.attention = ThresholdAttention(dense.embed_dim, dense.num_heads, batch_first=True, threshold=threshold)
    model.attention.load_state_dict(dense.state_dict())
    query, tokens = model.inputs(values, parents)
    kept = model.attention.support(query, tokens).to_mask().any(1).squeeze(1)  # [n, T]
    r2 = _r2(model(values, parents), y)
    model.attention = dense
    right = kept.gather(1, parents).sum().item()
    total = kept.sum().item()
    return {"recall": right / parents.numel(), "precision": right / total, "kept": total / len(y), "r2": r2}


def _r2(prediction: torch.Tensor, y: torch.Tensor) -> float:
    return 1 - ((prediction - y).square().mean() / y.var()).item()


def draw(figure, results: Sequence[SeedResult]) -> None:
    left, middle, right = figure.subplots(1, 3)
    for tokens, style in zip(results[0].details["sweep"], "-:", strict=True):
        sweeps = [result.details["sweep"][tokens] for result in results]
        for number, name in enumerate(("recall", "precision")):
            medians = [statistics.median(sweep[threshold][name] for sweep in sweeps) for threshold in sweeps[0]]
            look = {"color": f"C{number}", "linestyle": style, "marker": "o", "markersize": 3}
            left.plot(list(sweeps[0]), medians, **look, label=f"{name}, T={tokens}")
    left.set_xscale("log")
    left.set_ylim(0, 1.05)
    left.set_xlabel("relative threshold", fontsize=8)
    left.set_title("parents among the keys kept, by threshold", fontsize=9)
    for number, arm in enumerate(ARMS):
        curves = [result.details["characters"][arm]["training"] for result in results]
        medians = [statistics.median(step) for step in zip(*curves, strict=True)]
        smooth = [statistics.mean(medians[max(0, step - 9) : step + 1]) for step in range(len(medians))]
        middle.plot(range(1, 1 + len(smooth)), smooth, color=f"C{number}", label=arm)
    middle.set_title("characters: training loss, nats (mean of 10 steps)", fontsize=9)
    middle.set_xlabel("step", fontsize=8)
    for number, arm in enumerate((FIXED, LEARNED), 1):
        layers = zip(*(result.details["characters"][arm]["share_kept"] for result in results), strict=True)
        heights = [statistics.median(layer) for layer in layers]
        places = [layer + 0.4 * (number - 1.5) for layer in range(len(heights))]
        right.bar(places, heights, 0.36, color=f"C{number}", label=arm)
        right.set_xticks(range(len(heights)), [f"layer {layer + 1}" for layer in range(len(heights))])
    right.set_ylim(0, 1.25)  # room for the legend
    right.set_title("characters: share of the past kept", fontsize=9)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)


CLAIM = Claim(
    key="C7",
    stem="c07_attention_parents",
    title="attention finds the sparse parents",
    source="Poggio, compositional sparsity, section 5.2",
    text=(
        "T key-value tokens; the query names two keys, i and j, and y = sin(2 v_i) + v_i v_j of standard normal values."
        " One attention (two heads) and an MLP are trained with softmax over all keys; then keys below the relative"
        " threshold are dropped. Recall and precision of the parents among the keys that any head keeps, and the R2"
        " lost. With T=64 it is an open case. Beside it, without criterion, a character model on Python's own library,"
        " trained with softmax, with a fixed and with learned thresholds (shrink), begun alike."
    ),
    criteria=(
        Criterion("recall", ">=", 0.95),
        Criterion("precision", ">=", 0.95),
        Criterion("kept / T", "<=", 0.2),
        Criterion("R2 lost at the threshold", "<=", 0.005),
    ),
    size=Size(),
    quick=QUICK,
    parts=lambda size: 2 + len(ARMS),
    run=run,
    draw=draw,
)
