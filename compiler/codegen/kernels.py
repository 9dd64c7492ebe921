"""Kernels to object files: in parallel, cached by content.

The cache key covers the kernel's IR, the target and TVM's version, so an entry never goes stale; entries are written
aside and renamed, so an interrupted compile resumes from what it has.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tilewright.compiler import env
from tilewright.compiler.codegen.llvm_target import llvm_target
from tilewright.compiler.errors import CompileError
from tilewright.compiler.targets.base import Target


def compile_kernels(
    kernels: Mapping[str, Any],
    target: Target,
    cache: Path,
    jobs: int | None = None,
    done: Callable[[str, bool], None] = lambda name, cached: None,
) -> dict[str, Path]:
    """Object files of `kernels` (name -> PrimFunc) for a CPU target.

    done(name, cached) is called as each one is ready. LLVM runs outside Python's lock, so threads are enough. Raises
    CompileError where the cache can't be written.
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
            futures = {pool.submit(_compile, kernels[n], n, target, objects[n]): n for n in missing}
            for future in as_completed(futures):
                future.result()
                done(futures[future], False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return objects


def cache_key(func: Any, target: Target) -> str:
    """Content of the kernel, what it is compiled for, and what compiles it."""
    import tvm

    parts = (tvm.__version__, target.mcpu, *target.mattr, tvm.ir.save_json(func))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _compile(func: Any, name: str, target: Target, file: Path) -> None:
    import tvm

    executable = tvm.compile(tvm.IRModule({name: func.without_attr("tw.kernel")}), llvm_target(target))
    code = _object_code(executable.mod)
    with _writing_to(file.parent):
        handle, aside = tempfile.mkstemp(suffix=".o", dir=file.parent)
        try:
            with open(handle, "wb") as stream:
                stream.write(code)
            os.replace(aside, file)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)


def _object_code(mod: Any) -> bytes:
    """The object file of an LLVM module, by way of a file in memory: LLVM ends the process where a disk is full."""
    memory = os.memfd_create("kernel.o")
    with open(memory, "rb") as stream:
        mod.write_to_file(f"/proc/self/fd/{memory}", "o")
        return stream.read()


@contextlib.contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CompileError(
            f"the kernel cache {cache} can't be written to ({error.strerror}); make room, "
            f"or set {env.CACHE_DIR} to another place"
        ) from None
