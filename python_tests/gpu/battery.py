"""What damaged versions of a compiled kernel are run on (level L3b)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from python_tests.gpu.ptx import Program
from python_tests.gpu.ptx.mutate import Mutant, mutants, reason_caught

INSTRUCTIONS = 200_000  # of one block; a damaged loop that never ends is caught here


@dataclass(frozen=True)
class Battery:
    """A compiled kernel, and problems that it serves: each check runs one, with a program in place of the kernel's, and
    reaches boundaries that the others miss.

    ``immune``: instructions of which no damaged version counts, as the kernel is made to bear it.
    """

    name: str
    ptx: str
    checks: list[Callable[..., None]]
    immune: tuple[str, ...] = ()

    def mutants(self, per_kind: int) -> list[Mutant]:
        """At most so many damaged versions of each kind."""
        return mutants(self.ptx, seed=0, per_kind=per_kind, immune=self.immune)

    def reason(self, ptx: str) -> str | None:
        """Why the battery rejects this code, or None."""
        program = Program(ptx)
        runs = (partial(check, program=program, limit=INSTRUCTIONS) for check in self.checks)
        reasons = map(reason_caught, runs)
        return next((reason for reason in reasons if reason), None)
