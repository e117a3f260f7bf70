"""Global memory of the emulated device: arrays far apart, checked at every access.

Each array lies in the middle of 1 TiB of its own, so that no wrong offset of less than half of that lands in another
one. During a launch the memory notes which block wrote and which read every granule, and a race between blocks is a
fault: blocks run one after the other here, at the same time on a device.
"""

import numpy as np

from .faults import BOUNDS, MISALIGNED, RACE, READ_ONLY, WILD_ADDRESS, PTXFault

FIRST_ADDRESS = 1 << 44
DISTANCE_BITS = 40
NOBODY = -1
SEVERAL = -2


def rows_of(flat: np.ndarray, length: int) -> np.ndarray:
    """A one-dimensional array as rows of ``length``; what is left over at its end is in no row."""
    count = len(flat) // length
    return flat[: count * length].reshape(count, length)


class Region:
    """One array in global memory, and the marks that blocks leave on it."""

    def __init__(self, array: np.ndarray, base: int, name: str, readonly: bool, lead: int):
        self.bytes = array.reshape(-1).view(np.uint8)
        self.base, self.name, self.readonly, self.lead = base, name, readonly, lead
        self.written = False
        self._rows = {}
        self.granule = 4
        self.mark(check_races=False, granule=4)

    def mark(self, check_races: bool, granule: int) -> None:
        """Forgets all marks, before a launch."""
        self.written = False
        self.granule = granule
        self.tracked = check_races and not self.readonly
        granules = len(self.bytes) // granule + 1 if self.tracked else 0
        self.writer = np.full(granules, NOBODY, np.int32)
        self.reader = np.full(granules, NOBODY, np.int32)
        self.atomic = np.zeros(granules, bool)

    def rows(self, width: int, dtype) -> np.ndarray:
        """The array as ``[accesses of width bytes, elements of dtype]``."""
        found = self._rows.get((width, dtype))
        if found is None:
            found = rows_of(self.bytes, width).view(dtype)
            self._rows[width, dtype] = found
        return found

    def marks(self, marks: np.ndarray, offsets: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(marks as rows, the row of each access)."""
        granules = max(1, width // self.granule)
        return rows_of(marks, granules), offsets // (granules * self.granule)


class Memory:
    """The address space. Arrays are used in place: after a launch they hold what the program stored."""

    def __init__(self):
        self.regions: list[Region] = []

    def add(self, array: np.ndarray, name: str = "", readonly: bool = False, lead: int = 0) -> int:
        """Places a contiguous array (bfloat16 as uint16) and returns its address.

        The first ``lead`` bytes of the array are out of bounds: so an address can have any alignment.
        """
        if not array.flags.c_contiguous:
            raise ValueError(f"array '{name}': wanted a contiguous array, got strides {array.strides}")
        base = FIRST_ADDRESS + (len(self.regions) << DISTANCE_BITS) + (1 << DISTANCE_BITS - 1)
        self.regions.append(Region(array, base, name, readonly, lead))
        return base + lead

    def start(self, check_races: bool, granule: int) -> None:
        """Begins a launch. ``granule``: bytes of the program's smallest access, at most 4."""
        for region in self.regions:
            region.mark(check_races, granule)

    def region_at(self, address: int) -> Region | None:
        """The array that an address belongs to, in bounds or not."""
        number = (address - FIRST_ADDRESS) >> DISTANCE_BITS
        return self.regions[number] if 0 <= number < len(self.regions) else None

    def find(self, addresses: np.ndarray, width: int, what: str) -> list[tuple[Region, object, np.ndarray]]:
        """(array, lanes, offsets) for each array that these accesses touch; a fault where one of them may not."""
        wrong = addresses & (width - 1)
        if wrong.any():
            bad = int(addresses[wrong != 0][0])
            raise PTXFault(MISALIGNED, f"{what} of {width} bytes at address {self.describe(bad)}")
        region = self.region_at(int(addresses[0]))
        if region is not None:
            offsets = addresses - region.base
            if offsets.min() >= region.lead and offsets.max() + width <= len(region.bytes):
                return [(region, slice(None), offsets)]
        numbers = (addresses - FIRST_ADDRESS) >> DISTANCE_BITS
        return [self._part(addresses, numbers == number, width, what) for number in np.unique(numbers)]

    def _part(self, addresses, lanes, width, what) -> tuple[Region, np.ndarray, np.ndarray]:
        mine = addresses[lanes]
        region = self.region_at(int(mine[0]))
        if region is None:
            raise PTXFault(WILD_ADDRESS, f"{what} at {int(mine[0]):#x}, which lies in no array")
        offsets = mine - region.base
        outside = (offsets < region.lead) | (offsets + width > len(region.bytes))
        if outside.any():
            bad = self.describe(int(mine[outside][0]))
            raise PTXFault(BOUNDS, f"{what} of {width} bytes at {bad} of {len(region.bytes) - region.lead} bytes")
        return region, lanes, offsets

    def describe(self, address: int) -> str:
        region = self.region_at(address)
        return f"{address:#x}" if region is None else f"byte {address - region.base - region.lead} of '{region.name}'"

    def load(self, addresses: np.ndarray, width: int, dtype, block: int) -> np.ndarray:
        """What lies at the addresses, ``[lanes, width / size of dtype]``."""
        parts = self.find(addresses, width, "global load")
        for region, _, offsets in parts:
            if region.tracked:
                self._note_read(region, offsets, width, block)
        region, lanes, offsets = parts[0]
        if len(parts) == 1 and isinstance(lanes, slice):
            return region.rows(width, dtype)[offsets // width]
        result = np.empty((len(addresses), width // np.dtype(dtype).itemsize), dtype)
        for region, lanes, offsets in parts:
            result[lanes] = region.rows(width, dtype)[offsets // width]
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray, block: int) -> None:
        """Writes ``values`` ``[lanes, elements]``, one row to each address."""
        width = values.shape[1] * values.dtype.itemsize
        for region, lanes, offsets in self.find(addresses, width, "global store"):
            if region.readonly:
                raise PTXFault(READ_ONLY, f"store to '{region.name}'")
            if region.tracked:
                self._note_write(region, offsets, width, block)
            region.rows(width, values.dtype.type)[offsets // width] = values[lanes]
            region.written = True

    def atomic(self, address: int, width: int, block: int) -> np.ndarray:
        """The bytes that one atomic operation may read and write."""
        ((region, _, offsets),) = self.find(np.array([address]), width, "atomic")
        if region.readonly:
            raise PTXFault(READ_ONLY, f"atomic on '{region.name}'")
        if region.tracked:
            self._check_writer(
                region, offsets, width, block, "an atomic of block {block} meets what block {other} wrote"
            )
            rows, index = region.marks(region.atomic, offsets, width)
            rows[index] = True
        region.written = True
        offset = int(offsets[0])
        return region.bytes[offset : offset + width]

    def _check_writer(self, region, offsets, width, block, message) -> None:
        rows, index = region.marks(region.writer, offsets, width)
        writer = rows[index]
        foreign = (writer != NOBODY) & (writer != block)
        if foreign.any():
            what = message.format(block=block, other=writer[foreign][0])
            raise PTXFault(RACE, f"{what} in '{region.name}', without an atomic")

    def _note_read(self, region, offsets, width, block) -> None:
        if region.written:
            self._check_writer(region, offsets, width, block, "block {block} reads what block {other} wrote")
        rows, index = region.marks(region.reader, offsets, width)
        reader = rows[index]
        rows[index] = np.where((reader == NOBODY) | (reader == block), block, SEVERAL)

    def _note_write(self, region, offsets, width, block) -> None:
        if region.written:
            self._check_writer(region, offsets, width, block, "block {block} overwrites what block {other} wrote")
            rows, index = region.marks(region.atomic, offsets, width)
            if rows[index].any():
                raise PTXFault(RACE, f"block {block} overwrites the result of an atomic in '{region.name}'")
        rows, index = region.marks(region.reader, offsets, width)
        reader = rows[index]
        if ((reader != NOBODY) & (reader != block)).any():
            raise PTXFault(RACE, f"block {block} overwrites what another block reads in '{region.name}'")
        rows, index = region.marks(region.writer, offsets, width)
        rows[index] = block
