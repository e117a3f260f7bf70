"""ProximalSGD, ProximalAdamW and BetaLasso: torch's optimizers where nothing is penalised, exact zeros where it is."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from compsparse_kernels import MaskLayout, prune
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.testing import DTYPES, HALVES, assert_within_budget, random_mask, random_tensor

STEPS = 50
PAIRS = {
    "sgd": (prune.ProximalSGD, torch.optim.SGD, {"lr": 0.05}),
    "momentum": (prune.ProximalSGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.2}),
    "nesterov": (
        prune.ProximalSGD,
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adamw": (  # torch's own eps is 0 in float16, where squares vanish
        prune.ProximalAdamW,
        torch.optim.AdamW,
        {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1},
    ),
}
SHAPES = [(17, 9), (9,), ()]


def trained(make, options, dtype, gradients, **penalty):
    params = [
        nn.Parameter(random_tensor(*(shape or (1,)), seed=i).view(shape).to(dtype)) for i, shape in enumerate(SHAPES)
    ]
    optimizer = make(params, **options, **penalty)
    for step in gradients:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.to(dtype)
        optimizer.step()
    return [param.detach() for param in params], optimizer


def gradients(dtype):
    """The same in every dtype: a trend and noise."""
    drawn = [
        [random_tensor(*(shape or (1,)), seed=100 * step + i).view(shape) + 0.5 for i, shape in enumerate(SHAPES)]
        for step in range(STEPS)
    ]
    return [[grad.to(dtype) for grad in step] for step in drawn]


@pytest.mark.parametrize("dtype", DTYPES + HALVES, ids=str)
@pytest.mark.parametrize("make, torchs, options", PAIRS.values(), ids=PAIRS)
def test_without_a_penalty_they_are_torchs(make, torchs, options, dtype):
    drawn = gradients(dtype)
    ours, _ = trained(make, options, dtype, drawn)
    theirs, _ = trained(torchs, options, torch.float32 if dtype == torch.float64 else dtype, drawn)
    exact, _ = trained(torchs, options, torch.float64, drawn)
    for name, *parts in zip(("matrix", "vector", "number"), ours, theirs, exact, strict=True):
        assert_within_budget(*parts, name)


@pytest.mark.parametrize("make, torchs, options", PAIRS.values(), ids=PAIRS)
def test_state_dicts_go_to_torch_and_back(make, torchs, options):
    drawn = gradients(torch.float64)
    whole, _ = trained(torchs, options, torch.float64, drawn)
    for first, second in ((make, torchs), (torchs, make)):
        params, before = trained(first, options, torch.float64, drawn[:20])
        params = [nn.Parameter(param) for param in params]
        after = second(params, lr=1.0)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        for step in drawn[20:]:
            for param, grad in zip(params, step, strict=True):
                param.grad = grad
            after.step()
        torch.testing.assert_close([param.detach() for param in params], whole)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_parameters_that_lie_transposed(momentum):
    """What torch's optimizer keeps for them lies transposed too."""
    weight = random_tensor(6, 4, seed=1, dtype=torch.float64)
    results = []
    for make, param in ((prune.ProximalSGD, weight.T.contiguous().T), (torch.optim.SGD, weight.T.contiguous().T)):
        param = nn.Parameter(param)
        assert not param.is_contiguous()
        optimizer = make([param], lr=0.1, momentum=momentum)
        for _ in range(3):
            param.grad = param.detach().sin()
            optimizer.step()
        if make is torch.optim.SGD:
            other = prune.ProximalSGD([param], lr=1.0)
            other.load_state_dict(optimizer.state_dict())
            optimizer = other
        param.grad = torch.ones_like(param)
        optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


# ---- penalties


def least_squares(seed=0, out_features=6, in_features=20):
    """Targets that read three inputs each."""
    x = random_tensor(200, in_features, seed=seed, dtype=torch.float64)
    truth = torch.zeros(out_features, in_features, dtype=torch.float64)
    for row in range(out_features - 2):
        truth[row, 3 * row : 3 * row + 3] = 1.0
    return x, truth


# What `train` leaves of a condition: 400 steps converge to the rounding of a gradient, a sum of 200 terms of about 1.
LEFT = 200 * torch.finfo(torch.float64).eps


def train(layer, optimizer, x, target, steps=400):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().sum() / (2 * len(x))
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.8, "dampening": 0.8}, {"momentum": 0.8}, {"momentum": 0.8, "nesterov": True}],
    ids=["plain", "dampened", "momentum", "nesterov"],
)
def test_l1_reaches_the_optimum_of_the_lasso(settings):
    """Its conditions: gradient = -strength sign(w) where w is not 0, and at most that where it is. Momentum that is not
    dampened makes gradients 1 / (1 - momentum) as large, but not the penalty."""
    x, truth = least_squares()
    layer = nn.Linear(20, 6, bias=False, dtype=torch.float64)
    strength = 0.1 if settings.get("dampening") else 0.1 / (1 - settings.get("momentum", 0))
    optimizer = prune.ProximalSGD(layer.parameters(), lr=0.1, **settings, penalty="l1", strength=strength)
    train(layer, optimizer, x, x @ truth.T)
    weight, slope = layer.weight.detach(), layer.weight.grad
    alive = weight != 0
    assert torch.equal(alive, truth != 0)
    assert (slope[alive] + 0.1 * weight.sign()[alive]).abs().max() < LEFT and slope[~alive].abs().max() < 0.1


@pytest.mark.parametrize("block_shape, shape", [(None, (1, 20)), ((2, 4), (2, 4))], ids=str)
def test_group_l1_reaches_its_optimum(block_shape, shape):
    """The conditions of a group: gradient = -strength sqrt(n) w / |w| if it lives, and no longer if not."""
    x, truth = least_squares()
    layer = nn.Linear(20, 6, bias=False, dtype=torch.float64)
    settings = {"penalty": "group_l1", "strength": 0.05, "block_shape": block_shape}
    train(layer, prune.ProximalSGD([layer.weight], lr=0.2, **settings), x, x @ truth.T)

    def groups(matrix):
        return matrix.unflatten(1, (-1, shape[1])).unflatten(0, (-1, shape[0])).transpose(1, 2).flatten(2)

    weight, slope = groups(layer.weight.detach()), groups(layer.weight.grad)
    norms, most = weight.norm(dim=-1, keepdim=True), 0.05 * math.sqrt(shape[0] * shape[1])
    dead = norms[..., 0] == 0
    assert torch.equal(dead, groups(truth).norm(dim=-1) == 0)
    assert ((slope + most * weight / norms)[~dead]).abs().max() < LEFT
    assert slope[dead].norm(dim=-1).max() < most


@pytest.mark.parametrize("penalty, block_shape", [("l1", None), ("group_l1", None), ("group_l1", (2, 5))])
def test_adamw_finds_the_support(penalty, block_shape):
    x, truth = least_squares()
    layer = nn.Linear(20, 6, bias=False, dtype=torch.float64)
    settings = {"penalty": penalty, "strength": 0.2, "block_shape": block_shape}
    train(layer, prune.ProximalAdamW([layer.weight], lr=0.02, weight_decay=0.0, **settings), x, x @ truth.T)
    weight = layer.weight.detach()
    assert (weight[truth != 0] > 0.5).all() and not weight[-2:].any()


def test_groups_have_settings_of_their_own():
    layer = nn.Linear(8, 8)
    before = copy.deepcopy(layer)
    optimizer = prune.ProximalSGD(
        [{"params": [layer.weight], "penalty": "l1", "strength": 1e6}, {"params": [layer.bias], "lr": 0.5}], lr=0.1
    )
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert not layer.weight.any()
    torch.testing.assert_close(layer.bias, before.bias - 0.5)


def test_beta_lasso_by_hand():
    """Algorithm 1 of the paper, written out, for 50 steps in which weights die and come back to life."""
    weight = nn.Parameter(random_tensor(30, 20, dtype=torch.float64) * 0.2)
    optimizer = prune.BetaLasso([weight], lr=0.3, strength=0.01, beta=15)
    expected, died, lived = weight.detach().clone(), 0, 0
    for step in range(50):
        grad = random_tensor(30, 20, seed=step + 1, dtype=torch.float64) * 0.3
        weight.grad = grad
        optimizer.step()
        before = expected.clone()
        expected -= 0.3 * (grad + 0.01 * expected.sign())
        expected *= expected.abs() >= 15 * 0.01
        died += int(((before != 0) & (expected == 0)).sum())
        lived += int(((before == 0) & (expected != 0)).sum())
        torch.testing.assert_close(weight.detach(), expected)
    assert died > 50 and lived > 50


def test_beta_lasso_without_strength_is_sgd():
    results = []
    for make in (prune.BetaLasso, torch.optim.SGD):
        weight = nn.Parameter(random_tensor(5, 6, dtype=torch.float64))
        optimizer = make([weight], lr=0.1)
        for _ in range(10):
            weight.grad = weight.detach().sin()
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results)


# ---- torch's optimizer protocol


def test_closure_scheduler_and_missing_gradients():
    layer, frozen = nn.Linear(4, 3), nn.Parameter(torch.ones(2))
    optimizer = prune.ProximalAdamW([*layer.parameters(), frozen], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05 and first.requires_grad
    for _ in range(30):
        last = optimizer.step(closure)
    assert last < first and torch.equal(frozen, torch.ones(2)) and frozen not in optimizer.state


@pytest.mark.parametrize("make, torchs, options", PAIRS.values(), ids=PAIRS)
def test_deepcopies_step_alike(make, torchs, options):
    drawn = gradients(torch.float32)[:3]
    _, optimizer = trained(make, options, torch.float32, drawn, penalty="l1", strength=0.5)
    twin = copy.deepcopy(optimizer)
    for one in (optimizer, twin):
        for param in one.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)  # deepcopy leaves gradients behind
        one.step()
    for param, other in zip(*(one.param_groups[0]["params"] for one in (optimizer, twin)), strict=True):
        assert param is not other and torch.equal(param, other)


def test_a_refused_step_leaves_no_state():
    weight = nn.Parameter(torch.zeros(4, 3))
    for optimizer in (prune.ProximalSGD([weight], momentum=0.9), prune.ProximalAdamW([weight])):
        weight.grad = torch.eye(4, 3).to_sparse()
        with pytest.raises(TypeError, match=r"grad: expected a dense \(strided\) tensor"):
            optimizer.step()
        weight.grad = torch.ones(4, 3)
        optimizer.step()
        assert weight.isfinite().all()


# ---- masked layers and masks


@pytest.mark.parametrize("kind", ["csr", "block", "dense"])
def test_masked_layers_train_to_fewer_weights(kind):
    x, truth = least_squares()
    layer = MaskedLinear(20, 6, random_mask(6, 20, 0.7) | (truth != 0), kind=kind, bias=False, dtype=torch.float64)
    stored = layer.layout.to_mask()
    train(layer, prune.ProximalSGD([layer.values], lr=0.2, penalty="l1", strength=0.1), x, x @ truth.T)
    weight = layer.weight.detach()
    assert torch.equal(weight != 0, truth != 0) and not (weight != 0)[~stored].any()
    frozen = prune.freeze(copy.deepcopy(layer), kind="csr")
    assert frozen.values.numel() == int((truth != 0).sum()) < int(stored.sum())
    torch.testing.assert_close(frozen(x), layer(x))


def test_the_groups_of_block_values_are_blocks():
    layer = MaskedLinear(16, 16, MaskLayout.from_mask(random_mask(16, 16, 0.9), "block", (4, 4)))
    assert layer.values.shape == (16, 4, 4)
    with torch.no_grad():
        layer.values[::2] *= 1e-3
    layer.values.grad = torch.zeros_like(layer.values)
    prune.ProximalSGD([layer.values], lr=1.0, penalty="group_l1", strength=0.01).step()
    assert layer.values.flatten(1).any(1).tolist() == [False, True] * 8


@pytest.mark.parametrize("penalised", ["layer", "copy", "pickle", "regrown"])
@pytest.mark.parametrize("kind", ["block", "nm"])
def test_groups_of_the_weight_are_refused_where_values_are_stored_otherwise(kind, penalised):
    mask = (torch.arange(16) % 4 < 2).expand(16, 16).clone()
    layer = MaskedLinear(16, 16, mask, kind=kind)
    if penalised == "regrown":
        prune.update_masks(layer, {"": mask.roll(1, 1)}, kind=kind)
    layer = {"copy": copy.deepcopy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}.get(
        penalised, lambda one: one
    )(layer)
    with pytest.raises(ValueError, match=r"block_shape: expected None for values that are stored .*, got \(4, 4\)"):
        prune.ProximalSGD([layer.values], penalty="group_l1", strength=0.1, block_shape=(4, 4))
    prune.ProximalSGD([layer.values], penalty="group_l1", strength=0.1)


def test_groups_of_the_weight_are_refused_after_a_conversion():
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv1d(2, 4, 3))
    params = [model[0].weight, model[1].weight]  # of the second, a matrix is made
    optimizer = prune.ProximalAdamW(params, penalty="group_l1", strength=0.1, block_shape=(2, 2))
    prune.convert(model, {"0": torch.ones(16, 16, dtype=torch.bool)}, "block", optimizer)
    model[0].values.grad, model[1].weight.grad = torch.zeros_like(model[0].values), torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match="block_shape: expected None for values"):
        optimizer.step()
    prune.to_dense(model, optimizer)
    optimizer.step()


def test_freeze_takes_the_optimizer_along():
    layer = nn.Linear(12, 8)
    optimizer = prune.ProximalAdamW([{"params": [layer.weight], "penalty": "l1", "strength": 0.1}], lr=0.05)
    layer.weight.grad = torch.zeros(8, 12)
    for _ in range(20):
        optimizer.step()
    state = {key: value.clone() for key, value in optimizer.state[layer.weight].items()}
    alive = layer.weight.detach() != 0
    assert 0 < int(alive.sum()) < 96
    frozen = prune.freeze(layer, "csr", optimizer)
    assert optimizer.param_groups[0]["params"] == [frozen.values]
    assert torch.equal(optimizer.state[frozen.values]["exp_avg"], state["exp_avg"][alive])


@pytest.mark.parametrize("kind", ["auto", "csr", "block", "dense"])
def test_freeze_computes_what_the_model_did(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    weights = [model[0].weight, model[2].weight]
    optimizer = prune.ProximalAdamW(
        [{"params": weights, "penalty": "l1", "strength": 2.0}, {"params": model[4].parameters()}], lr=1e-3
    )
    x, labels = torch.randn(128, 40), torch.randint(10, (128,))
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    y, alive = model(x), [int(weight.count_nonzero()) for weight in weights]
    assert all(0 < count < 0.7 * weight.numel() for count, weight in zip(alive, weights, strict=True))
    assert prune.freeze(model, kind=kind) is model
    assert [type(model[i]).__name__ for i in (0, 2, 4)] == ["MaskedLinear", "MaskedLinear", "Linear"]
    assert [int(model[i].layout.to_mask().sum()) for i in (0, 2)] == alive
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    layer = model[0]
    assert prune.freeze(model)[0] is layer


def test_freeze_of_a_dead_layer():
    layer = nn.Linear(5, 4)
    nn.init.zeros_(layer.weight)
    frozen = prune.freeze(layer)
    assert isinstance(frozen, MaskedLinear) and frozen.layout.density == 0
    torch.testing.assert_close(frozen(torch.randn(3, 5)), layer.bias.expand(3, 4))


# ---- errors

W = nn.Parameter(torch.zeros(4, 3))
B = nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: prune.ProximalSGD([W], penalty="hard"),
            ValueError,
            "penalty: expected one of None, 'l1', 'group_l1', got 'hard'",
        ),
        (
            lambda: prune.ProximalAdamW([W], penalty="l0"),
            ValueError,
            "penalty: expected one of None, 'l1', 'group_l1', got 'l0'",
        ),
        (
            lambda: prune.BetaLasso([{"params": [W], "penalty": "l1"}]),
            ValueError,
            "penalty: expected one of 'hard', got 'l1'",
        ),
        (lambda: prune.ProximalSGD([W], lr=-1.0), ValueError, "lr: expected a finite number, at least 0, got -1.0"),
        (lambda: prune.ProximalSGD([W], lr="fast"), TypeError, "lr: expected a finite number, .* got str"),
        (lambda: prune.ProximalSGD([W], momentum=-1.0), ValueError, "momentum: expected a finite number"),
        (
            lambda: prune.ProximalSGD([W], dampening=None),
            TypeError,
            "dampening: expected a finite number, got NoneType",
        ),
        (lambda: prune.ProximalSGD([W], weight_decay=-1.0), ValueError, "weight_decay: expected a finite number"),
        (lambda: prune.ProximalSGD([W], nesterov=True), ValueError, "nesterov: expected False, or momentum > 0"),
        (
            lambda: prune.ProximalSGD([W], strength=1.0),
            ValueError,
            "strength: expected 0 where penalty is None, got 1.0",
        ),
        (lambda: prune.BetaLasso([W], strength=-1.0), ValueError, "strength: expected a finite number, at least 0"),
        (lambda: prune.BetaLasso([W], beta=-1.0), ValueError, "beta: expected a finite number, at least 0, got -1.0"),
        (
            lambda: prune.ProximalSGD([W], penalty="l1", block_shape=(2, 2)),
            ValueError,
            "block_shape: expected None where penalty is not 'group_l1'",
        ),
        (
            lambda: prune.ProximalAdamW([W, B], penalty="group_l1", strength=1.0),
            ValueError,
            r"params: expected tensors of 2 or more dimensions, as groups .* got 1-D float32 tensor \[4\]",
        ),
        (lambda: prune.ProximalAdamW([W], betas=(0.9, 2)), ValueError, r"betas: expected numbers in \[0, 1\), got 2"),
        (lambda: prune.ProximalAdamW([W], eps=-1.0), ValueError, "eps: expected a finite number, at least 0, got -1.0"),
        (lambda: prune.freeze([]), TypeError, "model: expected nn.Module, got list"),
        (lambda: prune.freeze(prune_me(), kind="coo"), ValueError, "kind: expected"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def prune_me():
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight)
    return layer


def test_a_refused_group_is_not_added():
    optimizer = prune.ProximalSGD([W], lr=0.1)
    with pytest.raises(ValueError, match="strength"):
        optimizer.add_param_group({"params": [B], "strength": 1.0})
    assert len(optimizer.param_groups) == 1


def test_groups_are_looked_for_at_each_step():
    """prune.convert may make one dimension of a weight's two."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 48))
    optimizer = prune.ProximalSGD([model[0].weight], lr=0.1, penalty="group_l1", strength=0.3)
    prune.convert(model, {"0": torch.rand(48, 32) < 0.2}, "csr", optimizer)
    model(torch.randn(5, 32)).sum().backward()
    with pytest.raises(ValueError, match="params: expected tensors of 2 or more dimensions"):
        optimizer.step()


@pytest.mark.parametrize(
    "theirs, ours, option",
    [
        (torch.optim.SGD, prune.ProximalSGD, "maximize"),
        (torch.optim.AdamW, prune.ProximalAdamW, "maximize"),
        (torch.optim.AdamW, prune.ProximalAdamW, "amsgrad"),
    ],
)
def test_options_that_ours_lack_are_refused(theirs, ours, option):
    other = theirs([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, **{option: True})
    optimizer = ours([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
    message = rf"state_dict: expected {option}=False \(there is no {option} here\), got True"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())
