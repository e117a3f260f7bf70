"""What ``check`` compares: each op on a few shapes, beside the same mathematics written with dense torch.

A case's ``dense`` works in any dtype, so in float64 it is the exact reference and in the op's own dtype it is the
error a user would have without this library (the error budget of :mod:`compsparse_kernels.testing`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from compsparse_kernels import ops
from compsparse_kernels.graphs import FunctionGraph
from compsparse_kernels.layouts import BlockLayout, DAGLayout, MaskLayout
from compsparse_kernels.layouts.nm import group
from compsparse_kernels.testing import attention_weights, dag_inputs, dag_node_by_node, random_mask, random_tensor

ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class Case:
    """``ours`` and ``dense`` compute the same from ``inputs`` (float64 tensors); unless ``differentiable`` is off, a
    gradient is checked for each."""

    op: str
    name: str
    inputs: dict[str, torch.Tensor]
    ours: Callable[..., torch.Tensor]
    dense: Callable[..., torch.Tensor]
    multilinear: bool = True  # then dense(|inputs|) is the sum of the terms in absolute value, for the error budget
    terms: Callable[..., torch.Tensor] | None = None  # gives that sum from |inputs| where dense does not
    differentiable: bool = True


def all_cases() -> Iterator[Case]:
    yield from _block_sparse_cases()
    yield from _masked_cases()
    yield from _dag_cases()
    yield from _attention_cases()
    yield from _proximal_cases()


def _draw(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random numbers that float32 holds exactly, so that every dtype sees the same input."""
    return {
        name: random_tensor(*shape, seed=seed).double() for seed, (name, shape) in enumerate(shapes.items()) if shape
    }


def _block_sparse_cases() -> Iterator[Case]:
    for batch, features, block, activation in (
        (1, (64, 96), (32, 32), None),
        (37, (83, 100), (16, 8), "relu"),
        (130, (192, 256), (8, 8), "gelu"),
        (65, (130, 70), (64, 32), "silu"),
        (48, (60, 52), (4, 4), None),
        (5, (33, 129), (128, 128), None),
    ):
        layout = _block_layout(features, block)
        name = f"{batch} x ({features[1]} -> {features[0]}), blocks {block[0]} x {block[1]}"
        yield _block_linear(f"{name}{f', {activation}' if activation else ''}", batch, layout, activation)
        yield _sampled_blocks(name, batch, layout)
    yield _block_linear("31 x (96 -> 64), transposed layout", 31, _block_layout((96, 64), (16, 8)).T, None)
    yield _block_linear("40 x (64 -> 64), shared blocks", 40, _tied_layout(), None)


def _block_layout(features: tuple[int, int], block: tuple[int, int]) -> BlockLayout:
    grid = [-(-size // side) for size, side in zip(features, block, strict=True)]
    mask = random_mask(*grid)
    mask[0, 0] = True  # not empty, however small the grid
    return BlockLayout.from_mask(mask, block, out_features=features[0], in_features=features[1])


def _tied_layout() -> BlockLayout:
    """A band of blocks, the same two value blocks along each diagonal: a convolution's weight."""
    rows = torch.arange(8).repeat(2)
    columns = torch.cat([torch.arange(8), (torch.arange(8) + 1) % 8])
    return BlockLayout.from_entries(rows, columns, (8, 8), 64, 64, slot=torch.arange(2).repeat_interleave(8))


def _block_linear(name: str, batch: int, layout: BlockLayout, activation: str | None) -> Case:
    return Case(
        "block_sparse_linear",
        name,
        _draw(x=(batch, layout.in_features), values=layout.values_shape, bias=(layout.out_features,)),
        lambda x, values, bias: ops.block_sparse_linear(x, values, layout.to(x.device), bias, activation),
        lambda x, values, bias: ACTIVATIONS[activation](F.linear(x, layout.to(x.device).unpack(values), bias)),
        multilinear=activation is None,
    )


def _sampled_blocks(name: str, batch: int, layout: BlockLayout) -> Case:
    return Case(
        "sampled_block_matmul",
        name,
        _draw(a=(batch, layout.out_features), b=(batch, layout.in_features)),
        lambda a, b: ops.sampled_block_matmul(a, b, layout.to(a.device)),
        lambda a, b: layout.to(a.device).pack(a.mT @ b),
    )


def _masked_cases() -> Iterator[Case]:
    for batch, features, density, kind in (
        (1, (96, 64), 0.1, "csr"),
        (37, (83, 100), 0.3, "csr"),
        (130, (192, 256), 0.05, "csr"),
        (64, (70, 50), 0.2, "block"),
        (64, (70, 50), 0.9, "dense"),
    ):
        layout = MaskLayout.from_mask(random_mask(*features, density), kind=kind)
        name = f"{batch} x ({features[1]} -> {features[0]}), density {density}, kind {kind}"
        yield from _masked_pair(name, batch, layout)
    for batch, features, nm in ((1, (96, 64), (2, 4)), (37, (83, 101), (2, 4)), (130, (192, 256), (4, 16))):
        magnitude = random_tensor(features[0], features[1]).abs()
        layout = MaskLayout.from_mask(_largest_of_groups(magnitude, *nm), kind="nm", nm=nm)
        name = f"{batch} x ({features[1]} -> {features[0]}), {nm[0]}:{nm[1]}"
        yield from _masked_pair(name, batch, layout)
        yield from _masked_pair(f"{name}, transposed layout", batch, layout.T)


def _masked_pair(name: str, batch: int, layout: MaskLayout) -> Iterator[Case]:
    yield Case(
        "masked_linear",
        name,
        _draw(x=(batch, layout.in_features), values=layout.values_shape, bias=(layout.out_features,)),
        lambda x, values, bias: ops.masked_linear(x, values, layout.to(x.device), bias),
        lambda x, values, bias: F.linear(x, layout.to(x.device).unpack(values), bias),
    )
    yield Case(
        "sampled_matmul",
        name,
        _draw(a=(batch, layout.out_features), b=(batch, layout.in_features)),
        lambda a, b: ops.sampled_matmul(a, b, layout.to(a.device)),
        lambda a, b: layout.to(a.device).pack(a.mT @ b),
    )


def _largest_of_groups(magnitude: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """bool ``[out, in]``: the n largest of each m consecutive columns."""
    grouped = group(magnitude, m)
    kept = torch.zeros_like(grouped, dtype=torch.bool).scatter(-1, grouped.topk(n, dim=-1).indices, True)
    return kept.flatten(1)[:, : magnitude.shape[1]]


def _dag_cases() -> Iterator[Case]:
    skip = FunctionGraph.random(n_inputs=6, n_nodes=20, in_degree=3, n_outputs=3, seed=1, skip=0.5)
    read = FunctionGraph(3, [[0, 1], [3, 2], [3, 4]], sinks=[3, 5])
    for batch, name, layout, activation in (
        (100, "tree of 16, width 16", DAGLayout(FunctionGraph.tree(16), 16), None),
        (37, "skip edges, width 33", DAGLayout(skip, 33, in_channels=2), "gelu"),
        (65, "outputs that are read, 7 hidden units", DAGLayout(read, 5, 7, out_channels=3), "silu"),
        (48, "padded convolutions", DAGLayout(FunctionGraph.conv1d(9, kernel=3, padding=1, depth=2), 8), "relu"),
        (1, "butterfly of 8, width 1", DAGLayout(FunctionGraph.butterfly(8), 1), None),
    ):
        yield _dag_network(f"{batch} x ({name}){f', {activation}' if activation else ''}", batch, layout, activation)


def _dag_network(name: str, batch: int, layout: DAGLayout, activation: str | None) -> Case:
    kinds = len(layout.kinds)
    names = ["x", *(f"{each}[{kind}]" for each in ("weights", "biases") for kind in range(kinds))]

    def ours(x, *parameters):
        return ops.dag_network(x, parameters[:kinds], layout.to(x.device), parameters[kinds:], activation)

    def dense(x, *parameters, act=ACTIVATIONS[activation]):
        return dag_node_by_node(x, parameters[:kinds], layout, parameters[kinds:], act)

    inputs = dict(zip(names, dag_inputs(layout, batch, torch.float64), strict=True))
    # Activations are about the identity at most, so the terms are those of the linear network.
    return Case("dag_network", name, inputs, ours, dense, terms=partial(dense, act=ACTIVATIONS[None]))


def _attention_cases() -> Iterator[Case]:
    for shape, keys, options in (
        ((2, 3, 37, 16), 45, {"threshold": 0.05}),
        ((1, 2, 130, 64), 130, {"threshold": 0.01, "is_causal": True}),
        ((1, 2, 65, 40), 70, {"threshold": 0.5, "rule": "absolute"}),
        ((1, 1, 1, 8), 33, {"threshold": 0.2}),
        ((1, 2, 65, 32), 70, {"threshold": 0.2, "shrink": True, "is_causal": True, "window": (40, 0)}),
        ((2, 2, 33, 24), 47, {"threshold": 0.7, "rule": "absolute", "shrink": True}),
        ((1, 2, 40, 96), 50, {"threshold": 0.1, "weights": "rectified"}),
        ((1, 2, 40, 20), 90, {"threshold": 0.6, "rule": "absolute", "weights": "rectified"}),
        ((1, 2, 50, 16), 130, {"threshold": 9, "rule": "topk", "is_causal": True}),
        ((1, 2, 50, 16), 130, {"threshold": 0.9, "rule": "topp"}),
        ((1, 2, 50, 16), 130, {"threshold": 1.5, "rule": "entmax"}),
        ((2, 1, 50, 16), 130, {"threshold": 2, "rule": "entmax", "window": (60, 30)}),
    ):
        said = (str(value) if name in ("rule", "weights") else f"{name} {value}" for name, value in options.items())
        options = {"scale": 0.375, **options}
        yield Case(
            "threshold_attention",
            f"{shape[:2]}, {shape[2]} queries, {keys} keys of {shape[3]}, {', '.join(said)}",
            _decided_inputs(shape, keys),
            lambda query, key, value, options=options: ops.threshold_attention(query, key, value, **options),
            lambda query, key, value, options=options: _dense_attention(query, key, value, **options),
            multilinear=False,
        )


def _decided_inputs(shape: tuple[int, ...], keys: int) -> dict[str, torch.Tensor]:
    """Query and key of small whole numbers: with the scale 3 / 8 every dtype holds their scores exactly, and none of
    these is near the logarithm of a threshold above, so no rounding decides what is kept."""
    key_shape = (*shape[:2], keys, shape[3])
    inputs = _draw(query=shape, key=key_shape, value=key_shape)
    return inputs | {name: inputs[name].round() for name in ("query", "key")}


def _dense_attention(
    query, key, value, threshold, scale, rule="relative", weights="softmax", shrink=False, is_causal=False, window=None
) -> torch.Tensor:
    scores = scale * query @ key.mT
    distance = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]
    left, right = window or (key.shape[2], key.shape[2])
    seen = (distance >= -left) & (distance <= (min(right, 0) if is_causal else right))
    scores = scores.masked_fill(~seen.to(scores.device), -torch.inf)
    kept = _kept(scores.detach().double(), threshold, rule) & (scores > -torch.inf)
    return attention_weights(scores, kept, threshold, rule, "shrink" if shrink else weights) @ value


def _kept(scores: torch.Tensor, threshold: float, rule: str) -> torch.Tensor:
    top = scores.amax(-1, keepdim=True)
    if rule == "absolute":
        return scores >= threshold
    if rule == "relative":
        return scores >= top + math.log(threshold)
    if rule == "entmax":
        low, high = top * (threshold - 1) - 1, top * (threshold - 1)
        for _ in range(60):  # halves the interval of the tau at which the weights add up to 1
            middle = (low + high) / 2
            much = ((threshold - 1) * scores - middle).relu().pow(1 / (threshold - 1)).sum(-1, keepdim=True) >= 1
            low, high = torch.where(much, middle, low), torch.where(much, high, middle)
        return (threshold - 1) * scores > low
    ordered = scores.sort(-1, descending=True).values
    if rule == "topk":
        return scores >= ordered[..., threshold - 1, None]
    fewest = (ordered.softmax(-1).cumsum(-1) < threshold).sum(-1, keepdim=True)
    return scores >= ordered.gather(-1, fewest)


def _proximal_cases() -> Iterator[Case]:
    """Each output: the parameter and its state, side by side."""
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    adamw = {"step": 3, "lr": 0.1, "weight_decay": 0.1}
    for shape, penalty in (
        ((37, 41), {}),
        ((130, 257), {"penalty": "l1", "strength": 3.0}),
        ((90, 700), {"penalty": "group_l1", "strength": 3.0}),
        ((33, 70), {"penalty": "group_l1", "strength": 4.0, "block_shape": (8, 16)}),
    ):
        name = f"{shape[0]} x {shape[1]}, {', '.join(map(str, penalty.values())) or 'no penalty'}"
        inputs = _draw(param=shape, grad=shape, momentum_buffer=shape)
        yield _proximal("proximal_sgd_", f"{name}, Nesterov", inputs, sgd | penalty)
        inputs = _draw(param=shape, grad=shape, exp_avg=shape, exp_avg_sq=shape)
        yield _proximal(
            "proximal_adamw_", name, inputs | {"exp_avg_sq": inputs["exp_avg_sq"].square()}, adamw | penalty
        )


def _proximal(op: str, name: str, inputs: dict[str, torch.Tensor], options: dict) -> Case:
    def changed(step, param, grad, *state):
        with torch.no_grad():
            param, *state = (tensor.detach().clone() for tensor in (param, *state))
            return torch.stack([step(param, grad.detach(), *state, **options), *state])

    def ours(*tensors):
        return changed(getattr(ops, op), *tensors)

    dense = partial(changed, partial(_torch_step, "SGD" if op == "proximal_sgd_" else "AdamW"))
    return Case(op, name, inputs, ours, dense, multilinear=False, differentiable=False)


def _torch_step(name, param, grad, *state, step=None, penalty=None, strength=0.0, block_shape=None, **options):
    """torch's optimizer, then the penalty's map in torch's ops."""
    param.grad = grad
    optimizer = getattr(torch.optim, name)([param], **options, foreach=False)
    if step is None:
        optimizer.state[param] = {"momentum_buffer": state[0]}
    else:
        optimizer.state[param] = {"step": torch.tensor(step - 1.0), "exp_avg": state[0], "exp_avg_sq": state[1]}
    optimizer.step()
    bound = options["lr"] * strength
    if penalty == "l1":
        param.copy_(F.softshrink(param, bound))
    elif penalty == "group_l1":
        _shrink_groups(param, bound, *(block_shape or (1, param.shape[1])))
    return param


def _shrink_groups(matrix, bound: float, block_out: int, block_in: int) -> None:
    for rows in matrix.split(block_out):
        for block in rows.split(block_in, 1):
            norm = torch.linalg.vector_norm(block)
            block.mul_((1 - bound * block.numel() ** 0.5 / norm).clamp(min=0))
