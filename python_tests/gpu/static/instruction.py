"""One machine instruction, in the form both vendors' listings are read into."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Control:
    """What NVIDIA's assembler wrote into bits 105..121 of an instruction for the scheduler."""

    stall: int  # cycles before the same warp issues its next instruction
    write_barrier: int  # scoreboard that the result releases, 7 for none
    read_barrier: int  # scoreboard that the reading of operands releases, 7 for none
    wait_mask: int  # scoreboards to wait for, one bit each


@dataclass(frozen=True)
class Instruction:
    """``target`` is the address a branch may go to; ``falls_through`` whether the next instruction may follow."""

    address: int
    mnemonic: str
    operands: str = ""
    target: int | None = None
    falls_through: bool = True
    control: Control | None = None

    @property
    def stall(self) -> int:
        return self.control.stall if self.control else 0
