"""What the launchers of dag_network decide before anything is compiled: rows, tiles, configurations, what is kept."""

import copy
import gc
import weakref
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from compsparse_kernels import DAGLayout, FunctionGraph, dag_network, explain
from compsparse_kernels.layouts.dag import INDEX_TENSORS
from compsparse_kernels.ops.arguments import compute_dtype
from compsparse_kernels.ops.dag_network import gather
from compsparse_kernels.ops.dag_network import triton as kernels
from compsparse_kernels.ops.triton_launch import Launch
from python_tests.gpu.aot import TARGETS
from python_tests.gpu.cases import shared_memory_of
from python_tests.gpu.dag_networks import GRAPHS, Case, network

LAYOUTS = {name: DAGLayout(graph, 3, in_channels=3, out_channels=2) for name, graph in GRAPHS.items()}


def forward_of(layout):
    return gather.forward_rows(layout.nodes, layout.edge_ptr, layout.edges, layout.steps, layout.weight_shapes)


def backward_of(layout):
    index = (layout.nodes, layout.child_ptr, layout.children, layout.steps)
    return gather.backward_rows(*index, layout.weight_shapes, layout.in_features)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_of_the_forward(layout):
    """Each node once, in its step, with its weight, and in each place of its fan-in the parent's row, or 0."""
    rows = forward_of(layout)
    assert [kind for kind, _ in rows.steps] == [int(layout.nodes[begin, 0]) for begin in layout.steps[:-1]]
    executed = [(kind, int(number)) for kind, numbers in rows.steps for number in numbers]
    for i, (kind, weight, column, output) in enumerate(layout.nodes.tolist()):
        of_kind, number = rows.kinds[kind], executed[i][1]
        assert executed[i][0] == kind and of_kind.first[number] == column + 1
        assert of_kind.weight[number] == weight
        assert of_kind.weight_ptr[weight] <= number < of_kind.weight_ptr[weight + 1]
        inputs = torch.zeros(layout.kinds[kind].fan_in, dtype=torch.int32)
        for parent, channels, offset in layout.edges[layout.edge_ptr[i] : layout.edge_ptr[i + 1]].tolist():
            inputs[offset : offset + channels] = torch.arange(parent + 1, parent + 1 + channels)
        assert torch.equal(of_kind.inputs[number], inputs)
        if output >= 0:
            assert rows.outputs[output] == column + 1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_terms_of_the_backward(layout):
    """Each vertex that is read, once, after its children; a term for each output of each child, with its weight."""
    numbers = [torch.arange(shape[0] * shape[1] * shape[2]) for shape in layout.weight_shapes]
    flat = torch.cat([part + 1000 * kind for kind, part in enumerate(numbers)])
    sources = layout.graph.num_sources
    column = [3 * source for source in range(sources)] + layout.nodes[:, 2].tolist()
    vertex_of = {first + 1: vertex for vertex, first in enumerate(column)}
    seen = set()
    for step in backward_of(layout):
        for at, first in enumerate(step.first.tolist()):
            vertex = vertex_of[first]
            expected = []
            for child, offset in layout.children[layout.child_ptr[vertex] : layout.child_ptr[vertex + 1]].tolist():
                kind, weight, begin, output = layout.nodes[child].tolist()
                assert output >= 0 or sources + child in seen
                _, out, fan_in = layout.weight_shapes[kind]
                block = 1000 * kind + weight * out * fan_in + offset
                expected += [(begin + 1 + o, block + o * fan_in) for o in range(out)]
            terms = slice(step.ptr[at], step.ptr[at + 1])
            weights = flat[step.weight[terms] * step.unit]
            assert list(zip(step.row[terms].tolist(), weights.tolist(), strict=True)) == expected
            assert len(expected) <= step.longest and (not step.even or len(expected) % step.even == 0)
            seen.add(vertex)
    sinks = {sources + i for i, output in enumerate(layout.nodes[:, 3].tolist()) if output >= 0}
    assert seen | sinks == set(range(len(column))) and not seen & sinks


def test_weights_that_begin_at_multiples_of_16_are_counted_so():
    assert {step.unit for step in backward_of(DAGLayout(FunctionGraph.tree(8), 16, in_channels=16))} == {16}
    assert {step.unit for step in backward_of(DAGLayout(FunctionGraph.tree(8), 8, in_channels=8))} == {1}


def test_vertices_with_most_terms_come_first():
    graph = FunctionGraph(3, [[0, 1], [1, 2], [3, 4, 1]])
    *_, sources = backward_of(DAGLayout(graph, 4))
    assert sources.first.tolist() == [2, 1, 3] and sources.ptr.diff().tolist() == [9, 4, 4]


def launches_of(width, batch, dtype=torch.bfloat16):
    layout = DAGLayout(FunctionGraph.tree(16), width)
    weights = [torch.zeros(shape, dtype=dtype) for shape in layout.weight_shapes]
    h = kernels._activations(torch.zeros(batch, layout.in_features, dtype=dtype), layout.columns)
    forward = forward_of(layout)
    return [
        *kernels.forward_launches(h, h, weights, [], forward, layout.linear, "relu", batch),
        *kernels.backward_launches(h, h, weights, backward_of(layout), layout.linear, "relu", batch),
        *(kernels.weight_launch(h, h, *pair) for pair in zip(layout.weight_shapes, forward.kinds, strict=True)),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 16, 48, 300])
@pytest.mark.parametrize("batch", [1, 100, 3000])
def test_every_target_has_a_few_configurations_that_fit(batch, width, dtype):
    for launch in launches_of(width, batch, dtype):
        given = launch.arguments
        assert given["lanes"] % given["TILE_BATCH"] == 0  # no step and no tile of the batch is cut
        kept = ("TILE_OUT", "TILE_IN") if "sums" in given else ("TILE_BATCH", "TILE_OUT")
        (summed,) = {"TILE_BATCH", "TILE_OUT", "TILE_IN"} - set(kept)
        step_bytes = sum(given[side] for side in kept) * given[summed] * dtype.itemsize
        for target in TARGETS:
            chosen = kernels.suitable(kernels.CONFIGS, given, shared_memory_of(target))
            assert 1 <= len(chosen) <= 8
            assert all((config.num_stages - 1) * step_bytes <= shared_memory_of(target) for config in chosen)


def test_the_batch_tile_leaves_enough_programs():
    h = torch.empty(1, 4096, dtype=torch.bfloat16)
    tiles = [kernels._product(h, count, 64, 128, 128) for count in (64, 8, 1)]
    assert [tile["TILE_BATCH"] for tile, _ in tiles] == [128, 64, 16]
    assert [programs for _, programs in tiles] == [2048, 512, 256]


def test_steps_are_cut_only_where_they_must_be():
    h = torch.empty(1, 64, dtype=torch.bfloat16)
    steps = [
        (tile["TILE_IN"], tile["EVEN_IN"]) for tile, _ in (kernels._product(h, 1, 16, n, n) for n in (128, 48, 30))
    ]
    assert steps == [(64, True), (16, True), (32, False)]


def test_the_work_on_shared_weights_is_split():
    layout = DAGLayout(FunctionGraph.conv1d(64, kernel=3, depth=1), 16, out_channels=16)
    h = torch.zeros(1 + layout.columns, 512)
    (kind,) = forward_of(layout).kinds
    launch = kernels.weight_launch(h, h, layout.weight_shapes[0], kind)
    sums = launch.arguments["sums"]
    assert kernels.ENOUGH_PROGRAMS / 2 < launch.programs <= kernels.ENOUGH_PROGRAMS
    assert len(sums) == launch.programs and sums.dtype == torch.float32


WAITS = ("_local_scalar_dense", "nonzero", "unique", "_unique2", "is_nonzero", "equal")


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        assert "device" not in (kwargs or {}) or function.overloadpacket.__name__ != "_to_copy"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("graph", GRAPHS)
def test_after_the_first_call_nothing_waits_for_the_gpu(graph):
    net = network(Case(graph))

    def both():
        return net.forward(kernels.dag_network), net.backward(kernels.dag_network_backward)

    with mock.patch.object(Launch, "__call__", lambda launch: None):
        both()
        with mock.patch.object(gather, "_numpy", side_effect=AssertionError("derived again")), _Ops() as ops:
            both()
    assert "index_select" in ops.names and not set(ops.names) & set(WAITS)


def test_what_is_kept_for_a_layout_goes_with_it():
    with mock.patch.object(Launch, "__call__", lambda launch: None):
        net = network(Case("skip edges"))
        net.forward(kernels.dag_network)
        net.backward(kernels.dag_network_backward)
    alive = weakref.ref(net.layout.nodes)
    del net
    gc.collect()
    assert alive() is None


def on_fake_gpu(layout):
    other = copy.copy(layout)
    for name in INDEX_TENSORS:
        part = getattr(layout, name)
        object.__setattr__(other, name, torch.empty(part.shape, dtype=part.dtype, device="cuda"))
    return other


def test_on_a_gpu_the_same_public_call_takes_half_precision():
    """Fake tensors lie on a GPU that is not there: everything runs but the kernels."""
    real = LAYOUTS["skip edges"]
    with FakeTensorMode():
        x = torch.empty(5, real.in_features, device="cuda", dtype=torch.bfloat16)
        assert explain("dag_network", x)["triton"] == "runs"
        assert explain("dag_network", x.double())["triton"].startswith("dtype float64 (has")
        weights = [torch.empty(shape, device="cuda", dtype=x.dtype) for shape in real.weight_shapes]
        y = dag_network(x, weights, on_fake_gpu(real))
        assert y.dtype == torch.bfloat16 and y.device.type == "cuda" and y.shape == (5, real.out_features)


def test_autocast_on_a_gpu_computes_in_half_precision():
    assert compute_dtype("dag_network", "cuda") == torch.get_autocast_dtype("cuda")
