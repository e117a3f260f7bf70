"""Single launches of dag_network's kernels on integers, and what they must leave in memory.

The integers are so small that every product and sum is exact: what a launch writes has one right rounding, in whatever
order it sums. All that it may not read is NaN, and all that it may not write must stay as it was.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton

from compsparse_kernels import DAGLayout, FunctionGraph
from compsparse_kernels.ops.dag_network import triton as kernels
from compsparse_kernels.ops.triton_launch import Launch
from python_tests.gpu.aot import Compiled
from python_tests.gpu.ptx import Program
from python_tests.gpu.ptx.torch_launch import run_compiled

DTYPE = torch.float16
NAN = float("nan")

# Nodes 4 and 6 share their weights, and so do nodes 7 to 9. Nodes 10 and 11 read a source too, and 12 to 14 are sinks.
# Nobody reads source 3; an even number of nodes reads each other source and each node of the first level.
GRAPH = FunctionGraph(
    4,
    [[0, 1], [1, 2], [2, 0], [4, 5], [5, 6], [6, 4], [0, 4], [0, 4], [7, 8], [9, 10], [11, 7]],
    shares=["a", None, "a", "b", "b", "b", None, None, None, "c", "c"],
)


class Bounds(NamedTuple):
    """What a tensor may hold, element by element; NaN where it must hold NaN."""

    low: torch.Tensor
    high: torch.Tensor

    def hold(self, ours: torch.Tensor) -> bool:
        within = (self.low <= ours) & (ours <= self.high)
        return bool((within | (ours.isnan() & self.low.isnan())).all())


@dataclass(frozen=True)
class Problem:
    """A launch, and what it must leave in each argument that it writes (in the sum of its parts, where it has them)."""

    launch: Launch
    expected: dict[str, Bounds]
    before: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self):
        before = {name: self.launch.arguments[name].clone() for name in self.expected}
        object.__setattr__(self, "before", before)

    def check(self, compiled: Compiled, program: Program | None = None, **options) -> None:
        """``compiled`` is the launch's code. Raises PTXFault or AssertionError unless it, or ``program`` in its place,
        leaves there what it must."""
        for name, tensor in self.before.items():
            self.launch.arguments[name].copy_(tensor)
        readonly = [position for position, name in enumerate(compiled.parameters) if name not in self.expected]
        run_compiled(compiled, program=program, readonly=readonly, **options)
        for name, bounds in self.expected.items():
            ours = self.launch.arguments[name]
            if ours.dim() > bounds.low.dim():
                ours = ours.double().sum(0)
            assert bounds.hold(ours), name


class Spec(NamedTuple):
    """One launch: which step of a network of this width it is, or which kind's weights, in how many parts.

    Sources have ``in_channels``, which are ``width`` where None.
    """

    width: int
    batch: int
    step: int = 0
    parts: int = 1
    in_channels: int | None = None

    @property
    def layout(self) -> DAGLayout:
        return DAGLayout(GRAPH, self.width, in_channels=self.in_channels or self.width)

    @property
    def lanes(self) -> int:
        return triton.cdiv(self.batch, kernels.LANES) * kernels.LANES


class _Numbers:
    """Integers from -``most`` to ``most``."""

    def __init__(self, most: int):
        self.most = most
        self.generator = torch.Generator().manual_seed(most)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randint(-self.most, self.most + 1, shape, generator=self.generator).to(DTYPE)

    def matrix(self, spec: Spec, rows: torch.Tensor) -> torch.Tensor:
        """``[1 + columns, lanes]``: these rows have numbers, 0 past the batch; row 0 is 0, the others NaN."""
        matrix = torch.full((1 + spec.layout.columns, spec.lanes), NAN, dtype=DTYPE)
        rows = rows.unique()
        matrix[rows, : spec.batch] = self(len(rows), spec.batch)
        matrix[rows, spec.batch :] = 0
        matrix[0] = 0
        return matrix


def forward(spec: Spec, tile: dict[str, object], activation: str) -> Problem:
    """Activations of the nodes of a step, and their slopes where the activation is curved."""
    layout = spec.layout
    curved = activation in kernels.CURVED
    draw = _Numbers(2 if curved else 31)  # in the bends of the curve
    rows = kernels.forward_rows(layout.nodes, layout.edge_ptr, layout.edges, layout.steps, layout.weight_shapes)
    kind, nodes = rows.steps[spec.step]
    first, weight, inputs = (
        part[nodes.long()].long() for part in (rows.kinds[kind].first, rows.kinds[kind].weight, rows.kinds[kind].inputs)
    )
    h = draw.matrix(spec, inputs)
    slopes = torch.full_like(h, NAN) if curved else None
    weights = [torch.full(shape, NAN, dtype=DTYPE) for shape in layout.weight_shapes]
    biases = [torch.full(shape, NAN, dtype=DTYPE) for shape in layout.bias_shapes]
    used = weight.unique()
    weights[kind][used] = draw(len(used), *weights[kind].shape[1:])
    biases[kind][used] = draw(len(used), biases[kind].shape[1])
    launch = kernels.forward_launches(h, slopes, weights, biases, rows, layout.linear, activation, spec.batch)[
        spec.step
    ]
    launch = _tiled(launch, tile, len(nodes), launch.arguments["out"], launch.arguments["fan_in"])

    z = weights[kind][weight].double() @ h[inputs].double() + biases[kind][weight].double()[:, :, None]
    written = first[:, None] + torch.arange(z.shape[1])  # [nodes, out]
    within = torch.arange(spec.lanes) < spec.batch
    value, slope = _activated(z, launch.arguments["ACTIVATION"])
    expected = {"h": _changed(h, written, *(bound.where(within, 0.0) for bound in value))}
    if launch.arguments["KEEP_SLOPES"]:
        # Past the batch they may be anything.
        expected["slopes"] = _changed(
            slopes, written, slope[0].where(within, -float("inf")), slope[1].where(within, float("inf"))
        )
    return Problem(launch, expected)


def backward(spec: Spec, tile: dict[str, object], activation: str) -> Problem:
    """Gradients of the vertices of a step, from the last to the sources."""
    layout, draw = spec.layout, _Numbers(31)
    index = (layout.nodes, layout.child_ptr, layout.children, layout.steps)
    rows = kernels.backward_rows(*index, layout.weight_shapes, layout.in_features)
    step = rows[spec.step]
    written = step.first.long()[:, None] + torch.arange(step.channels)  # [vertices, channels]
    at = step.weight[:, None] * step.unit + torch.arange(step.channels)  # [terms, channels]
    gradients = draw.matrix(spec, step.row.long())
    slopes = torch.full_like(gradients, NAN)
    slopes[written, : spec.batch] = _Numbers(2)(*written.shape, spec.batch)
    flat = torch.full((sum(shape.numel() for shape in map(torch.Size, layout.weight_shapes)),), NAN, dtype=DTYPE)
    flat[at] = draw(*at.shape)  # weights that are shared take the last numbers
    weights = [part.view(shape) for part, shape in zip(_split(flat, layout), layout.weight_shapes, strict=True)]
    launches = kernels.backward_launches(gradients, slopes, weights, rows, layout.linear, activation, spec.batch)
    launch = launches[spec.step]
    launch = _tiled(launch, tile, len(written), step.channels, step.even)

    counts = step.ptr.diff().tolist()
    terms = zip(flat[at].double().split(counts), gradients[step.row.long()].double().split(counts), strict=True)
    sums = torch.stack([values.mT @ read for values, read in terms])  # [vertices, channels, lanes]
    value = slopes[written].double()
    name = launch.arguments["ACTIVATION"]
    if name != "none":
        sums = sums.where(value > 0, 0.0) if name == "relu" else sums * value
    sums = sums.where(torch.arange(spec.lanes) < spec.batch, 0.0)
    return Problem(launch, {"gradients": _changed(gradients, written, sums, sums)})


def weight(spec: Spec, tile: dict[str, object]) -> Problem:
    """The gradients of a kind's weights."""
    layout, draw = spec.layout, _Numbers(31)
    rows = kernels.forward_rows(layout.nodes, layout.edge_ptr, layout.edges, layout.steps, layout.weight_shapes)
    kind, shape = rows.kinds[spec.step], layout.weight_shapes[spec.step]
    outputs = kind.first.long()[:, None] + torch.arange(shape[1])  # [nodes, out]
    inputs = kind.inputs.long()
    gradients, h = draw.matrix(spec, outputs), draw.matrix(spec, inputs)
    launch = kernels.weight_launch(gradients, h, shape, kind)
    sums = torch.full((spec.parts, *shape), NAN, dtype=DTYPE if spec.parts == 1 else torch.float32)
    tiles = shape[0] * triton.cdiv(shape[1], tile["TILE_OUT"]) * triton.cdiv(shape[2], tile["TILE_IN"])
    launch = Launch(launch.kernel, launch.arguments | tile | {"sums": sums, "parts": spec.parts}, spec.parts * tiles)

    products = gradients[outputs].double() @ h[inputs].double().mT  # [nodes, out, fan_in]
    exact = torch.zeros(shape, dtype=torch.float64).index_add_(0, kind.weight.long(), products)
    exact = exact.to(sums.dtype)
    return Problem(launch, {"sums": Bounds(exact, exact) if spec.parts > 1 else Bounds(exact[None], exact[None])})


def _tiled(launch: Launch, tile: dict[str, object], count: int, channels: int, even: int) -> Launch:
    """The launch with another tile, which has to suit."""
    assert channels % tile["TILE_OUT"] == 0 or not tile["EVEN_OUT"]
    assert even % tile["TILE_IN"] == 0 or not tile["EVEN_IN"]
    programs = count * triton.cdiv(channels, tile["TILE_OUT"]) * launch.arguments["lanes"] // tile["TILE_BATCH"]
    return Launch(launch.kernel, launch.arguments | tile, programs)


def _split(flat: torch.Tensor, layout: DAGLayout) -> tuple[torch.Tensor, ...]:
    return flat.split([torch.Size(shape).numel() for shape in layout.weight_shapes])


def _activated(z: torch.Tensor, activation: str) -> tuple[Bounds, Bounds | None]:
    """Bounds of the activation and of its slope, computed in float32 from an exact ``z``."""
    if activation == "none":
        return Bounds(z, z), None
    if activation == "relu":
        return Bounds(z.relu(), z.relu()), None
    assert activation == "silu"
    share = z.sigmoid()
    value, slope = z * share, share * (1 + z * (1 - share))
    # sigmoid = 1 / (1 + 2^(-z log2 e)): rounding the exponent costs |z| roundings of the power, the power, the sum and
    # the quotient cost one each; what it is multiplied with and added to costs |z| times that, and four more.
    error = torch.finfo(torch.float32).eps * (4 + 2 * z.abs()) * (1 + z.abs())
    return Bounds(value - error, value + error), Bounds(slope - error, slope + error)


def _changed(before: torch.Tensor, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Bounds:
    """``before`` with these rows, ``[nodes, channels, lanes]``, in place of its own. Rounding keeps bounds in order."""
    bounds = Bounds(before.clone(), before.clone())
    for bound, values in zip(bounds, (low, high), strict=True):
        bound[rows] = values.to(before.dtype)
    return bounds
