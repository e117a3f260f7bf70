"""What tests, benchmarks and ``python -m compsparse_kernels check`` share: inputs, the error budget, what can run here.

**The error budget.** A kernel and dense torch round the same sums in different orders, so neither is *the* right
answer; both are compared with a reference in float64. Ours may be wrong by at most

    2 * max|dense - exact|  +  eps * max(magnitude),

in the same dtype, on the same input. Why these terms and no other tolerance:

- Rounding a sum of K products errs by ``O(eps) * sum |x_k w_k|`` whatever the order (Higham, *Accuracy and Stability
  of Numerical Algorithms*, 2002, section 3.1); the order sets only the constant. The largest error over a tensor is
  stable from order to order, so the measured error of dense torch carries the constant for this input, and 2 is the
  room between two orders.
- Where few numbers are compared, dense torch may be exact by luck. One rounding of the ``magnitude``, the sum
  ``sum |x_k w_k|`` of the terms in absolute value, is what no order can be asked to avoid. Where no magnitude is
  given, the result itself stands for it.
- In float64 the reference is rounded as well. There dense torch runs in float32 on the same numbers, its error is
  scaled by the ratio of the two ``eps`` (the error is linear in it), and the reference's own error counts once more.

Nothing here is tuned to a machine, so the budget is the same in CI as at home.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from compsparse_kernels.layouts import DAGLayout
from compsparse_kernels.ops import cpu_isa
from compsparse_kernels.ops.backends import CPU_CAPS

DTYPES = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
THREADS = (1, 2, 3)
MEMORY_FORMS = ("contiguous", "transposed", "strided", "expanded")

# Instruction sets whose kernels this processor can run; empty where no compiled kernels are there.
ISAS = CPU_CAPS[: CPU_CAPS.index(cpu_isa()) + 1] if cpu_isa() else ()


def random_tensor(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    memory: str = "contiguous",
    seed: int = 0,
    requires_grad: bool = False,
) -> torch.Tensor:
    """Standard normal numbers, the same in every dtype (drawn in float32), that lie in memory in one of MEMORY_FORMS.

    ``expanded`` repeats one row along the first dimension with stride 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator).to(dtype)

    if memory == "contiguous":
        tensor = draw(*shape)
    elif memory == "transposed":
        tensor = draw(*reversed(shape)).permute(*reversed(range(len(shape))))
    elif memory == "strided":
        tensor = draw(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    elif memory == "expanded":
        tensor = draw(1, *shape[1:]).expand(*shape)
    else:
        raise ValueError(f"memory: expected one of {', '.join(MEMORY_FORMS)}, got {memory!r}")
    return tensor.requires_grad_(requires_grad)


def random_mask(rows: int, columns: int, density: float = 0.4, seed: int = 0) -> torch.Tensor:
    """bool ``[rows, columns]`` with each entry set independently."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def attention_inputs(
    batch, heads, queries, keys, width, value_width=None, kv_heads=None, dtype=torch.float32, seed=0, grad=False
):
    """Query (scaled so that supports are small), key and value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, heads, queries, width),
        (batch, kv_heads or heads, keys, width),
        (batch, kv_heads or heads, keys, value_width or width),
    ]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [tensor.requires_grad_(grad) for tensor in (query * 2, key, value)]


def attention_weights(
    scores: torch.Tensor, kept: torch.Tensor, threshold: float | torch.Tensor, rule: str, weighting: str
) -> torch.Tensor:
    """The weights of ``threshold_attention`` on a support that is given, as one writes them in dense torch.

    Args:
        scores: ``[..., Tq, Tk]``, -inf where a key is hidden.
        kept: bool, of that shape: the support.
        threshold: a number, or a tensor broadcastable to ``[..., Tq, 1]``.
        rule: of ``threshold_attention``.
        weighting: softmax, shrink or rectified.
    """
    some = kept.any(-1, keepdim=True)
    scores = scores.masked_fill(~kept, -torch.inf)
    top = scores.amax(-1, keepdim=True).masked_fill(~some, 0) if scores.shape[-1] else some.to(scores.dtype)
    below = (scores - top).masked_fill(~kept, 0)
    if rule == "entmax":
        return _entmax_weights((threshold - 1) * below, kept, threshold)
    if weighting == "softmax":
        return scores.softmax(-1).masked_fill(~some, 0)
    threshold = torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)
    cut = threshold.log() if rule == "relative" else threshold - top
    heights = below - cut if weighting == "rectified" else below.exp() - cut.exp()
    heights = heights.masked_fill(~kept, 0)
    return heights / heights.sum(-1, keepdim=True).masked_fill(~some, 1)


def _entmax_weights(x: torch.Tensor, kept: torch.Tensor, alpha: float) -> torch.Tensor:
    number = kept.sum(-1, keepdim=True).clamp(min=1).to(x.dtype)
    mean = x.sum(-1, keepdim=True) / number
    spread = (x - mean).masked_fill(~kept, 0).square().sum(-1, keepdim=True)
    tau = mean - (1 / number if alpha == 2 else ((1 - spread) / number).sqrt())
    return (x - tau).masked_fill(~kept, 0).pow(1 / (alpha - 1))


def dag_inputs(layout: DAGLayout, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """x, then the weights of each kind, then the biases of each kind; weights keep channels at a scale of about 1."""
    weights = [
        random_tensor(*shape, seed=seed + 1 + kind) / shape[-1] ** 0.5
        for kind, shape in enumerate(layout.weight_shapes)
    ]
    biases = [random_tensor(*shape, seed=seed + 1001 + kind) for kind, shape in enumerate(layout.bias_shapes)]
    x = random_tensor(batch, layout.in_features, seed=seed)
    return [tensor.to(dtype) for tensor in (x, *weights, *biases)]


def dag_node_by_node(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    layout: DAGLayout,
    biases: Sequence[torch.Tensor] | None = None,
    act: Callable[[torch.Tensor], torch.Tensor] = lambda z: z,
) -> torch.Tensor:
    """``dag_network``, slowly: one ``F.linear`` per node, along the graph. Of the layout's index tensors it reads only
    which weight each part of a node has."""
    graph, parts, nodes = layout.graph, layout.parts.tolist(), layout.nodes.tolist()
    is_read = set(graph.parents.idx.tolist())
    shares_with_read = {int(share) for node, share in enumerate(graph.share) if graph.num_sources + node in is_read}

    def affine(part, z):
        kind, weight = nodes[part][:2]
        return F.linear(z, weights[kind][weight], biases[kind][weight] if biases else None)

    argument_channels = _argument_channels(layout)
    values = [*x.unflatten(-1, (graph.num_sources, -1)).unbind(-2), *[None] * graph.num_nodes]  # [batch, channels]
    outputs = {}
    for vertex in np.concatenate(graph.levels[1:]).tolist():
        node = vertex - graph.num_sources
        begin, end = graph.parents.ptr[node : node + 2]
        arguments = [x.new_zeros(len(x), channels) for channels in argument_channels[graph.share[node]]]
        for parent, place in zip(graph.parents.idx[begin:end], graph.parents.position[begin:end], strict=True):
            arguments[place] = values[parent]
        first, second, readout = parts[node]
        z = affine(first, torch.cat(arguments, -1))
        is_output = vertex in graph.sinks and graph.share[node] not in shares_with_read
        if layout.hidden is not None:
            z = affine(second, act(z))
        elif not is_output:
            z = act(z)
        values[vertex] = z
        outputs[vertex] = z if is_output or readout < 0 else affine(readout, z)
    return torch.cat([outputs[sink] for sink in graph.sinks.tolist()], -1)


def _argument_channels(layout: DAGLayout) -> list[list[int]]:
    """Of each weight of the graph, the channels of each argument; of one that no node has, those of the others."""
    graph = layout.graph
    _, idx, position, arity = graph.parents
    channels = np.where(idx < graph.num_sources, layout.in_channels, layout.width).tolist()
    read = [{} for _ in range(graph.num_weights)]
    for node, place, count in zip(graph.parents.node_of_edge(), position.tolist(), channels, strict=True):
        read[graph.share[node]][place] = count
    arities = dict(zip(graph.share.tolist(), arity.tolist(), strict=True))
    usual = [layout.width if layout.width in places.values() else layout.in_channels for places in read]
    return [[read[share].get(place, usual[share]) for place in range(arities[share])] for share in range(len(read))]


def budget_used(
    ours: torch.Tensor, dense: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor | None = None
) -> float:
    """Error of ``ours`` as a share of the budget of this module's docstring; above 1 is too much, NaN counts as inf.

    Args:
        ours: the result under test.
        dense: dense torch's result in the dtype of ``ours``; where that is float64, in float32 on the same numbers.
        exact: the float64 reference.
        magnitude: float64 ``sum |terms|`` of each element; ``|exact|`` where None.
    """
    if exact.numel() == 0:
        return 0.0
    eps = torch.finfo(ours.dtype).eps
    allowed = 3 if ours.dtype == exact.dtype else 2
    error = _largest(ours.double() - exact)
    dense_error = _largest(dense.double() - exact) * eps / torch.finfo(dense.dtype).eps
    budget = allowed * dense_error + eps * _largest(exact if magnitude is None else magnitude)
    if error != error:
        return float("inf")
    return error / budget if budget > 0 else (0.0 if error == 0 else float("inf"))


def assert_within_budget(
    ours: torch.Tensor,
    dense: torch.Tensor,
    exact: torch.Tensor,
    name: str,
    magnitude: torch.Tensor | None = None,
) -> None:
    """Shape, and error within the budget of this module's docstring (arguments as for :func:`budget_used`)."""
    assert ours.shape == exact.shape, f"{name}: expected shape {list(exact.shape)}, got {list(ours.shape)}"
    assert dense.shape == exact.shape, f"{name}: dense has shape {list(dense.shape)}, exact {list(exact.shape)}"
    assert torch.isfinite(exact).all() and torch.isfinite(dense).all(), f"{name}: the reference itself is not finite"
    used = budget_used(ours, dense, exact, magnitude)
    assert used <= 1, (
        f"{name}: error {_largest(ours.double() - exact):.3g} is {used:.2f} of the budget"
        f" (dense {str(dense.dtype).removeprefix('torch.')} errs by {_largest(dense.double() - exact):.3g})"
    )


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.detach().abs().max())


@contextmanager
def num_threads(count: int):
    """Runs a block with ``torch.set_num_threads(count)``."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_in_subprocess(
    code: str,
    isa: str | None = None,
    blocked: Iterable[str] = (),
    timeout: float = 120,
) -> str:
    """Runs Python code in a fresh process and returns what it prints.

    Args:
        code: the source; it can import this package wherever it lies.
        isa: instruction set the kernels are capped to (``COMPSPARSE_CPU``).
        blocked: modules whose import fails there, as on a machine without them.
        timeout: seconds.

    Raises:
        AssertionError: with what the process printed, if it does not end well.
    """
    environment = dict(os.environ)
    environment.pop("COMPSPARSE_CPU", None)
    if isa is not None:
        environment["COMPSPARSE_CPU"] = isa
    paths = [str(Path(__file__).resolve().parent.parent), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    blocking = "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    source = f"import sys\n{blocking}{code}" if blocking else code
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"the process ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout
