"""Makes Triton's interpreter as strict as a GPU: ``with strict(): kernel[grid](...)``.

Plain interpretation reads and writes wherever a pointer leads, gives zero for a masked lane, runs programs one after
the other in order, adds bfloat16 numbers as integers and multiplies tf32 in full precision. Under :func:`strict`

bounds    every lane that is not masked lies in the tensor that its pointer came from, and is aligned (bounds.py)
poison    masked lanes of a load without ``other=`` are NaN, or a huge integer: on a GPU they are undefined
races     two programs that touch one address, one of them writing, or two lanes of one store that disagree (races.py)
order     programs run in an order shuffled by ``seed``
rounding  bfloat16 is rounded to nearest even, inputs of a tf32 product to tf32 (rounding.py)
overflow  int32 ``+ - *`` that wraps
dot       a ``tl.dot`` over fewer terms than the CUDA back end accepts

What is wrong raises :class:`KernelFault`. The process must have been started with ``TRITON_INTERPRET=1``.
"""

import contextlib
import dataclasses
import random
from collections.abc import Iterator

import numpy as np
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle

from python_tests.gpu.interpreter.bounds import ADDRESS, Allocations
from python_tests.gpu.interpreter.faults import KernelFault
from python_tests.gpu.interpreter.races import ATOMIC, LOAD, STORE, AccessLog, check_lanes
from python_tests.gpu.interpreter.rounding import from_bf16, to_bf16, to_tf32

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


@contextlib.contextmanager
def strict(
    seed: int = 0, races: bool = True, tf32: bool = True, overflow: bool = True, first_program: int = 0
) -> Iterator[None]:
    """Launches inside are strict; the flags turn off one check each.

    ``first_program`` is added to each program's first index: a few programs of a grid too large to run.
    """
    builder, semantic = interpreter.interpreter_builder, interpreter.interpreter_semantic
    replacements = (
        (builder, "__class__", _StrictBuilder),
        (builder, "options", dataclasses.replace(builder.options, debug=True, sanitize_overflow=overflow)),
        (builder, "codegen_fns", {**builder.codegen_fns, "min_dot_size": _checked_dot_size}),
        (semantic, "__class__", _StrictSemantic),
        (interpreter, "GridExecutor", _StrictExecutor),
        (interpreter, "_implicit_cvt", _tagged(interpreter._implicit_cvt)),
    )
    before = [getattr(owner, name) for owner, name, _ in replacements]
    builder.checks = _Checks(random.Random(seed), races, tf32, first_program)
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(replacements, before, strict=True):
            setattr(owner, name, value)
        del builder.checks


class _Checks:
    """The flags, and what is known of the launch that runs."""

    def __init__(self, generator: random.Random, races: bool, tf32: bool, first_program: int):
        self.generator = generator
        self.races = races
        self.tf32 = tf32
        self.first_program = first_program
        self.allocations = Allocations()
        self.log = AccessLog()
        self.order = []
        self.other_given = False  # in the load that is being made

    def begin(self) -> None:
        self.allocations = Allocations()
        self.log = AccessLog()
        self.order = []

    def end(self) -> None:
        if self.races:
            self.log.check()

    def touch(self, pointers: TensorHandle, mask: np.ndarray, access: str, program: tuple) -> TensorHandle:
        """Checks and logs an access; the pointers as addresses, for the interpreter to follow."""
        num_bytes = _np_dtype(pointers).itemsize
        addresses = self.allocations.check(pointers.data[mask], num_bytes, access, program)
        if self.races:
            self.log.add(addresses, num_bytes, access, program)
        return TensorHandle(pointers.data & ADDRESS, pointers.dtype)


class _StrictExecutor(interpreter.GridExecutor):
    def __call__(self, *args, **kwargs):
        checks = interpreter.interpreter_builder.checks
        checks.begin()
        try:
            with np.errstate(all="ignore"):
                super().__call__(*args, **kwargs)
        except InterpreterError as error:
            fault = _fault_behind(error)
            if fault is None:
                raise
            raise fault from None
        checks.end()


def _tagged(convert):
    """The interpreter's conversion of arguments, with pointers that tell which tensor they came from."""

    def converted(argument):
        result = convert(argument)
        if hasattr(argument, "data_ptr"):
            result.handle.data |= interpreter.interpreter_builder.checks.allocations.tag(argument)
        return result

    return converted


def _fault_behind(error: BaseException | None) -> KernelFault | None:
    """The interpreter wraps what a kernel raises once for each function it calls."""
    while error is not None and not isinstance(error, KernelFault):
        error = error.__cause__
    return error


class _StrictSemantic(TritonSemantic):
    def load(self, ptr, mask, other, *rest):
        # What follows drops a scalar ``other=0``: it asks for its truth.
        self.builder.checks.other_given = other is not None
        return super().load(ptr, mask, other, *rest)


class _StrictBuilder(interpreter.InterpreterBuilder):
    """Never made: the interpreter's one builder becomes one for a while, as its parts keep references to it."""

    def set_grid_idx(self, x, y, z):
        checks = self.checks
        if not checks.order:
            checks.order = list(np.ndindex(*self.grid_dim))
            checks.generator.shuffle(checks.order)
        x, y, z = checks.order.pop()
        self.grid_idx = (x + checks.first_program, y, z)

    def create_masked_load(self, ptrs, mask, other, cache_policy, is_volatile):
        given, self.checks.other_given = self.checks.other_given, False
        if other is None and not given and not mask.data.all():
            other = _poison(ptrs)
        ptrs = self.checks.touch(ptrs, mask.data, LOAD, self.grid_idx)
        return super().create_masked_load(ptrs, mask, other, cache_policy, is_volatile)

    def create_atomic_load(self, ptr, mask, sem, scope):
        ptr = self.checks.touch(ptr, mask.data, ATOMIC, self.grid_idx)
        return super().create_masked_load(ptr, mask, _poison(ptr), None, True)

    def create_masked_store(self, ptrs, value, mask, cache_policy):
        self._store(ptrs, value, mask, cache_policy, STORE)

    def create_atomic_store(self, ptr, val, mask, sem, scope):
        self._store(ptr, val, mask, None, ATOMIC)

    def _store(self, ptrs, value, mask, cache_policy, access):
        ptrs = self.checks.touch(ptrs, mask.data, access, self.grid_idx)
        if self.checks.races and access == STORE:
            stored = np.broadcast_to(value.data, mask.data.shape)[mask.data]
            check_lanes(ptrs.data[mask.data], stored, self.grid_idx)
        super().create_masked_store(ptrs, value, mask, cache_policy)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        ptr = self.checks.touch(ptr, mask.data, ATOMIC, self.grid_idx)
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        ptr = self.checks.touch(ptr, np.ones(ptr.data.shape, bool), ATOMIC, self.grid_idx)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def create_assert(self, condition, message):
        if "overflow detected" in message and not condition:
            raise KernelFault("overflow", f"{message}, program {self.grid_idx}")
        super().create_assert(condition, message)

    def binary_op(self, lhs, rhs, op):
        if not _is_bf16(lhs) or op in BITWISE:
            return super().binary_op(lhs, rhs, op)
        return _bf16_result(op(from_bf16(lhs.data), from_bf16(rhs.data)))

    def unary_op(self, arg, op):
        return _bf16_result(op(from_bf16(arg.data))) if _is_bf16(arg) else super().unary_op(arg, op)

    def ternary_op(self, lhs, rhs, other, op):
        if not _is_bf16(other) or op is np.where:  # a choice moves bits
            return super().ternary_op(lhs, rhs, other, op)
        return _bf16_result(op(*(from_bf16(part.data) for part in (lhs, rhs, other))))

    def create_fma(self, x, y, z):
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        x, y, z = (from_bf16(part.data).astype(np.float64) for part in (x, y, z))
        return _bf16_result((x * y + z).astype(np.float32))

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return super().cast_impl(src, dst_type)
        if target == tl.bfloat16:
            return _bf16_result(src.data.astype(np.float32))
        return super().cast_impl(TensorHandle(from_bf16(src.data), tl.float32), dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if _is_bf16(a):
            a, b = (TensorHandle(from_bf16(part.data), tl.float32) for part in (a, b))
        elif (
            self.checks.tf32
            and a.dtype.scalar == tl.float32
            and input_precision == interpreter._ir.INPUT_PRECISION.TF32
        ):
            a, b = (TensorHandle(to_tf32(part.data), tl.float32) for part in (a, b))
        if d.data.dtype != np.float32:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        # numpy's own sums of float32 depend on the tile's shape on some processors; of float64, rounded, they do not.
        products = a.data.astype(np.float64) @ b.data.astype(np.float64)
        return TensorHandle(products.astype(np.float32) + d.data, d.dtype.scalar)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _bf16_result(result: np.ndarray) -> TensorHandle:
    """float32 is rounded; what a comparison gives stays bool."""
    return TensorHandle(result if result.dtype == np.bool_ else to_bf16(result), tl.bfloat16)


def _np_dtype(pointers: TensorHandle) -> np.dtype:
    return interpreter._get_np_dtype(pointers.get_element_ty())


def _poison(pointers: TensorHandle) -> TensorHandle:
    element, dtype = pointers.get_element_ty(), _np_dtype(pointers)
    if element.is_floating():
        poison = TensorHandle(np.full(pointers.data.shape, np.nan, np.float32), tl.float32)
        return interpreter.interpreter_builder.cast_impl(poison, element)
    value = True if dtype == np.bool_ else np.iinfo(dtype).max // 3
    return TensorHandle(np.full(pointers.data.shape, value, dtype), element)


def _checked_dot_size(lhs_type, rhs_type):
    """The CUDA back end's own table, which is the same for every architecture."""
    least = min_dot_size(GPUTarget("cuda", 80, 32))(lhs_type, rhs_type)
    terms = lhs_type.shape[-1]
    if terms < least[2]:
        raise KernelFault("dot", f"tl.dot over {terms} terms of {lhs_type.scalar}, a GPU needs {least[2]}")
    return least
