"""Measures what ``kind="auto"`` goes by: a training step with each way to store a mask, on this machine."""

import time

import torch

from compsparse_kernels.layouts import MaskLayout
from compsparse_kernels.layouts.costs import WAYS, CostModel, Line
from compsparse_kernels.ops.masked_linear.api import masked_linear

BATCH = 256
FEATURES = 768
DENSITIES = (1 / 16, 1 / 4)
SAMPLES = 7


def calibrate() -> CostModel:
    """About a second. On one thread, whose processor time other programs hardly change; the best of a few samples."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            steps = {"step": _step_line(1.0), "step with zeros": _step_line(0.5)}
            return CostModel({**{way: _line(way) for way in WAYS}, **steps})
    finally:
        torch.set_num_threads(threads)


def _line(way: str) -> Line:
    """Through two densities; dense has one."""
    if way == "dense":
        return Line(0.0, _microseconds(way, 1.0)[1] / FEATURES**2)
    (stored, low), (more, high) = (_microseconds(way, density) for density in DENSITIES)
    per_element = max(high - low, 0.0) / (more - stored)
    return Line(max(low - per_element * stored, 0.0) / (2 * FEATURES), per_element)


def _step_line(survivors: float) -> Line:
    """Of Adam's step on a weight of which this share is trained, and the others are and stay 0."""
    generator = torch.Generator().manual_seed(0)
    trained = torch.rand(FEATURES, FEATURES, generator=generator) < survivors
    weight = torch.nn.Parameter(torch.randn(FEATURES, FEATURES, generator=generator) * trained)
    weight.grad = torch.randn(FEATURES, FEATURES, generator=generator) * trained
    optimizer = torch.optim.Adam([weight])
    optimizer.step()
    return Line(0.0, 1e6 * min(_seconds(optimizer.step) for _ in range(SAMPLES)) / weight.numel())


def _microseconds(way: str, density: float) -> tuple[int, float]:
    """Elements stored, and the time of forward and backward."""
    generator = torch.Generator().manual_seed(0)  # the same patterns at every calibration
    layout = _layout(way, density, generator)
    x, grad = (torch.randn(BATCH, FEATURES, generator=generator) for _ in range(2))
    inputs = x.requires_grad_(), torch.randn(layout.values_shape, generator=generator).requires_grad_()
    if way == "dense":  # a layer without a mask: what auto is to be no slower than
        step = lambda: torch.autograd.grad(x @ inputs[1].T, inputs, grad)  # noqa: E731
    else:
        step = lambda: torch.autograd.grad(masked_linear(*inputs, layout), inputs, grad)  # noqa: E731
    step()
    return inputs[1].numel(), 1e6 * min(_seconds(step) for _ in range(SAMPLES))


def _layout(way: str, density: float, generator: torch.Generator) -> MaskLayout:
    if way == "nm":
        m = round(1 / density)
        place = torch.randint(m, (FEATURES, FEATURES // m, 1), generator=generator)
        mask = (place == torch.arange(m)).flatten(1)
        return MaskLayout.from_mask(mask, "nm", nm=(1, m))
    size = int(way.removeprefix("block ")) if way.startswith("block") else 1
    blocks = torch.rand(FEATURES // size, FEATURES // size, generator=generator) < density
    mask = blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)
    mask &= torch.rand(mask.shape, generator=generator) < 0.99  # partly filled: the dearer sort of blocks
    kind = way.split()[0]
    return MaskLayout.from_mask(mask, kind, (size, size) if kind == "block" else None)


def _seconds(step) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started
