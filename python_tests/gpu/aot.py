"""Compiles a launch for a GPU that is not here, specialised as Triton's JIT would for the same arguments."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.uint8: "*u8",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@contextmanager
def float32_precision(name: str):
    """Launches made inside are those of a user who told torch ``tf32`` or ``ieee`` for products of float32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = name
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled ahead of time, and what it gets at launch."""

    kernel: "triton.compiler.CompiledKernel"  # .asm["ptx"], .asm["cubin"], .asm["amdgcn"], .metadata.shared
    arguments: tuple  # tensors and numbers in the order of the compiled parameters, constants left out
    programs: int
    num_warps: int
    num_stages: int
    parameters: tuple[str, ...]  # the names of those arguments
    aligned: frozenset[str]  # parameters of which the compiler was told that 16 divides them
    constants: dict[str, object]

    def serving(self, launch) -> "Compiled":
        """The same code with the arguments of another launch, for which what the compiler was told must hold too."""
        for name, value in self.constants.items():
            came = launch.arguments[name]
            assert came == value, f"{name}: the code is for {value!r}, the launch has {came!r}"
        arguments = tuple(launch.arguments[name] for name in self.parameters)
        for name, value, own in zip(self.parameters, arguments, self.arguments, strict=True):
            assert _type_of(value) == _type_of(own), f"{name}: the code is for {_type_of(own)}"
            assert _is_aligned(value) or name not in self.aligned, f"{name}: the code is for multiples of 16"
        return replace(self, arguments=arguments, programs=launch.programs)


def compile_launch(launch, config: triton.Config, target: str) -> Compiled:
    """Compiles a ``Launch`` of an op's ``triton.py`` in one configuration for one of TARGETS."""
    function = launch.kernel.fn
    given = {**launch.arguments, **config.kwargs}
    signature, constants, aligned, arguments = {}, {}, [], []
    for position, parameter in enumerate(function.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type_of(value)
        arguments.append(value)
        if _is_aligned(value):
            aligned.append(position)
    specialised = (tuple(signature.items()), tuple(constants.items()), tuple(aligned))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if TARGETS[target].backend == "cuda":
        options["maxnreg"] = config.maxnreg
    kernel = _compile(function, *specialised, target, tuple(options.items()))
    names = [parameter.name for parameter in function.params]
    return Compiled(
        kernel,
        tuple(arguments),
        launch.programs,
        config.num_warps,
        config.num_stages,
        tuple(name for name in names if name not in constants),
        frozenset(names[position] for position in aligned),
        constants,
    )


def _is_aligned(value) -> bool:
    address = value.data_ptr() if isinstance(value, torch.Tensor) else value
    return not isinstance(value, float) and address % 16 == 0


def _type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@cache
def _compile(function, signature, constants, aligned, target, options):
    attributes = {(position,): [["tt.divisibility", 16]] for position in aligned}
    source = ASTSource(function, dict(signature), dict(constants), attributes)
    return triton.compile(source, target=TARGETS[target], options=dict(options))
