"""The first visible GPU, as measuring.py wants a device. Needs NVIDIA's driver, CUDA's and TVM's runtime libraries."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.cuda.cudart import load_cudart
from tilewright.runtime.cuda.graphs import capture
from tilewright.runtime.cuda.memory import DeviceMemory, tensor
from tilewright.runtime.library import load_cuda_runtime
from tilewright.tuner.candidates import Candidate

_GRAPH_US = 2000.0  # of work in a graph, about: far above what the clock and a replay's start take
_LEAST_CALLS, _MOST_CALLS = 4, 64
_LOADED = 8  # candidates that stay loaded

Call = Callable[[], None]


@dataclass(frozen=True)
class _Held:
    memory: DeviceMemory
    tensor: Any
    shape: tuple[int, ...]
    dtype: np.dtype


class CudaDevice:
    """One context, one stream. Any error of a kernel comes out of whatever call follows it."""

    spread_bytes = 200 << 20  # several times the second-level cache
    most_copies = 512

    def __init__(self) -> None:
        self._cuda, self._ffi = load_cudart(), load_cuda_runtime()
        self._stream = self._cuda.stream()
        self._on_stream = self._ffi.use_raw_stream(self._ffi.device("cuda", 0), self._stream)
        self._marks = self._cuda.timer(), self._cuda.timer()
        self._graph = 0
        self.load = lru_cache(_LOADED)(self._load)

    def upload(self, array: np.ndarray) -> _Held:
        memory = DeviceMemory(self._cuda, array.nbytes)
        device = tensor(self._ffi, self._cuda.device_type, memory.address, array.shape, str(array.dtype))
        held = _Held(memory, device, array.shape, array.dtype)
        self.refill(held, array)
        return held

    def refill(self, held: _Held, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self._cuda.copy(held.memory.address, array.ctypes.data, array.nbytes, self._stream)
        self._cuda.synchronize(self._stream)

    def download(self, held: _Held) -> np.ndarray:
        array = np.empty(held.shape, held.dtype)
        self._cuda.copy(array.ctypes.data, held.memory.address, array.nbytes, self._stream)
        self._cuda.synchronize(self._stream)
        return array

    def _load(self, candidate: Candidate) -> Mapping[str, Callable[..., None]]:
        module = self._ffi.load_module(candidate.library)
        device_code = self._ffi.get_global_func("ffi.Module.load_from_bytes.cuda")
        for part in candidate.parts:
            module.import_module(device_code(Path(part).read_bytes()))
        return {launch.symbol: module[launch.symbol] for launch in candidate.launches}

    def run(self, call: Call) -> None:
        with self._on_stream:
            call()
        self._cuda.synchronize(self._stream)

    def timer(self, calls: Sequence[Call]) -> Callable[[], float]:
        """Samples are replays of one graph of the calls, each on memory of its own."""
        for call in calls[:2]:
            self.run(call)
        once_us = self._elapsed_us(lambda: self.run(calls[-1]))
        least, most = (-(-count // len(calls)) for count in (_LEAST_CALLS, _MOST_CALLS))
        turns = list(calls) * min(most, max(least, round(_GRAPH_US / (once_us * len(calls)))))
        self._capture(turns)
        return lambda: self._elapsed_us(self._replay) / len(turns)

    def _capture(self, turns: Sequence[Call]) -> None:
        """A graph in the last one's place."""

        def work() -> None:
            for call in turns:
                call()

        if self._graph:
            self._cuda.drop_graph(self._graph)
            self._graph = 0
        with self._on_stream:
            self._graph = capture(self._cuda, self._stream, work).graph

    def _replay(self) -> None:
        self._cuda.launch(self._graph, self._stream)

    def _elapsed_us(self, work: Call) -> float:
        start, end = self._marks
        self._cuda.record(start, self._stream)
        work()
        self._cuda.record(end, self._stream)
        self._cuda.synchronize(self._stream)
        return self._cuda.elapsed_ms(start, end) * 1e3

    def state(self) -> tuple[float | None, float | None]:
        return self._sensors.read() if self._sensors else (None, None)

    @cached_property
    def _sensors(self) -> "Sensors | None":
        return open_sensors()


@dataclass(frozen=True)
class Sensors:
    """The driver's management library, on the first GPU. https://docs.nvidia.com/deploy/nvml-api"""

    library: Any
    handle: ctypes.c_void_p

    def read(self) -> tuple[float | None, float | None]:
        """MHz of the multiprocessors, and °C."""
        clock, temperature = ctypes.c_uint(), ctypes.c_uint()
        told = not self.library.nvmlDeviceGetClockInfo(self.handle, 1, ctypes.byref(clock))
        warm = not self.library.nvmlDeviceGetTemperature(self.handle, 0, ctypes.byref(temperature))
        return float(clock.value) if told else None, float(temperature.value) if warm else None

    def driver(self) -> str:
        """The driver's release, such as 580.65.06."""
        text = ctypes.create_string_buffer(96)
        self.library.nvmlSystemGetDriverVersion(text, len(text))
        return text.value.decode(errors="replace")


def open_sensors() -> Sensors | None:
    """None where the library is not there, as in some containers."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
        return None
    return Sensors(library, handle)
