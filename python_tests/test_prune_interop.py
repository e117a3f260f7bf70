"""Pruned models through copies, pickle, files, torch.compile and DistributedDataParallel."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from compsparse_kernels import prune
from python_tests.pruning import KINDS, OPTIMIZERS, batch, masks_of, net, step

WORLD = 2


def trained(kind):
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step(model, optimizer, 0)
    prune.convert(model, masks_of(0.4, seed=3), kind, optimizer)
    step(model, optimizer, 1)
    return model, optimizer


def torch_save(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair)), "torch.save": torch_save}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_model_and_optimizer_train_and_prune_alike(kind, copied):
    pairs = [trained(kind)]
    pairs.append(copied(pairs[0]))
    for model, optimizer in pairs:
        step(model, optimizer, 2)
        prune.update_masks(model, masks_of(0.3, seed=7), optimizer, kind=kind)
        step(model, optimizer, 3)
    (ours, _), (other, _) = pairs
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))
    assert ours[0].values is not other[0].values


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_and_the_optimizers_state_dict(kind, tmp_path):
    """Into a model that was pruned otherwise: it takes over masks, kinds and the optimizer's state."""
    safetensors = pytest.importorskip("safetensors.torch")
    model, optimizer = trained(kind)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other, other_optimizer = trained("dense" if kind == "csr" else "csr")
    prune.update_masks(other, masks_of(0.6, seed=9), other_optimizer)
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    other_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for each, each_optimizer in ((model, optimizer), (other, other_optimizer)):
        step(each, each_optimizer, 2)
    assert other[0].layout.kind == kind
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_follows_its_masks(kind):
    """fullgraph: no layer breaks the graph, whatever kind; new masks are compiled anew."""
    torch._dynamo.reset()
    model, optimizer = trained(kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, target = batch(5)
    for seed in (7, 8):
        optimizer.zero_grad()
        F.mse_loss(compiled(x), target).backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()])
        prune.update_masks(model, masks_of(0.3, seed=seed), optimizer, kind=kind)


# ---- two processes

PROCESS = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from compsparse_kernels import prune
from python_tests.pruning import OPTIMIZERS, net, step

rank, world, rendezvous, result = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
model = net()
optimizer = OPTIMIZERS["adamw"](model.parameters())
masks = []

def train(parallel, first):
    for k in range(first, first + 3):
        step(parallel, optimizer, 10 * k + rank)  # each process has its own data

train(DistributedDataParallel(model), 0)
prune.convert(model, prune.magnitude_masks(model, 0.5), "csr", optimizer)
masks.append(model[0].layout.to_mask())
train(DistributedDataParallel(model), 3)
prune.update_masks(model, prune.magnitude_masks(model, 0.7), optimizer, kind="csr")
masks.append(model[0].layout.to_mask())

growth = prune.RigL(model, optimizer, delta_t=1, end=100, alpha=0.9, process_group=distributed.group.WORLD)
alone = prune.RigL(model, optimizer, delta_t=1, end=100, alpha=0.9)
parallel = DistributedDataParallel(model)
parallel(torch.randn(8, 13, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
alone._steps += 1
own_choice = alone._new_mask("0", model[0])
growth.step()
masks.append(model[0].layout.to_mask())
train(DistributedDataParallel(model), 6)
torch.save({"masks": masks, "own_choice": own_choice, "snapshot": prune.snapshot(model, optimizer)}, result)
distributed.destroy_process_group()
"""


def test_two_processes_keep_the_same_masks_and_values(tmp_path):
    """Gradients are averaged, so magnitudes agree; RigL's dense gradients are added up across the processes."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
    results = [tmp_path / f"rank{rank}.pt" for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(WORLD), str(tmp_path / "rendezvous"), str(result)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    for process in processes:
        try:
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, output
    first, second = (torch.load(result, weights_only=True) for result in results)
    assert all(torch.equal(a, b) for a, b in zip(first["masks"], second["masks"], strict=True))
    half, most, regrown = first["masks"]
    assert 0 < most.sum() < half.sum() and regrown.sum() == most.sum() and not torch.equal(regrown, most)
    assert not torch.equal(first["own_choice"], second["own_choice"])  # what each would have grown by itself
    for name, value in first["snapshot"]["model"].items():
        assert torch.equal(value, second["snapshot"]["model"][name]), name
    states = (each["snapshot"]["optimizer"]["states"] for each in (first, second))
    for ours, theirs in zip(*states, strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_the_wrapper_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(net())
        message = "model: expected the module inside DistributedDataParallel .*, got the wrapper"
        for call in (lambda: prune.convert(wrapped, {}), lambda: prune.to_dense(wrapped)):
            with pytest.raises(ValueError, match=message):
                call()
    finally:
        torch.distributed.destroy_process_group()
