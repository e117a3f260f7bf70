"""Inputs of the block-sparse kernels for compiled code, and the check of what it computes against float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from compsparse_kernels import BlockLayout
from compsparse_kernels.ops.block_sparse_linear import reference
from compsparse_kernels.ops.block_sparse_linear import triton as kernels
from compsparse_kernels.testing import assert_within_budget, random_tensor
from python_tests.gpu.aot import Compiled, compile_launch, float32_precision
from python_tests.gpu.ptx import Program
from python_tests.gpu.ptx.torch_launch import run_compiled

SHARED_MEMORY = 163 * 1024  # bytes, of sm_80; the others have more


@dataclass(frozen=True)
class Problem:
    """``integers``: numbers so small that every product and sum is exact, so the result has one right rounding."""

    layout: BlockLayout
    x: torch.Tensor  # [batch, in]
    grad: torch.Tensor  # [batch, out]
    values: torch.Tensor
    bias: torch.Tensor
    integers: bool = False

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Problem":
        tensors = ("x", "grad", "values", "bias")
        return replace(self, **{name: change(getattr(self, name)) for name in tensors})


def problem(
    block: tuple[int, int],
    features: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    *,
    shared: bool = False,
    integers: bool = False,
    empty_last_row: bool = False,
) -> Problem:
    """A layer in which every block row but the last has entries, and few begin in the first column."""
    out_features, in_features = features
    mask = torch.rand(-(-out_features // block[0]), -(-in_features // block[1]), generator=_generator(7)) < 0.5
    mask[:, 0] = False
    mask[torch.arange(len(mask)), torch.arange(len(mask)) % mask.shape[1]] = True
    mask[-1, -1] = True  # the block that both edges cut
    mask[-1] &= not empty_last_row
    rows, columns = mask.nonzero(as_tuple=True)
    slot = torch.arange(len(rows)) % 2 if shared else None
    layout = BlockLayout.from_entries(rows, columns, block, out_features, in_features, slot=slot)
    shapes = [(batch, in_features), (batch, out_features), layout.values_shape, (out_features,)]
    if integers:
        drawn = [torch.randint(-31, 32, shape, generator=_generator(seed)) for seed, shape in enumerate(shapes)]
        return Problem(layout, *(tensor.to(dtype) for tensor in drawn), integers=True)
    return Problem(layout, *(random_tensor(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)))


def nan_in_batch_row(p: Problem) -> Problem:
    """One row of the batch is NaN: no other row of a product may become so."""
    x, grad = p.x.clone(), p.grad.clone()
    x[len(x) // 2] = grad[len(x) // 2] = float("nan")
    return replace(p, x=x, grad=grad)


def nan_in_features(p: Problem) -> Problem:
    """The last input and the last output's gradient are NaN: no other row or column of a block may become so."""
    x, grad = p.x.clone(), p.grad.clone()
    x[:, -1] = grad[:, -1] = float("nan")
    return replace(p, x=x, grad=grad)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Direction:
    """One of the kernels' uses: which arguments the op of ``contract.py`` gets."""

    name: str
    reference: Callable[..., torch.Tensor]
    arguments: Callable[[Problem], tuple]
    launch: Callable[..., kernels.Launch]  # from the arguments and the output
    spoil: Callable[[Problem], Problem] = nan_in_batch_row

    def expected(self, p: Problem) -> torch.Tensor:
        return self.reference(*self.arguments(p))


def _launch_product(x, values, bias, ptr, idx, slot, _, transposed, activation, output):
    return kernels.product_launch(x, values, bias, ptr, idx, slot, transposed, activation, output)


def _launch_sampled(a, b, ptr, idx, slot, _, shared, __, ___, output):
    return kernels.sampled_launch(a, b, ptr, idx, slot, shared, output)


def _forward(p: Problem, activation: str = "silu") -> tuple:
    activation = "none" if p.integers else activation
    return p.x, p.values, p.bias, *p.layout.by_output, p.layout.out_features, False, activation


def _backward(p: Problem) -> tuple:
    return p.grad, p.values, None, *p.layout.by_input, p.layout.in_features, True, "none"


def _sampled(p: Problem) -> tuple:
    order, slots = p.layout.by_output, p.layout.num_slots
    return p.grad, p.x, *order, slots, slots != len(order.idx), *p.layout.block_shape


FORWARD = Direction("forward", reference.block_sparse_linear, _forward, _launch_product)
LINEAR = Direction("linear", reference.block_sparse_linear, lambda p: _forward(p, "none"), _launch_product)
BACKWARD = Direction("backward", reference.block_sparse_linear, _backward, _launch_product)
SAMPLED = Direction("sampled", reference.sampled_block_matmul, _sampled, _launch_sampled, nan_in_features)
DIRECTIONS = (FORWARD, BACKWARD, SAMPLED)


class Check:
    """One problem, compiled for one target: :meth:`run` executes it, or a program in its place, and compares.

    Args:
        direction, problem, target: what is run where.
        config: the first that suits, where None.
        tf32: whether float32 products may be so.
        constants: of another launch, where programs that were compiled for that one are to be run.
    """

    def __init__(self, direction, p: Problem, target: str, config=None, tf32: bool = True, constants=None):
        self.name = f"{direction.name} {str(p.x.dtype).removeprefix('torch.')} {p.layout.block_shape} {target}"
        self.integers = p.integers
        self.exact = direction.expected(p.map(torch.Tensor.double))
        self.terms = direction.expected(p.map(lambda t: t.double().abs()).map(torch.Tensor.nan_to_num))
        tensor_core = p.map(as_tf32) if tf32 and p.x.dtype == torch.float32 else p
        self.dense = direction.expected(tensor_core)
        self.output = torch.empty_like(self.dense)
        with float32_precision("tf32" if tf32 else "ieee"):
            launch = direction.launch(*direction.arguments(p), self.output)
        if constants is not None:
            launch.arguments.update({name: value for name, value in constants.items() if name.isupper()})
            launch = launch._replace(programs=_programs(launch))
        self.launch = launch
        config = config or kernels.suitable(launch.kernel.configs, launch.arguments, SHARED_MEMORY)[0]
        self.compiled: Compiled = compile_launch(launch, config, target)
        self._inputs = [
            position
            for position, value in enumerate(self.compiled.arguments)
            if isinstance(value, torch.Tensor) and value is not self.output
        ]

    @property
    def ptx(self) -> str:
        return self.compiled.kernel.asm["ptx"]

    def run(self, program: Program | None = None, **options) -> None:
        """Raises PTXFault or AssertionError unless the code computes the reference, in bounds and without races."""
        self.output.fill_(float("nan"))  # what nobody writes is seen
        run_compiled(self.compiled, program=program, readonly=self._inputs, **options)
        if self.integers:
            assert torch.equal(self.output, self.exact.to(self.output.dtype)), f"{self.name}: not rounded correctly"
            return
        assert torch.equal(self.output.isnan(), self.exact.isnan()), f"{self.name}: NaN in other places"
        finite = (tensor.nan_to_num() for tensor in (self.output, self.dense, self.exact))
        assert_within_budget(*finite, self.name, self.terms)


def _programs(launch: kernels.Launch) -> int:
    given = launch.arguments
    if "x" not in given:
        return launch.programs
    return given["rows"] * -(-given["batch"] // given["TILE_BATCH"])


def as_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """The yardstick for tf32: tensor cores ignore the last 13 bits of a float32 operand."""
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)
