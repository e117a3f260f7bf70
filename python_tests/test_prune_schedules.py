"""Sparsity that rises while the model trains."""

import copy

import pytest
import torch

from compsparse_kernels import prune
from python_tests.pruning import NAMES, OPTIMIZERS, dense_state, net, step

PLAN = {"begin": 3, "end": 9, "every": 2, "final": 0.8, "initial": 0.2}


def test_the_cubic_is_the_papers():
    times = {"begin": 10, "end": 50, "final": 0.9, "initial": 0.1}
    assert prune.cubic_sparsity(10, **times) == 0.1 and prune.cubic_sparsity(50, **times) == 0.9
    for t in (15, 20.5, 37):  # n times delta t is the paper's length of the ramp
        assert prune.cubic_sparsity(t, **times) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - (t - 10) / 40) ** 3)
    assert prune.cubic_sparsity(-5, **times) == prune.cubic_sparsity(10, **times)
    assert prune.cubic_sparsity(1e9, **times) == 0.9


@pytest.mark.parametrize("kind", ["auto", "csr"])
def test_the_pruner_follows_it_and_disturbs_nothing_else(kind):
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    pruner = prune.GradualPruner(model, optimizer, kind=kind, **PLAN)
    total = sum(model.get_submodule(name).weight.numel() for name in NAMES)
    for k in range(1, 13):
        step(model, optimizer, k)
        before = {name: model.get_submodule(name).weight.detach().clone() for name in NAMES}
        states = {name: copy.deepcopy(dense_state(optimizer, model.get_submodule(name))) for name in NAMES}
        pruned = pruner.step()
        assert pruned == (k in (3, 5, 7, 9))
        if k < 3:
            continue
        masks = {name: model.get_submodule(name).layout.to_mask() for name in NAMES}
        last = min(9, k - (k - 3) % 2)
        sparsity = prune.cubic_sparsity(last, begin=3, end=9, final=0.8, initial=0.2)
        assert sum(int(mask.sum()) for mask in masks.values()) == total - round(sparsity * total)
        for name, mask in masks.items():
            assert torch.equal(model.get_submodule(name).weight, before[name] * mask)
            for key, value in dense_state(optimizer, model.get_submodule(name)).items():
                assert torch.equal(value, states[name][key] * mask if value.dim() else states[name][key])
    assert pruner.sparsity == 0.8


def test_a_pruner_goes_on_from_its_state():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    first, second = (prune.GradualPruner(model, optimizer, **PLAN) for _ in range(2))
    assert not first.step() and not first.step()
    second.load_state_dict(first.state_dict())
    assert second.step() and second.sparsity == 0.2


def pruner(**options):
    model = net()
    options = {"model": model, "optimizer": OPTIMIZERS["sgd"](model.parameters())} | PLAN | options
    return prune.GradualPruner(options.pop("model"), options.pop("optimizer"), **options)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: prune.cubic_sparsity("1", begin=0, end=1, final=0.5), TypeError, "t: expected a number, got '1'"),
        *(
            (
                lambda name=name, value=value: prune.cubic_sparsity(
                    **{"t": 1, "begin": 0, "end": 3, name: value}, final=0.5
                ),
                ValueError,
                f"{name}: expected a finite number, got {value}",
            )
            for name in ("t", "begin", "end")
            for value in (float("nan"), float("inf"))
        ),
        (lambda: prune.cubic_sparsity(1, begin=3, end=3, final=0.5), ValueError, "end: expected a time after begin, 3"),
        (lambda: prune.cubic_sparsity(1, begin=0, end=3, final=1), ValueError, r"final: expected a number in \[0, 1\)"),
        (
            lambda: prune.cubic_sparsity(1, begin=0, end=3, final=0.5, initial=0.6),
            ValueError,
            "initial: expected a share of at most final, 0.5, got 0.6",
        ),
        (
            lambda: prune.cubic_sparsity(1, begin=0, end=3, final=0.5, initial=-1),
            ValueError,
            r"initial: expected a number in \[0, 1\), got -1",
        ),
        (
            lambda: pruner().load_state_dict({}),
            ValueError,
            r"state: expected what state_dict\(\) .*, got a dict of \[\]",
        ),
        (lambda: pruner().load_state_dict([3]), ValueError, "state: expected what state_dict.* got list"),
        (lambda: pruner(model=1), TypeError, "model: expected nn.Module, got int"),
        (lambda: pruner(optimizer=1), TypeError, "optimizer: expected torch.optim.Optimizer, got int"),
        (lambda: pruner(select=1), TypeError, "select: expected a function, got int"),
        (lambda: pruner(kind="coo"), ValueError, "kind: expected auto or one of .*, got 'coo'"),
        (lambda: pruner(begin=0), ValueError, "begin: expected a positive int, got 0"),
        (lambda: pruner(every=0.5), TypeError, "every: expected a positive int"),
        (lambda: pruner(every=4), ValueError, "every: expected a divisor of end - begin, 6, got 4"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
