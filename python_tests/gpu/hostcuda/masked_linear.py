"""The CUDA launches of masked_linear as functions of CPU tensors, with the arguments of the ops of the same names."""

import ctypes
from functools import lru_cache

import torch

from python_tests.gpu.hostcuda.build import make

ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # masked_linear.h


def seed(value: int) -> None:
    """Seeds the order in which blocks and threads run."""
    _library().hostcuda_seed(value)


def masked_linear(x, values, bias, ptr, idx, perm, out_features):
    """``compsparse::masked_linear``; see ``ops/masked_linear/contract.py``."""
    y = torch.full((x.shape[0], out_features), torch.nan, dtype=x.dtype)
    x, values = x.contiguous(), values.contiguous()
    pointers = map(_pointer, (x, values, bias, y, ptr, idx))
    positions = _pointer(perm), int(perm is not None and perm.dtype == torch.int64)
    sizes = map(ctypes.c_int64, (*x.shape, out_features, len(idx)))
    _library().hostcuda_masked_linear(ELEMENT_TYPES[x.dtype], *pointers, _is_wide(idx), *positions, *sizes)
    return y


def sampled_matmul(a, b, ptr, idx):
    """``compsparse::sampled_matmul``; see ``ops/masked_linear/contract.py``."""
    values = torch.full((len(idx),), torch.nan, dtype=a.dtype)
    a, b = a.contiguous(), b.contiguous()
    pointers = map(_pointer, (a, b, values, ptr, idx))
    sizes = map(ctypes.c_int64, (a.shape[0], b.shape[1], a.shape[1], len(idx)))
    _library().hostcuda_sampled_matmul(ELEMENT_TYPES[a.dtype], *pointers, _is_wide(idx), *sizes)
    return values


def _is_wide(idx):
    return {torch.int16: 0, torch.int32: 1}[idx.dtype]


def _pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@lru_cache
def _library():
    return ctypes.CDLL(str(make("plain/masked_linear.so")))
