"""A module compiled for CUDA: an object file for the host, and the device's part as TVM's loader reads it."""

import contextlib
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from tilewright.compiler.codegen.cuda_source import cubin
from tilewright.compiler.codegen.cuda_toolchain import load_cuda_runtime
from tilewright.compiler.codegen.llvm_target import cuda_target
from tilewright.compiler.codegen.object_code import object_code
from tilewright.compiler.errors import UserError
from tilewright.compiler.targets.base import Target

_ELF = b"\x7fELF"
_thread = threading.local()


@dataclass(frozen=True)
class CudaKernel:
    """object: the host's function, which checks the arguments and launches. device: the cubin, and before it how TVM
    launches it."""

    object: bytes
    device: bytes

    @property
    def cubin(self) -> bytes:
        return self.device[self.device.index(_ELF) :]


def compile_function(func: Any, name: str, target: Target) -> CudaKernel:
    """One PrimFunc by itself: a TIRx kernel, or a scheduled s_tir function, which carries the attribute of that name.

    NVRTC runs outside Python's lock, TVM's passes for CUDA mostly inside. Raises CompileError where NVRTC refuses the
    source, TargetError where a wheel is missing.
    """
    import tvm

    pipeline = "default" if func.attrs.get("s_tir", False) else "tirx"
    mod = tvm.IRModule({name: func.with_attr("global_symbol", name)})
    with cuda_codegen(target) as machine:
        built = tvm.compile(mod, machine, tir_pipeline=pipeline).mod
    return CudaKernel(object_code(built), _device_part(built))


@contextlib.contextmanager
def cuda_codegen(target: Target) -> Iterator[Any]:
    """TVM's target, as the current one, in whose scope TVM compiles for CUDA with our options and no driver.

    A UserError that arises under TVM comes out as itself.
    """
    load_cuda_runtime()
    _register()
    machine = cuda_target(target)
    _thread.error = None
    try:
        with machine:
            yield machine
    except Exception:
        if _thread.error is not None:
            raise _thread.error from None
        raise


@cache
def _register() -> None:
    """From now on this process compiles CUDA source as `cubin` says, whoever asks TVM to."""
    import tvm

    def compile_source(source: str) -> bytes:
        try:
            return cubin(str(source), str(tvm.target.Target.current().attrs["arch"]))
        except UserError as error:  # TVM would make another class of it
            _thread.error = error
            raise

    tvm.register_global_func("tvm_callback_cuda_compile", compile_source, override=True)


def load_device_part(device: bytes) -> Any:
    """A CUDA module of TVM's, to be imported into a host module; needs no device."""
    import tvm

    load_cuda_runtime()
    return tvm.get_global_func("ffi.Module.load_from_bytes.cuda")(device)


def _device_part(host: Any) -> bytes:
    """The bytes of the one CUDA module that a host module imports.

    TVM packs an import tree as: size; the tree, two lists of numbers; then, for each module, its kind and, unless that
    is "_lib", its bytes. Strings and lists are preceded by their length, all numbers have eight bytes.
    """
    import tvm

    packed = tvm.get_global_func("runtime.ModulePackImportsToTensor")(host).numpy().tobytes()
    at = 8
    for _ in range(2):
        (count,) = struct.unpack_from("<Q", packed, at)
        at += 8 + 8 * count
    fields = []
    while at < len(packed):
        (size,) = struct.unpack_from("<Q", packed, at)
        fields.append(packed[at + 8 : at + 8 + size])
        at += 8 + size
    library, kind, device = fields
    assert (library, kind) == (b"_lib", b"cuda"), fields
    return device
