"""Index arrays of sparse patterns: the C++ of csrc/layout.cpp where it was built, the same in numpy elsewhere.

Offsets (``ptr``) are int64. Row and column numbers are int32; :class:`MaskLayout` keeps them as int16 where they fit.
Positions of entries are int32, or int64 where a pattern has 2^31 entries or more.
"""

import numpy as np

try:
    from compsparse_kernels import _layout as compiled
except ImportError:
    compiled = None

INT32_LIMIT = 2**31


def compress(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [rows, columns] -> (ptr [rows + 1], idx [nnz]), columns ascending in each row."""
    if compiled is not None:
        return compiled.compress(mask)
    counts = mask.sum(axis=1, dtype=np.int64)
    return _offsets(counts), np.nonzero(mask)[1].astype(np.int32)


def transpose(ptr: np.ndarray, idx: np.ndarray, columns: int, wide: bool = False):
    """The same pattern by columns: (ptr [columns + 1], idx [nnz] rows ascending, perm [nnz] into the row order)."""
    wide = wide or len(idx) >= INT32_LIMIT
    if compiled is not None:
        return (compiled.transpose_wide if wide else compiled.transpose)(ptr, idx, columns)
    perm = np.argsort(idx, kind="stable")
    rows = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))[perm].astype(np.int32)
    counts = np.bincount(idx, minlength=columns).astype(np.int64)
    return _offsets(counts), rows, perm.astype(np.int64 if wide else np.int32)


def block_any(mask: np.ndarray, block_out: int, block_in: int) -> np.ndarray:
    """bool [rows, columns] -> bool [ceil(rows / block_out), ceil(columns / block_in)]: does the block hold anything?"""
    if compiled is not None:
        return compiled.block_any(mask, block_out, block_in)
    rows, columns = (-mask.shape[0] % block_out, -mask.shape[1] % block_in)
    padded = np.pad(mask, ((0, rows), (0, columns)))
    shape = (padded.shape[0] // block_out, block_out, padded.shape[1] // block_in, block_in)
    return padded.reshape(shape).any(axis=(1, 3))


def sort_entries(rows: np.ndarray, columns: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates in any order -> (ptr, idx, order): the entries by row, then column, and where each came from."""
    order = np.lexsort((columns, rows))
    counts = np.bincount(rows, minlength=num_rows).astype(np.int64)
    return _offsets(counts), columns[order].astype(np.int32), order


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
