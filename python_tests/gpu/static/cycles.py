"""A lower bound on the cycles of an iteration of the inner loop, from the machine code (NVIDIA).

The warps that a multiprocessor holds at once each do one iteration; that takes at least as long as

    stalls   what the scheduling bits make one warp wait between its instructions
    issue    one instruction a cycle from each of the 4 schedulers
    tensor   the products, at the data sheet's rate
    shared   the bytes that cross the 128 byte wide port of shared memory (operands that tensor cores of sm_90 and
             sm_100 read there by themselves are not counted: how often they do is not documented)

Memory latency, bank conflicts, barriers and everything outside the multiprocessor are left out, so no kernel is faster;
it ranks configurations and predicts no time.
"""

import math
import re
from dataclasses import dataclass

from python_tests.gpu.aot import TARGETS
from python_tests.gpu.static.analyse import Analysis
from python_tests.gpu.static.classify import access_bytes, kind
from python_tests.gpu.static.instruction import Instruction
from python_tests.gpu.static.occupancy import SCHEDULERS, WARP

SHARED_PORT = 128  # bytes a cycle of a multiprocessor (CUDA C++ Best Practices Guide, "Shared Memory and Memory Banks")
WARPGROUP = 4

# Multiply-adds a cycle of a multiprocessor, float16 and bfloat16 without sparsity. Data sheets: A100 312 TFLOP/s of 108
# multiprocessors at 1.41 GHz, H100 SXM 989 TFLOP/s of 132 at 1.83 GHz. tf32 has half the rate on both. sm_90 runs the
# warp products of sm_80 too, more slowly than its own; they are counted at the full rate, so that the bound stays one.
MULTIPLY_ADDS = {80: 1024, 90: 2048}

_WARP_PRODUCT = re.compile(r"HMMA\.(?P<shape>16816|1688|1684)\.")
_WARPGROUP_PRODUCT = re.compile(r"HGMMA\.(?P<rows>\d+)x(?P<columns>\d+)x(?P<depth>\d+)\.")
_WARP_SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}


@dataclass(frozen=True)
class CycleBound:
    """Cycles of one iteration of all warps that a multiprocessor holds."""

    warps: int
    stalls: float
    issue: float
    tensor: float
    shared: float

    @property
    def least(self) -> float:
        return max(self.stalls, self.issue, self.tensor, self.shared)

    @property
    def tensor_ceiling(self) -> float:
        """The share of the multiprocessor's tensor-core rate that this loop cannot exceed."""
        busy = self.warps / (SCHEDULERS * _warps_of_a_scheduler(self.warps))
        return busy * self.tensor / self.least

    @property
    def bound_by(self) -> str:
        return max(("tensor", "shared", "issue", "stalls"), key=lambda name: getattr(self, name))


def cycle_bound(analysis: Analysis) -> CycleBound | None:
    """None where nothing is known: AMD, no loop, or products whose shape is not in the instruction (sm_100)."""
    arch = TARGETS[analysis.target].arch
    if arch not in MULTIPLY_ADDS or analysis.inner_loop is None or analysis.occupancy.blocks == 0:
        return None
    warps = analysis.num_warps * analysis.occupancy.blocks
    in_turn = _warps_of_a_scheduler(warps)
    body = analysis.inner_loop.every_time
    rate = MULTIPLY_ADDS[arch] / SCHEDULERS
    return CycleBound(
        warps=warps,
        stalls=analysis.inner_stalls,
        issue=in_turn * len(body),
        tensor=in_turn * sum(multiply_adds(one) * _slowness(one) for one in body) / rate,
        shared=warps * sum(shared_bytes(one) for one in body) / SHARED_PORT,
    )


def multiply_adds(instruction: Instruction) -> int:
    """Of one warp; a warpgroup's product is shared by its 4 warps, each of which issues the instruction."""
    if found := _WARP_PRODUCT.match(instruction.mnemonic):
        return _WARP_SHAPES[found["shape"]]
    if found := _WARPGROUP_PRODUCT.match(instruction.mnemonic):
        return int(found["rows"]) * int(found["columns"]) * int(found["depth"]) // WARPGROUP
    return 0


def shared_bytes(instruction: Instruction) -> int:
    """That a warp moves into or out of shared memory by an instruction, if its lanes move different bytes."""
    if found := re.match(r"(LDSM|STSM)\.16\.MT?88(\.(?P<matrices>\d))?", instruction.mnemonic):
        return int(found["matrices"] or 1) * 8 * 16  # 8 rows of 16 bytes each
    width = access_bytes(instruction)
    work = kind(instruction, "cuda")
    if work == "async copy":
        return width * WARP if width > 4 else 0  # a narrow one fetches an index, for one lane of one warp
    return width * WARP if work in ("shared load", "shared store") else 0


def _warps_of_a_scheduler(warps: int) -> int:
    return math.ceil(warps / SCHEDULERS)


def _slowness(instruction: Instruction) -> int:
    return 2 if ".TF32" in instruction.mnemonic else 1
