"""Training steps that can be taken again, as rewinding does."""

import torch
from torch import nn
from torch.nn import functional as F


def batches(count: int, steps: int, batch: int, seed: int) -> torch.Tensor:
    """Rows of each step, ``[steps, batch]``: a step that is taken again sees the same."""
    return torch.randint(count, (steps, batch), generator=torch.Generator().manual_seed(seed))


def loss_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return (model(x).argmax(-1) == y).double().mean().item()
