"""Graphs with a rule: trees, butterflies, bands. Each function is a classmethod of FunctionGraph."""

from typing import TYPE_CHECKING

import numpy as np

from compsparse_kernels.graphs.checks import check_int, require
from compsparse_kernels.graphs.parents import Parents

if TYPE_CHECKING:
    from compsparse_kernels.graphs.function_graph import FunctionGraph


def tree(cls, n_inputs: int, arity: int = 2, share: str | None = None) -> "FunctionGraph":
    """Tree: node j of a level reads nodes ``arity * j .. arity * (j + 1) - 1`` of the level before, up to one root.

    The last node of a level has fewer parents where the level before does not divide.

    Args:
        n_inputs: number of sources, at least 2.
        arity: parents of a node, at least 2.
        share: None, each node has weights of its own; ``"level"``, the nodes of a level share; ``"all"``, all nodes.
            A last node with fewer parents shares too, its other arguments count as 0.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 4; Mhaskar and Poggio, "Deep vs. shallow
    networks: an approximation theory perspective", 2016.

    Example:
        >>> from compsparse_kernels import FunctionGraph
        >>> FunctionGraph.tree(64, arity=4, share="level")
        FunctionGraph(64 sources, 21 nodes in 3 levels, 1 sink, 84 edges, in-degree 4, 3 weights)
        >>> [FunctionGraph.tree(3).parents_of(node).tolist() for node in (3, 4, 5)]
        [[0, 1], [2], [3, 4]]
    """
    n_inputs, arity = check_int("n_inputs", n_inputs, least=2), check_int("arity", arity, least=2)
    require(share in (None, "level", "all"), "share", "None, 'level' or 'all'", repr(share))
    width, level, in_degrees, shares = n_inputs, 0, [], []
    while width > 1:
        nodes, level = -(-width // arity), level + 1
        in_degrees += [arity] * (nodes - 1) + [width - arity * (nodes - 1)]
        shares += [f"level {level}" if share == "level" else share] * nodes
        width = nodes
    # Each vertex but the root is read once, in order.
    ptr = np.concatenate(([0], np.cumsum(in_degrees)))
    shared_arity = None if share is None else np.full(len(in_degrees), arity)
    parents = Parents(ptr, np.arange(n_inputs + len(in_degrees) - 1), None, shared_arity)
    return cls(n_inputs, parents, shares=shares)


def butterfly(cls, n: int) -> "FunctionGraph":
    """Butterfly of the fast Fourier transform: node i of level l reads i and ``i xor 2 ** (l - 1)`` of level l - 1.

    After log2(n) levels every output depends on every input, with 2 n log2(n) edges in place of n ** 2.

    Args:
        n: inputs, and nodes of each level; a power of two, at least 2.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Cooley and Tukey, "An algorithm for the machine calculation of complex Fourier series", 1965.

    Example:
        >>> from compsparse_kernels import FunctionGraph
        >>> FunctionGraph.butterfly(16)
        FunctionGraph(16 sources, 64 nodes in 4 levels, 16 sinks, 128 edges, in-degree 2, 64 weights)
    """
    n = check_int("n", n, least=2)
    require(n & (n - 1) == 0, "n", "a power of two", n)
    place = np.arange(n)
    pairs = [
        np.stack((place, place ^ (1 << level)), axis=1) + level * n  # [n, 2]
        for level in range(n.bit_length() - 1)
    ]
    return cls(n, np.concatenate(pairs))


def banded(cls, width: int, depth: int, bandwidth: int) -> "FunctionGraph":
    """Bands: node i of a level reads nodes ``i - bandwidth .. i + bandwidth`` of the level before, those that exist.

    Locality without shared weights: each level is a banded matrix.

    Args:
        width: sources, and nodes of each level.
        depth: levels.
        bandwidth: how far a node reads to each side; 0 is the diagonal.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 4 (locality matters, sharing does not).

    Example:
        >>> from compsparse_kernels import FunctionGraph
        >>> FunctionGraph.banded(width=8, depth=2, bandwidth=1)
        FunctionGraph(8 sources, 16 nodes in 2 levels, 8 sinks, 44 edges, in-degrees 2..3, 16 weights)
    """
    width, depth = check_int("width", width), check_int("depth", depth)
    bandwidth = check_int("bandwidth", bandwidth, least=0)
    reach = np.arange(-min(bandwidth, width - 1), min(bandwidth, width - 1) + 1)
    read = np.arange(width)[:, None] + reach  # [width, 2 * bandwidth + 1]
    inside = (read >= 0) & (read < width)
    counts, idx = inside.sum(axis=1), read[inside]
    ptr = np.concatenate(([0], np.cumsum(np.tile(counts, depth))))
    level = np.repeat(np.arange(depth), len(idx))
    return cls(width, Parents(ptr, np.tile(idx, depth) + level * width))
