"""DAGNetwork and SparseDAGLinear through torch.compile, torch.export and AOTInductor."""

import shutil

import pytest
import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import nn
from torch.optim.adamw import adamw

from compsparse_kernels import DAGNetwork, FunctionGraph, SparseDAGLinear

TREE, BATCH = FunctionGraph.tree(8), 7


def dag_network():
    return DAGNetwork(TREE, 4, hidden=3)


def sparse_dag_linear():
    return SparseDAGLinear(8, 12, TREE.level_edges(1), activation="gelu")


def both():
    level = FunctionGraph.conv1d(8, kernel=3, padding=1).level_edges(1)
    return nn.Sequential(SparseDAGLinear(8, 16, level, activation="relu"), DAGNetwork(FunctionGraph.tree(16), 4))


every_model = pytest.mark.parametrize("make", [dag_network, sparse_dag_linear], ids=lambda f: f.__name__)
ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}


def make_pair(make):
    torch.manual_seed(0)
    model = make()
    twin = make()
    twin.load_state_dict(model.state_dict())
    return model, twin


def whole_step(model):
    """Forward, loss, backward and AdamW. (torch breaks the graph at an optimizer's ``step``, whatever the model: so its
    functional form.)"""
    parameters = list(model.parameters())
    averages, squares = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    counts = [torch.zeros(()) for _ in parameters]

    def step(x, target):
        loss = F.mse_loss(model(x), target)
        grads = list(torch.autograd.grad(loss, parameters))
        with torch.no_grad():
            options = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "maximize": False, "foreach": False}
            adamw(parameters, grads, averages, squares, [], counts, **options, **ADAMW)
        return loss.detach()

    return step


def eager_steps(model, data):
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for x, target in data:
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@every_model
def test_a_whole_training_step_is_one_graph(make, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no compiler here")
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch cannot trace autograd.grad")
    torch._dynamo.reset()
    model, twin = make_pair(make)
    sample = model(torch.randn(BATCH, 8))
    data = [(torch.randn(BATCH, 8), torch.randn_like(sample)) for _ in range(4)]
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        step = torch.compile(whole_step(model), fullgraph=True, backend=backend)
        losses = [step(x, target) for x, target in data]
    torch.testing.assert_close(losses, list(eager_steps(twin, data)))
    before = make_pair(make)[0]
    for parameter, other, start in zip(model.parameters(), twin.parameters(), before.parameters(), strict=True):
        # AdamW divides by the size of the gradient, so that rounding of small ones shows.
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-5)
        assert (parameter - start).abs().max() > 1e-2


@every_model
def test_functional_call_compiles(make):
    torch._dynamo.reset()
    model, twin = make_pair(make)
    x = torch.randn(BATCH, 8)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    parameters = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    twin.load_state_dict(parameters, strict=False)
    for parameter in parameters.values():
        parameter.requires_grad_()
    value, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(parameters), twin(x).square().mean()
    torch.testing.assert_close(value, expected)
    ours = torch.autograd.grad(value, list(parameters.values()))
    torch.testing.assert_close(ours, torch.autograd.grad(expected, list(twin.parameters())))


@every_model
def test_export_with_any_batch(make):
    model = make().eval()
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(model, (torch.randn(BATCH, 8),), dynamic_shapes=({0: batch},))
    called = {str(node.target) for node in program.graph.nodes}
    assert called & {"compsparse.dag_network.default", "compsparse.block_sparse_linear.default"}
    for rows in (2, 9, 300):
        x = torch.randn(rows, 8)
        assert torch.equal(program.module()(x), model(x))


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler here")
def test_ahead_of_time_inductor(tmp_path):
    """One shared object without Python in the model, which calls the ops of this library."""
    model = both().eval()
    batch = torch.export.Dim("batch", min=2, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(BATCH, 8),), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        for rows in (2, 9, 300):
            x = torch.randn(rows, 8)
            assert torch.equal(compiled(x), model(x))
