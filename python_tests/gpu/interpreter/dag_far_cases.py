"""Launches of the kernels of dag_network whose offsets pass 2^31, on memory that exists only where it is touched.

Each reads and writes a few numbers at the far ends of large tensors, and returns the result beside the exact one.
"""

import torch

from compsparse_kernels.ops.dag_network import triton as shipped
from compsparse_kernels.ops.dag_network.gather import Backward, Forward, Kind
from compsparse_kernels.testing import random_tensor
from python_tests.gpu.interpreter.guard_pages import far
from python_tests.gpu.interpreter.strict import strict

DTYPE = torch.float16
LANES, OUT, FAN_IN = 64, 16, 16
ROWS = 2**25 + 64  # times LANES: past 2^31
NODES = 2**27 + 8  # times FAN_IN
WEIGHTS = 2**23 + 8  # times OUT * FAN_IN
SOURCE, TARGET = ROWS - 48, ROWS - OUT  # rows


def _numbers(*shape: int, seed: int) -> torch.Tensor:
    """Small integers: their products and sums are exact."""
    return random_tensor(*shape, seed=seed).mul(2).round().to(DTYPE)


def _matrix(row: int, values: torch.Tensor) -> torch.Tensor:
    matrix = far((ROWS, LANES), DTYPE)
    matrix[row : row + len(values)] = values
    return matrix


def _last_node(num_weights: int) -> Kind:
    """The last of very many nodes, which alone has the last of the weights."""
    first, weight, weight_ptr = (far((size,), torch.int32) for size in (NODES, NODES, num_weights + 1))
    first[-1], weight[-1], weight_ptr[-2:] = TARGET, num_weights - 1, torch.tensor([NODES - 1, NODES])
    inputs = far((NODES, FAN_IN), torch.int32)
    inputs[-1] = torch.arange(SOURCE, SOURCE + FAN_IN)
    return Kind(first, weight, weight_ptr, inputs)


def far_forward(kernels=shipped):
    values, weight = _numbers(FAN_IN, LANES, seed=1), _numbers(OUT, FAN_IN, seed=2)
    h, weights = _matrix(SOURCE, values), far((WEIGHTS, OUT, FAN_IN), DTYPE)
    weights[-1] = weight
    slopes = far(h.shape, DTYPE)
    rows = Forward([_last_node(WEIGHTS)], [(0, torch.tensor([NODES - 1], dtype=torch.int32))], None)
    (launch,) = kernels.forward_launches(h, slopes, [weights], [], rows, [0], "silu", LANES)
    launch.arguments["ACTIVATION"] = "none"  # exact; what the slope is does not matter, but where it goes
    with strict():
        launch()
    assert (slopes[TARGET:] != 0).any()
    return h[TARGET:].double(), weight.double() @ values.double()


def far_backward(kernels=shipped):
    values, weight = _numbers(OUT, LANES, seed=1), _numbers(OUT, FAN_IN, seed=2)
    gradients = _matrix(SOURCE, values)
    weights = far((WEIGHTS, OUT, FAN_IN), DTYPE)
    weights[-1] = weight
    at = (WEIGHTS - 1) * OUT + torch.arange(OUT)  # in units of 16
    step = Backward(
        kind=0,
        channels=FAN_IN,
        first=torch.tensor([TARGET], dtype=torch.int32),
        ptr=torch.tensor([0, OUT]),
        row=torch.arange(SOURCE, SOURCE + OUT, dtype=torch.int32),
        weight=at,
        unit=16,
        longest=OUT,
        even=OUT,
    )
    (launch,) = kernels.backward_launches(gradients, gradients, [far((1, 1, 1), DTYPE)], [step], [1], "none", LANES)
    launch.arguments["weights"] = weights  # not joined to others: it has no memory
    with strict():
        launch()
    return gradients[TARGET:].double(), weight.double().mT @ values.double()


def far_weight(kernels=shipped):
    """Only the last program."""
    values, grad = _numbers(FAN_IN, LANES, seed=1), _numbers(OUT, LANES, seed=2)
    h, gradients = _matrix(SOURCE, values), _matrix(TARGET, grad)
    small = kernels.weight_launch(gradients, h, (1, OUT, FAN_IN), _last_node(1))
    sums = far((1, WEIGHTS, OUT, FAN_IN), DTYPE)
    arguments = small.arguments | {"sums": sums, "num_weights": WEIGHTS, "parts": 1} | _last_node(WEIGHTS)._asdict()
    del arguments["weight"]
    with strict(first_program=WEIGHTS - 1):
        small._replace(arguments=arguments, programs=1)()
    return sums[0, -1].double(), grad.double() @ values.double().mT


FAR_CASES = (far_forward, far_backward, far_weight)
