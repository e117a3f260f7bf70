"""Executes the PTX that a compiler generated, on the CPU, and checks what it does (level L3).

It covers everything between the source and PTX: layouts, swizzles, pipelined copies, tensor-core fragments, shuffles,
barriers. It is a reading of the PTX ISA: it proves nothing about ptxas, silicon, the memory model or time.
"""

from .faults import PTXFault, UnsupportedPTX
from .launch import launch
from .memory import Memory
from .profile import Profile
from .program import Program

__all__ = ["Memory", "PTXFault", "Profile", "Program", "UnsupportedPTX", "launch"]
