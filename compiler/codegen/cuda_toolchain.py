"""What compiles CUDA source here: NVIDIA's wheels, or else a toolkit, and no driver.

TVM makes CUDA modules only where its CUDA runtime library is loaded, which wants libcudart and a driver. Both come
from here, so that nobody sets a variable: libcudart is in a wheel, and where there is no driver a stub of its name
stands in, whose every function reports that there is no device.
"""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tilewright.compiler import env
from tilewright.compiler.codegen.c_compiler import c_compiler
from tilewright.compiler.errors import CompileError, TargetError

TOOLKIT = Path("/usr/local/cuda")

# What is needed of each wheel, and the wheel.
_LIBRARIES = {"libnvrtc.so.13": "nvidia-cuda-nvrtc", "libcudart.so.13": "nvidia-cuda-runtime"}
_HEADERS = {"cuda_runtime.h": "nvidia-cuda-runtime", "crt/host_defines.h": "nvidia-cuda-crt"}

_DRIVER = "libcuda.so.1"
# What libtvm_runtime_cuda.so wants of a driver, and what is asked for by those who look for devices.
_DRIVER_SYMBOLS = (
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDriverGetVersion",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Toolchain:
    """The files of one CUDA 13 installation. version: what tells its NVRTC from another."""

    nvrtc: Path
    cudart: Path
    include: Path
    version: str


@cache
def find_toolchain() -> Toolchain:
    """NVIDIA's wheels, and the toolkit in /usr/local/cuda for what they lack. Raises TargetError naming what neither
    has."""
    roots = (*_wheel_roots(), TOOLKIT)
    nvrtc, cudart = (_library(roots, name) for name in _LIBRARIES)
    include = next((root / "include" for root in roots if not _absent_headers(root)), None)
    if nvrtc and cudart and include:
        return Toolchain(nvrtc, cudart, include, _version(nvrtc))
    missing = {wheel for name, wheel in _LIBRARIES.items() if _library(roots, name) is None}
    missing |= set() if include else min((_absent_headers(root) for root in roots), key=len)
    what = ", ".join(sorted(missing))
    raise TargetError(f"CUDA code is compiled by {what} of CUDA 13, not found; pip install 'tilewright[cuda]'")


def _wheel_roots() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    return [Path(place) / "cu13" for place in places or ()]


def _library(roots: Sequence[Path], name: str) -> Path | None:
    places = (root / folder / name for root in roots for folder in ("lib", "lib64"))  # wheels, toolkits
    return next((place for place in places if place.is_file()), None)


def _absent_headers(root: Path) -> set[str]:
    return {wheel for name, wheel in _HEADERS.items() if not (root / "include" / name).is_file()}


def _version(nvrtc: Path) -> str:
    """Its file names say "13.0" and no more; releases of that differ in size."""
    files = sorted(nvrtc.parent.glob("libnvrtc-builtins.so.*"))
    return " ".join(f"{file.name} {file.stat().st_size}" for file in (nvrtc, *files))


@cache
def load_cuda_runtime() -> None:
    """TVM's CUDA runtime library into this process, if importing TVM has not found what it takes.

    Raises TargetError where a wheel is missing.
    """
    import tvm

    if tvm.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    toolchain = find_toolchain()
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        # Once a library of this name is loaded, the loader looks for no other.
        ctypes.CDLL(str(_driver_stub()))
    ctypes.CDLL(str(toolchain.cudart))
    ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))


def _driver_stub() -> Path:
    """A library with the driver's name and none of its abilities, in the cache."""
    source = "".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in _DRIVER_SYMBOLS)
    folder = env.cache_dir() / f"driver-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    stub = folder / _DRIVER
    if stub.exists():
        return stub
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            code, made = Path(scratch) / "driver.c", Path(scratch) / _DRIVER
            code.write_text(source)
            command = [c_compiler(), "-shared", "-fPIC", f"-Wl,-soname,{_DRIVER}", "-o", str(made), str(code)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise TargetError(f"{command[0]} could not make a library: {result.stderr.strip().splitlines()[-1]}")
            os.replace(made, stub)
    except OSError as error:
        raise CompileError(
            f"the cache {env.cache_dir()} can't be written to ({error.strerror}); make room, "
            f"or set {env.CACHE_DIR} to another place"
        ) from None
    return stub
