"""Which state space an access means."""

from .types import width


def state_space(opcode: tuple[str, ...]) -> str:
    """global (also for generic addresses), shared, local, param or const."""
    for modifier in opcode[1:]:
        space = modifier.split("::")[0]
        if space in ("shared", "local", "param", "const", "global"):
            return space
    return "global"


def smallest_access(program, space: str) -> int:
    """Bytes of the smallest element that the program loads or stores in this space, at most 4."""
    least = 4
    for instruction in program.instructions:
        if instruction.opcode[0] in ("ld", "st", "atom", "red") and state_space(instruction.opcode) == space:
            least = min(least, width(instruction.type) // 8)
    return least
