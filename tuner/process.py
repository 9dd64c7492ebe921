"""A process that answers one request after the other, and may crash or hang without harm: it is started again."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any

from tilewright.compiler.messages import receive, send

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class Hung(Exception):
    """No answer within the limit; the process was ended."""


class Ended(Exception):
    """The process ended by itself. status: negative where a signal ended it. said: the last line it wrote."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{_how(status)}{': ' if said else ''}{said}")
        self.status = status


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"ended by {signal.Signals(-status).name}"


class Worker:
    """A process running `main()` of a module, which calls `serve`. It starts when it is first asked."""

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        self._module = module
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  as long as this object

    def ask(self, request: Any, limit_s: float) -> Any:
        """The answer. Raises Hung or Ended; the next request then goes to a new process."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def too_late() -> None:
            late.set()
            _end(process)

        timer = threading.Timer(limit_s, too_late)
        timer.daemon = True
        timer.start()
        try:
            send(process.stdin, request)
            return receive(process.stdout)
        except (BrokenPipeError, EOFError):
            self._process = None
            _end(process)
            status = process.wait()
            if late.is_set():
                raise Hung(f"no answer in {limit_s:g} s") from None
            raise Ended(status, self._last_line()) from None
        except BaseException:
            self.close()
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """Ends the process, if there is one; a later request starts another."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)
            process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", f"from {self._module} import main; main()"]
        environment = {**os.environ, **self._environment}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,  # an interrupt is for the sweep, which ends this process itself
        )
        return self._process

    def _last_line(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4096))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def _end(process: "subprocess.Popen[bytes]") -> None:
    """With all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def serve(answer: Callable[[Any], Any]) -> None:
    """In the worker: answers requests until they end. It ends with the process that started it, however that ends."""
    with contextlib.suppress(OSError, AttributeError):  # Linux's; elsewhere the end of the requests has to do
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints is no answer
    while True:
        try:
            request = receive(sys.stdin.buffer)
        except EOFError:
            return
        send(answers, answer(request))
