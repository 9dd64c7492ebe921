"""What a step costs beside its kernels: the host's time to put it on the stream, and gaps between steps on the GPU."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

MIXED = 64  # tokens of the step whose host time counts: half of them a prompt's, the others one a sequence
CACHED = 100  # tokens that each of those sequences has
HOST_ROUNDS = 40
IDLE_STEPS = 256
IDLE_ROUNDS = 3


def host_us(model: Any) -> tuple[list[float], dict[str, Any]]:
    """Microseconds a kernel that launching a mixed step takes the host, a sample a step, and facts. Every step finds
    the GPU idle and its queue empty, and is no graph. Nothing else may use the model's pages meanwhile."""
    executor = model.executor
    batch = mixed_batch(model.limits)
    taken_us = []
    for _ in range(HOST_ROUNDS + 3):
        start = time.perf_counter()
        pending = executor.launch(batch)
        taken_us.append((time.perf_counter() - start) * 1e6)
        executor.collect(pending)
    kernels = count_kernels(lambda: executor.collect(executor.launch(batch)))  # last, since it slows launches down
    step_us = statistics.median(taken_us[3:])
    return [each / kernels for each in taken_us[3:]], {"kernels": kernels, "step_us": round(step_us, 1)}


def count_kernels(run: Callable[[], Any]) -> int:
    """How many kernels run on the GPU meanwhile, by CUPTI."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    count = sum(not name.startswith(("Memcpy", "Memset")) for name in names)
    if not count:
        raise SystemExit("no kernel was seen to run: not timed")
    return count


def mixed_batch(limits: Any) -> Any:
    """A step of MIXED tokens: a prompt's beginning, and one token of each of as many sequences with CACHED tokens."""
    from tilewright.runtime.types import StepBatch

    size, context = limits.page_size, min(CACHED, limits.max_context - 1)
    decodes = min(MIXED // 2, limits.max_batch - 1)
    prompt = min(MIXED - decodes, limits.max_context)
    lengths = [prompt, *[context + 1] * decodes]
    pages = [-(-length // size) for length in lengths]
    first = np.cumsum([0, *pages])
    if first[-1] > limits.num_pages:
        raise SystemExit(f"the pool has {limits.num_pages} pages and {first[-1]} are needed: not timed")
    positions = np.concatenate([np.arange(prompt), np.full(decodes, context)])
    begins = np.concatenate([np.repeat(first[0], prompt), first[1:-1]])
    count = len(lengths)
    last = np.cumsum([prompt, *[1] * decodes])
    ints = {
        "tokens": np.arange(10, 10 + len(positions)) % limits.vocab_size,
        "positions": positions,
        "slots": begins * size + positions,
        "indptr": [0, *last],
        "page_indptr": first,
        "page_indices": np.arange(first[-1]),
        "kv_len": lengths,
        "phases": [0, *[1] * decodes],
        "rows": last - 1,
        **{name: np.zeros(count) for name in ("top_k", "draws", "alternatives")},
        **{name: np.zeros(count + 1) for name in ("penalty_indptr", "bias_indptr")},
        **{name: [] for name in ("penalty_tokens", "penalty_counts", "bias_tokens")},
    }
    floats = {name: np.zeros(count) for name in ("temperature", "min_p", "presence_penalty", "frequency_penalty")}
    floats |= {name: np.ones(count) for name in ("top_p", "repetition_penalty")}
    return StepBatch(
        **{name: np.asarray(values, np.int32) for name, values in ints.items()},
        **{name: values.astype(np.float32) for name, values in floats.items()},
        bias_values=np.empty(0, np.float32),
        seeds=np.zeros(count, np.int64),
    )


def idle_percent(engine: Any, model: Any, prompt: list[int], params: Any) -> tuple[list[float], dict[str, Any]]:
    """Per cent of the time from one decode step to the next in which no graph of a step runs on the GPU, a sample a
    generation, and facts. What a step copies in and out counts as idle."""
    engine.generate([prompt], params)  # captures the graph
    samples, periods = [], []
    for _ in range(IDLE_ROUNDS):
        with timed_graphs(model.executor.cuda) as marks:
            engine.generate([prompt], params)
        period_ms, busy_ms = _period_and_busy(model.executor.cuda, marks)
        samples.append(100 * (1 - busy_ms / period_ms))
        periods.append(period_ms)
    return samples, {"period_ms": round(statistics.median(periods), 4)}


def _period_and_busy(cuda: Any, marks: list[tuple[int, int]]) -> tuple[float, float]:
    """Means over the steps but for the first and last ones, whose neighbours are none."""
    inner = marks[8:-8]
    if len(inner) < 16:
        raise SystemExit(f"{len(marks)} graphs ran, too few to time")
    cuda.wait(marks[-1][1])
    whole_ms = cuda.elapsed_ms(inner[0][0], inner[-1][0])
    busy_ms = sum(cuda.elapsed_ms(start, end) for start, end in inner[:-1])
    return whole_ms / (len(inner) - 1), busy_ms / (len(inner) - 1)


@contextmanager
def timed_graphs(cuda: Any) -> Iterator[list[tuple[int, int]]]:
    """A list that gets the events before and after every graph launched within."""
    marks: list[tuple[int, int]] = []
    spare = [cuda.timer() for _ in range(2 * (IDLE_STEPS + 64))]  # to make one takes the host's time
    launch = cuda.launch

    def timed(graph: int, stream: int) -> None:
        start, end = spare.pop(), spare.pop()
        cuda.record(start, stream)
        launch(graph, stream)
        cuda.record(end, stream)
        marks.append((start, end))

    cuda.launch = timed
    try:
        yield marks
    finally:
        del cuda.launch
