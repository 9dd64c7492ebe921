"""Compile a Lowering for a GPU and run it on torch tensors: what every CUDA schedule's test needs.

run = CudaRunner(lower(schedule, call, cuda_target()))      # compiles; needs no GPU
q, pages = run(qkv, cos, sin, pages, slots, layer)          # needs one
launch, outputs = run.bind(qkv, cos, sin, pages, slots, layer)
"""

import atexit
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tvm

from tilewright.compiler import env
from tilewright.compiler.codegen.cuda_module import CudaKernel, load_device_part
from tilewright.compiler.codegen.kernel_library import link_kernels
from tilewright.compiler.codegen.kernels import compile_kernels, read_kernel
from tilewright.compiler.targets import RECORDS
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Lowering, Output


def cuda_target() -> Target:
    """The record that kernels are tested for."""
    return RECORDS["nvidia-h100"]


class CudaRunner:
    """The compiled kernels of one lowering. Call it with the composite's arguments (torch tensors, int for scalars).

    Kernels run on torch's current stream. Arguments that the composite updates are updated in place. `m` is the first
    tensor's leading extent unless given.
    """

    def __init__(self, lowering: Lowering, target: Target | None = None) -> None:
        self.lowering = lowering.launched()
        functions = {f"kernel_{i}": kernel.written() for i, kernel in enumerate(self.lowering.kernels)}
        named = {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
        objects = compile_kernels(named, target or cuda_target(), env.cache_dir() / "kernels", env.jobs())
        self.kernels = {name: read_kernel(objects[name]) for name in named}
        self._functions: list[Any] = []

    @property
    def cubins(self) -> dict[int, bytes]:
        """The device code of each kernel, by its place in the lowering."""
        return {i: kernel.cubin for i, kernel in enumerate(self.kernels.values())}

    def sass(self, index: int) -> str:
        """The disassembly of a kernel. Raises FileNotFoundError where nvdisasm is not installed."""
        return disassemble(tool("nvdisasm"), self.cubins[index], "-c")

    def resources(self, index: int) -> str:
        """Registers, stack and shared memory of a kernel, as cuobjdump tells them."""
        return disassemble(tool("cuobjdump"), self.cubins[index], "-res-usage")

    def __call__(self, *arguments: Any, m: int | None = None) -> tuple[Any, ...]:
        launch, outputs = self.bind(*arguments, m=m)
        launch()
        return outputs

    def bind(self, *arguments: Any, m: int | None = None) -> tuple[Callable[[], None], tuple[Any, ...]]:
        """A function that enqueues all kernels on fixed memory, for capture and timing; and what the call returns."""
        import torch
        import tvm_ffi

        m = next(a.shape[0] for a in arguments if isinstance(a, torch.Tensor)) if m is None else m
        made: dict[str, Any] = {}
        launches = []
        for kernel, function in zip(self.lowering.kernels, self._load(), strict=True):
            outputs = {o.name: _poisoned(o, m) for o in kernel.outputs}
            made |= outputs
            inputs = [arguments[i] if isinstance(i, int) else made[i] for i in kernel.inputs]
            launches.append((function, [_passed(a) for a in (*inputs, *outputs.values())]))
        held = (arguments, made)

        def launch(held: Any = held) -> None:
            with tvm_ffi.use_torch_stream():
                for function, values in launches:
                    function(*values)

        return launch, tuple(arguments[r] if isinstance(r, int) else made[r] for r in self.lowering.results)

    def _load(self) -> list[Any]:
        if not self._functions:
            self._functions = load_kernels(self.kernels)
        return self._functions


def load_kernels(kernels: Mapping[str, CudaKernel]) -> list[Any]:
    """The kernels as functions of tensors on a GPU, each linked as a compiled model's are."""
    folder = Path(tempfile.mkdtemp(prefix="tilewright-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    functions = []
    for name, kernel in kernels.items():
        code, library = folder / f"{name}.o", folder / f"{name}.so"
        code.write_bytes(kernel.object)
        link_kernels([code], library)
        module = tvm.runtime.load_module(str(library))
        module.import_module(load_device_part(kernel.device))
        functions.append(module[name])
    return functions


def _poisoned(output: Output, m: int) -> Any:
    """A new tensor that no kernel has written: NaN, or a large negative integer."""
    import torch

    shape = tuple(m if d == "m" else int(d) for d in output.shape)
    dtype = getattr(torch, output.dtype)
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min // 2
    return torch.full(shape, value, dtype=dtype, device="cuda")


def _passed(value: Any) -> Any:
    import tvm_ffi

    return value if isinstance(value, int | float) else tvm_ffi.from_dlpack(value)


@cache
def tool(name: str) -> str:
    """A program of NVIDIA's wheels, or of a toolkit."""
    places = [str(Path(p) / "nvidia" / "cu13" / "bin") for p in sys.path] + ["/usr/local/cuda/bin"]
    found = shutil.which(name) or next(filter(None, (shutil.which(name, path=place) for place in places)), None)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; pip install nvidia-cuda-{name}")
    return found


def disassemble(program: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, *options, file.name], check=True, capture_output=True, text=True).stdout
