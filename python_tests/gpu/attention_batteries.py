"""The problems that damaged kernels of thresholded attention are run on.

A damaged kernel takes the place of its own among the launches of an op. Those before it are not run again, and those
after it read what it left, so that it is judged as at L3: by the support, and by results near float64's.
"""

from dataclasses import dataclass, field, replace
from unittest import mock

import torch

from compsparse_kernels.ops.threshold_attention import triton as kernels
from compsparse_kernels.ops.triton_launch import Launch
from python_tests.gpu.aot import Compiled
from python_tests.gpu.attention_problems import WRITTEN, Case, check
from python_tests.gpu.battery import Battery
from python_tests.gpu.emulated import compiled_for, execute
from python_tests.gpu.ptx import Program

ROWS = 16  # of a tile of queries, that small problems have several
SEEN_BY = {"screen_kernel": ("decide_kernel", "attend_kernel"), "decide_kernel": ("attend_kernel",)}
# The screen rounds float64 only in ``under``, whose margin holds whichever way that goes.
IMMUNE = {"screen_kernel": ("cvt.rn.f32.f64",)}
EXACT_PRODUCT = "fma.rn.f64"
BACKWARD_KERNELS = ("rows_kernel", "keys_kernel")


@dataclass
class Replay:
    """A case, computed once; :meth:`run` computes it again from the launch of ``kernel`` on."""

    kernel: str
    case: Case
    target: str
    code: Compiled | None = None  # of ``kernel``; compiled for this case where None
    left: dict[str, list[torch.Tensor]] = field(default_factory=dict, init=False)  # by each kernel
    exact_products: int = field(default=0, init=False)  # in float64: of pairs near a cut

    def __post_init__(self):
        self._check(self._record)

    def run(self, program: Program, limit: int) -> None:
        """Raises PTXFault or AssertionError unless ``program``, in place of the kernel's, computes the reference."""
        self._check(lambda launch: self._repeat(launch, program, limit))

    def _check(self, run) -> None:
        def op(name, arguments):
            called = mock.patch.object(Launch, "__call__", lambda launch: run(launch))  # binds as a method does
            with called, mock.patch.object(kernels, "MOST_ROWS", ROWS):
                torch.use_deterministic_algorithms(True)  # fresh memory holds NaN: what nobody writes is seen
                try:
                    return getattr(kernels, name)(*arguments)
                finally:
                    torch.use_deterministic_algorithms(False)

        check(self.case, op, backward=self.kernel in BACKWARD_KERNELS)

    def _record(self, launch: Launch) -> None:
        name = launch.kernel.fn.__name__
        if name == self.kernel:
            self.code = (self.code or compiled_for(launch, kernels, self.target, most_warps=True)).serving(launch)
            self.exact_products = execute(self.code, WRITTEN[name]).get(EXACT_PRODUCT, 0)
        else:
            execute(compiled_for(launch, kernels, self.target), WRITTEN[name])
        self.left[name] = [launch.arguments[one].clone() for one in WRITTEN[name]]

    def _repeat(self, launch: Launch, program: Program, limit: int) -> None:
        name = launch.kernel.fn.__name__
        if name == self.kernel:
            counts = execute(self.code.serving(launch), WRITTEN[name], program=program, limit=limit)
            assert counts.get(EXACT_PRODUCT, 0) <= self.exact_products, "the bound decides less than it can"
            _assert_sizes(launch.arguments)
        elif name in SEEN_BY.get(self.kernel, ()):
            execute(compiled_for(launch, kernels, self.target), WRITTEN[name], limit=limit)
        else:
            for one, kept in zip(WRITTEN[name], self.left[name], strict=True):
                launch.arguments[one].copy_(kept)


def _assert_sizes(given: dict) -> None:
    """What memory is allocated by."""
    for name, most in (("tile_count", "most_tiles"), ("degree", "keys")):
        if name in given:
            assert given[name].min() >= 0 and given[name].max() <= given[most], name


# Ties at the cut, in integers; ends of the visible keys that cross a tile among the queries of one; numbers that are
# not finite; rows and keys with more survivors than are gathered at a time. Sizes end in all quarters of a tile.
SMALL = Case(width=16, value_width=16, batch=1, precision="bfloat16", padding=True)
OF_EQUALS = replace(SMALL, queries=19, integers=True, threshold=1.0, few_scores=True)
ALMOST_ALL = replace(SMALL, threshold=1e-6)
FORWARD = (
    OF_EQUALS,
    replace(ALMOST_ALL, queries=12, keys=37, batch=2, is_causal=True, query_offset=21),
    replace(ALMOST_ALL, queries=30, keys=130, window=(29, 7), query_offset=60),
    replace(ALMOST_ALL, queries=37, keys=43, spoiled=True),
    replace(SMALL, queries=9, keys=130),
    replace(SMALL, queries=5, keys=23, hidden=True),
)
BACKWARD = (
    OF_EQUALS,
    replace(ALMOST_ALL, queries=7, keys=101),
    replace(ALMOST_ALL, queries=43, keys=12, batch=2),
    replace(SMALL, queries=9, keys=23, hidden=True),
)


def attention_battery(kernel: str, target: str) -> Battery:
    """``kernel``: one of WRITTEN."""
    checks, code = [], None
    for case in BACKWARD if kernel in BACKWARD_KERNELS else FORWARD:
        checks.append(Replay(kernel, case, target, code))
        code = checks[0].code
    immune = IMMUNE.get(kernel, ())
    return Battery(f"attention {kernel} {target}", code.kernel.asm["ptx"], [one.run for one in checks], immune)
