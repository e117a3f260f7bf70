"""Sparse training stays in step with a dense twin that trains W * M, across pruning, rewinding and regrowth."""

import pytest
import torch
from torch import nn

from compsparse_kernels import prune
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.testing import assert_within_budget
from python_tests.pruning import KINDS, OPTIMIZERS, Twin, dense_state, masks_of, net, step


def everything(model, optimizer):
    """Of each parameter, itself and its state, dense: {(place, key): tensor}."""
    found = {}
    for name, layer in model.named_children():
        if not isinstance(layer, (nn.Linear, MaskedLinear)):
            continue
        found[name, "weight"], found[name, "bias"] = layer.weight.detach(), layer.bias.detach()
        for key, value in dense_state(optimizer, layer).items():
            found[name, key] = value
        for key, value in optimizer.state[layer.bias].items():
            found[name, f"bias {key}"] = value
    return found


def lockstep(make, kind, dtype, steps, compare):
    """Prune, rewind, prune on, regrow, each after a sixth of the steps; ``compare(ours, twins)`` at each of them."""
    model = net(dtype)
    optimizer = make(model.parameters())
    twins = [Twin(kept, make) for kept in (torch.float32, torch.float64)]
    part = steps // 6

    def train(number):
        for k in range(number * part, (number + 1) * part):
            step(model, optimizer, k)
            for twin in twins:
                twin.step(k)
        compare((model, optimizer), twins)

    def put(masks):
        update = prune.convert if type(model[0]) is nn.Linear else prune.update_masks
        update(model, masks, kind=kind, optimizer=optimizer)
        for twin in twins:
            twin.prune(masks)

    train(0)
    start, starts = prune.snapshot(model, optimizer), [twin.save() for twin in twins]
    train(1)
    half, fifth, grown = masks_of(0.5, 3), masks_of(0.2, 7), masks_of(0.4, 11)
    put(half)
    train(2)
    put({name: mask & half[name] for name, mask in fifth.items()})
    prune.rewind(model, start, optimizer)
    for twin, saved in zip(twins, starts, strict=True):
        twin.rewind(saved)
    train(3)
    put({name: mask | grown[name] for name, mask in fifth.items()})
    train(4)
    put(half)
    train(5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_adamw_stays_in_step_with_the_dense_twin(kind, dtype):
    """300 steps. The budget is that of one product (compsparse_kernels.testing): twice what dense float32 training
    departs from dense float64 training over the same steps."""

    def compare(ours, twins):
        ours, dense, exact = everything(*ours), *(everything(twin.model, twin.optimizer) for twin in twins)
        for key, value in ours.items():
            if "step" in key[1]:
                assert value == exact[key], key
            else:
                assert_within_budget(value, dense[key], exact[key].double(), str(key))

    lockstep(OPTIMIZERS["adamw"], kind, dtype, 300, compare)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kind_dense_is_the_dense_twin_to_the_bit(name):
    """It multiplies the same matrices, so that whatever differs would be our remap."""

    def compare(ours, twins):
        ours, dense = everything(*ours), everything(twins[0].model, twins[0].optimizer)
        assert all(torch.equal(value, dense[key]) for key, value in ours.items())

    lockstep(OPTIMIZERS[name], "dense", torch.float32, 60, compare)
