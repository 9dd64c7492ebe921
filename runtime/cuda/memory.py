"""Memory of the GPU and of the host, and tensors over it as TVM takes them."""

import ctypes
import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from tilewright.compiler.artifact import numpy_dtype
from tilewright.runtime.cuda.cudart import Cudart

_INT, _FLOAT, _UINT, _BFLOAT = 0, 2, 1, 4  # DLPack's type codes
_CODES = {"int": _INT, "uint": _UINT, "float": _FLOAT, "bfloat": _BFLOAT}


class DeviceMemory:
    """An allocation on the GPU, freed with this object: tensors over it must not outlive it."""

    def __init__(self, cuda: Cudart, size: int) -> None:
        self.size = size
        self.address = cuda.malloc(max(size, 1))
        weakref.finalize(self, cuda.free, self.address).atexit = False  # the end of the process frees it


class PinnedMemory:
    """An allocation on the host that the GPU copies from and to by itself. array: uint8[size] over it, whose views must
    not outlive this object."""

    def __init__(self, cuda: Cudart, size: int) -> None:
        self.size = size
        self.address = cuda.host_malloc(max(size, 1))
        weakref.finalize(self, cuda.host_free, self.address).atexit = False
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    """DLPack's DLManagedTensor. https://dmlc.github.io/dlpack/latest/c_api.html"""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def tensor(ffi: Any, device_type: int, address: int, shape: Sequence[int], dtype: str) -> Any:
    """A dense tensor over memory that stays the caller's. Its description lies in C's heap, where C's free() fits as
    the deleter: no Python runs when TVM drops it."""
    ndim = len(shape)
    block = _libc.malloc(ctypes.sizeof(_ManagedTensor) + 16 * ndim)
    extents = block + ctypes.sizeof(_ManagedTensor)
    strides = [prod(shape[i + 1 :]) for i in range(ndim)]
    (ctypes.c_int64 * (2 * ndim)).from_address(extents)[:] = [*shape, *strides]
    described = _ManagedTensor.from_address(block)
    described.tensor = _Tensor(
        address, _Device(device_type, 0), ndim, _data_type(dtype), extents, extents + 8 * ndim, 0
    )
    described.context, described.deleter = None, _FREE
    return ffi.from_dlpack(_new_capsule(block, b"dltensor", None))


def _data_type(dtype: str) -> _DataType:
    kind = dtype.rstrip("0123456789")
    return _DataType(_CODES[kind], int(dtype[len(kind) :]), 1)


def tensor_bytes(shape: Sequence[int], dtype: str) -> int:
    return prod(shape) * numpy_dtype(dtype).itemsize


def aligned(size: int, alignment: int = 256) -> int:
    """The next multiple; 256 is what CUDA's own allocations start at."""
    return -(-size // alignment) * alignment
