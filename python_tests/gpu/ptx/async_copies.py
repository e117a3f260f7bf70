"""Copies from global to shared memory on their way: each thread commits them in groups and waits for groups."""

from dataclasses import dataclass

import numpy as np

from .shared_memory import SharedMemory


@dataclass
class Copy:
    """What one cp.async of some lanes will write."""

    threads: np.ndarray
    offsets: np.ndarray
    data: np.ndarray  # [lanes, bytes]
    groups: np.ndarray  # the group of each lane, as its thread counts them

    def part(self, lanes: np.ndarray) -> "Copy":
        return Copy(*(field[lanes] for field in (self.threads, self.offsets, self.data, self.groups)))


class AsyncCopies:
    """The copies in flight of one block. Data lands when it is waited for: the latest moment that PTX allows."""

    def __init__(self, shared: SharedMemory, num_threads: int):
        self.shared = shared
        self.committed = np.zeros(num_threads, np.int64)
        self.pending: list[Copy] = []

    def reset(self) -> None:
        self.committed.fill(0)
        self.pending.clear()

    def issue(self, threads, offsets, data) -> None:
        shared, width = self.shared, data.shape[1]
        if shared.check_races:
            shared.check_write(offsets, threads, width)
            granules, index = shared.granule_rows(offsets, width)
            shared.rows("in_flight", granules)[index] = True
            shared.any_in_flight = True
        self.pending.append(Copy(threads, offsets, data, self.committed[threads]))

    def commit(self, mask) -> None:
        if mask is None:
            self.committed += 1
        else:
            self.committed[mask] += 1

    def wait(self, mask, allowed: int) -> None:
        """The threads of the mask wait until at most ``allowed`` of their latest groups are in flight.

        With -1 also for copies that they have not committed.
        """
        reached = self.committed - allowed
        if mask is not None:
            reached = np.where(mask, reached, 0)
        earliest, latest = reached.min(), reached.max()
        left = []
        for copy in self.pending:
            if copy.groups.max() < earliest:
                self._land(copy)
            elif copy.groups.min() >= latest:
                left.append(copy)
            else:
                left += self._land_partly(copy, reached)
        self.pending = left
        self.shared.any_in_flight = bool(left)

    def _land_partly(self, copy: Copy, reached: np.ndarray) -> list[Copy]:
        done = copy.groups < reached[copy.threads]
        if done.any():
            self._land(copy.part(done))
        return [] if done.all() else [copy.part(~done)]

    def _land(self, copy: Copy) -> None:
        shared = self.shared
        if shared.check_races:
            granules, index = shared.granule_rows(copy.offsets, copy.data.shape[1])
            shared.rows("in_flight", granules)[index] = False
        shared.put(copy.offsets, copy.threads, copy.data)
