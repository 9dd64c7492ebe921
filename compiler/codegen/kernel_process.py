"""Kernels for a GPU compiled in processes of their own, which are kept for the next one.

To write a kernel down and to lower it is work in Python, up to a second each under the interpreter's lock, so threads
of one process would stand in line. A process imports TVM once and then compiles one kernel after the other.
"""

import atexit
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

from tilewright.compiler.errors import CompileError, UserError
from tilewright.compiler.messages import receive, send
from tilewright.compiler.targets.base import Target

_idle: LifoQueue["_Process"] = LifoQueue()


def compile_elsewhere(func: Any, name: str, target: Target, file: Path, written: Callable[[Any], Any]) -> None:
    """`compile_cuda` of codegen/kernels.py in another process. Called from several threads it compiles as many kernels
    at the same time. written: can be pickled. Raises what that raises for the caller to mend."""
    import tvm

    try:
        process = _idle.get_nowait()
    except Empty:
        process = _Process()
    process.compile((tvm.ir.save_json(func), name, target, file, written))
    _idle.put(process)


class _Process:
    def __init__(self) -> None:
        command = [sys.executable, "-c", f"from {__name__} import main; main()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def compile(self, request: tuple[Any, ...]) -> None:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            send(requests, request)
            error = receive(answers)
        except (BrokenPipeError, EOFError):
            raise CompileError(f"the process that compiles kernels ended with status {self._process.wait()}") from None
        if error is not None:
            raise error

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


@atexit.register
def _close_all() -> None:
    while not _idle.empty():
        _idle.get_nowait().close()


def main() -> None:
    """Until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one by closing the pipe
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints is no answer
    from tilewright.compiler.codegen.kernels import compile_cuda
    from tilewright.compiler.without_torch import without_torch

    with without_torch():
        import tvm
    while True:
        try:
            func, name, target, file, written = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            compile_cuda(written(tvm.ir.load_json(func)), name, target, file)
        except UserError as error:
            send(answers, error)
        except Exception:
            send(answers, RuntimeError(f"{name} did not compile\n{traceback.format_exc()}"))
        else:
            send(answers, None)
