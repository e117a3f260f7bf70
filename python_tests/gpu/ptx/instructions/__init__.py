"""What each instruction does: DECODERS maps the first part of an opcode to a function of (block, instruction).

The function reads the operands once and returns the step that executes the instruction for a mask of active threads
(None: all threads). Importing this package fills the table.
"""

from . import arithmetic, async_copy, atomics, blackwell, conversions, data_movement, hopper, logic, tensor_core, warp
from .registry import DECODERS

__all__ = [
    "DECODERS",
    "arithmetic",
    "async_copy",
    "atomics",
    "blackwell",
    "conversions",
    "data_movement",
    "hopper",
    "logic",
    "tensor_core",
    "warp",
]
