"""The kernels of the proximal steps, as the ladder compiles and runs them: rule, dtype, groups and target."""

from dataclasses import dataclass
from itertools import product

import torch
import triton

from compsparse_kernels.ops.proximal import triton as kernels
from compsparse_kernels.ops.triton_launch import Launch
from compsparse_kernels.testing import random_tensor
from python_tests.gpu.aot import TARGETS, Compiled, compile_launch
from python_tests.gpu.cases import Work
from python_tests.proximal import Problem

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGE, SMALL = (4096, 4096), (32, 2048)
GROUPS = {"single": None, "blocks": (32, 32), "rows": (1, LARGE[1]), "tiny": (4, 4)}
RULES = {"sgd": {"momentum": 0.9, "weight_decay": 0.1}, "adamw": {"weight_decay": 0.1}}
FLOPS = {"sgd": 10, "adamw": 16}  # of a weight: additions, products, divisions and roots of the formulas
DEFAULT = (("sgd", "fp32", "single"), ("adamw", "bf16", "blocks"))


@dataclass(frozen=True)
class ProximalCase:
    """A step of a weight of 4096 x 4096. Without groups there is no loop: a thread has its weights at once."""

    rule: str
    dtype: str
    groups: str
    target: str
    tensor_cores = False
    async_copies = False
    index_loads = None
    least_occupancy = 0.375
    least_useful = 0.95

    @property
    def op(self) -> str:
        return f"proximal_{self.rule}_"

    @property
    def name(self) -> str:
        return f"proximal-{self.rule}-{self.dtype}-{self.groups}-{self.target}"

    @property
    def inner_loop(self) -> bool:
        return self.groups != "single"

    @property
    def config(self) -> triton.Config:
        return kernels.sgd_kernel.configs[0]

    def launch(self) -> Launch:
        """The numbers in its tensors are whatever lies in memory: it is to be compiled only."""
        return self._launch(LARGE, torch.empty)

    def compiled(self) -> Compiled:
        return compile_launch(self.launch(), self.config, self.target)

    def small_launch(self) -> Launch:
        """The same kernel on random numbers, to be executed. Rows are shorter, so that there are more of them."""
        return self._launch(SMALL, random_tensor)

    def _launch(self, shape, tensor) -> Launch:
        penalty = ("l1", 5.0) if self.groups == "single" else ("group_l1", 9.0)
        named = Problem(self.rule, (1, 1), DTYPES[self.dtype], RULES[self.rule], *penalty).arguments()
        tensors = [name for name, value in named.items() if isinstance(value, torch.Tensor)]
        named |= {name: tensor(*shape, dtype=DTYPES[self.dtype]) for name in tensors}
        block = GROUPS[self.groups] or (1, 1)
        named |= {"block_out": block[0], "block_in": min(block[1], shape[1])}
        return {"sgd": kernels.sgd_launch, "adamw": kernels.adamw_launch}[self.rule](**named)

    def least_work(self, launch: Launch) -> Work:
        """Each tensor is read once and, but for the gradient, written once. A program with groups asks twice for what
        it reads; the second time it is in a cache."""
        tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
        size, read = tensors[0].nbytes, len(tensors)
        passes = 1 if self.groups == "single" else 2
        return Work(
            flops=FLOPS[self.rule] * tensors[0].numel(),
            bytes=(2 * read - 1) * size,
            tile_bytes=((passes + 1) * read - 1) * size,
        )


def shipped(long: bool = False) -> list[ProximalCase]:
    """Every rule, dtype, kind of groups and target; or a few."""
    cases = [ProximalCase(*one) for one in product(RULES, DTYPES, GROUPS, TARGETS)]
    return cases if long else [case for case in cases if (case.rule, case.dtype, case.groups) in DEFAULT]
