"""Part (c): a small transformer over image patches, whose queries attend only to the patches that matter."""

import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from compsparse_kernels import ThresholdAttention
from compsparse_kernels.cli.demo import figures
from compsparse_kernels.cli.demo.data import CLASSES, SIDE, Digits
from compsparse_kernels.cli.demo.report import Figure, Row, Section, accuracy_row, time_row
from compsparse_kernels.cli.demo.training import Effort, Stage, accuracy, median_ms, speedup, time_steps, train

PATCH = 4  # pixels per side
GRID = SIDE // PATCH
TOKENS = GRID * GRID + 1  # the first is the class token
WIDTH, HEADS, DEPTH = 64, 4, 2
THRESHOLD = 0.1
EXACT = 1e-30  # a relative threshold that drops nothing that float32 can see: the dense softmax
LEARNING_RATE = 2e-3
BATCH = 64
SHIFT = 1
TIMED_BATCH = 128

TITLE = "Unknown graph in a transformer: thresholded attention"
TEXT = (
    f"A transformer over {GRID} x {GRID} patches of {PATCH} x {PATCH} pixels and a class token ({TOKENS} tokens, width"
    f" {WIDTH}, {HEADS} heads, {DEPTH} layers) is trained from scratch with <code>ThresholdAttention</code>: query i"
    f" attends to key j only where p<sub>ij</sub> &ge; {THRESHOLD:g} max<sub>j</sub> p<sub>ij</sub>, and the softmax"
    f" runs over these keys. Training images are moved by up to {SHIFT} pixel at random.",
    "Peers: the same trained weights with the full softmax, to see what was lost by dropping keys; and the same network"
    " trained alike with <code>nn.MultiheadAttention</code>. Finding the keys has a cost of its own, which pays"
    f" where sequences are long and few keys survive; {TOKENS} tokens are few.",
)


class Block(nn.Module):
    """Pre-norm transformer block; the attention has the interface of ``nn.MultiheadAttention``."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), attention
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [n, tokens, width]
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(x)


class PatchTransformer(nn.Module):
    """``attention(width, heads, batch_first=True)`` makes the attention of each layer."""

    def __init__(self, attention: Callable[..., nn.Module]):
        super().__init__()
        self.embedding = nn.Linear(PATCH * PATCH, WIDTH)
        self.class_token = nn.Parameter(0.1 * torch.randn(WIDTH))
        self.place = nn.Parameter(0.1 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block(attention(WIDTH, HEADS, batch_first=True)) for _ in range(DEPTH))
        self.readout = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[n, 784]`` -> ``[n, tokens, width]``."""
        patches = pixels.view(-1, GRID, PATCH, GRID, PATCH).transpose(2, 3).reshape(-1, GRID * GRID, PATCH * PATCH)
        patches = self.embedding(patches)
        return torch.cat([self.class_token.expand(len(patches), 1, -1), patches], 1) + self.place

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(pixels)
        for block in self.blocks:
            x = block(x)
        return self.readout(x[:, 0])

    @torch.no_grad()
    def attention_inputs(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """What the attention of each layer is given, ``[n, tokens, width]`` each."""
        x, inputs = self.tokens(pixels), []
        for block in self.blocks:
            inputs.append(block.norm(x))
            x = block(x)
        return inputs


def run(digits: Digits, seed: int, effort: Effort, stage: Stage) -> Section:
    model = _fit(
        partial(ThresholdAttention, threshold=THRESHOLD), digits, effort, seed, stage, "(c) ThresholdAttention"
    )
    peer = _fit(nn.MultiheadAttention, digits, effort, seed, stage, "(c) nn.MultiheadAttention")
    stage.begin("(c) test and timing", 1)
    full = copy.deepcopy(model)
    for block in full.blocks:
        block.attention.threshold = EXACT
    accuracies = {
        "ThresholdAttention": accuracy(model, digits),
        "full softmax": accuracy(full, digits),
        "nn.MultiheadAttention": accuracy(peer, digits),
    }
    kept = kept_per_layer(model, digits.test_x)
    seconds = _time(model, digits.test_x[:TIMED_BATCH], effort.timing_rounds)
    stage.tick()
    return _section(model, digits, accuracies, kept, seconds)


def kept_per_layer(model: PatchTransformer, pixels: torch.Tensor) -> list[float]:
    """Share of all pairs of a query and a key that each layer keeps."""
    densities = []
    for chunk in pixels.split(250):
        inputs = model.attention_inputs(chunk)
        pairs = zip(model.blocks, inputs, strict=True)
        densities.append([len(chunk) * block.attention.support(x).density for block, x in pairs])
    return [sum(layer) / len(pixels) for layer in zip(*densities, strict=True)]


def _fit(attention, digits, effort, seed, stage, title) -> PatchTransformer:
    stage.begin(title, effort.attention_epochs)
    torch.manual_seed(seed)
    model = PatchTransformer(attention)
    options = {"lr": LEARNING_RATE, "seed": seed, "tick": stage.tick, "batch": BATCH, "shift": SHIFT}
    train(model, digits, effort.attention_epochs, **options)
    return model.eval()


def _time(model: PatchTransformer, pixels: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Forward and backward of the last attention layer on what it really gets."""
    ours = model.blocks[-1].attention
    layers = {"ThresholdAttention": ours, "SDPA": ours.to_multihead_attention().train()}
    x = model.attention_inputs(pixels)[-1].requires_grad_()

    def step(attention):
        attention(x, x, x, need_weights=False)[0].sum().backward()

    seconds = time_steps({name: partial(step, layer) for name, layer in layers.items()}, rounds)
    model.zero_grad()
    return seconds


def _section(model, digits, accuracies, kept, seconds) -> Section:
    ours = "ThresholdAttention"
    section = Section("c", TITLE, TEXT)
    section.rows += [
        accuracy_row("test accuracy", accuracies[ours], "same weights, full softmax", accuracies["full softmax"]),
        accuracy_row("test accuracy", accuracies[ours], "nn.MultiheadAttention", accuracies["nn.MultiheadAttention"]),
    ]
    section.rows += [
        Row(f"keys kept, layer {layer}", f"{share:.1%}", "full softmax 100%", f"{1 / share:.1f}x fewer", False)
        for layer, share in enumerate(kept, start=1)
    ]
    name = f"attention step, {TOKENS} tokens, batch {TIMED_BATCH}"
    section.rows.append(time_row(name, seconds[ours], "SDPA", seconds["SDPA"]))
    section.figures += [
        Figure(
            "Token support over six test digits. Which patches the class token keeps, by layer (brighter: more weight,"
            " mean over heads; dark: dropped by every head), and for one query patch (outlined) the patches it keeps in"
            " the first layer.",
            _support_figure(model, _examples(digits)),
        ),
        Figure(
            f"How many keys a query keeps, over all queries and heads of {TIMED_BATCH} test digits.",
            _degree_figure(model, digits.test_x[:TIMED_BATCH]),
        ),
    ]
    section.numbers = {
        "threshold": THRESHOLD,
        "accuracy": accuracies,
        "kept_per_layer": kept,
        "attention_step_ms": {key: median_ms(times) for key, times in seconds.items()},
        "attention_step_speedup": speedup(seconds[ours], seconds["SDPA"]),
    }
    return section


def _examples(digits: Digits) -> torch.Tensor:
    """The first test digit of six classes, ``[6, 784]``."""
    return torch.stack([digits.test_x[digits.test_y == label][0] for label in (0, 2, 3, 4, 7, 8)])


def _support_figure(model: PatchTransformer, pixels: torch.Tensor) -> bytes:
    supports = [
        block.attention.support(x).to_dense().mean(1)  # [n, tokens, tokens]
        for block, x in zip(model.blocks, model.attention_inputs(pixels), strict=True)
    ]
    query = (GRID // 2) * GRID + GRID // 2  # the patch in the middle
    lines = [(f"class token,\nlayer {layer}", weights[:, 0, 1:]) for layer, weights in enumerate(supports, start=1)]
    lines.append(("middle patch,\nlayer 1", supports[0][:, 1 + query, 1:]))
    figure = figures.canvas(6.4)
    grid = figure.subplots(1 + len(lines), len(pixels))
    for axes, digit in zip(grid[0], pixels, strict=True):
        axes.imshow(figures.image(digit), cmap="gray_r")
        figures.bare(axes)
    grid[0, 0].set_ylabel("digit", fontsize=9)
    for line, (title, weights) in zip(grid[1:], lines, strict=True):
        line[0].set_ylabel(title, fontsize=9)
        for axes, digit, weight in zip(line, pixels, weights, strict=True):
            _overlay(axes, digit, weight)
            if title.startswith("middle"):
                corner = (query % GRID * PATCH - 0.5, query // GRID * PATCH - 0.5)
                axes.add_patch(figures.outline(corner, PATCH))
    return figures.to_png(figure)


def _overlay(axes, digit: torch.Tensor, weight: torch.Tensor) -> None:
    """The digit in grey under a heat map of ``weight [patches]``."""
    spread = weight.view(GRID, GRID).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1).numpy()
    axes.imshow(spread**0.5, cmap="inferno", vmin=0)
    axes.contour(figures.image(digit), levels=[0.5], colors="white", linewidths=0.8)
    kept = int((weight > 0).sum())
    figures.bare(axes, f"{kept} of {GRID * GRID} patches", 7)


def _degree_figure(model: PatchTransformer, pixels: torch.Tensor) -> bytes:
    figure = figures.canvas(2.2)
    grid = figure.subplots(1, DEPTH, sharey=True)
    for layer, (axes, block, x) in enumerate(
        zip(grid, model.blocks, model.attention_inputs(pixels), strict=True), start=1
    ):
        degrees = block.attention.support(x).degree.flatten().tolist()
        axes.hist(degrees, bins=range(1, TOKENS + 2), density=True, color=figures.OURS)
        axes.set_title(f"layer {layer}: median {statistics.median(degrees):.0f} of {TOKENS} keys", fontsize=10)
        axes.set_xlabel("keys kept by a query", fontsize=9)
        figures.light_frame(axes)
    grid[0].set_ylabel("share of queries", fontsize=9)
    return figures.to_png(figure)
