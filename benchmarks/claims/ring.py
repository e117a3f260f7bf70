"""Data of C3 and C5: two classes of random patterns on a ring, which differ in how far neighbours agree.

Source: Ingrosso and Goldt, "Data-driven emergence of convolutional structure in neural networks" (PNAS 2022); Redman,
Wang, Ingrosso, Goldt, "On How Iterative Magnitude Pruning Discovers Local Receptive Fields in Fully Connected Neural
Networks" (2024) prune nets trained on it.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from compsparse_kernels import theory

LENGTHS = (1.0, 3.0)  # correlation length of each class
GAIN = 3.0


@dataclass(frozen=True)
class RingData:
    """Patterns ``[n, ring]`` float32 and classes ``[n]``."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


def covariance(ring: int, length: float) -> torch.Tensor:
    r""":math:`C_{ij} = e^{-(D_{ij} / \xi)^2}`, float64 ``[ring, ring]``."""
    return torch.exp(-((theory.ring_distance(ring).double() / length) ** 2))


def saturated(correlation: torch.Tensor, gain: float) -> torch.Tensor:
    r"""The correlation of :math:`\mathrm{erf}(g z / \sqrt 2)` where that of z (unit variance) is given:
    :math:`\arcsin(g^2 c / (1 + g^2)) / \arcsin(g^2 / (1 + g^2))`."""
    share = gain**2 / (1 + gain**2)
    return torch.asin(share * correlation) / math.asin(share)


def patterns(
    count: int, ring: int, length: float, gaussian: bool, generator: torch.Generator, gain: float = GAIN
) -> torch.Tensor:
    r"""``[count, ring]`` float64 of unit variance: :math:`x = \mathrm{erf}(g z / \sqrt 2) / Z(g)`, z Gaussian of the
    covariance above and :math:`Z(g)^2 = (2 / \pi) \arcsin(g^2 / (1 + g^2))`; or a Gaussian x of the same covariance."""
    correlation = covariance(ring, length)
    if gaussian:
        correlation = saturated(correlation, gain)
    values, vectors = torch.linalg.eigh(correlation)
    root = vectors * values.clamp_min(0).sqrt()  # rounding makes eigenvalues near 0 negative
    z = torch.randn(count, ring, generator=generator, dtype=torch.float64) @ root.T
    if gaussian:
        return z
    scale = math.sqrt(2 / math.pi * math.asin(gain**2 / (1 + gain**2)))
    return torch.erf(gain * z / math.sqrt(2)) / scale


def ring_data(ring: int, train: int, test: int, seed: int, gaussian: bool = False, shuffle: bool = False) -> RingData:
    """Both classes equally often; ``shuffle`` gives training patterns the label of another at random."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count in (train, test):
        y = torch.arange(count) % len(LENGTHS)
        x = torch.stack([patterns(count, ring, length, gaussian, generator) for length in LENGTHS])
        parts += [x[y, torch.arange(count)].float(), y]
    if shuffle:
        parts[1] = parts[1][torch.randperm(train, generator=generator)]
    return RingData(*parts)


def ring_net(ring: int, hidden: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(ring, hidden), nn.ReLU(), nn.Linear(hidden, len(LENGTHS)))
