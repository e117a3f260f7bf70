"""What Triton kernels share: launches, the choice of a configuration, what is kept for a layout, epilogues."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakIdKeyDictionary

LEAST_TILE = 16  # sides of a tensor-core product
LARGEST_TILE = 128 * 128  # sums of one program: 64 a thread with 8 warps; masks take half of the registers
LARGEST_EXACT_TILE = 64  # batch rows where products are exact float32: registers hold their operands
STEP_BYTES = 128  # of a row of each operand that one step reads: a cache line
ENOUGH_PROGRAMS = 264  # two for each multiprocessor of a large GPU
INTERPRETED = triton.knobs.runtime.interpret


class Launch(NamedTuple):
    """One call of a kernel. Tests compile and execute it without a GPU, in each of its configurations."""

    kernel: "triton.runtime.Autotuner"
    arguments: dict[str, object]  # by name; the size and order of the steps are in them, not in the configuration
    programs: int

    def __call__(self) -> None:
        self.kernel[(self.programs,)](**self.arguments)


def padded(side: int) -> int:
    """The side of the tile that holds a block's side."""
    return max(LEAST_TILE, triton.next_power_of_2(side))


def dot_precision(dtype: torch.dtype) -> str:
    """tf32 where torch's own products would use it. Half precision has one way only."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def step_of(dtype: torch.dtype) -> int:
    """What one step sums over: a cache line of each operand; half of it where registers hold what is multiplied."""
    return STEP_BYTES // dtype.itemsize // (2 if dot_precision(dtype) == "ieee" else 1)


_kept = WeakIdKeyDictionary()  # a tensor of a layout -> name -> (others, what was made)


def kept(owner: torch.Tensor, name: str, others: tuple[torch.Tensor, ...], make: Callable[[], object]):
    """What ``make()`` returns, made once for a layout: its tensors are told by identity, as layouts never change. It
    may not hold ``owner``, or neither would ever be freed."""
    of_owner = _kept.setdefault(owner, {})
    found = of_owner.get(name)
    if found is None or any(one is not other for one, other in zip(found[0], others, strict=True)):
        found = of_owner[name] = (others, make())
    return found[1]


# Triton keeps one tile fewer in flight than it has stages (as many on Hopper and Blackwell, which have room for them).
# Two stages are for targets with little shared memory.
# ptxas would spill to reach an occupancy of its own choice, unless it is told that all registers may be used.
MOST_REGISTERS = None if torch.version.hip else 255
CONFIGS = [
    triton.Config({}, num_warps=warps, num_stages=stages, maxnreg=MOST_REGISTERS)
    for stages in (3, 4, 2)
    for warps in (1, 2, 4, 8)
]


class Tile(NamedTuple):
    """What a program adds to its sums in one step: ``[outer, step]`` times ``[step, inner]``."""

    outer: int
    inner: int
    step: int
    size: int  # bytes of a number
    most_sums: int  # that a thread may hold beside addresses and masks
    exact: bool  # float32 products without tensor cores


def suitable(configs: list[triton.Config], tile: Tile, shared_memory: int) -> list[triton.Config]:
    """The configurations to choose from.

    The tiles in flight fit in ``shared_memory`` bytes, each warp has a product for the tensor cores, and each thread
    copies at least 4 bytes of an operand (less is not copied asynchronously). No thread holds so many sums that
    registers spill, and products without tensor cores take as many warps as there are and few stages: memory does not
    limit them.
    """
    outer, inner, step, size, most_sums, exact = tile

    def fits(config):
        return (config.num_stages - 1) * (outer + inner) * step * size <= shared_memory

    def shares(config):
        threads = 32 * config.num_warps
        busy = outer * inner >= 16 * threads and min(outer, inner) * step * size >= 4 * threads
        return outer * inner <= most_sums * threads and (busy or config.num_warps == 1)

    widest = max(config.num_warps for config in configs)
    sharing = [config for config in configs if shares(config)]
    sharing = sharing or [config for config in configs if config.num_warps == widest]
    if exact:
        most_warps = max(config.num_warps for config in sharing)
        sharing = [config for config in sharing if config.num_warps == most_warps and config.num_stages <= 3]
    fitting = [config for config in sharing if fits(config)]
    deep = [config for config in fitting if config.num_stages > 2]
    return deep or fitting or sharing[-1:]


def tuned(configs: list[triton.Config], key: list[str], choose: Callable[..., list[triton.Config]]):
    """The fastest configuration of those that ``choose(configs, arguments, shared_memory)`` returns, measured once for
    each key and kept in Triton's cache folder."""

    def prune(configs, named_arguments, **arguments):
        if INTERPRETED:
            return configs[:1]
        device = triton.runtime.driver.active.get_current_device()
        properties = triton.runtime.driver.active.utils.get_device_properties(device)
        return choose(configs, {**named_arguments, **arguments}, properties["max_shared_mem"])

    return triton.autotune(
        configs, key=key, prune_configs_by={"early_config_prune": prune}, cache_results=not INTERPRETED
    )


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)  # keeps NaN
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def slope_of(z, ACTIVATION: tl.constexpr):
    """The derivative of an activation that is curved."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        slope = share + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    else:
        share = tl.sigmoid(z)
        slope = share * (1.0 + z * (1.0 - share))
    return slope
