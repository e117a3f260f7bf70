"""Masks by blocks, N:M and at random, and masks that torch.nn.utils.prune has made."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from compsparse_kernels import prune
from compsparse_kernels.testing import random_mask
from python_tests.pruning import OPTIMIZERS, batch, dense_state, masks_of, net, step

BLOCKS = ((6, 4), (3, 13), (1, 1), (5, 8))  # of 18 x 13 and 17 x 18: some ragged


def blocks_of(tensor, block_shape):
    """Every block of a matrix, in order, cut by slices: ragged ones are smaller."""
    bo, bi = block_shape
    rows, columns = (range(0, size, step) for size, step in zip(tensor.shape, block_shape, strict=True))
    return [tensor[row : row + bo, column : column + bi] for row, column in itertools.product(rows, columns)]


def score(block, norm):
    return block.double().square().mean().sqrt() if norm == "l2" else block.double().abs().mean()


# ---- blocks


@pytest.mark.parametrize("norm", ["l2", "l1", None])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_the_blocks_of_largest_norm_survive_whole(block_shape, scope, norm):
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(3)
    masks = prune.magnitude_masks(model, 0.6, scope, block_shape=block_shape, norm=norm)
    kept, scores = {}, {}
    for name, mask in masks.items():
        blocks = blocks_of(mask, block_shape)
        assert all(bool(block.all()) or not bool(block.any()) for block in blocks)
        kept[name] = torch.tensor([bool(block.all()) for block in blocks])
        weights = blocks_of(model.get_submodule(name).weight.detach(), block_shape)
        scores[name] = torch.stack([score(block, norm or "l2") for block in weights])
    groups = [list(kept)] if scope == "global" else [[name] for name in kept]
    for names in groups:
        alive, value = (torch.cat([part[name] for name in names]) for part in (kept, scores))
        assert int(alive.sum()) == len(alive) - round(0.6 * len(alive))
        assert value[alive].min() >= value[~alive].max()


def test_the_norms_differ():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 0.0, 2.0, 2.0]])
    kept = {
        norm: prune.magnitude_masks(layer, 0.5, include_last=True, block_shape=(1, 2), norm=norm)[""].tolist()
        for norm in ("l2", "l1")
    }
    assert kept == {"l2": [[True, True, False, False]], "l1": [[False, False, True, True]]}


def test_ragged_blocks_compete_by_their_mean():
    layer = nn.Linear(5, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.5]])
    masks = prune.magnitude_masks(layer, 0.6, include_last=True, block_shape=(1, 2))
    assert masks[""].tolist() == [[False, False, False, False, True]]


def test_dead_weights_of_blocks_stay_dead():
    model = net()
    first = masks_of(0.5, seed=3)
    first["0"][:6, :4] = False
    prune.convert(model, first)
    masks = prune.magnitude_masks(model, 0.3, block_shape=(6, 4))
    assert all(not bool((mask & ~first[name]).any()) for name, mask in masks.items())
    assert int(masks["0"].sum()) < int(first["0"].sum())


def test_blocks_are_stored_as_blocks():
    model = net()
    masks = prune.magnitude_masks(model, 0.6, block_shape=(6, 4))
    prune.convert(model, masks, kind="block", block_shape=(6, 4))
    assert model[0].layout.blocks.block_shape == (6, 4) and model[0].layout.mask is None


# ---- N:M


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (3, 3), (4, 8)], ids=str)
def test_the_largest_of_each_group_survive(nm):
    n, m = nm
    model = net()
    for name, mask in prune.magnitude_masks(model, nm=nm).items():
        weight = model.get_submodule(name).weight.detach().abs()
        for row in range(len(mask)):
            for values, kept in zip(weight[row].split(m), mask[row].split(m), strict=True):
                assert int(kept.sum()) == min(n, len(kept))
                assert kept.all() or values[kept].min() >= values[~kept].max()


def test_ties_of_a_group_are_broken_by_position():
    layer = nn.Linear(6, 2)
    nn.init.ones_(layer.weight)
    masks = prune.magnitude_masks(layer, nm=(2, 4), include_last=True)
    assert masks[""].tolist() == [[True, True, False, False, True, True]] * 2


def test_dead_weights_of_a_group_stay_dead():
    model = net()
    first = masks_of(0.3, seed=3)
    prune.convert(model, first)
    nn.init.zeros_(model[0].values)  # stored zeros are alive, dead weights are not
    masks = prune.magnitude_masks(model, nm=(2, 4))
    for name, mask in masks.items():
        for kept, alive in zip(mask.split(4, 1), first[name].split(4, 1), strict=True):
            assert torch.equal(kept.sum(1), alive.sum(1).clamp(max=2)) and not bool((kept & ~alive).any())


# ---- torch.nn.utils.prune


def test_a_model_pruned_by_torch_goes_on_training_as_it_would():
    """Values, gradients and state are those of weight_orig under its mask."""
    model, twin = net(), net()
    models = {}
    for each in (model, twin):
        for name, mask in masks_of(0.5, seed=3).items():
            torch_prune.custom_from_mask(each.get_submodule(name), "weight", mask)
        models[each] = OPTIMIZERS["adam"](each.parameters())
        for k in range(3):
            step(each, models[each], k)
    masks = prune.masks_from_torch(model)
    assert masks.keys() == {"0", "2"} and all(torch.equal(mask, masks_of(0.5, seed=3)[n]) for n, mask in masks.items())
    optimizer = models[model]
    prune.convert(model, masks, "dense", optimizer)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    for name, mask in masks.items():
        layer, old = model.get_submodule(name), twin.get_submodule(name)
        assert torch.equal(layer.weight, old.weight_orig * mask)  # twin.weight is that of the last forward pass
        state = models[twin].state[old.weight_orig]
        assert torch.equal(dense_state(optimizer, layer)["exp_avg"], state["exp_avg"] * mask)
    for k in range(3, 6):
        step(model, optimizer, k)
        step(twin, models[twin], k)
    x, _ = batch(9)
    assert torch.equal(model(x), twin(x))


def test_magnitudes_under_a_mask_of_torchs_are_those_of_now():
    """torch recomputes layer.weight in the next forward pass only."""
    layer, mask = nn.Linear(8, 8, bias=False), random_mask(8, 8)
    torch_prune.custom_from_mask(layer, "weight", mask)
    with torch.no_grad():
        layer.weight_orig.copy_(torch.arange(64.0).view(8, 8).flip(0, 1))
    (found,) = prune.magnitude_masks(layer, 1 - 3 / 64, include_last=True).values()
    alive = mask.nonzero()
    assert found.nonzero().tolist() == alive[:3].tolist()


def test_convolutions_pruned_by_torch_are_passed_over():
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Linear(8, 8))
    for layer in model:
        torch_prune.random_unstructured(layer, "weight", amount=0.5)
    assert list(prune.masks_from_torch(model)) == ["1"]


def test_a_wider_mask_than_torchs_starts_at_zero():
    layer, mask = nn.Linear(8, 8), random_mask(8, 8)
    weight = layer.weight.detach().clone()
    torch_prune.custom_from_mask(layer, "weight", mask)
    layer = prune.convert(layer, {"": torch.ones(8, 8, dtype=torch.bool)})
    assert torch.equal(layer.weight, weight * mask)


# ---- random


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("distribution", ["uniform", "erdos_renyi"])
def test_random_masks_have_the_share_asked_for(distribution, sparsity):
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 10), nn.Linear(10, 3))
    masks = prune.random_masks(model, sparsity, distribution, include_last=True)
    total = sum(mask.numel() for mask in masks.values())
    # The count of each of 3 layers is rounded.
    assert abs(sum(int(mask.sum()) for mask in masks.values()) - (1 - sparsity) * total) <= 3 * 0.5
    if distribution == "uniform":
        assert all(int(mask.sum()) == round((1 - sparsity) * mask.numel()) for mask in masks.values())


def test_erdos_renyi_densities():
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 40), nn.Linear(40, 3))
    masks = prune.random_masks(model, 0.95, include_last=True)
    total = 200 * 100 + 100 * 40 + 40 * 3
    epsilon = (0.05 * total) / (300 + 140 + 43)
    for mask in masks.values():
        assert int(mask.sum()) == round(epsilon * sum(mask.shape))
    crowded = prune.random_masks(model, 0.85, include_last=True)
    epsilon = (0.15 * total - 120) / (300 + 140)  # the last layer is full
    assert [int(mask.sum()) for mask in crowded.values()] == [round(epsilon * 300), round(epsilon * 140), 120]


def test_random_masks_follow_the_generator():
    draws = [prune.random_masks(net(), 0.5, generator=torch.Generator().manual_seed(seed))["0"] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# ---- errors


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: prune.magnitude_masks(net(), 0.5, nm=(2, 4)), ValueError, "sparsity: expected None with nm, .* 0.5"),
        (
            lambda: prune.magnitude_masks(net(), scope="layer", nm=(2, 4)),
            ValueError,
            "scope: expected None with nm, .*, got 'layer'",
        ),
        (
            lambda: prune.magnitude_masks(net(), nm=(2, 4), block_shape=(2, 2)),
            ValueError,
            "block_shape: expected None with nm",
        ),
        (lambda: prune.magnitude_masks(net(), nm=(2, 4), norm="l1"), ValueError, "norm: expected None with nm"),
        (lambda: prune.magnitude_masks(net(), nm="2:4"), TypeError, r"nm: expected \(n, m\), two ints, got '2:4'"),
        (lambda: prune.magnitude_masks(net(), nm=(4, 2)), ValueError, r"nm: expected .* 1 <= n <= m, got \(4, 2\)"),
        (lambda: prune.magnitude_masks(net(), norm="l1"), ValueError, "norm: expected None without block_shape"),
        (
            lambda: prune.magnitude_masks(net(), norm="l3", block_shape=(2, 2)),
            ValueError,
            "norm: expected 'l2' or 'l1', got 'l3'",
        ),
        (lambda: prune.magnitude_masks(net(), block_shape=(0, 2)), ValueError, r"block_shape\[0\]: expected"),
        (lambda: prune.masks_from_torch(3), TypeError, "model: expected nn.Module, got int"),
        (lambda: prune.masks_from_torch(net()), ValueError, "model: expected .*weight_mask.* none among 3 linear"),
        (lambda: prune.random_masks(None), TypeError, "model: expected nn.Module, got NoneType"),
        (lambda: prune.random_masks(net(), 1.5), ValueError, r"sparsity: expected a number in \[0, 1\), got 1.5"),
        (lambda: prune.random_masks(net(), 0.5, "erk"), ValueError, "distribution: expected .*, got 'erk'"),
        (lambda: prune.random_masks(net(), generator=7), TypeError, "generator: expected torch.Generator or None"),
        (lambda: prune.random_masks(net(), skip="0"), TypeError, "skip: expected a collection of names"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
