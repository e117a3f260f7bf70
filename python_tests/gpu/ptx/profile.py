"""What a program's accesses cost: sectors of global memory, bank conflicts of shared memory, traffic.

Exact counts for the given input. A perfect cache is assumed for two of them: ``l2_sectors`` counts each sector once for
each block, ``dram_sectors`` once for the launch.
"""

from dataclasses import dataclass, field

import numpy as np

SECTOR = 32
BANKS = 32
KEY = 1 << 45  # above any sector number: addresses have fewer than 50 bits
LANES_AT_ONCE = {1: 32, 2: 32, 4: 32, 8: 16, 16: 8, 32: 4}  # of a warp, by bytes of a lane's access


@dataclass
class Access:
    """Totals of one kind of access."""

    requests: int = 0  # warps that accessed
    sectors: int = 0  # of 32 bytes, counted for each request
    useful_bytes: int = 0  # different bytes that were wanted, for each request
    requested_bytes: int = 0  # lanes times bytes

    @property
    def useful_per_sector(self) -> float:
        """Share of the moved bytes that was wanted; 1 where nothing was moved."""
        return self.useful_bytes / (SECTOR * self.sectors) if self.sectors else 1.0

    def add(self, other: "Access") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class SharedAccess:
    """Wavefronts of shared memory: how many it took, and how few it could have taken."""

    wavefronts: int = 0
    least_wavefronts: int = 0

    @property
    def conflict_ratio(self) -> float:
        """1 without bank conflicts."""
        return self.wavefronts / self.least_wavefronts if self.least_wavefronts else 1.0


@dataclass
class Profile:
    """Counts of one launch or several. ``*_by_location`` splits the same by line of the kernel's source."""

    loads: Access = field(default_factory=Access)
    stores: Access = field(default_factory=Access)
    atomics: Access = field(default_factory=Access)
    shared: SharedAccess = field(default_factory=SharedAccess)
    l2_sectors: int = 0  # different sectors that the loads of each block touch, summed over blocks
    load_dram_sectors: int = 0  # different sectors that loads of the launch touch
    store_dram_sectors: int = 0
    global_by_location: dict[tuple[str, str], Access] = field(default_factory=dict)  # (kind, location)
    shared_by_location: dict[str, SharedAccess] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)
    _block_sectors: set = field(default_factory=set, repr=False)
    _sectors: dict[str, set] = field(default_factory=lambda: {"loads": set(), "stores": set()}, repr=False)

    def note_global(self, kind: str, addresses: np.ndarray, warps: np.ndarray, width: int, location: str) -> None:
        """One instruction: ``kind`` is loads, stores or atomics."""
        first, last = addresses // SECTOR, (addresses + width - 1) // SECTOR
        sectors = np.unique(np.concatenate([warps * KEY + first, warps * KEY + last]))
        different = np.unique(warps * (KEY * SECTOR) + addresses)
        access = Access(len(np.unique(warps)), len(sectors), width * len(different), width * len(addresses))
        getattr(self, kind).add(access)
        self.global_by_location.setdefault((kind, location), Access()).add(access)
        if kind in self._sectors:
            touched = (sectors % KEY).tolist()
            self._sectors[kind].update(touched)
            if kind == "loads":
                self._block_sectors.update(touched)

    def note_shared(self, offsets: np.ndarray, threads: np.ndarray, width: int, location: str) -> None:
        """One instruction's accesses: lanes are served in order, so many at once that 128 bytes are wanted."""
        phases = threads // LANES_AT_ONCE[width]
        words = offsets[:, None] // 4 + np.arange(max(1, width // 4))
        keys = np.unique((phases[:, None] * (1 << 32) + words).ravel())
        phase, bank = keys >> 32, keys % BANKS
        present, phase = np.unique(phase, return_inverse=True)
        load = np.bincount(phase * BANKS + bank, minlength=len(present) * BANKS).reshape(len(present), BANKS)
        wavefronts = int(load.max(axis=1).sum())
        least = int((-(-load.sum(axis=1) // BANKS)).sum())
        for total in (self.shared, self.shared_by_location.setdefault(location, SharedAccess())):
            total.wavefronts += wavefronts
            total.least_wavefronts += least

    def end_block(self) -> None:
        self.l2_sectors += len(self._block_sectors)
        self._block_sectors.clear()

    def end_launch(self, instructions: dict[str, int]) -> None:
        self.load_dram_sectors += len(self._sectors["loads"])
        self.store_dram_sectors += len(self._sectors["stores"])
        for touched in self._sectors.values():
            touched.clear()
        for name, count in instructions.items():
            self.instructions[name] = self.instructions.get(name, 0) + count
