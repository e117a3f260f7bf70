"""Bytes that tensors take, each storage counted once whoever refers to it."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch


def tensors_in(held: object, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers and layouts, with what the cached properties of these hold."""
    seen = set() if seen is None else seen
    if id(held) in seen:  # a layout and its transpose hold each other
        return
    seen.add(id(held))
    if isinstance(held, torch.Tensor):
        yield held
        return
    if dataclasses.is_dataclass(held):
        held = vars(held)
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, (tuple, list)) else ()
    for part in parts:
        yield from tensors_in(part, seen)


def storage_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the storages that are not ``seen`` yet, and now are."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
