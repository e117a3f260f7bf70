"""Small kernels around a few instructions under test."""

import numpy as np

from .launch import launch
from .memory import Memory
from .program import Program
from .types import DTYPES, width

NAMES = "abcefgh"
HEADER = ".version 8.4\n.target sm_90a\n.address_size 64\n"


def kernel(body: str, pointers: int = 0, registers: str = "", threads: int = 32, shared: int = 0) -> str:
    """PTX text. ``body`` finds the arguments in %p0, %p1, ... and the thread's number in %tid (32 bits) and %wide."""
    params = ", ".join(f".param .u64 p{number}" for number in range(pointers))
    loads = "\n".join(f"ld.param.u64 %p{number}, [p{number}];" for number in range(pointers))
    memory = f".shared .align 128 .b8 buffer[{shared}];" if shared else ""
    return f"""{HEADER}
.visible .entry snippet({params})
.reqntid {threads}
{{
    .reg .pred %q<8>;
    .reg .b16 %h<16>;
    .reg .b32 %r<32>;
    .reg .b64 %l<16>;
    .reg .b64 %p<8>;
    .reg .b32 %tid;
    .reg .b64 %wide;
    {memory}
    {registers}
    mov.u32 %tid, %tid.x;
    cvt.u64.u32 %wide, %tid;
    {loads}
    {body}
    ret;
}}
"""


def evaluate(body: str, result_type: str, *operands, shared: int = 0, registers: str = "") -> np.ndarray:
    """Runs ``body`` on operands (type, one value for each thread), which it finds in %a, %b, %c, %e, ...

    Returns what it leaves in %d, for each thread.
    """
    values = [np.atleast_1d(np.asarray(given, DTYPES[type_name])) for type_name, given in operands]
    count = max([len(value) for value in values], default=32)
    threads = -(-count // 32) * 32
    memory = Memory()
    result = np.zeros(threads, DTYPES[result_type])
    addresses = [memory.add(result, "result")]
    declared, text = f"{_declare('d', result_type)} .reg .b64 %at; {registers}", ""
    for number, ((type_name, _), value) in enumerate(zip(operands, values, strict=True), start=1):
        name, bits = NAMES[number - 1], width(type_name)
        padded = np.resize(value, threads)
        addresses.append(memory.add(padded, name, readonly=True))
        declared += _declare(name, type_name)
        text += f"mad.lo.s64 %at, %wide, {bits // 8}, %p{number};\nld.global.b{bits} %{name}, [%at];\n"
    text += body + f"\nmad.lo.s64 %at, %wide, {width(result_type) // 8}, %p0;\n"
    text += f"st.global.b{width(result_type)} [%at], %d;\n"
    launch(Program(kernel(text, len(addresses), declared, threads, shared)), (1,), addresses, memory=memory)
    return result[:count]


def _declare(name: str, type_name: str) -> str:
    return f".reg .b{width(type_name)} %{name}; "


def run(body: str, *arrays: np.ndarray, threads: int = 32, shared: int = 0, grid: int = 1, readonly=(), **options):
    """Runs ``body`` on arrays, whose addresses are in %p0, %p1, ...; returns the counts of instructions."""
    memory = Memory()
    addresses = [memory.add(array, f"array {n}", n in readonly) for n, array in enumerate(arrays)]
    registers = options.pop("registers", "")
    program = Program(kernel(body, len(arrays), registers, threads, shared))
    return launch(program, (grid,), addresses, memory=memory, **options)
