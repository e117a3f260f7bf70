"""Runs what ``aot.py`` compiled: torch tensors go into emulated memory and come back as the kernel left them."""

from collections.abc import Collection

import numpy as np
import torch

from .launch import DEFAULT_LIMIT, launch
from .memory import Memory
from .profile import Profile
from .program import Program

CONTAINERS = {
    torch.uint8: torch.uint8,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
}
ALIGNMENT = 16  # bytes that a compiled kernel may rely on


def run_compiled(
    compiled,
    *,
    program: Program | None = None,
    order=None,
    check_races: bool = True,
    profile: Profile | None = None,
    readonly: Collection[int] = (),
    limit: int = DEFAULT_LIMIT,
) -> dict[str, int]:
    """Executes a ``Compiled`` and returns how often each instruction ran.

    Tensors the kernel wrote hold its results afterwards. ``program``: run this one (a mutant) in place of the compiled
    text. ``readonly``: positions in ``compiled.arguments`` of tensors to which a store is a fault. The rest is as in
    ``launch``.
    """
    program = program or Program(compiled.kernel.asm["ptx"])
    memory = Memory()
    arguments, copies = [], []
    for position, value in enumerate(compiled.arguments):
        if not isinstance(value, torch.Tensor):
            arguments.append(value)
            continue
        data, lead = _bytes_of(value)
        arguments.append(memory.add(data, f"argument {position}", position in readonly, lead))
        copies.append((value, data, lead, memory.regions[-1]))
    counts = launch(
        program,
        (compiled.programs,),
        arguments,
        shared_memory=compiled.kernel.metadata.shared,
        memory=memory,
        order=order,
        check_races=check_races,
        profile=profile,
        limit=limit,
    )
    for tensor, data, lead, region in copies:
        if region.written:
            _copy_back(tensor, data[lead:])
    return counts


def _bytes_of(tensor: torch.Tensor) -> tuple[np.ndarray, int]:
    """(the tensor's bytes, how many of them lie before it so that its address is aligned as it is now)."""
    if tensor.dtype not in CONTAINERS:
        raise TypeError(f"tensor of {tensor.dtype}: wanted one of {', '.join(map(str, CONTAINERS))}")
    if not tensor.is_contiguous():
        raise ValueError(f"tensor with strides {tensor.stride()}: wanted a contiguous one")
    lead = tensor.data_ptr() % ALIGNMENT
    flat = tensor.detach().view(CONTAINERS[tensor.dtype]).reshape(-1).numpy().view(np.uint8)
    data = np.zeros(lead + len(flat), np.uint8)
    data[lead:] = flat
    return data, lead


def _copy_back(tensor: torch.Tensor, data: np.ndarray) -> None:
    container = CONTAINERS[tensor.dtype]
    values = torch.from_numpy(data.copy()).view(container).reshape(tensor.shape)
    tensor.detach().view(container).copy_(values)
