"""CUDA source to cubin, in processes of NVRTC's own that are kept for the next source."""

import atexit
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

from tilewright.compiler.errors import CompileError

_WORKER = Path(__file__).with_name("cuda_nvrtc_worker.py")
_idle: LifoQueue["_Worker"] = LifoQueue()


def compile_source(library: Path, source: str, options: Sequence[str], headers: Mapping[str, str]) -> bytes:
    """The cubin of `source`, whose includes are looked up among `headers` first. library: NVRTC.

    Called from several threads it compiles as many sources at the same time.

    Raises CompileError with the compiler's first complaint: generated source does not fail, so that is a mistake in a
    kernel or an installation whose parts do not fit.
    """
    try:
        worker = _idle.get_nowait()
    except Empty:
        worker = _Worker()
    code = source.encode()
    request = {"library": str(library), "options": list(options), "headers": dict(headers), "size": len(code)}
    ok, result = worker.compile(request, code)
    _idle.put(worker)
    if ok:
        return result
    log = result.decode(errors="replace").strip()
    first = next((line for line in log.splitlines() if "error" in line), log or "no message")
    raise CompileError(f"NVRTC could not compile a kernel: {first}")


class _Worker:
    """One process that runs `cuda_nvrtc_worker.py`."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", str(_WORKER)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def compile(self, request: Mapping[str, Any], code: bytes) -> tuple[bool, bytes]:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            requests.write(json.dumps(request).encode() + b"\n" + code)
            requests.flush()
            answer: dict[str, Any] = json.loads(answers.readline() or b"{}")
        except (BrokenPipeError, ValueError):
            answer = {}
        if not answer:
            raise CompileError(f"the process that compiles kernels ended with status {self._process.wait()}")
        return answer["ok"], answers.read(answer["size"])

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


@atexit.register
def _close_all() -> None:
    while not _idle.empty():
        _idle.get_nowait().close()
