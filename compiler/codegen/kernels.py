"""Kernels to object files: in parallel, cached by content.

The cache key covers the kernel's IR, the target and all that compiles it, so an entry never goes stale; entries are
written aside and renamed, so an interrupted compile resumes from what it has. A kernel for a GPU has a second file
beside its object file: the device's part, which the library takes in.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from tilewright.compiler import env
from tilewright.compiler.codegen.by_rows import by_rows, compile_choice
from tilewright.compiler.codegen.cuda_module import CudaKernel, compile_function
from tilewright.compiler.codegen.cuda_source import how
from tilewright.compiler.codegen.kernel_process import compile_elsewhere
from tilewright.compiler.codegen.llvm_target import build_llvm, cuda_target, llvm_target
from tilewright.compiler.codegen.object_code import object_code as _object_code
from tilewright.compiler.errors import CompileError
from tilewright.compiler.targets.base import Target

_FEW = 3  # kernels that compile in less time than a process takes to start


def _as_it_is(func: Any) -> Any:
    return func


def compile_kernels(
    kernels: Mapping[str, Any],
    target: Target,
    cache: Path,
    jobs: int | None = None,
    done: Callable[[str, bool], None] = lambda name, cached: None,
    written: Callable[[Any], Any] = _as_it_is,
) -> dict[str, Path]:
    """Object files of `kernels` (name -> PrimFunc), each with its `device_part` where the target is a GPU.

    done(name, cached) is called as each one is ready. written(func) is the kernel itself where `func` only stands for
    it, as it does for those that need not be written down when they are in the cache; it is pickled where there are
    many kernels for a GPU, which are compiled in processes of their own. LLVM runs outside Python's lock. Raises
    CompileError where the cache can't be written, TargetError where the target's compiler is not installed.
    """
    with _writing_to(cache):
        cache.mkdir(parents=True, exist_ok=True)
    objects = {name: cache / f"{cache_key(func, target)}.o" for name, func in kernels.items()}
    missing = []
    for name, file in objects.items():
        if file.exists():
            done(name, True)
        else:
            missing.append(name)
    with ThreadPoolExecutor(max_workers=jobs or os.cpu_count() or 1) as pool:
        try:
            compile_one = partial(_compile_one, target=target, written=written, elsewhere=len(missing) > _FEW)
            futures = {pool.submit(compile_one, kernels[n], n, file=objects[n]): n for n in missing}
            for future in as_completed(futures):
                future.result()
                done(futures[future], False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return objects


def device_part(file: Path) -> Path:
    """The device's part of a kernel for a GPU, by its object file."""
    return file.with_suffix(".cuda")


def read_kernel(file: Path) -> CudaKernel:
    """A compiled kernel for a GPU, by its object file."""
    return CudaKernel(file.read_bytes(), device_part(file).read_bytes())


def cache_key(func: Any, target: Target) -> str:
    """Content of the kernel and its name, what it is compiled for, and what compiles it.

    A kernel of a module carries a digest of its content, since to write it out takes a tenth of a second.
    """
    import tvm

    attrs = func.attrs or {}
    content = (str(attrs["global_symbol"]), str(attrs["tw.content"])) if "tw.content" in attrs else ()
    parts = (tvm.__version__, *_compiler(target), *(content or (tvm.ir.save_json(func),)))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _compiler(target: Target) -> tuple[str, ...]:
    if target.kind == "cpu":
        return target.mcpu, *target.mattr
    return str(cuda_target(target)), how()


def _bare(func: Any) -> Any:
    """A kernel without what only we read of it."""
    for name in ("tw.kernel", "tw.content", "tw.plain"):
        func = func.without_attr(name)
    return func


def _compile_one(
    func: Any, name: str, target: Target, file: Path, written: Callable[[Any], Any], elsewhere: bool
) -> None:
    parts = by_rows(func)
    if parts is not None:
        _write(file, compile_choice(parts, name))
    elif target.kind == "cuda" and elsewhere:
        compile_elsewhere(func, name, target, file, written)
    elif target.kind == "cuda":
        compile_cuda(written(func), name, target, file)
    else:
        _compile(written(func), name, target, file)


def _compile(func: Any, name: str, target: Target, file: Path) -> None:
    import tvm

    module, machine = tvm.IRModule({name: _bare(func)}), llvm_target(target)
    plain = "tw.plain" in (func.attrs or {})  # as it is compiled within a program, with all of TVM's passes
    executable = tvm.compile(module, machine) if plain else build_llvm(module, machine)
    _write(file, _object_code(executable.mod))


def compile_cuda(func: Any, name: str, target: Target, file: Path) -> None:
    """Compiles one kernel for a GPU into `file` and its `device_part`."""
    kernel = compile_function(_bare(func), name, target)
    # The object file last: where it stands, its other half does.
    _write(device_part(file), kernel.device)
    _write(file, kernel.object)


def _write(file: Path, content: bytes) -> None:
    with _writing_to(file.parent):
        handle, aside = tempfile.mkstemp(suffix=".o", dir=file.parent)
        try:
            with open(handle, "wb") as stream:
                stream.write(content)
            os.replace(aside, file)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)


@contextlib.contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CompileError(
            f"the kernel cache {cache} can't be written to ({error.strerror}); make room, "
            f"or set {env.CACHE_DIR} to another place"
        ) from None
