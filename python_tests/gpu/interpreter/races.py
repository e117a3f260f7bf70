"""Races: on a GPU the programs of a launch run in any order, or at once, and so do the lanes of one store."""

import numpy as np

from python_tests.gpu.interpreter.faults import KernelFault

LOAD, STORE, ATOMIC = "load", "store", "atomic"


class AccessLog:
    """What each program of a launch touched. Two programs race on an address if at least one of them writes it,
    unless both do so atomically."""

    def __init__(self):
        self._accesses = {LOAD: [], STORE: [], ATOMIC: []}  # (addresses, bytes of an element, program) each

    def add(self, addresses: np.ndarray, num_bytes: int, access: str, program: tuple) -> None:
        if addresses.size:
            self._accesses[access].append((addresses.ravel(), num_bytes, program))

    def check(self) -> None:
        """Raises KernelFault at the first address on which two programs race; called when the launch is over."""
        written = [*self._accesses[STORE], *self._accesses[ATOMIC]]
        if not written:
            return
        # Most loads are far from what is written, and need no further look.
        first = min(int(addresses.min()) for addresses, _, _ in written) - 8
        last = max(int(addresses.max()) for addresses, _, _ in written) + 8
        loads = [(_between(addresses, first, last), *rest) for addresses, *rest in self._accesses[LOAD]]
        everything = [*written, *loads]
        unit = min(num_bytes for _, num_bytes, _ in everything)
        programs = sorted({program for _, _, program in everything})
        number = {program: position for position, program in enumerate(programs)}
        stores, atomics, loads = (
            _touched(entries, unit, number) for entries in (self._accesses[STORE], self._accesses[ATOMIC], loads)
        )
        for one, two, how in (
            (stores, stores, "store and store"),
            (stores, atomics, "store and atomic"),
            (stores, loads, "store and load"),
            (atomics, loads, "atomic and load"),
        ):
            _raise_if_shared(one, two, how, programs)


def check_lanes(addresses: np.ndarray, values: np.ndarray, program: tuple) -> None:
    """Raises KernelFault if two lanes of one store put different values at one address."""
    order = np.argsort(addresses, kind="stable")
    addresses = addresses[order]
    bits = values[order].view(f"u{values.itemsize}")
    if ((addresses[:-1] == addresses[1:]) & (bits[:-1] != bits[1:])).any():
        raise KernelFault("race", f"two lanes of one store by program {program} put different values at one address")


def _between(addresses: np.ndarray, first: int, last: int) -> np.ndarray:
    return addresses[(addresses >= np.uint64(first)) & (addresses <= np.uint64(last))]


def _touched(entries, unit: int, number: dict) -> np.ndarray:
    """[pairs, 2]: address and number of a program, each pair once; wide elements count as several of ``unit`` bytes."""
    pairs = [np.empty((0, 2), np.uint64)]
    for addresses, num_bytes, program in entries:
        units = (addresses[:, None] + np.arange(0, num_bytes, unit, dtype=np.uint64)).ravel()
        pairs.append(np.stack([units, np.full_like(units, number[program])], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def _raise_if_shared(one: np.ndarray, two: np.ndarray, how: str, programs: list) -> None:
    """Both arrays as _touched makes them: is an address of ``one`` in ``two``, from another program?"""
    common = np.intersect1d(one[:, 0], two[:, 0])
    pairs = np.concatenate([part[np.isin(part[:, 0], common)] for part in (one, two)])
    pairs = np.unique(pairs, axis=0)
    shared = np.flatnonzero(pairs[:-1, 0] == pairs[1:, 0])
    if len(shared):
        first, second = (programs[int(number)] for number in pairs[shared[0] : shared[0] + 2, 1])
        raise KernelFault("race", f"programs {first} and {second} touch one address, by {how}")
