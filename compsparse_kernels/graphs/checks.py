"""Checks that the graphs share. Every message names the argument, what was wanted and what came."""

import importlib
from collections.abc import Iterable
from numbers import Integral, Real
from types import ModuleType

import numpy as np


def require(condition: bool, argument: str, wanted: str, came: object, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"{argument}: expected {wanted}, got {came}")


def describe(value: object) -> str:
    """What an argument is, for an error message: ``2-D int64 array [3, 4]``, ``list``."""
    if isinstance(value, np.ndarray):
        return f"{value.ndim}-D {value.dtype} array {list(value.shape)}"
    return type(value).__name__


def listing(items: Iterable[str], most: int = 8) -> str:
    """The first few of many names."""
    items = list(items)
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown}, ... ({len(items)} in all)"


def check_int(argument: str, value: object, least: int = 1) -> int:
    wanted = f"an int of at least {least}"
    is_int = isinstance(value, Integral) and not isinstance(value, bool)
    require(is_int, argument, wanted, repr(value), TypeError)
    require(value >= least, argument, wanted, value)
    return int(value)


def check_share(argument: str, value: object) -> float:
    """A number in 0..1."""
    ok = isinstance(value, Real) and 0 <= value <= 1
    require(ok, argument, "a number in 0..1", repr(value))
    return float(value)


def check_integers(argument: str, value: object) -> np.ndarray:
    """A 1-D integer array of its own memory, as int64."""
    array = np.asarray(value)
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.int64)
    ok = array.ndim == 1 and np.issubdtype(array.dtype, np.integer)
    require(ok, argument, "1-D integers", describe(array))
    return array.astype(np.int64)


def freeze(array: np.ndarray, dtype: type = np.int32) -> np.ndarray:
    """A read-only copy: what was checked stays as it was."""
    array = np.array(array, dtype=dtype)
    array.setflags(write=False)
    return array


def import_extra(name: str) -> ModuleType:
    """A library that only some methods need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"{package} is needed here: pip install compsparse_kernels[graphs]") from error
