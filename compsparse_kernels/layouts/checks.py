"""Checks that layouts share. Every message names the argument, what was wanted and what came."""

import torch


def require(condition: bool, argument: str, wanted: str, came: object, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"{argument}: expected {wanted}, got {came}")


def describe(value: object) -> str:
    """What an argument is, for an error message: ``3-D float64 tensor [2, 3, 4]`` or ``list``."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{value.dim()}-D {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"


def check_bool_matrix(argument: str, value: object) -> None:
    ok = isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.dim() == 2
    require(
        ok, argument, "2-D bool tensor", describe(value), ValueError if isinstance(value, torch.Tensor) else TypeError
    )


def check_integers(argument: str, value: object) -> None:
    ok = isinstance(value, torch.Tensor) and value.dim() == 1
    ok = ok and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    require(ok, argument, "1-D integer tensor", describe(value))


def check_positive_int(argument: str, value: object, most: int | None = None) -> None:
    wanted = "a positive int" if most is None else f"an int in 1..{most}"
    is_int = isinstance(value, int) and not isinstance(value, bool)
    require(is_int, argument, wanted, describe(value) if not is_int else value, TypeError)
    require(value >= 1 and (most is None or value <= most), argument, wanted, value)


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: what kernels read is what was checked, whatever the caller does to his tensor afterwards."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def check_compressed(
    ptr: torch.Tensor,
    idx: torch.Tensor,
    rows: int,
    columns: int,
    names: tuple[str, str],
    idx_dtypes: tuple[torch.dtype, ...] = (torch.int32,),
) -> None:
    """A well-formed compressed pattern: offsets from 0 to nnz, indices in range and strictly ascending in each row."""
    for name, value, dtypes in zip(names, (ptr, idx), ((torch.int64,), idx_dtypes), strict=True):
        ok = isinstance(value, torch.Tensor) and value.dim() == 1 and value.dtype in dtypes
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        require(ok, name, f"1-D {wanted} tensor", describe(value))
    require(len(ptr) == rows + 1, names[0], f"{rows + 1} offsets", len(ptr))
    ascending = bool((ptr[1:] >= ptr[:-1]).all()) and int(ptr[0]) == 0 and int(ptr[-1]) == len(idx)
    require(ascending, names[0], f"offsets ascending from 0 to {len(idx)}", f"{int(ptr[0])}..{int(ptr[-1])}")
    if len(idx) == 0:
        return
    low, high = int(idx.min()), int(idx.max())
    require(low >= 0 and high < columns, names[1], f"values in 0..{columns - 1}", f"{low}..{high}")
    rises = idx[1:] > idx[:-1]
    starts = ptr[1:-1]
    starts = starts[(starts > 0) & (starts < len(idx))] - 1
    rises[starts] = True
    require(bool(rises.all()), names[1], "strictly ascending values in each row", "duplicate or unsorted values")
