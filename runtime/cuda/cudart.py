"""CUDA's runtime library, as far as serving needs it: memory, one stream, events and graphs.

Addresses, streams, events and graphs are plain integers. Every failed call raises DeviceError with the library's own
words; an error of a kernel comes out of whatever call follows it.
"""

import ctypes
import importlib.util
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from tilewright.compiler.errors import TargetError
from tilewright.runtime.types import DeviceError

_LIBRARY = "libcudart.so.13"
_NON_BLOCKING = 1  # cudaStreamNonBlocking: no waiting for the legacy stream
_NO_TIMING = 2  # cudaEventDisableTiming
_RELAXED = 2  # cudaStreamCaptureModeRelaxed: TVM's pool may ask for memory while a graph is captured
_BY_ADDRESS = 4  # cudaMemcpyDefault: the addresses say what is where
_NOT_READY = 600  # cudaErrorNotReady
_CUDA = 2  # DLPack's device type

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaSetDevice": (c_int,),
    "cudaMalloc": (c_void_p, c_size_t),
    "cudaFree": (c_void_p,),
    "cudaHostAlloc": (c_void_p, c_size_t, c_uint),
    "cudaFreeHost": (c_void_p,),
    "cudaMemGetInfo": (c_void_p, c_void_p),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaMemcpy2DAsync": (c_void_p, c_size_t, c_void_p, c_size_t, c_size_t, c_size_t, c_int, c_void_p),
    "cudaStreamCreateWithFlags": (c_void_p, c_uint),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaStreamDestroy": (c_void_p,),
    "cudaStreamBeginCapture": (c_void_p, c_int),
    "cudaStreamEndCapture": (c_void_p, c_void_p),
    "cudaEventCreateWithFlags": (c_void_p, c_uint),
    "cudaEventRecord": (c_void_p, c_void_p),
    "cudaEventQuery": (c_void_p,),
    "cudaEventSynchronize": (c_void_p,),
    "cudaEventDestroy": (c_void_p,),
    "cudaEventElapsedTime": (c_void_p, c_void_p, c_void_p),
    "cudaGraphInstantiate": (c_void_p, c_void_p, c_ulonglong),
    "cudaGraphDestroy": (c_void_p,),
    "cudaGraphExecDestroy": (c_void_p,),
    "cudaGraphLaunch": (c_void_p, c_void_p),
}


class Cudart:
    """The library's calls on the first GPU that is visible."""

    device_type = _CUDA
    max_pitch = 2**31 - 1  # bytes between the rows of copy_2d

    def __init__(self, library: Any) -> None:
        self._library = library
        self._abandoned = False
        library.cudaGetErrorString.restype = library.cudaGetErrorName.restype = c_char_p
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
        self._call("cudaSetDevice", 0)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def malloc(self, size: int) -> int:
        return self._make("cudaMalloc", size)

    def free(self, address: int) -> None:
        if not self._abandoned:
            self._library.cudaFree(address)  # fails only where an earlier error was told, or the process ends

    def host_malloc(self, size: int) -> int:
        """Memory of the host that the GPU reads and writes itself."""
        return self._make("cudaHostAlloc", size, 0)

    def host_free(self, address: int) -> None:
        if not self._abandoned:
            self._library.cudaFreeHost(address)

    def abandon(self) -> None:
        """The GPU hangs, and CUDA would wait for what runs: from here on no memory is freed, and when the process ends,
        it ends without CUDA's own farewell, by the status that it had."""
        if not self._abandoned:
            self._abandoned = True
            _end_at_once()

    def memory(self) -> tuple[int, int]:
        """Bytes of the GPU that are free, and all."""
        free, total = c_size_t(), c_size_t()
        self._call("cudaMemGetInfo", byref(free), byref(total))
        return free.value, total.value

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("cudaMemcpyAsync", target, source, size, _BY_ADDRESS, stream)

    def copy_2d(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        """Copies rows of `width` bytes that lie a pitch apart."""
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, _BY_ADDRESS, stream)

    # ---- order -------------------------------------------------------------------------------------------------------

    def stream(self) -> int:
        return self._make("cudaStreamCreateWithFlags", _NON_BLOCKING)

    def drop_stream(self, stream: int) -> None:
        self._library.cudaStreamDestroy(stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def event(self) -> int:
        return self._make("cudaEventCreateWithFlags", _NO_TIMING)

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def reached(self, event: int) -> bool:
        """Whether all before the event's last record is done; true where it was never recorded."""
        code = self._library.cudaEventQuery(event)
        if code not in (0, _NOT_READY):
            raise self._error("cudaEventQuery", code)
        return code == 0

    def timer(self) -> int:
        """An event that knows when it was reached, for `elapsed_ms`."""
        return self._make("cudaEventCreateWithFlags", 0)

    def drop_event(self, event: int) -> None:
        self._library.cudaEventDestroy(event)

    def wait(self, event: int) -> None:
        """Until all before the event's last record is done, however long it takes."""
        self._call("cudaEventSynchronize", event)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds on the GPU from one timer to another; both have been reached."""
        taken = c_float()
        self._call("cudaEventElapsedTime", byref(taken), start, end)
        return taken.value

    # ---- graphs ------------------------------------------------------------------------------------------------------

    def begin_capture(self, stream: int) -> None:
        """From here on, what is put on the stream is noted and not run."""
        self._call("cudaStreamBeginCapture", stream, _RELAXED)

    def end_capture(self, stream: int) -> int:
        """What was noted, ready to be launched."""
        graph = self._make_last("cudaStreamEndCapture", stream)
        try:
            return self._make("cudaGraphInstantiate", graph, 0)
        finally:
            self._library.cudaGraphDestroy(graph)

    def abort_capture(self, stream: int) -> None:
        graph = c_void_p()
        self._library.cudaStreamEndCapture(stream, byref(graph))
        if graph.value:
            self._library.cudaGraphDestroy(graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def drop_graph(self, graph: int) -> None:
        self._library.cudaGraphExecDestroy(graph)

    # ---- errors ------------------------------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise self._error(name, code)

    def _make(self, name: str, *arguments: Any) -> int:
        """What the call stores through its first argument."""
        made = c_void_p()
        self._call(name, byref(made), *arguments)
        return made.value or 0

    def _make_last(self, name: str, *arguments: Any) -> int:
        made = c_void_p()
        self._call(name, *arguments, byref(made))
        return made.value or 0

    def _error(self, name: str, code: int) -> DeviceError:
        self._library.cudaGetLastError()  # a failed call must not be blamed on the next one
        words = self._library.cudaGetErrorString(code).decode(errors="replace")
        short = self._library.cudaGetErrorName(code).decode(errors="replace")
        return DeviceError(f"{name} failed on the GPU: {words} ({short})")


def _end_at_once() -> None:
    """Handlers of exit() run last come, first served: this one leaves before those that CUDA has registered."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # where there is CUDA, there is glibc
        libc.on_exit(libc._exit, None)


@cache
def load_cudart() -> Cudart:
    """The library of the nvidia-cuda-runtime package, else the system's. Raises TargetError where there is none."""
    for place in (*_package_files(), _LIBRARY):
        try:
            # Global, since TVM's CUDA library looks for it by name.
            return Cudart(ctypes.CDLL(str(place), mode=ctypes.RTLD_GLOBAL))
        except OSError:
            continue
    raise TargetError(
        f"CUDA's runtime library {_LIBRARY} is neither installed with pip nor known to the system; "
        "pip install 'tilewright[cuda]'"
    )


def _package_files() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = (Path(folder) / "cu13" / "lib" / _LIBRARY for folder in folders)
    return [file for file in files if file.exists()]
