"""The kernels that ship, as the ladder compiles and runs them: direction, dtype, block, configuration and target."""

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
import triton

from compsparse_kernels import BlockLayout
from compsparse_kernels.ops.block_sparse_linear import triton as kernels
from compsparse_kernels.ops.triton_launch import MOST_REGISTERS
from compsparse_kernels.testing import random_mask, random_tensor
from python_tests.gpu.aot import TARGETS, Compiled, compile_launch, float32_precision
from python_tests.gpu.static.gates import INDEX_LOADS
from python_tests.gpu.static.occupancy import LDS, LIMITS

FEATURES = 512
LARGE_BATCH = 16384  # the launcher fills a GPU and chooses its tiles as for real work
SMALL_BATCH = 256  # what an emulator can run
DENSITY = 0.5

OPS = {
    "forward": "block_sparse_linear",
    "backward": "block_sparse_linear",  # of the input: the transposed order and storage
    "sampled": "sampled_block_matmul",  # the gradient of the values
}
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
SQUARE_BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128))
RECTANGULAR_BLOCKS = ((16, 64), (64, 32), (32, 128), (128, 16))
DEFAULT = (
    ("forward", "bf16", (64, 64)),
    ("forward", "bf16", (128, 128)),
    ("forward", "tf32", (64, 64)),
    ("backward", "fp16", (64, 32)),
    ("sampled", "bf16", (64, 64)),
    ("sampled", "fp16", (128, 128)),
)


class Work(NamedTuple):
    """What a launch must do at least, whatever its tiles' order; ``tile_bytes`` if no two programs share a cache."""

    flops: int
    bytes: int  # each operand, index and result once
    tile_bytes: int  # once for each program that needs it


@dataclass(frozen=True)
class Case:
    direction: str
    dtype: str
    block: tuple[int, int]
    num_warps: int
    num_stages: int
    target: str
    index_loads = INDEX_LOADS
    inner_loop = True
    least_occupancy = 0.0
    least_useful = 0.95

    @property
    def op(self) -> str:
        return OPS[self.direction]

    @property
    def name(self) -> str:
        block_out, block_in = self.block
        config = f"w{self.num_warps}s{self.num_stages}"
        return f"{self.direction}-{self.dtype}-{block_out}x{block_in}-{config}-{self.target}"

    @property
    def config(self) -> triton.Config:
        return triton.Config({}, num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=MOST_REGISTERS)

    @property
    def tensor_cores(self) -> bool:
        return self.dtype != "fp32"  # exact float32 products have none

    @property
    def async_copies(self) -> bool:
        """wgmma and tcgen05 take tf32 operands along the summed dimension only; a sampled product's lie across it, so
        they are turned on their way to shared memory, 4 bytes at a time."""
        return not (self.direction == "sampled" and self.dtype == "tf32" and self.target in ("sm_90", "sm_100"))

    def launch(self) -> kernels.Launch:
        """On a large batch. The numbers in its tensors are whatever lies in memory: it is to be compiled only."""
        return _large_launch(self.direction, self.dtype, self.block)

    def compiled(self) -> Compiled:
        return compile_launch(self.launch(), self.config, self.target)

    def small_launch(self) -> kernels.Launch:
        """The same kernel with the same constants on a small batch of random numbers, to be executed."""
        large = self.launch()
        small = _launch(self.direction, self.dtype, self.block, SMALL_BATCH, random_tensor)
        constants = {name: value for name, value in large.arguments.items() if name.isupper()}
        by_batch = self.direction != "sampled"  # one program for each tile of the batch
        programs = large.programs * SMALL_BATCH // LARGE_BATCH if by_batch else small.programs
        return small._replace(arguments={**small.arguments, **constants}, programs=programs)

    def least_work(self, launch: kernels.Launch) -> Work:
        return least_work(launch)


def shipped(long: bool = False) -> list[Case]:
    """Every block, dtype and configuration that a target's autotuner would try; or a few, first choices only."""
    if not long:
        return [_cases(*kernel, target)[0] for kernel in DEFAULT for target in TARGETS]
    every = product(OPS, DTYPES, SQUARE_BLOCKS + RECTANGULAR_BLOCKS, TARGETS)
    return [case for one in every for case in _cases(*one)]


def least_work(launch: kernels.Launch) -> Work:
    """Of a launch made here: no shared slots, no ragged blocks."""
    given = launch.arguments
    if "x" in given:
        return _least_product(given)
    return _least_sampled(given)


def _least_product(given: dict) -> Work:
    batch, rows, entries = given["batch"], given["rows"], len(given["idx"])
    block_out, block_in, size = given["BLOCK_OUT"], given["BLOCK_IN"], given["x"].element_size()
    tiles = triton.cdiv(batch, given["TILE_BATCH"])
    columns = len(given["idx"].unique())
    values = entries * block_out * block_in * size
    output = batch * rows * block_out * size
    indices = entries * 8 + rows * (8 + 4)  # idx and slot; ptr and order
    return Work(
        flops=2 * batch * entries * block_out * block_in,
        bytes=batch * columns * block_in * size + values + output + indices,
        tile_bytes=batch * entries * block_in * size + tiles * (values + indices) + output,
    )


def _least_sampled(given: dict) -> Work:
    batch, entries = given["batch"], len(given["entry_row"])
    block_out, block_in, size = given["BLOCK_OUT"], given["BLOCK_IN"], given["a"].element_size()
    rows, columns = len(given["entry_row"].unique()), len(given["entry_column"].unique())
    values = entries * block_out * block_in * size
    indices = entries * 12  # row, column and slot
    return Work(
        flops=2 * batch * entries * block_out * block_in,
        bytes=batch * (rows * block_out + columns * block_in) * size + values + indices,
        tile_bytes=batch * entries * (block_out + block_in) * size + values + indices,
    )


def _launch(direction: str, dtype_name: str, block: tuple[int, int], batch: int, tensor) -> kernels.Launch:
    block_out, block_in = block
    mask = random_mask(FEATURES // block_out, FEATURES // block_in, DENSITY)
    layout = BlockLayout.from_mask(mask, block, FEATURES, FEATURES)
    dtype = DTYPES[dtype_name]
    first, second = tensor(batch, FEATURES, dtype=dtype), tensor(batch, FEATURES, dtype=dtype)
    values = tensor(*layout.values_shape, dtype=dtype)
    with float32_precision("ieee" if dtype_name == "fp32" else "tf32"):
        if direction == "sampled":
            return kernels.sampled_launch(first, second, *layout.by_output, False, values)
        transposed = direction == "backward"
        order = layout.by_input if transposed else layout.by_output
        return kernels.product_launch(first, values, None, *order, transposed, "none", second)


@cache
def _large_launch(direction: str, dtype: str, block: tuple[int, int]) -> kernels.Launch:
    return _launch(direction, dtype, block, LARGE_BATCH, torch.empty)


def _cases(direction: str, dtype: str, block: tuple[int, int], target: str) -> list[Case]:
    launch = _large_launch(direction, dtype, block)
    configs = kernels.suitable(launch.kernel.configs, launch.arguments, shared_memory_of(target))
    return [Case(direction, dtype, block, one.num_warps, one.num_stages, target) for one in configs]


def shared_memory_of(target: str) -> int:
    """Bytes that one block may have."""
    arch = TARGETS[target].arch
    return LIMITS[arch].shared_per_block * 1024 if arch in LIMITS else LDS
