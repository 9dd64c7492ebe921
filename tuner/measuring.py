"""Runs candidates in a process of its own: checks what they compute, then times them.

A candidate's results are held to numpy, and to the default tile's bit for bit: tuning must not change a token that a
model says. Arguments stand in so many copies that together they don't fit into the second-level cache, and calls take
them in turn, as the layers of a model do.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from tilewright.schedules.base import Output
from tilewright.tuner.candidates import Candidate, Failure
from tilewright.tuner.problem_base import numpy_dtype
from tilewright.tuner.problems import Problem, with_layer
from tilewright.tuner.process import Ended, Hung, Worker, serve

LIMIT_S = 60.0  # for one candidate, its check included
LEAST_SAMPLES, MOST_SAMPLES = 7, 28
STEADY = 0.02  # of the median, that the middle half of the samples may span
DRIFT = 0.03  # of the median, between the two halves of the samples, or of the clock
SIGKILL = 9


@dataclass(frozen=True)
class Request:
    """kind: of the device. default: the candidate of the space's first tile, whose bits count."""

    kind: str
    problem: Problem
    default: Candidate
    candidate: Candidate


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call: median, and the middle half of the samples. clock, temperature: after it, where told."""

    us: float
    spread_us: tuple[float, float]
    clock_mhz: float | None = None
    temperature_c: float | None = None


class Device(Protocol):
    """What measuring needs of a processor or GPU. Held arrays are the device's own kind of thing."""

    spread_bytes: int  # of arguments that calls take in turn
    most_copies: int

    def upload(self, array: np.ndarray) -> Any:
        """An array on the device, as kernels take it."""

    def refill(self, held: Any, array: np.ndarray) -> None: ...

    def download(self, held: Any) -> np.ndarray: ...

    def load(self, candidate: Candidate) -> Mapping[str, Callable[..., None]]:
        """The kernels by symbol."""

    def run(self, call: Callable[[], None]) -> None:
        """Until it is done."""

    def timer(self, calls: Sequence[Callable[[], None]]) -> Callable[[], float]:
        """A function that runs the calls in turn, for some milliseconds, and gives the microseconds of one."""

    def state(self) -> tuple[float | None, float | None]:
        """Clock in MHz and temperature in °C, as far as they are told."""


class Wrong(Exception):
    """A result that it must not have."""


class Measurer:
    """The process that measures, as the sweep sees it."""

    def __init__(self, kind: str, environment: Mapping[str, str], limit_s: float = LIMIT_S) -> None:
        self._kind, self._limit_s = kind, limit_s
        self._worker = Worker(__name__, environment)

    def measure(self, problem: Problem, default: Candidate, candidate: Candidate) -> Timing | Failure:
        """A candidate's time, or how it failed. Whatever it does, the next one has a fresh process if need be."""
        try:
            return self._worker.ask(Request(self._kind, problem, default, candidate), self._limit_s)
        except Hung as hung:
            return Failure("hang", str(hung))
        except Ended as end:
            return Failure("memory" if end.status == -SIGKILL else "crash", f"the process {end}")

    def close(self) -> None:
        self._worker.close()


def main() -> None:
    bench: list[_Bench] = []  # the last one
    device = cache(make_device)

    def answer(request: Request) -> Timing | Failure:
        try:
            if not bench or bench[0].problem != request.problem:
                bench.clear()
                bench.append(_Bench(device(request.kind), request.problem))
            return bench[0].measure(request.default, request.candidate)
        except Wrong as wrong:
            return Failure("wrong", str(wrong))
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            failure = Failure("memory" if _of_memory(error, text) else "crash", text)
            bench.clear()
            if request.kind == "cuda":  # after most errors a context is of no use any more
                raise _Fatal(failure) from error
            return failure

    serve_until_fatal(answer)


class _Fatal(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


def serve_until_fatal(answer: Callable[[Request], Timing | Failure]) -> None:
    """Serves; what is fatal is answered, and then the process ends without a farewell from the device."""
    import os
    import threading

    def guarded(request: Request) -> Timing | Failure:
        try:
            return answer(request)
        except _Fatal as fatal:
            threading.Timer(0.2, os._exit, (1,)).start()
            return fatal.failure

    serve(guarded)


def make_device(kind: str) -> Device:
    if kind == "cuda":
        from tilewright.tuner.device_cuda import CudaDevice

        return CudaDevice()
    from tilewright.tuner.device_cpu import CpuDevice

    return CpuDevice()


def _of_memory(error: Exception, text: str) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in text.lower() or "alloc" in text.lower()


class _Bench:
    """One problem on the device."""

    def __init__(self, device: Device, problem: Problem) -> None:
        self.problem = problem
        self._device = device
        self._arguments = problem.arguments()
        first = [device.upload(a) if isinstance(a, np.ndarray) else a for a in self._arguments]
        self._copies = [first, *(self._copy(first, i) for i in range(1, self._count()))]
        self._outputs: dict[tuple[Output, int], Any] = {}
        self._expected: list[np.ndarray] | None = None

    def _count(self) -> int:
        if self.problem.layer_argument is not None:
            return min(self.problem.layers, self._device.most_copies)
        size = sum(a.nbytes for a in self._arguments if isinstance(a, np.ndarray))
        return max(2, min(self._device.most_copies, -(-self._device.spread_bytes // size)))

    def _copy(self, first: Sequence[Any], index: int) -> list[Any]:
        """The arguments on the device once more: another layer of the same pages, or all of them."""
        if self.problem.layer_argument is not None:
            return with_layer(first, self.problem, index)
        return [self._device.upload(a) if isinstance(a, np.ndarray) else a for a in self._arguments]

    def measure(self, default: Candidate, candidate: Candidate) -> Timing:
        if self._expected is None:
            self._expected = self._results(default, self._device.load(default))
            complaint = self.problem.complaint(self._arguments, self._expected)
            if complaint:
                self._expected = None
                raise Wrong(complaint)
        functions = self._device.load(candidate)
        if candidate != default:
            self._compare(self._results(candidate, functions), self._expected)
        return self._timed(candidate, functions)

    def _compare(self, results: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
        """Raises Wrong where a bit differs that a kernel has to settle."""
        if not all(np.array_equal(_bits(results[i]), _bits(expected[i])) for i in self.problem.settled):
            complaint = self.problem.complaint(self._arguments, results)
            raise Wrong(complaint or "gives other bits than the default tile")

    def _results(self, candidate: Candidate, functions: Mapping[str, Any]) -> list[np.ndarray]:
        """What it leaves in memory that held nothing of the kind."""
        self._poison(candidate)
        shared, own = self._calls(candidate, functions, 0)
        self._device.run(shared)
        self._device.run(own)
        return [self._result(candidate, r) for r in candidate.results]

    def _poison(self, candidate: Candidate) -> None:
        """What is to be written is no result of an earlier candidate's."""
        for launch in candidate.launches:
            for output in launch.outputs:
                self._device.refill(self._output(output, 0), self._poisoned(output))
        for result in candidate.results:
            if isinstance(result, int):
                self._device.refill(self._copies[0][result], np.asarray(self._arguments[result]))

    def _poisoned(self, output: Output) -> np.ndarray:
        dtype = numpy_dtype(output.dtype)
        shape = tuple(self.problem.rows if d == "m" else int(d) for d in output.shape)
        worst = np.iinfo(dtype).max // 2 + 1 if dtype.kind in "iu" else np.nan
        return np.full(shape, worst, dtype)

    def _output(self, output: Output, copy: int) -> Any:
        if (output, copy) not in self._outputs:
            self._outputs[output, copy] = self._device.upload(self._poisoned(output))
        return self._outputs[output, copy]

    def _result(self, candidate: Candidate, which: int | str) -> np.ndarray:
        if isinstance(which, int):
            return self._device.download(self._copies[0][which])
        outputs = {o.name: o for launch in candidate.launches for o in launch.outputs}
        return self._device.download(self._output(outputs[which], 0))

    def _calls(self, candidate: Candidate, functions: Mapping[str, Any], copy: int) -> tuple[Any, Any]:
        """What a step does once, and the call itself, as functions."""
        shared: list[tuple[Any, list[Any]]] = []
        own: list[tuple[Any, list[Any]]] = []
        made: dict[str, Any] = {}
        for launch in candidate.launches:
            made |= {o.name: self._output(o, copy) for o in launch.outputs}
            inputs = [self._copies[copy][i] if isinstance(i, int) else made[i] for i in launch.inputs]
            values = [getattr(v, "tensor", v) for v in (*inputs, *(made[o.name] for o in launch.outputs))]
            (shared if launch.shared else own).append((functions[launch.symbol], values))
        return _runner(shared), _runner(own)

    def _timed(self, candidate: Candidate, functions: Mapping[str, Any]) -> Timing:
        pairs = [self._calls(candidate, functions, copy) for copy in range(len(self._copies))]
        for shared, _ in pairs:
            self._device.run(shared)
        sample = self._device.timer([own for _, own in pairs])
        timing, drifted = _sampled(sample, self._device)
        if drifted:  # the machine was busy, or its clock changed
            timing, _ = _sampled(sample, self._device)
        return timing


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _runner(calls: Sequence[tuple[Any, list[Any]]]) -> Callable[[], None]:
    if len(calls) == 1:
        [(function, values)] = calls
        return lambda: function(*values)

    def run() -> None:
        for function, values in calls:
            function(*values)

    return run


def _sampled(sample: Callable[[], float], device: Device) -> tuple[Timing, bool]:
    """Samples until they agree, and whether they drifted meanwhile."""
    sample()
    before, _ = device.state()
    samples = [sample() for _ in range(LEAST_SAMPLES)]
    end_s = time.monotonic() + LIMIT_S / 8
    while _width(samples) > STEADY and len(samples) < MOST_SAMPLES and time.monotonic() < end_s:
        samples.append(sample())
    clock, temperature = device.state()
    low, median, high = statistics.quantiles(samples, n=4)
    half = len(samples) // 2
    moved = abs(statistics.median(samples[:half]) - statistics.median(samples[half:])) > DRIFT * median
    throttled = bool(before and clock and abs(clock - before) > DRIFT * before)
    rounded = Timing(round(median, 4), (round(low, 4), round(high, 4)), clock, temperature)
    return rounded, moved or throttled


def _width(samples: Sequence[float]) -> float:
    low, median, high = statistics.quantiles(samples, n=4)
    return (high - low) / median
