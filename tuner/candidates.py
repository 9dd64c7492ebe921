"""A tile compiled: a shared library, and how its kernels are called. In processes of their own, which may be killed."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import LifoQueue
from typing import Any

from tilewright.compiler import env
from tilewright.compiler.errors import UserError
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Lowering, Output, Schedule
from tilewright.tuner.process import Ended, Hung, Worker, serve

LIMIT_S = 120.0  # for one candidate


@dataclass(frozen=True)
class Launch:
    """One kernel of a candidate, as schedules/base.py has it, by the name of its symbol."""

    symbol: str
    inputs: tuple[int | str, ...]
    outputs: tuple[Output, ...]
    shared: bool


@dataclass(frozen=True)
class Candidate:
    """What is to be measured. library: of the kernels' host code; parts: their device code, on a GPU."""

    library: str
    parts: tuple[str, ...]
    launches: tuple[Launch, ...]
    results: tuple[int | str, ...]


@dataclass(frozen=True)
class Failure:
    """Why a candidate has no time. kind: of schedules.records.FAILURES."""

    kind: str
    detail: str


@dataclass(frozen=True)
class _Request:
    schedule: Schedule
    facts: Any
    tile: Any
    target: Target


class Compilers:
    """Processes that compile candidates, `jobs` at a time, each within a time limit."""

    def __init__(self, jobs: int, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._pool = ThreadPoolExecutor(jobs)
        self._workers: LifoQueue[Worker] = LifoQueue()
        for _ in range(jobs):
            self._workers.put(Worker(__name__))

    def submit(self, schedule: Schedule, facts: Any, tile: Any, target: Target) -> "Future[Candidate | Failure]":
        return self._pool.submit(self._compile, _Request(schedule, facts, tile, target))

    def _compile(self, request: _Request) -> Candidate | Failure:
        worker = self._workers.get()
        try:
            answer = worker.ask(request, self._limit_s)
        except Hung:
            return Failure("compile", f"not compiled in {self._limit_s:g} s")
        except Ended as end:
            return Failure("compile", f"the compiler {end}")
        finally:
            self._workers.put(worker)
        if isinstance(answer, UserError):
            raise answer  # of the machine, not of the candidate
        return answer

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        while not self._workers.empty():
            self._workers.get_nowait().close()
        self._pool.shutdown()


def main() -> None:
    from tilewright.compiler.without_torch import without_torch

    with without_torch():
        import tvm  # noqa: F401  first here, so that no later import brings torch along
    serve(_answer)


def _answer(request: _Request) -> Candidate | Failure | UserError:
    from tilewright.compiler.errors import TargetError

    try:
        lowering = request.schedule.apply(request.facts, request.tile, request.target)
        return compile_lowering(lowering, request.target)
    except TargetError as error:
        return error
    except Exception as error:
        return Failure("compile", " ".join(f"{type(error).__name__}: {error}".split())[:300])


def compile_lowering(lowering: Lowering, target: Target) -> Candidate:
    """Compiles and links, or finds it in the cache."""
    from tilewright.compiler.codegen.kernel_library import link_kernels
    from tilewright.compiler.codegen.kernels import compile_kernels, device_part

    lowering = lowering.launched()
    names = [f"kernel_{i}" for i in range(len(lowering.kernels))]
    written = {n: k.written().with_attr("global_symbol", n) for n, k in zip(names, lowering.kernels, strict=True)}
    objects = list(compile_kernels(written, target, env.cache_dir() / "kernels", 1).values())
    digest = hashlib.sha256(" ".join(file.name for file in objects).encode()).hexdigest()[:32]
    library = env.cache_dir() / "tuning" / f"{digest}.so"
    if not library.exists():
        _write_aside(library, lambda file: link_kernels(objects, file))
    parts = tuple(str(device_part(file)) for file in objects if device_part(file).exists())
    launches = tuple(Launch(n, k.inputs, k.outputs, k.shared) for n, k in zip(names, lowering.kernels, strict=True))
    return Candidate(str(library), parts, launches, lowering.results)


def _write_aside(file: Path, write: Callable[[Path], None]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        write(Path(folder) / file.name)
        os.replace(Path(folder) / file.name, file)
