"""What a training step costs with each way to store a mask, measured once per machine: ``kind="auto"`` goes by it.

A layer takes ``per_feature * (in + out) + per_element * stored`` microseconds: forward and backward, float32, one
thread, batch 256. Only the order of such times matters, and that hardly depends on batch or threads.

An optimizer's step is paid for each stored element, too, and more than once for zeros among them where their square
roots leave the fast path of a library.
"""

import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from compsparse_kernels._processor import processor_model
from compsparse_kernels._version import __version__
from compsparse_kernels.layouts.checks import describe, require

SWITCH = "COMPSPARSE_CALIBRATE"
BLOCK_SIZES = (32, 16, 8)  # of which there are lines; larger ones first, which are as fast and need fewer indices


class Line(NamedTuple):
    """Microseconds per feature (of input and output) and per stored element."""

    per_feature: float
    per_element: float


@dataclass(frozen=True)
class CostModel:
    """A :class:`Line` per way to store a mask: ``dense``, ``csr``, ``nm``, ``block 32``, ``block 16``, ``block 8``; and
    of Adam's step, where its state has no zeros (``step``) and where it has some (``step with zeros``).

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> from compsparse_kernels.layouts.costs import SHIPPED_COSTS
        >>> SHIPPED_COSTS.microseconds("csr", 1024 + 1024, 50_000) < SHIPPED_COSTS.microseconds("dense", 2048, 2**20)
        True
    """

    lines: Mapping[str, Line]

    def __post_init__(self):
        wanted = "dict of way: (per_feature, per_element)"
        require(isinstance(self.lines, Mapping), "lines", wanted, describe(self.lines), TypeError)
        names = WAYS + STEPS
        require(set(names) <= self.lines.keys(), "lines", ", ".join(names), ", ".join(map(str, self.lines)))
        object.__setattr__(self, "lines", {name: _line(name, self.lines[name]) for name in names})

    def microseconds(self, way: str, features: int, stored: int) -> float:
        """Of a layer whose inputs and outputs are ``features`` in all, with ``stored`` elements in memory."""
        line = self.lines[way]
        return line.per_feature * features + line.per_element * stored

    def step_microseconds(self, stored: int, with_zeros: bool) -> float:
        """Of a step of the optimizer on ``stored`` elements, with zeros in its state or without."""
        return self.lines["step with zeros" if with_zeros else "step"].per_element * stored

    def save(self, path: Path) -> None:
        """As JSON, if nobody was faster: all processes of a machine go by the same file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(self.lines, file, indent=2)
        try:
            os.link(file.name, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(file.name)

    @classmethod
    def load(cls, path: Path) -> "CostModel":
        """What :meth:`save` wrote. ValueError where it is something else."""
        try:
            return cls(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a cost model ({error})") from error


STEPS = ("step", "step with zeros")
WAYS = ("dense", "csr", "nm", *(f"block {size}" for size in BLOCK_SIZES))


def _line(way: str, numbers) -> Line:
    ok = isinstance(numbers, Sequence) and len(numbers) == 2
    ok = ok and all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers)
    require(ok, f"lines[{way!r}]", "two finite numbers, not negative", numbers)
    return Line(*map(float, numbers))


# Of a Zen 4 with AVX-512, where dense takes 0.0176: rounded towards dense, which other processors favour.
SHIPPED_COSTS = CostModel(
    {
        "dense": Line(0.0, 0.014),
        "csr": Line(0.32, 0.033),
        "step": Line(0.0, 0.0025),
        "step with zeros": Line(0.0, 0.0025),
        "nm": Line(0.32, 0.033),
        "block 32": Line(0.28, 0.0147),
        "block 16": Line(0.29, 0.0147),
        "block 8": Line(0.44, 0.0152),
    }
)

_calibrate: Callable[[], CostModel] | None = None


def calibrate_with(function: Callable[[], CostModel]) -> None:
    """Registers what measures this machine: a room above this one, which has the kernels."""
    global _calibrate
    _calibrate = function


@cache
def this_machine() -> CostModel:
    """This machine's costs: from the user's cache folder, or measured now (a second or two) and written there.

    ``COMPSPARSE_CALIBRATE=0`` in the environment gives :data:`SHIPPED_COSTS` instead. A cache that cannot be read is
    measured and written anew; where none can be written, each process measures for itself.
    """
    if os.environ.get(SWITCH) == "0" or _calibrate is None:
        return SHIPPED_COSTS
    path = cache_path()
    try:
        return CostModel.load(path)
    except (OSError, ValueError):
        measured = _calibrate()
    try:
        path.unlink(missing_ok=True)  # it was not there, or of no use
        measured.save(path)
        return CostModel.load(path)
    except (OSError, ValueError):
        return measured


def cache_path() -> Path:
    """Where this machine's costs are kept; another version, processor or cap of the instruction set has its own."""
    import platformdirs

    facts = (__version__, processor_model(), platform.machine(), os.environ.get("COMPSPARSE_CPU"))
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("compsparse_kernels") / f"costs-{name}.json"
