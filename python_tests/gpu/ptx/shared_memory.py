"""Shared memory of one block, with the marks that tell a race between its threads from an ordered access.

Between two barriers a granule that one thread writes may not be touched by another. A mark is a stamp: the phase in
which an access happened, times OWNERS, plus who accessed. Every barrier begins a new phase; marks of a phase before the
last barrier are harmless and need no clearing. Barriers of a warp order the accesses of its own threads only.
"""

import numpy as np

from .faults import BOUNDS, IN_FLIGHT_READ, IN_FLIGHT_WRITE, MISALIGNED, PROXY, RACE, PTXFault
from .memory import rows_of

LANES = 32
MAX_THREADS = 1024
OWNERS = 2048  # threads, then whole warps, then SEVERAL
SEVERAL = OWNERS - 1
WARP_OF = np.concatenate([np.arange(MAX_THREADS) // LANES, np.arange(MAX_THREADS)])  # owner -> warp
WARP_OF[SEVERAL] = -1
POISON = 0xFF  # what nobody wrote: NaN in every floating-point format
LARGEST_ACCESS = 64


def whole_warp(threads: np.ndarray) -> np.ndarray:
    """The owners that stand for all threads of the warps of these threads."""
    return MAX_THREADS + threads // LANES


class SharedMemory:
    """``granule``: bytes of the program's smallest shared access, at most 4. ``has_proxies``: whether asynchronous
    products read it."""

    def __init__(self, size: int, granule: int, has_proxies: bool = False):
        self.size, self.granule, self.has_proxies = size, granule, has_proxies
        padded = -(-size // LARGEST_ACCESS) * LARGEST_ACCESS
        self.bytes = np.empty(padded, np.uint8)
        granules = padded // granule
        self.writer = np.empty(granules, np.int32)
        self.reader = np.empty(granules, np.int32)
        self.in_flight = np.empty(granules, bool)  # destinations of asynchronous copies nobody has waited for
        self.operand = np.empty(granules, bool)  # what an asynchronous product still reads
        self.unfenced = np.empty(granules, bool)  # written without a proxy fence since
        self.warp_floor = np.empty(MAX_THREADS // LANES, np.int32)
        self._rows = {}
        self.reset(check_races=True)

    def reset(self, check_races: bool) -> None:
        self.check_races = check_races
        self.phase = 0
        self.bytes.fill(POISON)
        for marks in (self.writer, self.reader, self.in_flight, self.operand, self.unfenced, self.warp_floor):
            marks.fill(0)
        self.any_in_flight = self.any_operand = False
        self.barrier()

    def barrier(self) -> None:
        """All threads have met: what was accessed before is ordered for all."""
        self.phase += 1
        self.now = self.floor = self.phase * OWNERS

    def warp_barrier(self, warps: np.ndarray) -> None:
        """The threads of these warps have met."""
        self.phase += 1
        self.now = self.phase * OWNERS
        self.warp_floor[warps] = self.now

    def rows(self, name: str, length: int, dtype=None) -> np.ndarray:
        """The bytes or the marks of this name as rows of ``length``."""
        found = self._rows.get((name, length, dtype))
        if found is None:
            found = rows_of(getattr(self, name), length)
            found = found if dtype is None else found.view(dtype)
            self._rows[name, length, dtype] = found
        return found

    def check(self, offsets: np.ndarray, width: int, what: str) -> None:
        """Every access inside shared memory and aligned."""
        if (offsets & (width - 1)).any():
            bad = int(offsets[(offsets & (width - 1)) != 0][0])
            raise PTXFault(MISALIGNED, f"shared {what} of {width} bytes at offset {bad}")
        if offsets.max() + width > self.size:
            raise PTXFault(BOUNDS, f"shared {what} of {width} bytes at offset {offsets.max()} of {self.size} bytes")

    def load(self, offsets: np.ndarray, owners: np.ndarray, width: int, dtype) -> np.ndarray:
        """``[accesses, elements]``: what lies at the offsets. ``owners``: who accesses, a thread or a whole warp."""
        self.check(offsets, width, "load")
        if self.check_races:
            self._note_read(offsets, owners, width)
        return self.rows("bytes", width, dtype)[offsets // width]

    def store(self, offsets: np.ndarray, owners: np.ndarray, values: np.ndarray) -> None:
        """Writes one row of ``values`` ``[accesses, elements]`` to each offset."""
        self.check(offsets, values.shape[1] * values.dtype.itemsize, "store")
        self.put(offsets, owners, values)

    def put(self, offsets: np.ndarray, owners: np.ndarray, values: np.ndarray) -> None:
        """A store whose place was checked before."""
        width = values.shape[1] * values.dtype.itemsize
        data, places = self.rows("bytes", width, values.dtype.type), offsets // width
        contested = self._note_write(offsets, owners, width) if self.check_races else None
        data[places] = values
        if contested is not None and (data[places][contested] != values[contested]).any():
            raise PTXFault(RACE, "two threads store different values to one place of shared memory at once")

    def granule_rows(self, offsets: np.ndarray, width: int) -> tuple[int, np.ndarray]:
        """(granules of one access, its row)."""
        granules = max(1, width // self.granule)
        return granules, offsets // (granules * self.granule)

    def _conflicts(self, marks: np.ndarray, owners: np.ndarray) -> bool:
        """Whether some mark ``[accesses, granules]`` is of another owner, and no barrier lies in between."""
        fresh = marks >= self.floor
        if not fresh.any():
            return False
        foreign = fresh & (marks & SEVERAL != owners[:, None])
        if not foreign.any():
            return False
        warps = WARP_OF[owners]
        is_ordered = (WARP_OF[marks & SEVERAL] == warps[:, None]) & (marks < self.warp_floor[warps][:, None])
        return bool((foreign & ~is_ordered).any())

    def _note_read(self, offsets, owners, width) -> None:
        granules, index = self.granule_rows(offsets, width)
        if self.any_in_flight and self.rows("in_flight", granules)[index].any():
            raise PTXFault(IN_FLIGHT_READ, "shared memory is read while an asynchronous copy to it is in flight")
        if self._conflicts(self.rows("writer", granules)[index], owners):
            raise PTXFault(RACE, "shared memory is read that another thread wrote since the last barrier")
        readers = self.rows("reader", granules)
        stamps = (self.now + owners)[:, None]
        before = readers[index]
        if (before >= self.floor).any():
            stamps = self._joined(before, stamps, owners)
        readers[index] = stamps
        after = readers[index]
        if (after != stamps).any():  # several threads of this same instruction read one granule
            lost = (after != stamps).any(axis=1)
            readers[index[lost]] = self._joined(after, stamps, owners)[lost]

    def _joined(self, marks, stamps, owners) -> np.ndarray:
        """One mark for the owner of each fresh mark and the owner that reads now."""
        others = marks & SEVERAL
        warps = WARP_OF[owners][:, None]
        both = np.where(WARP_OF[others] == warps, MAX_THREADS + warps, SEVERAL)
        joins = (marks >= self.floor) & (others != owners[:, None])
        return np.where(joins, self.now + both, stamps).astype(np.int32)

    def check_write(self, offsets, owners, width) -> None:
        """No other thread has read these granules since the last barrier, and no asynchronous operation uses them."""
        granules, index = self.granule_rows(offsets, width)
        if self._conflicts(self.rows("reader", granules)[index], owners):
            raise PTXFault(RACE, "shared memory is overwritten that another thread read since the last barrier")
        if self.any_in_flight and self.rows("in_flight", granules)[index].any():
            raise PTXFault(IN_FLIGHT_WRITE, "shared memory is overwritten while a copy to it is in flight")
        if self.any_operand and self.rows("operand", granules)[index].any():
            raise PTXFault(IN_FLIGHT_WRITE, "shared memory is overwritten while an asynchronous product reads it")

    def _note_write(self, offsets, owners, width) -> np.ndarray | None:
        """Marks a write; returns which accesses share a granule with another owner's of this same instruction."""
        self.check_write(offsets, owners, width)
        granules, index = self.granule_rows(offsets, width)
        writers = self.rows("writer", granules)
        if self._conflicts(writers[index], owners):
            raise PTXFault(RACE, "shared memory is overwritten that another thread wrote since the last barrier")
        stamps = (self.now + owners)[:, None]
        writers[index] = stamps
        if self.has_proxies:
            self.rows("unfenced", granules)[index] = True
        contested = writers[index] != stamps
        return contested.any(axis=1) if contested.any() else None

    def fence_proxy(self) -> None:
        """What was written so far may be read by asynchronous products."""
        self.unfenced.fill(False)

    def read_operand(self, offsets: np.ndarray) -> np.ndarray:
        """Granules of an asynchronous product's operand, checked: fenced, complete and ordered by a barrier."""
        granules = np.unique(offsets // self.granule)
        if self.check_races:
            if self.in_flight[granules].any():
                raise PTXFault(IN_FLIGHT_READ, "an asynchronous product reads shared memory with a copy in flight")
            if self.unfenced[granules].any():
                raise PTXFault(PROXY, "an asynchronous product reads shared memory without fence.proxy.async after it")
            if (self.writer[granules] >= self.floor).any():
                raise PTXFault(RACE, "an asynchronous product reads shared memory written since the last barrier")
        return granules
