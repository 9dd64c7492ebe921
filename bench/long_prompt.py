"""A long prompt that arrives while others stream: what it does to the times between their tokens.

Streams by the engine itself, with serve's stretch. Each round measures the streams without the prompt and with it, one
after the other, on pages that hold nothing of the round before. The prompt's answer must be what it is alone.
"""

import asyncio
import time
from itertools import pairwise
from typing import Any

import numpy as np

from tilewright import Engine, EngineLimits, SamplingParams
from tilewright.session import CPU_STRETCH

STREAMS, STREAM_PROMPT, PROMPT, ANSWER, ALONE_S = 4, 20, 4096, 8, 4.0
PARAMS = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)


def measure(model: Any, rounds: int) -> tuple[list[float], list[float], dict[str, Any]]:
    """-> (ratios of the 99th percentiles, first tokens of the prompt in ms, what else stands in the lines)."""
    ratios, first_ms, alone_ms = [], [], []
    with Engine(model, EngineLimits(max_stretch=CPU_STRETCH)) as engine:
        for round_ in range(rounds):
            prompt = np.random.default_rng(round_).integers(0, model.limits.vocab_size, PROMPT)
            [right] = engine.generate([prompt], PARAMS)
            alone, beside, first_s, said = asyncio.run(_round(engine, prompt))
            assert said == right.token_ids, "the answer depends on what runs beside it"
            ratios.append(float(np.percentile(beside, 99) / np.percentile(alone, 99)))
            first_ms.append(1e3 * first_s)
            alone_ms.append(1e3 * float(np.percentile(alone, 99)))
    return ratios, first_ms, {"max_stretch": CPU_STRETCH, "p99_alone_ms": [round(ms, 2) for ms in alone_ms]}


async def _round(engine: Engine, prompt: np.ndarray) -> tuple[list[float], list[float], float, tuple[int, ...]]:
    """-> (seconds between tokens without the prompt, with it, to its first token, its answer)."""
    times: list[list[float]] = [[] for _ in range(STREAMS)]
    endless = SamplingParams(temperature=0, max_tokens=engine.capacity - STREAM_PROMPT, ignore_eos=True)

    async def listen(own: list[float]) -> None:
        async for _ in engine.stream([1 + len(times)] * STREAM_PROMPT, endless):
            own.append(time.perf_counter())

    tasks = [asyncio.create_task(listen(own)) for own in times]
    while not all(times):
        await asyncio.sleep(0.01)
    begun_s = time.perf_counter()
    await asyncio.sleep(ALONE_S)
    arrived_s, first_s, answer = time.perf_counter(), 0.0, None
    async for event in engine.stream(prompt, PARAMS):
        first_s = first_s or time.perf_counter()
        answer = event.completion
    assert answer is not None
    assert not any(task.done() for task in tasks), "a stream ended before the prompt's answer began"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    alone, beside = _between(times, begun_s, arrived_s), _between(times, arrived_s, first_s)
    return alone, beside, first_s - arrived_s, answer.token_ids


def _between(streams: list[list[float]], begun_s: float, ended_s: float) -> list[float]:
    return [b - a for times in streams for a, b in pairwise(times) if begun_s <= a and b <= ended_s]
