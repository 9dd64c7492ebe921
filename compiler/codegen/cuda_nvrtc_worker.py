"""A process that compiles CUDA source with NVRTC, one request after the other, until its input ends.

NVRTC compiles one program at a time in a process, so that compiling several at once takes several processes. This file
runs as a script and imports nothing but the standard library: it starts in a few hundredths of a second.

Request: a line of JSON {"library", "options", "headers", "size"}, then `size` bytes of source. Answer: a line of JSON
{"ok", "size"}, then `size` bytes, the cubin or what the compiler says of the source.
"""

import ctypes
import json
import signal
import sys
from pathlib import Path
from typing import Any


class NVRTC:
    """The library at `path`."""

    def __init__(self, path: str) -> None:
        # NVRTC looks for this one by name alone, where a wheel's folder is not searched.
        self._builtins = [ctypes.CDLL(str(file)) for file in Path(path).parent.glob("libnvrtc-builtins.so.*")]
        self._library = ctypes.CDLL(path)

    def compile(self, source: bytes, options: list[str], headers: dict[str, str]) -> tuple[bool, bytes]:
        """(True, cubin) or (False, log). headers: text by the name that it is included by."""
        program = ctypes.c_void_p()
        texts, names = _strings(list(headers.values())), _strings(list(headers))
        create = self._library.nvrtcCreateProgram
        self._check(create(ctypes.byref(program), source, b"kernel.cu", len(headers), texts, names))
        try:
            failed = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            return not failed, self._read(program, "ProgramLog" if failed else "CUBIN").rstrip(b"\0" if failed else b"")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(self._library.nvrtcGetErrorString(status).decode())


def _strings(values: list[str]) -> Any:
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one by closing the pipe
    compilers: dict[str, NVRTC] = {}
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while line := requests.readline():
        request: dict[str, Any] = json.loads(line)
        source = requests.read(request["size"])
        try:
            library = request["library"]
            if library not in compilers:
                compilers[library] = NVRTC(library)
            ok, result = compilers[library].compile(source, request["options"], request["headers"])
        except (OSError, RuntimeError) as error:
            ok, result = False, str(error).encode()
        answers.write(json.dumps({"ok": ok, "size": len(result)}).encode() + b"\n" + result)
        answers.flush()


if __name__ == "__main__":
    main()
