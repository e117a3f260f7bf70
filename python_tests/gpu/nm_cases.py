"""The kernels of N:M products, as the ladder compiles and runs them: dtype, pattern, configuration and target."""

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import triton

from compsparse_kernels.layouts.nm import NMLayout
from compsparse_kernels.ops.masked_linear import triton as kernels
from compsparse_kernels.ops.triton_launch import MOST_REGISTERS, Launch
from compsparse_kernels.testing import random_tensor
from python_tests.gpu.aot import TARGETS, Compiled, compile_launch, float32_precision
from python_tests.gpu.cases import DTYPES, FEATURES, LARGE_BATCH, SMALL_BATCH, Work, shared_memory_of
from python_tests.gpu.static.gates import INDEX_LOADS
from python_tests.nm import nm_mask

OPS = {"product": "nm_linear", "transposed": "nm_linear_transposed", "sampled": "nm_sampled"}
PATTERNS = ((2, 4), (4, 8))
DEFAULT = (("product", "bf16", (2, 4)), ("transposed", "fp16", (2, 4)), ("sampled", "bf16", (4, 8)))


@dataclass(frozen=True)
class NMCase:
    """A product with a square weight of whole groups and tiles."""

    kernel: str
    dtype: str
    pattern: tuple[int, int]
    num_warps: int
    num_stages: int
    target: str
    index_loads = INDEX_LOADS
    inner_loop = True
    least_occupancy = 0.0
    least_useful = 0.75  # a step reads a few bytes of a row's positions, of a sector of 32

    @property
    def op(self) -> str:
        return OPS[self.kernel]

    @property
    def name(self) -> str:
        n, m = self.pattern
        return f"nm-{self.kernel}-{self.dtype}-{n}:{m}-w{self.num_warps}s{self.num_stages}-{self.target}"

    @property
    def config(self) -> triton.Config:
        return triton.Config({}, num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=MOST_REGISTERS)

    @property
    def tensor_cores(self) -> bool:
        return self.dtype != "fp32"

    @property
    def async_copies(self) -> bool:
        """Less than 4 bytes a lane are not copied asynchronously: where a step has so few positions they pass through
        registers. wgmma and tcgen05 take tf32 operands along the summed dimension only, across which those of a sampled
        product lie."""
        if self.kernel == "sampled":
            return not (self.dtype == "tf32" and self.target in ("sm_90", "sm_100"))
        given = self.launch().arguments
        positions = given["TILE_OUT"] * given["GROUPS"] * given["N"] * given["BITS"] // 8  # bytes of a step
        return positions >= 4 * 32 * self.num_warps

    def launch(self) -> Launch:
        """On a large batch. The numbers in its tensors are whatever lies in memory: it is to be compiled only."""
        return _large_launch(self.kernel, self.dtype, self.pattern)

    def compiled(self) -> Compiled:
        return compile_launch(self.launch(), self.config, self.target)

    def small_launch(self) -> Launch:
        """The same kernel with the same constants on a small batch of random numbers, to be executed."""
        large, small = self.launch(), _launch(self.kernel, self.dtype, self.pattern, SMALL_BATCH, random_tensor)
        constants = {name: value for name, value in large.arguments.items() if name.isupper()}
        by_batch = self.kernel != "sampled"  # one program for each tile of the batch
        programs = large.programs * SMALL_BATCH // LARGE_BATCH if by_batch else small.programs
        return small._replace(arguments=small.arguments | constants, programs=programs)

    def least_work(self, launch: Launch) -> Work:
        """The products of a dense weight, which is what tensor cores do; the bytes of a packed one."""
        given = launch.arguments
        batch, out_features, in_features = given["batch"], given["out_features"], given["in_features"]
        size = given["values"].element_size()
        weight = given["values"].nbytes + given["positions"].nbytes
        rows = triton.cdiv(out_features, given["TILE_OUT"])
        columns = triton.cdiv(in_features, given["GROUPS"] * given["M"])
        x, y = batch * in_features * size, batch * out_features * size
        if self.kernel == "sampled":
            tile_bytes = rows * x + columns * y + weight
        else:
            tiles = batch // given["TILE_BATCH"]
            tile_bytes = tiles * weight + (columns * y + x if given["TRANSPOSED"] else rows * x + y)
        return Work(flops=2 * batch * out_features * in_features, bytes=x + y + weight, tile_bytes=tile_bytes)


def shipped(long: bool = False) -> list[NMCase]:
    """Every pattern, dtype and configuration that a target's autotuner would try; or a few, first choices only."""
    if not long:
        return [_cases(*kernel, target)[0] for kernel in DEFAULT for target in TARGETS]
    every = product(OPS, DTYPES, PATTERNS, TARGETS)
    return [case for one in every for case in _cases(*one)]


def launch_of(kernel: str, dtype: str, layout: NMLayout, batch: int, tensor, with_bias: bool = False) -> Launch:
    def draw(*shape):
        return tensor(*shape, dtype=DTYPES[dtype])

    x, y, values = draw(batch, layout.in_features), draw(batch, layout.out_features), draw(*layout.values_shape)
    with float32_precision("ieee" if dtype == "fp32" else "tf32"):
        if kernel == "sampled":
            return kernels.sampled_launch(y, x, layout.positions, layout.m, values)
        given, result = (y, x) if kernel == "transposed" else (x, y)
        bias = draw(result.shape[1]) if with_bias else None
        return kernels.product_launch(given, values, bias, layout.positions, layout.m, kernel == "transposed", result)


@cache
def layout_of(pattern: tuple[int, int], features: tuple[int, int]) -> NMLayout:
    return NMLayout.from_mask(nm_mask(*features, *pattern), *pattern)


def _launch(kernel: str, dtype: str, pattern: tuple[int, int], batch: int, tensor) -> Launch:
    return launch_of(kernel, dtype, layout_of(pattern, (FEATURES, FEATURES)), batch, tensor)


@cache
def _large_launch(kernel: str, dtype: str, pattern: tuple[int, int]) -> Launch:
    return _launch(kernel, dtype, pattern, LARGE_BATCH, torch.empty)


def _cases(kernel: str, dtype: str, pattern: tuple[int, int], target: str) -> list[NMCase]:
    launch = _large_launch(kernel, dtype, pattern)
    configs = kernels.suitable(launch.kernel.configs, launch.arguments, shared_memory_of(target))
    return [NMCase(kernel, dtype, pattern, one.num_warps, one.num_stages, target) for one in configs]
