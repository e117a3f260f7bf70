"""What is measured: entries, and the suites they are in. Each op's entries are in the module of its name."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

MODULES = (
    "block_sparse_linear",
    "masked_linear",
    "nm_linear",
    "dag_network",
    "threshold_attention",
    "proximal",
    "overhead",
)
GPU_MODULES = ("block_sparse_linear", "masked_linear")  # these have cuda_entries()
DEVICES = ("cpu", "cuda")
SUITES = ("quick", "foundation", "bars", "all")

Outputs = Sequence[torch.Tensor]


@dataclass
class Side:
    """One of the two that run in turn. ``check`` raises Mismatch where an output is not what it should be."""

    run: Callable[[], object]
    check: Callable[[object], None]
    seconds: Callable[[], float] | None = None  # one sample, of a thing that times itself


@dataclass
class Case:
    """Both sides on fresh random input."""

    ours: Side
    peer: Side | None
    density: float | None = None  # where only the input tells
    device: str = "cpu"  # one of DEVICES: it decides how time is taken


class Mismatch(Exception):
    """A side computed something else than it should: its time means nothing."""


@dataclass(frozen=True)
class Entry:
    """One row per number of threads: the time of ``ours`` beside the peer's on the same input.

    Args:
        op, variant, shape, density, direction, peer: what is measured; together they are the name.
        make: builds the case; called just before it is measured, so that one case is in memory at a time.
        suites: the suites it is in, each with its bar: the least ratio peer / ours, or None.
        limit_ms: the most milliseconds ours may take, for what has no peer to beat.
    """

    op: str
    variant: str
    shape: str
    density: float | None
    direction: str
    peer: str | None
    make: Callable[[], Case]
    suites: Mapping[str, float | None]
    limit_ms: float | None = None
    dtype: str = "float32"
    name: str = field(init=False)

    def __post_init__(self):
        density = None if self.density is None else f"d{self.density:g}"
        peer = None if self.peer is None else f"vs {self.peer}"
        parts = (self.op, self.direction, self.variant, self.shape, density, peer)
        object.__setattr__(self, "name", " / ".join(part for part in parts if part))

    def bar(self, suite: str) -> float | None:
        """The bar in this suite; suite ``all`` has those of ``bars``."""
        return self.suites.get("bars" if suite == "all" else suite)


def select(suite: str, modules: Sequence[str] | None = None, device: str = "cpu") -> list[Entry]:
    """The entries of a suite on a device, of all modules or of those named."""
    entries = []
    for name in modules or (MODULES if device == "cpu" else GPU_MODULES):
        module = importlib.import_module(f"benchmarks.{name}")
        if device == "cpu":
            entries += module.entries()
        elif name in GPU_MODULES:
            entries += module.cuda_entries()
    return [entry for entry in entries if suite == "all" or suite in entry.suites]
