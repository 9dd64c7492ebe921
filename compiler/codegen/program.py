"""The step's program: Relax to VM code, linked with the kernels into one shared library."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tilewright.compiler.codegen.c_compiler import c_compiler
from tilewright.compiler.codegen.cuda_module import cuda_codegen, load_device_part
from tilewright.compiler.codegen.kernels import device_part
from tilewright.compiler.codegen.llvm_target import llvm_target
from tilewright.compiler.codegen.plain_operators import Operator, fuse, operators, replaced
from tilewright.compiler.errors import CompileError, TargetError
from tilewright.compiler.targets.base import Target

# LLVM ends the process where its disk is full; the objects of a program take a few megabytes.
_ROOM_BYTES = 64 << 20


def _none_tuned(found: Sequence[Operator]) -> Mapping[str, Any]:
    return {}


def build_program(
    mod: Any, target: Target, tuned: Callable[[Sequence[Operator]], Mapping[str, Any]] = _none_tuned
) -> tuple[Any, Mapping[str, int]]:
    """A Relax VM executable of a scheduled module without its kernels, and each function's planned workspace in bytes.

    What no schedule took is lowered by TVM; for a GPU it becomes kernels of one thread an element. tuned: asked, for a
    CPU, which of these plain operators to lower from another PrimFunc, by name. Weights become one tuple argument, so
    that a call passes a handful of values, whatever the number of layers.
    """
    import tvm

    with _codegen(target) as machine:
        fused = fuse(mod)
        if target.kind == "cpu":
            fused = replaced(fused, tuned(operators(fused)))
        lowered = tvm.transform.Sequential([*_device_schedules(target), *_lowering()])(fused)
        planned = _order_shape_stores(tvm.transform.Sequential(_finalising())(lowered))
        executable = tvm.compile(planned, machine, relax_pipeline=tvm.transform.Sequential([]))
    return executable, _workspace(planned)


@contextlib.contextmanager
def _codegen(target: Target) -> Iterator[Any]:
    """TVM's target, as the current one."""
    if target.kind == "cuda":
        with cuda_codegen(target) as machine:
            yield machine
    else:
        with llvm_target(target) as machine:
            yield machine


def _device_schedules(target: Target) -> list[Any]:
    """Blocks and threads for the loops of plain operators, on a GPU."""
    if target.kind == "cpu":
        return []
    from tvm.s_tir import dlight

    return [dlight.ApplyDefaultSchedule(dlight.gpu.Reduction(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())]


def _lowering() -> list[Any]:
    from tvm.relax import transform

    return [
        transform.RewriteDataflowReshape(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
    ]


def _finalising() -> list[Any]:
    from tvm.relax import transform

    return [
        transform.StaticPlanBlockMemory(),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]


def _order_shape_stores(mod: Any) -> Any:
    """The functions that compute a call's extents, with their stores in the order of their slots.

    TVM's VMShapeLower emits the stores of one function in the order of a hash of addresses, which differs from run to
    run, and so would the code. None reads what another writes, so any order computes the same.

    before   H[7] = H[4] * 812        after   H[6] = H[4] * 384
             H[6] = H[4] * 384                H[7] = H[4] * 812
    """
    import tvm
    from tvm import tirx

    functions = dict(mod.functions.items())
    for gvar, func in functions.items():
        if isinstance(func, tirx.PrimFunc) and isinstance(func.body, tirx.SeqStmt):
            stores = list(func.body.seq)
            if "tirx.is_host_func" in func.attrs and all(isinstance(s, tirx.BufferStore) for s in stores):
                stores.sort(key=lambda store: int(store.indices[0]))
                functions[gvar] = func.with_body(tirx.SeqStmt(stores))
    return tvm.IRModule(functions, mod.attrs)


def _workspace(mod: Any) -> dict[str, int]:
    """Bytes of planned storage by function; what is sized by the request alone (a step's results) is not planned."""
    from tvm import ir, relax

    totals: dict[str, int] = {}
    for gvar, func in mod.functions.items():
        if isinstance(func, relax.Function):
            calls = (b.value for block in func.body.blocks for b in block.bindings if isinstance(b.value, ir.Call))
            shapes = [c.args[0] for c in calls if getattr(c.op, "name", "") == "relax.vm.alloc_storage"]
            fixed = [s for s in shapes if isinstance(s, relax.ShapeExpr) and hasattr(s.values[0], "value")]
            totals[gvar.name_hint] = sum(int(s.values[0].value) for s in fixed)
    return totals


def link(executable: Any, kernels: Iterable[Path], library: Path) -> None:
    """One shared library of program and kernels. Symbols are stripped, so that equal input gives equal bytes.

    kernels: object files; the device's part of each, where it has one, becomes a CUDA module in the library.
    """
    compiler = c_compiler()
    _check_room()
    files = sorted(kernels)
    extra = [str(file) for file in files]
    _import_device_parts(executable, [device_part(file) for file in files if device_part(file).exists()])

    def run(output: str, objects: list[str], options: Any = None, **_: Any) -> None:
        command = [compiler, "-shared", "-fPIC", "-Wl,-s", "-Wl,--build-id=none", "-o", output, *objects, *extra, "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise TargetError(f"{compiler} could not link the model: {result.stderr.strip().splitlines()[-1]}")

    run.object_format = "o"  # type: ignore[attr-defined]
    executable.export_library(str(library), fcompile=run)


def _import_device_parts(executable: Any, files: list[Path]) -> None:
    """Gives the program's host code the kernels' device code, where a kernel's host function looks for it.

    All host code of a library shares one context, whose imports are those of the program's LLVM module.
    """
    if not files:
        return
    host = next(module for module in executable.mod.imports if module.kind == "llvm")
    for file in files:
        host.import_module(load_device_part(file.read_bytes()))


def _check_room() -> None:
    """Raises CompileError where the directory for temporary files is close to full."""
    scratch = tempfile.gettempdir()
    free = shutil.disk_usage(scratch).free
    if free < _ROOM_BYTES:
        raise CompileError(
            f"{scratch} has {free >> 20} MiB left and linking takes up to {_ROOM_BYTES >> 20}; "
            "make room, or set TMPDIR to another place"
        )
