"""What pruning has won so far, layer by layer: milliseconds and bytes, measured against dense layers."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from compsparse_kernels.layouts.checks import check_positive_int, require
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.ops import cpu_isa
from compsparse_kernels.prune.layers import masked_layers
from compsparse_kernels.prune.memory import storage_bytes, tensors_in

if TYPE_CHECKING:
    from rich.table import Table

COPIES = 4  # of each parameter, in training: itself, its gradient, and Adam's two moments
LEAST_ROUNDS = 5
LEAST_SAMPLE = 2e-3  # seconds; a shorter sample would show the clock and the scheduler
MIB = 2**20
WIDTH_OF_FILES = 140


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of ours and of dense, medians over rounds in which both ran in turn, and the quartiles of the
    rounds' ratios dense / ours."""

    ours_ms: float
    dense_ms: float
    ratios: tuple[float, float, float]

    @classmethod
    def of(cls, ours: list[float], dense: list[float]) -> "Timing":
        """From seconds, round by round."""
        ratios = [b / a for a, b in zip(ours, dense, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(1e3 * statistics.median(ours), 1e3 * statistics.median(dense), (low, median, high))

    @property
    def verdict(self) -> str:
        """No gain is told that more than a quarter of the rounds deny."""
        low, median, high = self.ratios
        if low > 1:
            return f"{median:.2f}x faster"
        return f"{1 / median:.2f}x slower" if high < 1 else "no difference"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """A layer against the dense ``nn.Linear`` of its shape; ``forward`` without gradients, ``training`` forward and
    backward. Bytes are those that training with Adam keeps: parameters, gradients, two moments, index tensors."""

    name: str
    out_features: int
    in_features: int
    kind: str
    density: float
    forward: Timing
    training: Timing
    bytes: int
    dense_bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`report` found. ``settings`` says what the numbers depend on."""

    layers: list[LayerReport]
    settings: dict[str, object]

    def table(self) -> "Table":
        """For ``rich.print``."""
        from rich.table import Table

        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        table = Table(title="MaskedLinear / dense", caption=settings, header_style="bold")
        for name in (
            "layer",
            "in -> out",
            "kind",
            "density",
            "ms, forward",
            "",
            "ms, with backward",
            "",
            "MiB, training",
        ):
            table.add_column(name)
        for layer in self.layers:
            table.add_row(
                layer.name or "(model)",
                f"{layer.in_features} -> {layer.out_features}",
                layer.kind,
                f"{layer.density:.3f}",
                *_cells(layer.forward),
                *_cells(layer.training),
                f"{layer.bytes / MIB:.2f} / {layer.dense_bytes / MIB:.2f}",
            )
        return table


def report(model: nn.Module, batch: int = 256, *, rounds: int = 15, show: bool = True) -> Report:
    """Time and memory of each :class:`MaskedLinear` layer against the dense layer it stands for, measured here and now.

    Both sides run in turn on the same random input, in ``rounds`` rounds. A layer is called faster, or slower, only if
    three quarters of the rounds agree; below break-even it is called slower. The model, its gradients and torch's
    random numbers are left as they are.

    Args:
        model: any module with :class:`MaskedLinear` layers. Computing is done in the dtype and on the device of each.
        batch: rows of the input.
        rounds: at least 5.
        show: print the table (rich).

    Returns:
        A :class:`Report` with a :class:`LayerReport` per layer.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> model = prune.convert(model, prune.magnitude_masks(model, sparsity=0.95), kind="csr")
        >>> (layer,) = prune.report(model, batch=32, show=False).layers
        >>> layer.name, layer.kind, layer.bytes < layer.dense_bytes, layer.forward.ours_ms > 0
        ('0', 'csr', True, True)
    """
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    check_positive_int("batch", batch)
    check_positive_int("rounds", rounds)
    require(rounds >= LEAST_ROUNDS, "rounds", f"at least {LEAST_ROUNDS}", rounds)
    layers = masked_layers(model)
    require(bool(layers), "model", "one with MaskedLinear layers (prune.convert makes them)", "one without")
    found = Report([_measured(name, layer, batch, rounds) for name, layer in layers.items()], _settings(layers, batch))
    if show:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, WIDTH_OF_FILES)
        console.print(found.table())
    return found


def training_bytes(layer: nn.Module) -> int:
    """Bytes that training a linear layer with Adam keeps between steps."""
    return COPIES * storage_bytes(layer.parameters(), set()) + storage_bytes(
        tensors_in(getattr(layer, "layout", None)), set()
    )


def _measured(name, layer, batch, rounds) -> LayerReport:
    dense = layer.to_linear()
    options = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32}
    x, gradient = (
        torch.randn(batch, size, **options).to(layer.values) for size in (layer.in_features, layer.out_features)
    )
    with torch.no_grad():
        forward = _timed(*((lambda each=each: each.forward(x)) for each in (layer, dense)), x.device, rounds)
    training = _timed(*(_training_step(each, x, gradient) for each in (layer, dense)), x.device, rounds)
    return LayerReport(
        *(name, layer.out_features, layer.in_features, layer.layout.kind, layer.layout.density),
        *(forward, training, training_bytes(layer), training_bytes(dense)),
    )


def _training_step(layer, x, gradient) -> Callable[[], object]:
    """Gradients are returned, not left in the model; ``forward`` runs no hooks."""
    x = x.detach().requires_grad_()
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(layer.forward(x), wanted, gradient)


def _timed(ours, dense, device, rounds) -> Timing:
    sides = [(call, _repeats(call, device)) for call in (ours, dense)]
    seconds = [[_seconds(call, repeats, device) for call, repeats in sides] for _ in range(rounds)]
    return Timing.of(*map(list, zip(*seconds, strict=True)))


def _repeats(call, device) -> int:
    """How many calls make a sample; finding out is the warm-up."""
    repeats = 1
    while _seconds(call, repeats, device) * repeats < LEAST_SAMPLE:
        repeats *= 2
    return repeats


def _seconds(call, repeats, device) -> float:
    """Of one call, on average."""
    _finish(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    _finish(device)
    return (time.perf_counter() - started) / repeats


def _finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _settings(layers: dict[str, MaskedLinear], batch) -> dict[str, object]:
    dtypes = {str(layer.values.dtype).removeprefix("torch.") for layer in layers.values()}
    devices = {str(layer.values.device) for layer in layers.values()}
    return {
        "batch": batch,
        "dtype": "/".join(sorted(dtypes)),
        "device": "/".join(sorted(devices)),
        "instruction set": cpu_isa() or "none",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cells(timing: Timing) -> tuple[str, str]:
    color = "green" if "faster" in timing.verdict else "red" if "slower" in timing.verdict else "dim"
    return f"{timing.ours_ms:.3f} / {timing.dense_ms:.3f}", f"[{color}]{timing.verdict}[/]"
