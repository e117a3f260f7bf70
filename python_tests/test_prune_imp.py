"""IMP: the same as a plain implementation with W * M, and the same after an interruption, to the bit."""

import dataclasses
import os
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from compsparse_kernels import prune
from compsparse_kernels.nn import MaskedLinear
from python_tests.pruning import NAMES, OPTIMIZERS, Twin, batch, net, step

STEPS, ROUNDS, FRACTION, REWIND = 12, 3, 0.4, 4


def imp(model=None, optimizer="adamw", train=step, **options):
    model = model or net()
    options = {"steps": STEPS, "rounds": ROUNDS, "fraction": FRACTION, "rewind_step": REWIND} | options
    return prune.IMP(model, OPTIMIZERS[optimizer](model.parameters()), train, **options)


def largest(weights, masks, count):
    """The plain way: sort what is left of all layers, keep so many."""
    alive = torch.cat([(weights[name].abs() * masks[name]).flatten() for name in NAMES])
    kept = torch.zeros(len(alive), dtype=torch.bool)
    kept[alive.argsort(descending=True)[:count]] = True
    parts = kept.split([weights[name].numel() for name in NAMES])
    return {name: part.view_as(weights[name]) for name, part in zip(NAMES, parts, strict=True)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("rewind_step", [0, REWIND])
def test_it_is_the_plain_algorithm_to_the_bit(optimizer, rewind_step):
    """Kind dense multiplies the same matrices as W * M."""
    ours = imp(optimizer=optimizer, kind="dense", rewind_step=rewind_step)
    history = ours.run()
    twin = Twin(torch.float32, OPTIMIZERS[optimizer])
    saved = None
    for number in range(ROUNDS + 1):
        if number > 0:
            weights = {name: twin.model.get_submodule(name).weight.detach() for name in NAMES}
            total = sum(weight.numel() for weight in weights.values())
            twin.prune(largest(weights, twin.masks, total - round((1 - (1 - FRACTION) ** number) * total)))
            twin.rewind(saved)
        for k in range(rewind_step if number else 0, STEPS):
            if number == 0 and k == rewind_step:
                saved = twin.save()
            twin.step(k)
        kept = sum(int(mask.sum()) for mask in twin.masks.values())
        found = sum(history[number].layer_density[name] * twin.masks[name].numel() for name in NAMES)
        assert round(found) == kept
    for name in NAMES:
        layer = ours.model.get_submodule(name)
        assert torch.equal(layer.layout.to_mask(), twin.masks[name] != 0)
        assert torch.equal(layer.weight, twin.model.get_submodule(name).weight)
    assert torch.equal(ours.model[4].weight, twin.model[4].weight)


def test_it_trains_sparse():
    seen = []

    def train(model, optimizer, k):
        loss = step(model, optimizer, k)
        sparse = [layer for layer in model if isinstance(layer, MaskedLinear)]
        states = [value.shape for layer in sparse for value in optimizer.state[layer.values].values() if value.dim()]
        seen.append((k, len(sparse), all(len(shape) == 1 for shape in states), loss.requires_grad))

    select = partial(prune.magnitude_masks, scope="layer", include_last=True)
    ours = imp(train=train, select=select, rounds=4, kind="csr")
    history = ours.run()
    dense, pruned = seen[:STEPS], seen[STEPS:]
    assert [entry[:2] for entry in dense] == [(k, 0) for k in range(STEPS)]
    assert [entry[:2] for entry in pruned] == [(k, 3) for k in range(REWIND, STEPS)] * 4
    assert all(entry[2] for entry in seen)
    assert [done.number for done in history] == [0, 1, 2, 3, 4]
    for done in history:
        assert done.layer_density.keys() == {"0", "2", "4"} and done.seconds > 0 and done.evaluation is None
        for name, density in done.layer_density.items():
            layer = ours.model.get_submodule(name)
            size = layer.in_features * layer.out_features
            assert round(density * size) == size - round((1 - (1 - FRACTION) ** done.number) * size)


def test_schedulers_are_rewound_and_models_evaluated():
    rates, modes = [], []
    model = nn.Sequential(nn.Linear(13, 18), nn.Dropout(), nn.Linear(18, 4))
    model[1].eval()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

    def train(model, optimizer, k):
        rates.append(optimizer.param_groups[0]["lr"])
        modes.append([module.training for module in model])
        step(model, optimizer, k)
        scheduler.step()

    def evaluate(model):
        assert not model.training and not model[1].training and not torch.is_grad_enabled()
        return {"loss": torch.tensor(0.5), "count": np.float64(len(rates))}

    history = prune.IMP(
        model, optimizer, train, steps=6, rounds=2, rewind_step=2, evaluate=evaluate, stateful=[scheduler]
    ).run()
    first = [3e-3 * 0.5 ** (k // 3) for k in range(6)]
    assert rates == first + 2 * first[2:]
    assert modes == [[True, False, True]] * 14
    assert [done.evaluation for done in history] == [{"loss": 0.5, "count": float(n)} for n in (6, 10, 14)]


def test_a_single_layer_is_a_model():
    model = nn.Linear(13, 4)
    ours = imp(model, select=partial(prune.magnitude_masks, include_last=True))
    ours.run()
    assert isinstance(ours.model, MaskedLinear)


# ---- resuming


def noisy(model, optimizer, k):
    """Random numbers of every generator that is saved; none of them follows from k."""
    x, target = batch(k)
    x = nn.functional.dropout(x, 0.2) + random.random() + float(np.random.standard_normal())
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), target).backward()
    optimizer.step()


class Interruption(Exception):
    pass


def interrupted(at):
    """``noisy`` that stops the process, as it were, at its call number ``at``."""
    calls = []

    def train(model, optimizer, k):
        calls.append(k)
        if len(calls) == at:
            raise Interruption
        noisy(model, optimizer, k)

    return train


def seed():
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)


def result(ours):
    """Everything that a resumed run must have in common with an uninterrupted one."""
    history = [dataclasses.replace(done, seconds=0) for done in ours.history]
    draws = torch.rand(1).item(), random.random(), np.random.rand()
    return prune.snapshot(ours.model, ours.optimizer), history, draws


def assert_same(ours, theirs):
    for name, value in theirs[0]["model"].items():
        assert torch.equal(ours[0]["model"][name], value), name
    for mine, other in zip(ours[0]["optimizer"]["states"], theirs[0]["optimizer"]["states"], strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], value) for key, value in other.items())
    assert ours[1:] == theirs[1:]


def norm(model):
    return sum(parameter.norm().item() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["auto", "dense"])
@pytest.mark.parametrize("at", [3, 17, 25, 36], ids=lambda at: f"step{at}")
def test_a_resumed_run_ends_as_an_uninterrupted_one(at, kind, tmp_path):
    model = net()
    seed()
    whole = imp(model, train=noisy, kind=kind, evaluate=norm)
    whole.run()
    expected = result(whole)
    model = net()
    seed()
    with pytest.raises(Interruption):
        imp(model, train=interrupted(at), kind=kind, evaluate=norm, directory=tmp_path).run()
    rounds_done = 0 if at <= STEPS else 1 + (at - STEPS - 1) // (STEPS - REWIND)
    assert sorted(os.listdir(tmp_path)) == [f"round_{number:03}.pt" for number in range(rounds_done)]
    model = net()
    seed()  # only counts where nothing is done yet
    resumed = imp(model, train=noisy, kind=kind, evaluate=norm, directory=tmp_path)
    resumed.run()
    assert_same(result(resumed), expected)


def test_the_same_object_goes_on(tmp_path):
    model = net()
    seed()
    whole = imp(model, train=noisy)
    whole.run()
    expected = result(whole)
    model = net()
    seed()
    ours = imp(model, train=interrupted(17), directory=tmp_path)
    with pytest.raises(Interruption):
        ours.run()
    ours.run()  # its counter is past 17
    assert_same(result(ours), expected)
    again = [dataclasses.replace(done) for done in ours.history]
    assert ours.run() == again  # nothing is left to do


def test_a_finished_run_is_read_back(tmp_path):
    """Weights, masks, the optimizer's and the scheduler's state, random numbers."""
    found = []
    for train in (noisy, interrupted(1)):
        model = net()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

        def step_and_schedule(model, optimizer, k, train=train, scheduler=scheduler):
            train(model, optimizer, k)
            scheduler.step()

        ours = prune.IMP(
            model, optimizer, step_and_schedule, steps=6, rounds=1, stateful=[scheduler], directory=tmp_path
        )
        ours.run()
        found.append((result(ours), scheduler.state_dict()))
    (first, first_schedule), (second, second_schedule) = found
    assert_same(second, first)
    assert second_schedule == first_schedule and first_schedule["last_epoch"] == 6


def test_more_rounds_are_added_to_a_finished_run(tmp_path):
    model = net()
    seed()
    whole = imp(model, train=noisy, rounds=3)
    whole.run()
    expected = result(whole)
    model = net()
    seed()
    imp(model, train=noisy, rounds=1, directory=tmp_path).run()
    longer = imp(train=noisy, rounds=3, directory=tmp_path)
    longer.run()
    assert_same(result(longer), expected)


def test_a_file_keeps_the_kinds_of_its_round(tmp_path):
    imp(rounds=1, kind="csr", directory=tmp_path).run()
    resumed = imp(rounds=2, kind="block", directory=tmp_path, train=interrupted(1))
    with pytest.raises(Interruption):
        resumed.run()
    assert resumed.model[0].layout.kind == "block"
    resumed = imp(rounds=1, kind="block", directory=tmp_path)
    resumed.run()
    assert resumed.model[0].layout.kind == "csr"


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        imp(directory=tmp_path).run()
    assert os.listdir(tmp_path) == []


def test_a_progress_bar_is_shown(capsys):
    imp(rounds=1, progress=True).run()
    shown = capsys.readouterr().out
    assert "dense, before 1 rounds" in shown and "round 1 of 1" in shown and "100%" in shown
    imp(rounds=1).run()
    assert capsys.readouterr().out == ""


# ---- errors


class Odd:
    def state_dict(self):
        return {"what": Odd}

    def load_state_dict(self, state):
        pass


def resume_with(directory, **options):
    imp(rounds=1, directory=directory).run()
    imp(rounds=1, directory=directory, **options).run()


def run_again():
    ours = imp(train=interrupted(3))
    with pytest.raises(Interruption):
        ours.run()
    ours.run()


def without_the_first(directory):
    imp(rounds=1, directory=directory).run()
    os.unlink(directory / "round_000.pt")
    imp(rounds=1, directory=directory).run()


def with_a_spoilt_file(directory, spoil):
    imp(rounds=1, directory=directory).run()
    spoil(directory / "round_001.pt")
    imp(rounds=1, directory=directory).run()


def cut(file):
    file.write_bytes(file.read_bytes()[:1000])


def scheduler_of(optimizer=None):
    return torch.optim.lr_scheduler.StepLR(optimizer or OPTIMIZERS["sgd"](net().parameters()), 3)


def with_another_stateful(directory, second):
    imp(rounds=1, directory=directory, stateful=[scheduler_of()]).run()
    imp(rounds=1, directory=directory, stateful=second).run()


def with_another_model(directory, model):
    imp(rounds=1, directory=directory).run()
    imp(rounds=1, directory=directory, model=model).run()


def in_a_file(directory):
    (directory / "file").write_text("")
    imp(directory=directory / "file").run()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda _: prune.IMP([], None, step, steps=1, rounds=1), TypeError, "model: expected nn.Module, got list"),
        (lambda _: prune.IMP(net(), None, step, steps=1, rounds=1), TypeError, "optimizer: expected .*, got NoneType"),
        (lambda _: imp(train=3), TypeError, "step: expected a function, got int"),
        (lambda _: imp(select={}), TypeError, "select: expected a function, got dict"),
        (lambda _: imp(evaluate=1.0), TypeError, "evaluate: expected a function, got float"),
        (lambda _: imp(steps=0), ValueError, "steps: expected a positive int, got 0"),
        (lambda _: imp(rounds=2.0), TypeError, "rounds: expected a positive int"),
        (lambda _: imp(fraction=1), ValueError, r"fraction: expected a number in \[0, 1\), got 1"),
        (lambda _: imp(rewind_step=STEPS), ValueError, "rewind_step: expected an int in 0..11, got 12"),
        (lambda _: imp(rewind_step=0.5), TypeError, "rewind_step: expected an int in 0..11, got 0.5"),
        (lambda _: imp(kind="coo"), ValueError, "kind: expected auto or one of .*, got 'coo'"),
        (lambda _: imp(kind="csr", block_shape=(2, 2)), ValueError, "block_shape: expected None with kind csr"),
        (lambda _: imp(block_shape=(0, 2)), ValueError, r"block_shape\[0\]: expected an int"),
        (lambda _: imp(stateful=[3]), TypeError, r"stateful: expected a list of objects with state_dict .*, got \[3\]"),
        (lambda _: imp(evaluate=lambda model: "good").run(), TypeError, "evaluate: expected .*number.* returns str"),
        (lambda _: run_again(), ValueError, "directory: expected one with a finished round .*, got None"),
        (lambda path: resume_with(path, fraction=0.3), ValueError, "fraction: expected 0.4, as in the run of .* 0.3"),
        (
            lambda path: resume_with(path, optimizer="sgd"),
            ValueError,
            "optimizer: expected AdamW, as in the run of .*, got SGD",
        ),
        (
            lambda path: with_another_stateful(path, [Odd()]),
            ValueError,
            r"stateful: expected \['StepLR'\], as in the run of .*, got \['Odd'\]",
        ),
        (lambda path: with_another_stateful(path, []), ValueError, r"stateful: expected \['StepLR'\], .*, got \[\]"),
        (
            lambda path: with_another_model(path, nn.Sequential(nn.Linear(13, 4), nn.Linear(4, 4), nn.Linear(4, 4))),
            ValueError,
            "model: expected one like that of the run of .*, got ",
        ),
        (
            lambda path: with_another_model(path, nn.Sequential(nn.Linear(13, 4), nn.Linear(4, 4))),
            ValueError,
            r"optimizer: expected groups of \[6\] parameters, as in the snapshot, got \[4\]",
        ),
        (
            lambda path: with_a_spoilt_file(path, cut),
            ValueError,
            r"round_001.pt: expected a whole file of torch.save, got",
        ),
        (
            lambda path: with_a_spoilt_file(path, lambda file: file.write_bytes(b"")),
            ValueError,
            r"round_001.pt: expected a whole file of torch.save, got",
        ),
        (
            lambda path: with_a_spoilt_file(path, lambda file: torch.save([3], file)),
            ValueError,
            r"round_001.pt: expected what a round of IMP wrote, got list",
        ),
        (lambda _: imp(directory=5), TypeError, "directory: expected a path or None, got int"),
        (in_a_file, ValueError, "directory: expected a folder, there or not, got the file"),
        (without_the_first, ValueError, "directory: expected one with round_000.pt"),
        (
            lambda path: imp(stateful=[Odd()], directory=path).run(),
            ValueError,
            r"round_000.pt: expected tensors and plain data, got what torch.load\(weights_only=True\) refuses",
        ),
    ],
)
def test_errors(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)
