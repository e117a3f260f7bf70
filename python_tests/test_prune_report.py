"""prune.report: bytes as training really keeps them, verdicts that the rounds bear out, a model left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compsparse_kernels import prune
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.prune.memory import storage_bytes, tensors_in
from compsparse_kernels.prune.reporting import training_bytes
from compsparse_kernels.testing import random_mask
from python_tests.pruning import KINDS, masks_of, net


def converted(kind="csr"):
    return prune.convert(net(), masks_of(0.3, seed=1), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_a_training_run(kind):
    """After a step of Adam: parameters, gradients, both moments, and the index tensors of the state dict."""
    layer = MaskedLinear(40, 24, random_mask(24, 40, 0.2), kind=kind)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(3, 40)).sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    numbers = [tensor for parameter in layer.parameters() for tensor in (parameter, parameter.grad)] + moments
    kept = sum(tensor.numel() * 4 for tensor in numbers)
    layout = layer.layout
    orders = {
        "csr": lambda: [*layout.by_output[:2], *layout.by_input],
        "block": lambda: [*layout.blocks.by_output, *layout.blocks.by_input, layout.mask],
        "dense": lambda: [layout.mask],
    }[kind]()
    assert training_bytes(layer) == kept + sum(tensor.nbytes for tensor in orders if tensor is not None)


def test_transposes_and_shared_storages_count_once():
    layout = MaskedLinear(16, 16, random_mask(16, 16), kind="csr").layout
    before = storage_bytes(tensors_in(layout), set())
    assert layout.T.T is layout and storage_bytes(tensors_in(layout), set()) == before > 0


def test_a_row_per_masked_layer():
    found = prune.report(converted(), batch=16, rounds=5, show=False)
    assert [(row.name, row.out_features, row.in_features, row.kind) for row in found.layers] == [
        ("0", 18, 13, "csr"),
        ("2", 17, 18, "csr"),
    ]
    masks = masks_of(0.3, seed=1)
    for row in found.layers:
        assert row.density == pytest.approx(masks[row.name].double().mean().item())
        assert row.dense_bytes == 16 * (row.out_features * row.in_features + row.out_features)
        for timing in (row.forward, row.training):
            low, median, high = timing.ratios
            assert 0 < low <= median <= high and timing.ours_ms > 0 and timing.dense_ms > 0
    assert found.settings["batch"] == 16 and found.settings["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    "ours, dense, verdict",
    [
        ([1, 1, 1, 1, 1], [2, 2, 3, 2, 2], "2.00x faster"),
        ([2, 2, 2, 2, 2], [1, 1, 1, 1, 1], "2.00x slower"),
        ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1], "no difference"),
        ([1, 1, 1, 1, 1], [0.9, 0.8, 1.1, 1.2, 1.3], "no difference"),  # faster in most rounds, not in three quarters
        ([1, 1, 1, 1, 9], [2, 2, 2, 2, 2], "2.00x faster"),  # one round was disturbed
    ],
)
def test_verdicts(ours, dense, verdict):
    timing = prune.Timing.of(ours, dense)
    assert timing.verdict == verdict
    assert (timing.ours_ms, timing.dense_ms) == (1e3 * sorted(ours)[2], 1e3 * sorted(dense)[2])


def test_below_break_even_no_gain_is_printed(capsys, monkeypatch):
    slow = prune.Timing.of([2.0] * 5, [1.0] * 5)
    monkeypatch.setattr("compsparse_kernels.prune.reporting._timed", lambda *_: slow)
    prune.report(converted(), batch=4)
    shown = capsys.readouterr().out
    assert "faster" not in shown and shown.count("2.00x slower") == 4 and "2000.000 / 1000.000" in shown
    fast = prune.Timing.of([1.0] * 5, [2.0] * 5)
    monkeypatch.setattr("compsparse_kernels.prune.reporting._timed", lambda *_: fast)
    prune.report(converted(), batch=4)
    assert capsys.readouterr().out.count("2.00x faster") == 4


def test_the_model_is_left_as_it_was(capsys):
    model = converted()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    F.mse_loss(model(torch.randn(4, 13)), torch.randn(4, 4)).backward()
    seen.clear()
    state = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    generator = torch.get_rng_state()
    prune.report(model, batch=4, rounds=5)
    assert torch.equal(torch.get_rng_state(), generator) and not seen and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True))
    assert "MaskedLinear / dense" in capsys.readouterr().out


def test_frozen_layers_are_measured_too():
    model = converted()
    model[0].values.requires_grad_(False)
    assert len(prune.report(model, batch=4, rounds=5, show=False).layers) == 2


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: prune.report(1), TypeError, "model: expected nn.Module, got int"),
        (lambda: prune.report(nn.Linear(2, 2)), ValueError, "model: expected one with MaskedLinear layers"),
        (lambda: prune.report(converted(), batch=0), ValueError, "batch: expected a positive int, got 0"),
        (lambda: prune.report(converted(), rounds=4), ValueError, "rounds: expected at least 5, got 4"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
