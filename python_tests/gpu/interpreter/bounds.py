"""Every address that a kernel touches must lie in the tensor that its pointer came from, and be aligned.

Tensors may be neighbours in memory, so an address alone does not tell what it was made from. Pointers therefore carry
the number of their tensor in the upper 16 bits, which addresses of a process do not use and arithmetic leaves alone.
"""

import numpy as np

from python_tests.gpu.interpreter.faults import KernelFault

TAG_SHIFT = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)


class Allocations:
    """The tensors of a launch: the bytes that each covers, as viewed, not those of the storage behind it."""

    def __init__(self):
        self._starts = [0]  # tag 0: no tensor
        self._ends = [0]

    def tag(self, tensor) -> np.uint64:
        """What to set in the pointers to a tensor."""
        start = tensor.data_ptr()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        elements = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
        self._starts.append(start)
        self._ends.append(start + elements * tensor.element_size())
        return np.uint64(len(self._starts) - 1) << TAG_SHIFT

    def check(self, pointers: np.ndarray, num_bytes: int, access: str, program: tuple) -> np.ndarray:
        """The addresses behind tagged ``pointers`` [lanes], to elements of ``num_bytes``.

        Raises:
            KernelFault: if any is outside of its tensor or misaligned.
        """
        addresses, tags = pointers & ADDRESS, np.minimum(pointers >> TAG_SHIFT, len(self._starts) - 1).astype(np.int64)
        starts, ends = np.array(self._starts, np.uint64)[tags], np.array(self._ends, np.uint64)[tags]
        outside = (addresses < starts) | (addresses + np.uint64(num_bytes) > ends)
        what = f"of a {access} by program {program}"
        if outside.any():
            at = int(np.argmax(outside))
            start, end = int(starts[at]), int(ends[at])
            where = f"{int(addresses[at]) - start} bytes from the start of a tensor of {end - start} bytes"
            raise KernelFault("bounds", f"{int(outside.sum())} lane(s) {what} out of bounds, the first is {where}")
        misaligned = addresses % np.uint64(num_bytes) != 0
        if misaligned.any():
            raise KernelFault("misaligned", f"{int(misaligned.sum())} lane(s) {what}, elements of {num_bytes} bytes")
        return addresses
