"""Which calls are trained by scores computed again, and which store the support."""

import math

import pytest
import torch

from compsparse_kernels import threshold_attention
from compsparse_kernels.testing import HALVES
from python_tests.attention import NO_KERNELS, op_arguments
from python_tests.attention_training import KEEP, leaves_of, many_kept, train, way_of

OPS = torch.ops.compsparse
pytestmark = pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))

STORED = {
    "support": {"return_support": True},
    "degree": {"return_support": "degree"},
    "dropout": {"dropout_p": 0.1},
    "topk": {"rule": "topk", "threshold": 100},
    "topp": {"rule": "topp", "threshold": 0.99},
    "entmax": {"rule": "entmax", "threshold": 1.5},
    "shrink": {"shrink": True},
    "rectified": {"weights": "rectified"},
    "few kept": {"threshold": 0.5},
    "few reach it": {"rule": "absolute", "threshold": 3.0},
    "bias with a gradient": {"attn_bias": torch.zeros(1, 150, requires_grad=True)},
}


@pytest.mark.parametrize("name", STORED)
def test_calls_that_store_the_support(name):
    tensors = leaves_of(many_kept(1, 2, 60, 150, 16))
    out = threshold_attention(*tensors, **(KEEP | STORED[name]))
    assert way_of(out[0] if "return_support" in STORED[name] else out) == "Threshold"
    assert way_of(threshold_attention(*tensors, **KEEP)) == "Recomputed"


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_store_the_support(dtype):
    assert way_of(threshold_attention(*leaves_of(many_kept(1, 2, 60, 150, 16, dtype=dtype)), **KEEP)) == "Threshold"


@pytest.mark.parametrize("sizes", [(1, 2, 23, 150, 16), (1, 2, 60, 31, 16), (0, 2, 60, 150, 16), (1, 0, 60, 150, 16)])
def test_small_calls_store_the_support(sizes):
    assert way_of(threshold_attention(*leaves_of(many_kept(*sizes)), **KEEP)) == "Threshold"


@pytest.mark.parametrize("odd", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", range(3))
def test_inputs_that_are_not_finite_store_the_support(which, odd):
    """Sums over whole blocks of keys count 0 times each."""
    tensors = many_kept(1, 2, 60, 150, 16)
    tensors[which][0, 1, 7, 3] = odd
    padding = torch.arange(150)[None] == 7  # which may hide it
    options = {"key_padding_mask": padding} if which > 0 else {}
    results = train(tensors, way="Threshold", **options, **KEEP)
    assert which == 0 or all(result.isfinite().all() for result in results)


def test_compile_stores_the_support():
    """The choice depends on numbers, which a trace has not; the results are those of eager mode within rounding."""
    torch._dynamo.reset()
    ops = []

    def backend(graph, inputs):
        ops.append(graph.print_readable(print_output=False))
        return graph

    leaves = leaves_of(many_kept(1, 2, 60, 150, 16))
    compiled = torch.compile(lambda *inputs: threshold_attention(*inputs, **KEEP), fullgraph=True, backend="aot_eager")
    ours = compiled(*leaves)
    eager = threshold_attention(*leaves, **KEEP)
    assert way_of(eager) == "Recomputed"
    torch.testing.assert_close(ours, eager)
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (ours, eager)]
    torch.testing.assert_close(*grads)
    torch.compile(lambda *inputs: threshold_attention(*inputs, **KEEP), fullgraph=True, backend=backend)(*leaves)
    assert len(ops) == 1 and "threshold_attention_bits" not in ops[0] and "is_dense" not in ops[0]


def test_without_gradient_nothing_is_kept():
    tensors = leaves_of(many_kept(1, 2, 60, 150, 16))
    with torch.no_grad():
        assert threshold_attention(*tensors, **KEEP).grad_fn is None


def test_what_is_kept_is_not_overestimated():
    """Among a few keys of many the largest score is not in view: a fifth that is kept looks like a third."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 4096, 64) for _ in range(3))
    scores = query[0, 0, ::64] @ key[0, 0].mT / 8
    below = scores - scores.amax(-1, keepdim=True)
    for share, dense in ((0.2, False), (0.45, True)):
        threshold = math.exp(float(below.quantile(1 - share)))
        assert (
            OPS.threshold_attention_is_dense(*op_arguments(query, key, value, threshold=threshold, scale=0.125))
            is dense
        )
