"""What the tests of pruning share: a small net, optimizers, a training step, and state seen as dense."""

import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.testing import random_mask, random_tensor

KINDS = ("csr", "block", "dense")
SIZES = (13, 18, 17)  # ragged for blocks of 16
NAMES = ("0", "2")
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": partial(torch.optim.Adam, lr=3e-3, weight_decay=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
}
PER_WEIGHT = {
    "sgd": {"momentum_buffer"},
    "adam": {"exp_avg", "exp_avg_sq"},
    "adamw": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "rmsprop": {"square_avg", "momentum_buffer", "grad_avg"},
}


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    first, second, third = SIZES
    layers = nn.Sequential(
        nn.Linear(first, second), nn.Tanh(), nn.Linear(second, third), nn.Tanh(), nn.Linear(third, 4)
    )
    return layers.to(dtype)


def masks_of(density, seed):
    return {
        name: random_mask(rows, columns, density, seed + number)
        for number, (name, columns, rows) in enumerate(zip(NAMES, SIZES[:-1], SIZES[1:], strict=True))
    }


def batch(k, dtype=torch.float32):
    return random_tensor(32, SIZES[0], seed=k, dtype=dtype), random_tensor(32, 4, seed=1000 + k, dtype=dtype)


def step(model, optimizer, k, forward=None):
    x, target = batch(k, next(model.parameters()).dtype)
    loss = F.mse_loss((forward or model)(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss  # alive during the caller's next call, as in most training loops


def trained(name="adamw", dtype=torch.float32, steps=5):
    model = net(dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    for k in range(steps):
        step(model, optimizer, k)
    return model, optimizer


def dense_state(optimizer, layer):
    """What the optimizer holds of a layer's weight, as [out, in]."""
    weight = layer.values if isinstance(layer, MaskedLinear) else layer.weight
    unpack = layer.layout.unpack if isinstance(layer, MaskedLinear) else torch.clone
    state = optimizer.state[weight]
    return {key: unpack(value) if value.shape == weight.shape else value for key, value in state.items()}


class Twin:
    """The dense net that simulates sparsity: W * M in the forward pass, W and its state set to 0 where M is."""

    def __init__(self, dtype, make):
        self.model = net(dtype)
        self.optimizer = make(self.model.parameters())
        self.masks = {name: torch.ones_like(self.model.get_submodule(name).weight) for name in NAMES}

    def forward(self, x):
        for name, layer in self.model.named_children():
            x = F.linear(x, layer.weight * self.masks[name], layer.bias) if name in NAMES else layer(x)
        return x

    def step(self, k):
        step(self.model, self.optimizer, k, self.forward)

    def prune(self, masks):
        self.masks = {name: mask.to(self.model[0].weight) for name, mask in masks.items()}
        with torch.no_grad():
            for name, mask in self.masks.items():
                weight = self.model.get_submodule(name).weight
                weight.mul_(mask)
                for value in self.optimizer.state[weight].values():
                    if value.shape == weight.shape:
                        value.mul_(mask)

    def save(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def rewind(self, saved):
        self.model.load_state_dict(saved[0])
        self.optimizer.load_state_dict(copy.deepcopy(saved[1]))
        self.prune(self.masks)
