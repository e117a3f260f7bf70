"""Magnitude masks, and models converted to MaskedLinear and back."""

import copy

import pytest
import torch
from torch import nn

from compsparse_kernels import prune
from compsparse_kernels.nn import MaskedLinear

SPARSITIES = (0.0, 0.3, 0.5, 0.9, 0.987)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30, bias=False), nn.ReLU())
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.head = nn.Linear(30, 10)

    def forward(self, x):
        return self.head(self.conv(self.body(x).unsqueeze(1)).squeeze(1))


def alive(masks):
    return sum(int(mask.sum()) for mask in masks.values())


# ---- masks


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("include_last", [False, True])
def test_global_masks_keep_exactly_the_largest(sparsity, include_last):
    model = Net()
    masks = prune.magnitude_masks(model, sparsity, include_last=include_last)
    names = ["body.0", "body.2"] + ["head"] * include_last
    assert list(masks) == names
    weights = [model.get_submodule(name).weight.detach() for name in names]
    assert all(
        mask.dtype == torch.bool and mask.shape == w.shape for mask, w in zip(masks.values(), weights, strict=True)
    )
    every = torch.cat([w.abs().flatten() for w in weights])
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert int(kept.sum()) == len(every) - round(sparsity * len(every))
    assert every[kept].min() >= (every[~kept].max() if sparsity else 0)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_layer_masks_prune_each_layer_alike(sparsity):
    model = Net()
    with torch.no_grad():
        model.body[0].weight.mul_(100)
    for name, mask in prune.magnitude_masks(model, sparsity, scope="layer").items():
        weight = model.get_submodule(name).weight.detach().abs()
        assert int(mask.sum()) == weight.numel() - round(sparsity * weight.numel())
        assert weight[mask].min() >= (weight[~mask].max() if sparsity else 0)


def test_global_scope_compares_across_layers():
    model = Net()
    with torch.no_grad():
        model.body[0].weight.fill_(1e-6)
    masks = prune.magnitude_masks(model, 600 / 1500)
    assert not masks["body.0"].any() and masks["body.2"].all()


def test_ties_are_broken_by_position():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
    for layer in model:
        nn.init.constant_(layer.weight, -1.0)
    with torch.no_grad():
        model[0].weight[1, 3] = 2.0
    masks = prune.magnitude_masks(model, 1 - 3 / 14, include_last=True)
    assert masks["0"].nonzero().tolist() == [[0, 0], [0, 1], [1, 3]] and not masks["1"].any()
    zeros = nn.Linear(4, 2)
    nn.init.zeros_(zeros.weight)
    (mask,) = prune.magnitude_masks(zeros, 0.5, include_last=True).values()
    assert mask.tolist() == [[True] * 4, [False] * 4]


def test_dead_weights_stay_dead_and_count():
    torch.manual_seed(0)
    model = Net()
    total, before = 20 * 30 + 30 * 30, None
    for sparsity in (0.5, 0.75, 0.9):
        masks = prune.magnitude_masks(model, sparsity)
        assert alive(masks) == total - round(sparsity * total)
        assert before is None or all((before[name] | ~masks[name]).all() for name in masks)
        prune.convert(model, masks)
        for layer in (model.body[0], model.body[2]):
            nn.init.normal_(layer.values)  # new magnitudes, so other weights are the smallest in the next round
        before = masks
    again = prune.magnitude_masks(model, 0.2)
    assert all(torch.equal(again[name], before[name]) for name in before)  # sparser than asked already


def test_stored_zeros_of_a_masked_layer_are_alive():
    mask = torch.eye(4, dtype=torch.bool)
    model = nn.Sequential(MaskedLinear(4, 4, mask), nn.Linear(4, 2))
    nn.init.zeros_(model[0].values)
    masks = prune.magnitude_masks(model, 1 - 2 / 16)
    assert masks["0"].nonzero().tolist() == [[0, 0], [1, 1]]


def test_last_layer_and_skip():
    def pruned(**options):
        return list(prune.magnitude_masks(Net(), **options))

    assert pruned(include_last=True) == ["body.0", "body.2", "head"]
    assert pruned(skip=["body.0"]) == ["body.2"]
    assert pruned(skip={"body"}, include_last=True) == ["head"]
    assert pruned(skip=lambda name, layer: layer.bias is None) == ["body.0"]
    assert list(prune.magnitude_masks(nn.Linear(3, 3), include_last=True)) == [""]


def test_subclasses_of_linear_are_left_alone():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    assert list(prune.magnitude_masks(model)) == ["up"]


def test_masks_lie_with_their_layers_and_leave_the_model_alone():
    model = Net().double()
    before = copy.deepcopy(model.state_dict())
    prune.magnitude_masks(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---- conversion


@pytest.mark.parametrize("kind", ["auto", "csr", "block", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_convert_computes_the_masked_model_and_back(kind, dtype):
    model = Net().to(dtype).eval()
    model.body[0].weight.requires_grad_(False)
    masks = prune.magnitude_masks(model, 0.8)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            twin.get_submodule(name).weight.mul_(mask)
    x = torch.randn(5, 20, dtype=dtype)
    assert prune.convert(model, masks, kind=kind) is model
    assert isinstance(model.body[0], MaskedLinear) and type(model.head) is nn.Linear
    assert kind in ("auto", model.body[0].layout.kind) and not model.body[0].training
    assert not model.body[0].values.requires_grad and model.body[2].values.requires_grad
    torch.testing.assert_close(model(x), twin(x))
    assert prune.to_dense(model) is model
    state = twin.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), twin(x))


def test_root_layer():
    linear, mask = nn.Linear(6, 4), torch.rand(4, 6) < 0.5
    layer = prune.convert(linear, {"": mask})
    assert isinstance(layer, MaskedLinear) and torch.equal(layer.weight, linear.weight * mask)
    back = prune.to_dense(layer)
    assert type(back) is nn.Linear and torch.equal(back.weight, linear.weight * mask)


def test_layer_with_two_names_stays_one():
    shared = nn.Linear(5, 5)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ModuleDict({"again": shared}))
    assert list(prune.magnitude_masks(model, include_last=True)) == ["0"]
    prune.convert(model, {"2": torch.eye(5, dtype=torch.bool)})
    assert isinstance(model[0], MaskedLinear) and model[0] is model[2] is model[3]["again"]


def test_converting_again_repacks():
    model = nn.Sequential(nn.Linear(6, 4))
    first = torch.rand(4, 6) < 0.7
    prune.convert(model, {"0": first})
    weight = model[0].weight.detach()
    second = first & (torch.rand(4, 6) < 0.5)
    prune.convert(model, {"0": second}, kind="csr")
    assert model[0].values.numel() == second.sum() and torch.equal(model[0].weight, weight * second)
    grown = torch.ones(4, 6, dtype=torch.bool)
    prune.convert(model, {"0": grown})
    assert torch.equal(model[0].weight, weight * second) and torch.equal(model[0].layout.to_mask(), grown)


def test_encoder_layer_with_pruned_feed_forward():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    masks = prune.magnitude_masks(layer, 0.5, include_last=True)
    assert list(masks) == ["linear1", "linear2"]
    sparse = prune.convert(copy.deepcopy(layer), masks)
    with torch.no_grad():
        for name, mask in masks.items():
            layer.get_submodule(name).weight.mul_(mask)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(sparse(x), layer(x))
    with torch.no_grad():  # torch's fused path, which reads linear1.weight
        torch.testing.assert_close(sparse(x), layer(x))


def test_pruned_model_trains():
    torch.manual_seed(0)
    model = Net()
    prune.convert(model, prune.magnitude_masks(model, 0.7))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    x, target = torch.randn(64, 20), torch.randint(10, (64,))
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ---- errors


MASK = torch.ones(30, 20, dtype=torch.bool)


def nan_model():
    model = Net()
    with torch.no_grad():
        model.body[0].weight[0, 0] = torch.nan
    return model


def tied_model():
    model = nn.ModuleDict({"embed": nn.Embedding(30, 20), "read": nn.Linear(20, 30)})
    model["read"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: prune.magnitude_masks([]), TypeError, "model: expected nn.Module, got list"),
        (lambda: prune.magnitude_masks(Net(), 1.0), ValueError, r"sparsity: expected a number in \[0, 1\), got 1.0"),
        (lambda: prune.magnitude_masks(Net(), "most"), TypeError, "sparsity: expected a number .*, got 'most'"),
        (
            lambda: prune.magnitude_masks(Net(), scope="all"),
            ValueError,
            "scope: expected 'global' or 'layer', got 'all'",
        ),
        (lambda: prune.magnitude_masks(Net(), skip="head"), TypeError, "skip: expected a collection of names"),
        (
            lambda: prune.magnitude_masks(Net(), skip=["bod"]),
            ValueError,
            "skip: expected names of .*body.0.*, got 'bod'",
        ),
        (lambda: prune.magnitude_masks(nn.Linear(2, 2)), ValueError, "model: expected a linear layer .*include_last"),
        (lambda: prune.magnitude_masks(nn.ReLU()), ValueError, "model: expected a linear layer .*got 0 linear layers"),
        (lambda: prune.magnitude_masks(nan_model()), ValueError, "model: weight of 'body.0': expected no NaN, got NaN"),
        (lambda: prune.convert([], {}), TypeError, "model: expected nn.Module, got list"),
        (lambda: prune.convert(Net(), [MASK]), TypeError, "masks: expected dict of name: mask, got list"),
        (lambda: prune.convert(Net(), {"x": MASK}), ValueError, r"masks\['x'\]: expected the name .*body.0.*unknown"),
        (
            lambda: prune.convert(Net(), {"conv": MASK}),
            ValueError,
            r"masks\['conv'\]: expected .*nn.Linear.*got Conv1d",
        ),
        (
            lambda: prune.convert(Net(), {"body.0": MASK.T}),
            ValueError,
            r"masks\['body.0'\]: expected bool tensor \[30, 20\]",
        ),
        (
            lambda: prune.convert(Net(), {"body.0": MASK.float()}),
            ValueError,
            r"masks\['body.0'\]: expected 2-D bool tensor",
        ),
        (lambda: prune.convert(Net(), {"body.0": None}), TypeError, r"masks\['body.0'\]: expected .* got NoneType"),
        (lambda: prune.convert(Net(), {"body.0": MASK}, kind="coo"), ValueError, "kind: expected"),
        (lambda: prune.convert(tied_model(), {"read": MASK}), ValueError, r"masks\['read'\]: .* tied to .* 'embed'"),
        (lambda: prune.to_dense(None), TypeError, "model: expected nn.Module, got NoneType"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_refused_conversion_replaces_nothing():
    model = Net()
    with pytest.raises(ValueError, match=r"body\.2"):
        prune.convert(model, {"body.0": MASK, "body.2": MASK})
    assert type(model.body[0]) is nn.Linear
