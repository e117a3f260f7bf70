"""A small character model on the sources of Python's own library, read where they are installed: softmax attention,
a fixed threshold and learned ones, trained alike."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.claims.attention import SoftmaxAttention
from compsparse_kernels import TransformerBlock

SOFTMAX, FIXED, LEARNED = "softmax", "fixed", "learned"
ARMS = (SOFTMAX, FIXED, LEARNED)
CHARACTERS = 128  # ASCII; whatever else a source has becomes 0


@dataclass(frozen=True)
class TextSize:
    text: int = 1_000_000  # characters
    context: int = 64
    dim: int = 64
    heads: int = 4
    layers: int = 2
    batch: int = 16
    steps: int = 500
    learning_rate: float = 3e-3
    threshold: float = 0.05
    evaluated: int = 64  # windows of the held-out text


QUICK = TextSize(text=20_000, context=16, dim=16, heads=2, batch=4, steps=4, evaluated=4)


def library_text(characters: int) -> torch.Tensor:
    """int64 ``[n]``: the sources of the standard library's modules in the order of their names, up to so many
    characters."""
    parts, length = [], 0
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        if length >= characters:
            break
        parts.append(path.read_bytes())
        length += len(parts[-1])
    text = torch.frombuffer(bytearray(b"".join(parts)[:characters]), dtype=torch.uint8).long()
    return text.where(text < CHARACTERS, 0)


class CharacterModel(nn.Module):
    """``[B, T]`` characters to ``[B, T, 128]`` scores of the next one."""

    def __init__(self, size: TextSize, arm: str):
        super().__init__()
        options = {"shrink": True, "learn_threshold": True} if arm == LEARNED else {}
        self.embedding = nn.Embedding(CHARACTERS, size.dim)
        self.place = nn.Parameter(0.02 * torch.randn(size.context, size.dim))
        options["threshold"] = size.threshold
        blocks = [TransformerBlock(size.dim, size.heads, **options) for _ in range(size.layers)]
        if arm == SOFTMAX:
            for block in blocks:
                with torch.random.fork_rng(devices=()):  # so that what comes after begins as in the other arms
                    dense = SoftmaxAttention(size.dim, size.heads, batch_first=True)
                dense.load_state_dict(block.attention.state_dict())
                block.attention = dense
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.readout = nn.LayerNorm(size.dim), nn.Linear(size.dim, CHARACTERS)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        x = self.embedding(characters) + self.place[: characters.shape[1]]
        for block in self.blocks:
            x = block(x, is_causal=True)
        return self.readout(self.norm(x))


def run_arm(arm: str, text: torch.Tensor, seed: int, size: TextSize) -> dict:
    """Held-out loss (nats a character), share and mass kept (of each layer), tokens per second of training, the losses
    while training, learned thresholds. The last tenth of the text is held out."""
    torch.manual_seed(seed)
    model = CharacterModel(size, arm)
    cut = len(text) * 9 // 10
    train, held_out = text[:cut], text[cut:]
    optimizer = torch.optim.Adam(model.parameters(), lr=size.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    losses, began = [], time.perf_counter()
    for _ in range(size.steps):
        loss = _loss(model, _windows(train, size.batch, size.context, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - began
    model.eval()
    windows = _windows(held_out, size.evaluated, size.context, torch.Generator().manual_seed(0))  # the same for all
    with torch.no_grad():
        loss = _loss(model, windows).item()
    stats = [block.attention.stats() for block in model.blocks] if arm != SOFTMAX else []
    return {
        "loss": loss,
        "share_kept": [each.share_kept for each in stats],
        "mass_kept": [each.mass_kept for each in stats],
        "thresholds": [block.attention.threshold.tolist() for block in model.blocks] if arm == LEARNED else [],
        "tokens_per_second": size.steps * size.batch * size.context / seconds,
        "training": losses,
    }


def _windows(text, count, context, generator):
    """``[count, context + 1]``"""
    starts = torch.randint(len(text) - context, (count, 1), generator=generator)
    return text[starts + torch.arange(context + 1)]


def _loss(model, windows):
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
