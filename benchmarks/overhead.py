"""What a call costs beside its arithmetic, and what the import costs beside torch's."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.inputs import differentiated, leaves
from benchmarks.registry import Case, Entry, Mismatch, Side
from compsparse_kernels import BlockLayout, MaskLayout, block_sparse_linear, masked_linear, threshold_attention

FORWARD_LIMIT_MS = 0.005
BACKWARD_LIMIT_MS = 0.060
IMPORT_LIMIT_MS = 150.0
FEATURES = 16

TIME_IMPORT = """
import time, torch
started = time.perf_counter()
import compsparse_kernels
print(time.perf_counter() - started)
"""


def entries() -> Iterator[Entry]:
    for op, (make, peer, shape) in _calls().items():
        for direction, limit_ms in (("forward", FORWARD_LIMIT_MS), ("forward+backward", BACKWARD_LIMIT_MS)):
            build = partial(_call_case, make, direction == "forward+backward")
            suites = {"bars": None, "quick": None}
            yield Entry(op, "one call", shape, None, direction, peer, build, suites, limit_ms)
    suites = {"bars": None}
    yield Entry("import", "beyond torch", "fresh process", None, "import", None, _import_case, suites, IMPORT_LIMIT_MS)


def _calls() -> dict[str, tuple[Callable, str, str]]:
    linear = f"(1, {FEATURES}->{FEATURES})"
    return {
        "block_sparse_linear": (_tiny_block_sparse, "F.linear", linear),
        "masked_linear": (_tiny_masked, "F.linear", linear),
        "threshold_attention": (_tiny_attention, "SDPA", "B1 H1 T1 D8"),
    }


def _tiny_block_sparse():
    layout = BlockLayout.from_mask(torch.eye(2, dtype=torch.bool), (8, 8))
    weight = torch.randn(FEATURES, FEATURES) * layout.to_mask()
    x = torch.randn(1, FEATURES)
    return lambda x, values: block_sparse_linear(x, values, layout), (x, layout.pack(weight)), F.linear, (x, weight)


def _tiny_masked():
    mask = torch.eye(FEATURES, dtype=torch.bool)
    layout = MaskLayout.from_mask(mask, kind="csr")
    weight, x = torch.randn(FEATURES, FEATURES) * mask, torch.randn(1, FEATURES)
    return lambda x, values: masked_linear(x, values, layout), (x, layout.pack(weight)), F.linear, (x, weight)


def _tiny_attention():
    tensors = tuple(torch.randn(1, 1, 1, 8) for _ in range(3))
    return partial(threshold_attention, threshold=0.5), tensors, F.scaled_dot_product_attention, tensors


def _call_case(make: Callable, backward: bool) -> Case:
    """Only the outputs are compared: the arithmetic is checked where it is what is measured."""
    ours, our_inputs, peer, peer_inputs = make()
    expected = peer(*peer_inputs)

    def check(result):
        output = result[0] if backward else result
        if not torch.allclose(output, expected, rtol=1e-4, atol=1e-5):
            raise Mismatch("the tiny input's output is not the peer's")

    sides = []
    for function, inputs in ((ours, our_inputs), (peer, peer_inputs)):
        run = partial(function, *inputs)
        if backward:
            run = differentiated(function, leaves(*inputs), torch.ones_like(expected))
        sides.append(Side(run, check))
    return Case(*sides)


def _import_case() -> Case:
    def seconds() -> float:
        done = subprocess.run([sys.executable, "-c", TIME_IMPORT], capture_output=True, text=True, check=True)
        return float(done.stdout)

    def check(result: float) -> None:
        if not result > 0:
            raise Mismatch(f"the import's time is {result}")

    return Case(Side(seconds, check, seconds), None)
