"""Problems of the proximal steps: random numbers, torch's optimizer followed by the map as papers write it, float64."""

import math

import torch

from compsparse_kernels.ops import proximal_adamw_, proximal_sgd_
from compsparse_kernels.ops.proximal import reference
from compsparse_kernels.testing import assert_within_budget, random_tensor

SGD = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.02},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
}
NAMES = {"sgd": ("param", "momentum_buffer"), "adamw": ("param", "exp_avg", "exp_avg_sq")}


class Problem:
    """A step on random numbers, the same in every dtype: the op, torch's optimizer followed by the map, float64."""

    def __init__(self, rule, shape, dtype, options, penalty=None, strength=0.0, block_shape=None, seed=0):
        self.rule, self.dtype, self.options = rule, dtype, {"lr": 0.1} | options
        self.penalty, self.strength, self.block_shape = penalty, strength, block_shape
        count = {"sgd": 3 if options.get("momentum") else 2, "adamw": 4}[rule]
        self.tensors = [random_tensor(*(shape or (1,)), dtype=dtype, seed=seed + i).view(shape) for i in range(count)]
        if rule == "adamw":
            self.tensors[3] = self.tensors[3].square()

    def ours(self, backend=None):
        tensors = [tensor.clone() for tensor in self.tensors]
        step = {"step": 3} if self.rule == "adamw" else {}
        op = {"sgd": proximal_sgd_, "adamw": proximal_adamw_}[self.rule]
        penalty = {"penalty": self.penalty, "strength": self.strength, "block_shape": self.block_shape}
        assert op(*tensors, **step, **self.options, **penalty, backend=backend) is tensors[0]
        assert torch.equal(tensors[1], self.tensors[1])
        return [tensors[0], *tensors[2:]]

    def dense(self, dtype):
        param, grad, *state = (tensor.to(dtype, copy=True) for tensor in self.tensors)
        param.requires_grad_().grad = grad
        if self.rule == "sgd":
            optimizer = torch.optim.SGD([param], **self.options, foreach=False)
            optimizer.state[param] = {"momentum_buffer": state[0]} if state else {}
        else:
            optimizer = torch.optim.AdamW([param], **self.options, foreach=False)
            step = torch.tensor(2.0)  # that many were made
            optimizer.state[param] = {"step": step, "exp_avg": state[0], "exp_avg_sq": state[1]}
        optimizer.step()
        bound = self.options["lr"] * self.strength
        return [mapped(param.detach(), self.penalty, bound, self.block_shape), *state]

    def arguments(self):
        """Those of the registered op, by name and in its order, on copies of the tensors."""
        names = {"sgd": ("param", "grad", "momentum_buffer"), "adamw": ("param", "grad", "exp_avg", "exp_avg_sq")}
        named = dict.fromkeys(names[self.rule])
        named |= dict(zip(named, (tensor.clone() for tensor in self.tensors), strict=False))
        if self.rule == "sgd":
            usual = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
            named |= usual | self.options | {"first": False}
        else:
            beta1, beta2 = self.options.get("betas", (0.9, 0.999))
            usual = {"step": 3, "lr": 0.1, "beta1": beta1, "beta2": beta2, "eps": 1e-8, "weight_decay": 0.01}
            named |= usual | {name: value for name, value in self.options.items() if name != "betas"}
        named |= {"penalty": self.penalty or "none", "strength": self.strength}
        if self.rule == "sgd":
            named["beta"] = 0.0
        rows = len(named["param"]) if named["param"].dim() else 1
        whole_rows = (1, named["param"].numel() // rows)
        block = (self.block_shape or whole_rows) if self.penalty == "group_l1" else (1, 1)
        return named | dict(zip(("block_out", "block_in"), block, strict=True))

    def terms(self):
        """Of each result, the sum of its terms in absolute value: with a negative lr no sign is left."""
        named = {
            name: value.double().abs() if isinstance(value, torch.Tensor) else value
            for name, value in self.arguments().items()
        }
        getattr(reference, f"proximal_{self.rule}_")(**named | {"lr": -named["lr"], "penalty": "none"})
        param, _, *state = (value for value in named.values() if isinstance(value, torch.Tensor))
        return [param + named["lr"] * self.strength, *state]

    def check(self, ours=None):
        """``ours``, or else what the op computes, is within the error budget; returns it."""
        ours, exact = ours or self.ours(), self.dense(torch.float64)
        dense = self.dense(torch.float32 if self.dtype == torch.float64 else self.dtype)
        for name, *parts, terms in zip(NAMES[self.rule], ours, dense, exact, self.terms(), strict=False):
            assert parts[0].dtype == self.dtype
            assert_within_budget(*parts, f"{name}, {self.penalty}", terms)
        return ours


def mapped(weight, penalty, bound, block_shape):
    """The maps as they are written in the papers, in the dtype of ``weight``."""
    if penalty == "l1":
        return weight.sign() * (weight.abs() - bound).clamp(min=0)
    if penalty != "group_l1":
        return weight
    matrix = weight.reshape(len(weight) if weight.dim() else 1, -1)
    block_out, block_in = block_shape or (1, matrix.shape[1])
    result = torch.empty_like(matrix)
    for row in range(0, matrix.shape[0], block_out):
        for column in range(0, matrix.shape[1], block_in):
            place = (slice(row, row + block_out), slice(column, column + block_in))
            group = matrix[place]
            factor = 1 - bound * math.sqrt(group.numel()) / torch.linalg.vector_norm(group)
            result[place] = group * factor.clamp(min=0)
    return result.view(weight.shape)
