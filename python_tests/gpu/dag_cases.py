"""The kernels of dag_network, as the ladder compiles and runs them: kernel, dtype, width, configuration and target."""

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import triton

from compsparse_kernels import DAGLayout, FunctionGraph
from compsparse_kernels.ops.dag_network import triton as kernels
from compsparse_kernels.ops.triton_launch import MOST_REGISTERS, Launch
from compsparse_kernels.testing import random_tensor
from python_tests.gpu.aot import TARGETS, Compiled, compile_launch, float32_precision
from python_tests.gpu.cases import DTYPES, LARGE_BATCH, SMALL_BATCH, Work, shared_memory_of

LARGE_TREE, SMALL_TREE = 64, 8  # leaves
OPS = {"forward": "dag_network", "backward": "dag_network_backward", "weight": "dag_network_backward"}
WIDTHS = (16, 32, 64, 128)
DEFAULT = (("forward", "bf16", 64), ("backward", "fp16", 32), ("weight", "tf32", 64))


@dataclass(frozen=True)
class DagCase:
    """A step in the middle of a binary tree: nodes of ``width`` channels that read two of them."""

    kernel: str
    dtype: str
    width: int
    num_warps: int
    num_stages: int
    target: str
    index_loads = None  # one for each row that is copied
    inner_loop = True
    least_occupancy = 0.0
    least_useful = 0.95

    @property
    def op(self) -> str:
        return OPS[self.kernel]

    @property
    def name(self) -> str:
        return f"dag-{self.kernel}-{self.dtype}-{self.width}-w{self.num_warps}s{self.num_stages}-{self.target}"

    @property
    def config(self) -> triton.Config:
        return triton.Config({}, num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=MOST_REGISTERS)

    @property
    def tensor_cores(self) -> bool:
        return self.dtype != "fp32"

    @property
    def async_copies(self) -> bool:
        """wgmma and tcgen05, which take at least 4 warps, want tf32 operands along the summed dimension. Those of a
        weight's gradient lie so; the rows of a product lie across it, and are turned 4 bytes at a time."""
        turned = self.kernel != "weight" and self.dtype == "tf32" and self.num_warps >= 4
        return not (turned and self.target in ("sm_90", "sm_100"))

    def launch(self) -> Launch:
        """On a large batch. The numbers in its tensors are whatever lies in memory: it is to be compiled only."""
        return _large_launch(self.kernel, self.dtype, self.width)

    def compiled(self) -> Compiled:
        return compile_launch(self.launch(), self.config, self.target)

    def small_launch(self) -> Launch:
        """The same kernel with the same constants on a small tree and batch of random numbers, to be executed."""
        small = _launch(self.kernel, self.dtype, self.width, SMALL_TREE, SMALL_BATCH, random_tensor)
        constants = {name: value for name, value in self.launch().arguments.items() if name.isupper()}
        given = small.arguments
        programs = small.programs
        if self.kernel != "weight":  # one program for each tile of the batch
            programs = programs * given["TILE_BATCH"] // constants["TILE_BATCH"]
        return small._replace(arguments=given | constants, programs=programs)

    def least_work(self, launch: Launch) -> Work:
        return (_least_weight if self.kernel == "weight" else _least_product)(launch.arguments)


def shipped(long: bool = False) -> list[DagCase]:
    """Every width, dtype and configuration that a target's autotuner would try; or a few, first choices only."""
    if not long:
        return [_cases(*kernel, target)[0] for kernel in DEFAULT for target in TARGETS]
    every = product(OPS, DTYPES, WIDTHS, TARGETS)
    return [case for one in every for case in _cases(*one)]


def _least_product(given: dict) -> Work:
    """Of a step in which a program does all of a node's outputs."""
    forward = "fan_in" in given
    lanes, size = given["lanes"], given["weights"].element_size()
    if forward:
        read, channels = given["inputs"][given["nodes"].long()], given["out"]
    else:
        read, channels = given["row"].view(len(given["first"]), -1), given["channels"]
    count, terms = read.shape
    results = count * channels * lanes * size * 2  # activations and slopes, or slopes and gradients
    of_tile = count * terms * (channels * size + (4 if forward else 12))
    return Work(
        flops=2 * lanes * count * channels * terms,
        bytes=len(read.unique()) * lanes * size + results + of_tile,
        tile_bytes=read.numel() * lanes * size + results + of_tile * (lanes // given["TILE_BATCH"]),
    )


def _least_weight(given: dict) -> Work:
    """Of weights that nobody shares."""
    count, out, fan_in = given["sums"].shape[1:]
    lanes, size = given["lanes"], given["h"].element_size()
    outs, ins = triton.cdiv(out, given["TILE_OUT"]), triton.cdiv(fan_in, given["TILE_IN"])
    steps = lanes // given["TILE_BATCH"]
    return Work(
        flops=2 * lanes * count * out * fan_in,
        bytes=count * ((out + fan_in) * lanes * size + fan_in * 4) + given["sums"].nbytes,
        tile_bytes=count * ((ins * out + outs * fan_in) * lanes * size + steps * outs * fan_in * 4)
        + given["sums"].nbytes,
    )


def _launch(kernel: str, dtype: str, width: int, leaves: int, batch: int, tensor) -> Launch:
    layout = DAGLayout(FunctionGraph.tree(leaves), width=width)

    def draw(*shape):
        return tensor(*shape, dtype=DTYPES[dtype])

    weights, biases = ([draw(*shape) for shape in shapes] for shapes in (layout.weight_shapes, layout.bias_shapes))
    h, gradients = draw(1 + layout.columns, batch), draw(1 + layout.columns, batch)
    shapes = [weight.shape for weight in weights]
    forward = kernels.forward_rows(layout.nodes, layout.edge_ptr, layout.edges, layout.steps, shapes)
    with float32_precision("ieee" if dtype == "fp32" else "tf32"):
        if kernel == "weight":
            return kernels.weight_launch(gradients, h, shapes[1], forward.kinds[1])
        if kernel == "forward":
            return kernels.forward_launches(h, gradients, weights, biases, forward, layout.linear, "gelu", batch)[1]
        index = (layout.nodes, layout.child_ptr, layout.children, layout.steps)
        rows = kernels.backward_rows(*index, shapes, layout.in_features)
        return kernels.backward_launches(gradients, h, weights, rows, layout.linear, "gelu", batch)[-2]


@cache
def _large_launch(kernel: str, dtype: str, width: int) -> Launch:
    return _launch(kernel, dtype, width, LARGE_TREE, LARGE_BATCH, torch.empty)


def _cases(kernel: str, dtype: str, width: int, target: str) -> list[DagCase]:
    launch = _large_launch(kernel, dtype, width)
    configs = kernels.suitable(launch.kernel.configs, launch.arguments, shared_memory_of(target))
    return [DagCase(kernel, dtype, width, one.num_warps, one.num_stages, target) for one in configs]
