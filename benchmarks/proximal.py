"""Steps of the proximal optimizers against torch's, fused or by lists of tensors, followed by the map in torch ops."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.inputs import compare, fastest
from benchmarks.registry import Case, Entry, Side
from compsparse_kernels import prune

OP = "proximal"
LR = 1e-4
STRENGTH = {"l1": 1e-2, "group_l1": 1e-2}
RULES = {
    "SGD": (prune.ProximalSGD, torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (prune.ProximalAdamW, torch.optim.AdamW, {}),
}
NETS = {  # shapes of the weights of a net
    "784-300-100-10": ((300, 784), (100, 300), (10, 100)),
    "1024x1024": ((1024, 1024),),
    "4096x4096": ((4096, 4096),),
}
PENALTIES = (("l1", None), ("group_l1", None), ("group_l1", (32, 32)))


def entries() -> Iterator[Entry]:
    """The bar: never slower than torch's own step with the map after it."""
    for rule in RULES:
        for implementation in ("fused", "foreach"):
            for net in NETS:
                suites = {"bars": 1.0} | ({"quick": 1.0} if net != "4096x4096" else {})
                yield _entry(rule, net, "l1", None, "float32", implementation, suites)
        for penalty, block_shape in PENALTIES[1:]:
            yield _entry(rule, "4096x4096", penalty, block_shape, "float32", "fused", {"bars": 1.0})
        yield _entry(rule, "4096x4096", "l1", None, "bfloat16", "fused", {"bars": 1.0})


def _entry(rule, net, penalty, block_shape, dtype, implementation, suites) -> Entry:
    groups = "" if penalty == "l1" else f" {block_shape[0]}x{block_shape[1]}" if block_shape else " rows"
    variant = f"{rule}, {penalty}{groups}{'' if dtype == 'float32' else f', {dtype}'}"
    make = partial(_case, rule, net, penalty, block_shape, getattr(torch, dtype), implementation)
    peer = f"torch {implementation}, then the map"
    return Entry(OP, variant, net, None, "step", peer, make, suites, dtype=dtype)


def _case(rule, net, penalty, block_shape, dtype, implementation) -> Case:
    """A step changes what it reads, so each check makes one of its own, from the start."""
    ours, torchs, options = RULES[rule]
    options = {"lr": LR} | options
    drawn = [[torch.randn(shape).to(dtype) for shape in NETS[net]] for _ in range(2)]
    bound = LR * STRENGTH[penalty]

    def theirs(shrink, to=dtype, **implementation):
        """(parameters, a call that steps and then shrinks them)"""
        params, optimizer = _optimizer(torchs, drawn, to, options | implementation)

        def run():
            optimizer.step()
            with torch.no_grad():
                for param in params:
                    shrink(param, bound, block_shape)

        return params, run

    def proximal():
        settings = {"penalty": penalty, "strength": STRENGTH[penalty], "block_shape": block_shape}
        params, optimizer = _optimizer(ours, drawn, dtype, options | settings)
        return params, optimizer.step

    def stepped(make):
        params, run = make()
        run()
        return [param.detach() for param in params]

    def side(make, run):
        return Side(run, lambda _: compare(stepped(make), exact, dense))

    shrink, *others = MAPS[penalty]
    exact = stepped(partial(theirs, shrink, torch.float64))
    dense = stepped(partial(theirs, shrink, foreach=False))
    peers = {make: make()[1] for make in (partial(theirs, one, **{implementation: True}) for one in (shrink, *others))}
    fast = fastest(peers.values())
    return Case(side(proximal, proximal()[1]), side(next(make for make, run in peers.items() if run is fast), fast))


def _optimizer(make, drawn, dtype, options):
    params = [torch.nn.Parameter(weight.to(dtype, copy=True)) for weight in drawn[0]]
    for param, grad in zip(params, drawn[1], strict=True):
        param.grad = grad.to(dtype)
    return params, make(params, **options)


def _copied(param, bound, block_shape):
    param.copy_(F.softshrink(param, bound))


def _clamped(param, bound, block_shape):
    param.sub_(param.clamp(-bound, bound))


def _in_place(param, bound, block_shape):
    torch.ops.aten.softshrink.out(param, bound, out=param)


def _blocks(param, block_shape):
    block_out, block_in = block_shape or (1, param.shape[1])
    return param.unflatten(1, (-1, block_in)).unflatten(0, (-1, block_out))  # [.., block_out, .., block_in]


def _by_norm(param, bound, block_shape):
    blocks = _blocks(param, block_shape)
    norms = torch.linalg.vector_norm(blocks, dim=(1, 3), keepdim=True)
    blocks.mul_((1 - bound * (blocks.shape[1] * blocks.shape[3]) ** 0.5 / norms).clamp_(min=0))


def _by_squares(param, bound, block_shape):
    blocks = _blocks(param, block_shape)
    squares = blocks.square().sum((1, 3), keepdim=True)
    blocks.mul_((1 - bound * (blocks.shape[1] * blocks.shape[3]) ** 0.5 * squares.rsqrt()).clamp_(min=0))


# The maps in torch ops, in place, each written in several ways; the fastest is the peer.
MAPS = {"l1": (_copied, _clamped, _in_place), "group_l1": (_by_norm, _by_squares)}
