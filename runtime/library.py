"""TVM's runtime libraries, without its compiler, and without torch."""

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

from tilewright.compiler.errors import ArtifactError, TargetError
from tilewright.compiler.without_torch import without_torch

_LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_extra.so")
_CUDA_LIBRARY = "libtvm_runtime_cuda.so"


@cache
def load_runtime() -> Any:
    """The tvm_ffi module, with TVM's runtime libraries loaded. Raises ArtifactError where they are missing."""
    folder = _folder()
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    with without_torch():
        import tvm_ffi
    for name in _LIBRARIES:
        file = folder / name
        try:
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ArtifactError(f"{file} can't be loaded ({error}); reinstall apache-tvm") from None
    return tvm_ffi


@cache
def load_cuda_runtime() -> Any:
    """As `load_runtime`, with TVM's CUDA library. CUDA's own runtime library must be loaded. Raises TargetError too."""
    ffi = load_runtime()
    file = _folder() / _CUDA_LIBRARY
    try:
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TargetError(
            f"{file} can't be loaded ({error}); install NVIDIA's driver, or reinstall apache-tvm"
        ) from None
    return ffi


def _folder() -> Path:
    """Where TVM's libraries are."""
    spec = importlib.util.find_spec("tvm")
    if spec is None or spec.origin is None:
        raise ArtifactError(
            "apache-tvm, whose runtime libraries run artifacts, is not installed; pip install apache-tvm"
        )
    return Path(spec.origin).parent / "lib"


def set_threads(count: int) -> int:
    """How many threads kernels run on, from now on, in threads of Python that have not run any yet."""
    os.environ["TVM_NUM_THREADS"] = str(count)
    # Binding to cores loses more than it gains wherever another process is busy on one of them.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    return count
