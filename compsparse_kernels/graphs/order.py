"""Levels of a directed acyclic graph by longest path, and a cycle where there is one.

Vertices are numbered: sources first, then nodes. Node ``i`` is vertex ``num_sources + i`` and reads the vertices
``idx[ptr[i]]..idx[ptr[i + 1] - 1]``.
"""

import numpy as np

# Below this many edges a level costs less edge by edge than in numpy's calls: long chains have many narrow levels.
NARROW = 64


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``starts[0], starts[0] + 1, ...``, ``counts[0]`` of them, then those of the next start, and so on."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)


def longest_path_levels(num_sources: int, ptr: np.ndarray, idx: np.ndarray) -> np.ndarray:
    """Level of each vertex: 0 for sources, for nodes 1 + the largest of their parents; -1 on and after cycles.

    Kahn's algorithm, a level at a time: the vertices whose last parent has just been placed are the next level.
    """
    num_vertices = num_sources + len(ptr) - 1
    out_degrees = np.bincount(idx, minlength=num_vertices)
    child_ptr = np.concatenate(([0], np.cumsum(out_degrees)))
    node_of_edge = np.repeat(np.arange(num_sources, num_vertices), np.diff(ptr))
    children = node_of_edge[np.argsort(idx, kind="stable")]
    waiting = np.concatenate((np.zeros(num_sources, np.int64), np.diff(ptr)))  # parents that are not placed yet
    views = tuple(memoryview(array) for array in (child_ptr, children, waiting))
    level = np.full(num_vertices, -1, np.int64)
    frontier, depth = np.arange(num_sources), 0
    while len(frontier):
        level[frontier] = depth
        depth += 1
        starts, counts = child_ptr[frontier], out_degrees[frontier]
        if counts.sum() < NARROW:
            frontier = _narrow_step(frontier.tolist(), *views)
        else:
            reached = children[ranges(starts, counts)]
            np.subtract.at(waiting, reached, 1)
            frontier = np.unique(reached[waiting[reached] == 0])
    return level


def _narrow_step(frontier: list[int], child_ptr: memoryview, children: memoryview, waiting: memoryview) -> np.ndarray:
    ready = []
    for vertex in frontier:
        for child in children[child_ptr[vertex] : child_ptr[vertex + 1]]:
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)
    return np.array(sorted(ready), dtype=np.int64)


def find_cycle(level: np.ndarray, num_sources: int, ptr: np.ndarray, idx: np.ndarray) -> list[int]:
    """Vertices of one cycle, each read by the next, the first again at the end; the level of what it blocks is -1."""
    vertex = int(np.flatnonzero(level < 0)[0])
    path, place = [], {}
    while vertex not in place:
        place[vertex] = len(path)
        path.append(vertex)
        node = vertex - num_sources
        parents = idx[ptr[node] : ptr[node + 1]]
        vertex = int(parents[level[parents] < 0][0])
    return [vertex, *reversed(path[place[vertex] :])]
