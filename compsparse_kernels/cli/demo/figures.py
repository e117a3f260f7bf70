"""Figures as PNG bytes: matplotlib without a display, one style."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from compsparse_kernels.cli.demo.data import SIDE

OURS, PEER, SECOND_PEER = "#1f5fbf", "#9aa3b2", "#d08a2e"
WIDTH = 9.5  # inches


def canvas(height: float) -> Canvas:
    return Canvas(figsize=(WIDTH, height), layout="constrained")


def to_png(figure: Canvas) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def bare(axes, title: str = "", size: float = 9) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if title:
        axes.set_title(title, fontsize=size)


def image(pixels: torch.Tensor) -> np.ndarray:
    """A row of pixels ``[784]`` as an image ``[28, 28]``."""
    return pixels.detach().reshape(SIDE, SIDE).numpy()


def light_frame(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def bars(axes, names: Sequence[str], heights: Sequence[float], colors: Sequence[str], title: str, unit: str) -> None:
    """Horizontal bars with their values beside them; smaller is better."""
    drawn = axes.barh(range(len(names)), heights, color=colors, height=0.62)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.bar_label(drawn, [f" {height:.3g} {unit}" for height in heights], fontsize=9)
    axes.set_xlim(0, max(heights) * 1.25)
    axes.set_title(title, fontsize=10)
    light_frame(axes)


def outline(corner: tuple[float, float], side: float) -> Rectangle:
    return Rectangle(corner, side, side, fill=False, edgecolor="cyan", linewidth=1.4)
