"""Single launches of the kernels of N:M products on integers, and what they must leave."""

import torch
import triton

from compsparse_kernels.ops.masked_linear import reference
from compsparse_kernels.ops.masked_linear import triton as kernels
from compsparse_kernels.ops.triton_launch import Launch
from python_tests.gpu.dag_problems import Bounds, Problem
from python_tests.gpu.nm_products import OPS, Case, Product, products

PRODUCT, TRANSPOSED, SAMPLED = range(len(OPS))
NAN = float("nan")


def problem(case: Case, op: int, tile: dict[str, object]) -> Problem:
    """The integers of ``case`` are exact, so that each result has one right rounding. One row of the batch is NaN, or,
    where the batch is summed over, the last input and output: no other result may become so."""
    assert case.integers
    product = products(case)[op]
    for tensor in product.tensors[: 2 if op == SAMPLED else 1]:
        tensor[(..., -1) if op == SAMPLED else len(tensor) // 2] = NAN
    exact = product.run(reference, torch.Tensor.double).to(case.dtype)
    launch = _launch(case, product, torch.full_like(exact, NAN))
    launch = _tiled(launch, tile)
    return Problem(launch, {"values" if op == SAMPLED else "y": Bounds(exact, exact)})


def _launch(case: Case, product: Product, result: torch.Tensor) -> Launch:
    first, second, *bias = product.tensors
    positions = product.rest[0]
    with case.settings():
        if product.op == OPS[SAMPLED]:
            return kernels.sampled_launch(first, second, positions, case.m, result)
        return kernels.product_launch(first, second, *bias, positions, case.m, product.op == OPS[TRANSPOSED], result)


def _tiled(launch: Launch, tile: dict[str, object]) -> Launch:
    """The launch with another tile, which has to suit."""
    given = launch.arguments | tile
    whole = given["in_features"] % (given["GROUPS"] * given["M"]) == given["out_features"] % given["TILE_OUT"] == 0
    assert whole or not given["EVEN"], "this tile is for whole groups and tiles"
    columns = triton.cdiv(given["groups"], given["GROUPS"])
    rows = triton.cdiv(given["out_features"], given["TILE_OUT"])
    if "y" not in given:
        return Launch(launch.kernel, given, rows * columns)
    tiles = columns if given["TRANSPOSED"] else rows
    return Launch(launch.kernel, given, tiles * triton.cdiv(given["batch"], given["TILE_BATCH"]))
