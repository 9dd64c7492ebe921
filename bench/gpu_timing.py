"""Time on a GPU: calls captured into CUDA graphs, which are replayed in turns."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
GRAPH_US = 2000.0  # of work in a graph, about: far above what the clock and a replay's start take
LEAST_CALLS, MOST_CALLS = 4, 64


def device() -> str:
    facts = torch.cuda.get_device_properties(0)
    return f"{facts.name}, {facts.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}"


@dataclass(frozen=True)
class Graph:
    """`count` calls in one CUDA graph."""

    replay: Call
    count: int


def capture(calls: Sequence[Call]) -> Graph:
    """A graph of the calls in turn, as often as takes GRAPH_US. Each touches memory of its own, so that together they
    don't fit into the cache."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        once_us = _elapsed_us(calls[-1])
        least, most = (-(-count // len(calls)) for count in (LEAST_CALLS, MOST_CALLS))
        turns = list(calls) * min(most, max(least, round(GRAPH_US / (once_us * len(calls)))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            for call in turns:
                call()
    return Graph(graph.replay, len(turns))


def take_turns(graphs: Mapping[str, Graph], rounds: int) -> dict[str, list[float]]:
    """Microseconds of a call of each, a sample a round: the graphs in turn, first forwards, then backwards."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    for i in range(rounds):
        for name in list(graphs)[:: 1 if i % 2 == 0 else -1]:
            graph = graphs[name]
            graph.replay()
            times = [_elapsed_us(graph.replay) for _ in range(2)]
            samples[name].append(statistics.mean(times) / graph.count)
    return samples


def _elapsed_us(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches: bytes read a second, and operations a second on bfloat16 matrices."""

    bytes_s: float
    operations_s: float

    def floor_us(self, size_bytes: int, operations: int) -> float:
        """No call that moves so much and computes so much takes less."""
        return max(size_bytes / self.bytes_s, operations / self.operations_s) * 1e6


def read_rates(rounds: int) -> list[float]:
    """TB/s of a sum over 2 GiB."""
    data = torch.ones(1 << 29, dtype=torch.float32, device="cuda")
    out = torch.empty((), dtype=torch.float32, device="cuda")
    times = take_turns({"sum": capture([lambda: torch.sum(data, dim=0, out=out)])}, rounds)["sum"]
    return [data.nbytes / t / 1e6 for t in times]


def matrix_rates(rounds: int) -> list[float]:
    """TFLOP/s of the product of bfloat16 matrices of 8192 x 8192."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(size, size, device="cuda", dtype=torch.bfloat16)
    times = take_turns({"product": capture([lambda: torch.matmul(a, b.t(), out=out)])}, rounds)["product"]
    return [2 * size**3 / t / 1e6 for t in times]
