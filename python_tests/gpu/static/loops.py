"""The loops of a kernel, and which are innermost: natural loops of its control-flow graph.

An address range would not do: on sm_100 the waits for a copy or a product are small loops behind the kernel's end that
jump back into the middle of the main loop.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from python_tests.gpu.static.instruction import Instruction

# Compare, branch and step are three instructions: a shorter loop, of a test and a branch, computes nothing but waits.
SHORTEST = 5


@dataclass(frozen=True)
class Loop:
    """``every_time`` are the instructions of each iteration; the others of ``instructions`` may be branched around."""

    instructions: tuple[Instruction, ...]
    every_time: tuple[Instruction, ...]


def innermost_loops(instructions: list[Instruction]) -> list[Loop]:
    """Loops that contain no other; loops that only wait count as part of what surrounds them."""
    return [loop for loop, contains_others in _loops(instructions) if not contains_others]


def outer_loops(instructions: list[Instruction]) -> list[Loop]:
    """Loops that contain others, each without what those contain."""
    return [loop for loop, contains_others in _loops(instructions) if contains_others]


def _loops(instructions: list[Instruction]) -> list[tuple[Loop, bool]]:
    """Each loop without those that it contains, and whether there are any."""
    blocks = _basic_blocks(instructions)
    graph = _control_flow(blocks)
    dominators = _dominators(graph, instructions[0].address)
    bodies = _natural_loops(graph, dominators)
    working = {header: body for header, body in bodies.items() if _length(body, blocks) >= SHORTEST}
    found = []
    for header, body in sorted(working.items()):
        others = [working[other] for other in working if other != header and other in body]
        own = body.difference(*others)
        every_time = own & _every_time(header, body, graph, dominators)
        found.append((Loop(_listed(own, blocks), _listed(every_time, blocks)), bool(others)))
    return found


def _basic_blocks(instructions: list[Instruction]) -> dict[int, list[Instruction]]:
    """By the address of their first instruction."""
    starts = {instructions[0].address} | {one.target for one in instructions if one.target is not None}
    for before, after in pairwise(instructions):
        if before.target is not None or not before.falls_through:
            starts.add(after.address)
    blocks: dict[int, list[Instruction]] = {}
    for one in instructions:
        if one.address in starts:
            start = one.address
            blocks[start] = []
        blocks[start].append(one)
    return blocks


def _control_flow(blocks: dict[int, list[Instruction]]) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(blocks)
    starts = list(blocks)
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        last = blocks[start][-1]
        if last.target in blocks:
            graph.add_edge(start, last.target)
        if last.falls_through and following is not None:
            graph.add_edge(start, following)
    return graph


def _dominators(graph: nx.DiGraph, entry: int) -> dict[int, set[int]]:
    """The blocks on every path from the entry to each block that can be reached, itself included."""
    immediate = nx.immediate_dominators(graph, entry)
    dominators: dict[int, set[int]] = {}
    for block in nx.dfs_preorder_nodes(graph, entry):
        chain, at = {block}, block
        while at != entry:
            at = immediate[at]
            chain.add(at)
        dominators[block] = chain
    return dominators


def _natural_loops(graph: nx.DiGraph, dominators: dict[int, set[int]]) -> dict[int, set[int]]:
    """header -> its body: what reaches an edge back to the header without passing the header."""
    bodies: dict[int, set[int]] = {}
    for latch, header in graph.edges:
        if header in dominators.get(latch, ()):
            without_header = graph.subgraph(dominators.keys() - {header})
            reaching = {latch} | (nx.ancestors(without_header, latch) if latch != header else set())
            bodies.setdefault(header, set()).update(reaching | {header})
    return bodies


def _every_time(header: int, body: set[int], graph: nx.DiGraph, dominators: dict[int, set[int]]) -> set[int]:
    latches = [block for block in graph.predecessors(header) if block in body]
    return body.intersection(*(dominators[latch] for latch in latches))


def _listed(body: Iterable[int], blocks: dict[int, list[Instruction]]) -> tuple[Instruction, ...]:
    return tuple(one for start in sorted(body) for one in blocks[start])


def _length(body: Iterable[int], blocks: dict[int, list[Instruction]]) -> int:
    return sum(len(blocks[start]) for start in body)
