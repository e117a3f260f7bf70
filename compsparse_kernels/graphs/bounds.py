"""Theorem 1 on a graph: how many units suffice for an accuracy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from compsparse_kernels.graphs.checks import listing, require

if TYPE_CHECKING:
    from compsparse_kernels.graphs.function_graph import FunctionGraph


@dataclass(frozen=True)
class ComplexityBounds:
    """Units that suffice for accuracy ``eps``, up to constants: :meth:`FunctionGraph.theorem1_bounds`.

    Attributes:
        eps: accuracy, in the sup norm.
        N_shallow, N_deep: numbers of units; ``inf`` beyond the range of a float, so their log10 is there too.
        exponent_shallow, exponent_deep: the r in ``eps ** -r``; for the deep network that of its largest term.
    """

    eps: float
    N_shallow: float
    N_deep: float
    log10_N_shallow: float
    log10_N_deep: float
    exponent_shallow: float
    exponent_deep: float


def theorem1_bounds(graph: "FunctionGraph", eps: float, smoothness: float | Sequence[float]) -> ComplexityBounds:
    r"""Units that suffice to approximate a function on this graph, by a shallow network and by one on the graph.

    .. math:: N_{shallow} = \epsilon^{-n/m}, \qquad N_{deep} = \sum_v \epsilon^{-d_v/m_v}

    with n the number of sources that something reads, d_v the in-degree of node v, m_v the number of continuous
    derivatives of its constituent function, and m the smallest m_v.

    What the numbers are not: nothing here is measured. They are upper bounds **up to constants**, which are left out
    and may depend on d_v, m_v, the depth and the norms of the constituents, so only the growth with 1/eps and n means
    something, and a small N promises no small network. The shallow bound is the best that is known for *all* functions
    of n variables with m derivatives; one compositional function may need less. The theorem speaks of
    approximation in the sup norm on a cube, by units with an activation that is smooth and no polynomial (for ReLU, of
    Lipschitz functions, m = 1); constituents need to be Lipschitz for errors to pass up the graph without
    blow-up. It says nothing about what training finds, or how many samples that takes. Nodes that share weights are
    counted one by one, as in the theorem: it counts units, not parameters.

    Args:
        eps: accuracy, in 0 < eps < 1.
        smoothness: m, the same for all nodes, or one positive number m_v for each node.

    Raises:
        ValueError: naming the argument, what was wanted and what came.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", Theorem 1; Poggio, Mhaskar, Rosasco, Miranda and
    Liao, "Why and when can deep- but not shallow-networks avoid the curse of dimensionality: a review", 2017.

    Example:
        >>> from compsparse_kernels import FunctionGraph
        >>> bounds = FunctionGraph.tree(8).theorem1_bounds(eps=0.1, smoothness=2)
        >>> round(bounds.N_shallow), round(bounds.N_deep)  # 0.1 ** (-8 / 2), 7 * 0.1 ** (-2 / 2)
        (10000, 70)
        >>> bounds.exponent_shallow, bounds.exponent_deep
        (4.0, 1.0)
    """
    require(isinstance(eps, Real) and 0 < eps < 1, "eps", "a number between 0 and 1", repr(eps))
    smooth = _checked_smoothness(smoothness, graph.num_nodes)
    read = np.unique(graph.parents.idx)
    num_variables = int((read < graph.num_sources).sum())
    exponent_shallow = num_variables / float(smooth.min())
    exponents = graph.in_degrees / smooth
    decades = -math.log10(eps)
    largest = float(exponents.max())
    log10_shallow = exponent_shallow * decades
    log10_deep = largest * decades + math.log10(float((10.0 ** ((exponents - largest) * decades)).sum()))
    sizes = _power_of_10(log10_shallow), _power_of_10(log10_deep)
    return ComplexityBounds(float(eps), *sizes, log10_shallow, log10_deep, exponent_shallow, largest)


def _checked_smoothness(smoothness: float | Sequence[float], num_nodes: int) -> np.ndarray:
    smooth = np.asarray(smoothness)
    numbers = np.issubdtype(smooth.dtype, np.number) and not np.issubdtype(smooth.dtype, np.complexfloating)
    wanted = f"a positive number, or {num_nodes} of them, one for each node"
    require(numbers and smooth.shape in ((), (num_nodes,)), "smoothness", wanted, repr(smoothness))
    wrong = smooth[~(np.isfinite(smooth) & (smooth > 0))]
    require(wrong.size == 0, "smoothness", wanted, listing(map(str, np.ravel(wrong))))
    return smooth.astype(np.float64)


def _power_of_10(exponent: float) -> float:
    return 10.0**exponent if exponent < 308 else math.inf
