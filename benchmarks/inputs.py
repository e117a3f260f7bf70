"""Random inputs, the two directions, the fastest of several ways, and the comparison with float64."""

from collections.abc import Callable, Iterable, Sequence

import torch

from benchmarks.registry import Mismatch, Outputs, Side
from benchmarks.timing import seconds_per_call
from compsparse_kernels.testing import budget_used

# Shares of the error budget. Tests hold ours to 1; here it is only asked whether both compute the same function.
TOLERANCE = 8
SLOW = 0.2  # seconds


def mask_of_density(rows: int, columns: int, density: float) -> torch.Tensor:
    """bool ``[rows, columns]`` with exactly round(density * rows * columns) true entries, at random places."""
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[torch.randperm(rows * columns)[: max(1, round(density * rows * columns))]] = True
    return mask.view(rows, columns)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies of tensors that want a gradient."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def differentiated(
    forward: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], grad: torch.Tensor
) -> Callable[[], list[torch.Tensor]]:
    """A call that computes the output and the gradient of every input: ``[output, *gradients]``."""

    def run() -> list[torch.Tensor]:
        output = forward(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, grad)]

    return run


def fastest(candidates: Iterable[Callable[[], object]]) -> Callable[[], object]:
    """The best of several ways to compute the same, each warmed up and then timed three times, or once if slow."""

    def best_time(candidate):
        slow = seconds_per_call(candidate, 1) > SLOW
        return min(seconds_per_call(candidate, 1) for _ in range(1 if slow else 3))

    return min(candidates, key=best_time)


def side(
    run: Callable[[], object], exact: Outputs, dense: Outputs, outputs: Callable[[object], Outputs] | None = None
) -> Side:
    """A side whose outputs are compared with float64 ones; ``outputs`` makes them comparable (transposes, packs)."""

    def check(result: object) -> None:
        compare(_as_outputs(result) if outputs is None else outputs(result), exact, dense)

    return Side(run, check)


def compare(results: Outputs, exact: Outputs, dense: Outputs) -> None:
    """Raises Mismatch unless each result is near its float64 value, measured by the error of dense torch."""
    for number, (result, right, rounded) in enumerate(zip(results, exact, dense, strict=True)):
        if result.shape != right.shape:
            raise Mismatch(f"output {number}: expected shape {list(right.shape)}, got {list(result.shape)}")
        used = budget_used(result, rounded, right)
        if not used <= TOLERANCE:
            raise Mismatch(f"output {number}: error is {used:.3g} times the budget (at most {TOLERANCE} here)")


def _as_outputs(result: object) -> Outputs:
    return (result,) if isinstance(result, torch.Tensor) else result
