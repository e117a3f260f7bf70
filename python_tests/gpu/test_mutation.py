"""Level L3b: damages the compiled kernels in one place each and counts how many of them the checks of L3 catch."""

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from python_tests.gpu import ledger
from python_tests.gpu.problems import LINEAR, SAMPLED, Check, problem
from python_tests.gpu.ptx.mutate import mutants, reason_caught, score

LEAST_SCORE = 0.8
INSTRUCTIONS = 200_000  # of one block; a damaged loop that never ends is caught here
BLOCK = (32, 32)


@dataclass(frozen=True)
class Battery:
    """Problems that one compiled kernel serves: each reaches boundaries that the others miss."""

    checks: list[Check]

    def reason(self, ptx: str) -> str | None:
        """Why the battery rejects this code, or None."""
        reasons = (reason_caught(lambda check=check: check.run(ptx, limit=INSTRUCTIONS)) for check in self.checks)
        return next((reason for reason in reasons if reason), None)


def battery(direction, target: str, features: tuple[int, int], dtype=torch.float16) -> Battery:
    """``features`` decides how operands are loaded: multiples of 16 asynchronously, others element by element."""
    out_features, in_features = features
    more_rows = (out_features + 9 * BLOCK[0], in_features)  # more block rows than a group has
    tiles = 192 if direction is SAMPLED else 0  # three steps along the batch, before what is left over
    problems = [
        problem(BLOCK, features, 37 + tiles, dtype),
        problem(BLOCK, more_rows, 19, dtype, integers=True),
        problem(BLOCK, more_rows, 42, dtype, empty_last_row=True),
        direction.spoil(problem(BLOCK, features, 53 + tiles, dtype)),
        *(problem(BLOCK, features, batch, dtype) for batch in (7, 14, 23, 30, 58, 65, 129)),
    ]
    first = Check(direction, problems[0], target)
    constants = first.launch.arguments
    return Battery([first, *(Check(direction, p, target, constants=constants) for p in problems[1:])])


@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.long)])
@pytest.mark.parametrize("features", [(80, 112), (70, 100)], ids=["copied", "by element"])
@pytest.mark.parametrize("direction", [LINEAR, SAMPLED], ids=lambda direction: direction.name)
@pytest.mark.parametrize("per_kind", [3, pytest.param(40, marks=pytest.mark.long)])
def test_damaged_code_is_caught(direction, features, target, per_kind):
    checks = battery(direction, target, features)
    original = checks.checks[0].ptx
    assert checks.reason(original) is None
    result = score(mutants(original, seed=0, per_kind=per_kind), checks.reason)
    ledger.mutants(checks.checks[0].name, result.caught.total(), result.total.total())
    survivors = "\n".join(map(str, result.survivors))
    assert result.total.total() >= 20 and result.ratio >= LEAST_SCORE, f"{result.ratio:.0%} caught, not:\n{survivors}"
