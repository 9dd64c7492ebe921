"""A long prompt that arrives while others stream: what it does to the times between their tokens.

Streams by the engine itself, with serve's stretch. Each round measures the streams with the prompt and then without it,
on pages that hold nothing of the round before, and compares the same tokens of the same streams: those that came
between the prompt's arrival and its first token. Streams grow by as much meanwhile, and slower with their length,
whether a prompt arrives or not. The prompt's answer must be what it is alone.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import numpy as np

from tilewright import Engine, EngineLimits, SamplingParams
from tilewright.session import CPU_STRETCH

STREAMS, STREAM_PROMPT, LEAD, PROMPT, ANSWER = 4, 20, 200, 4096, 8
PARAMS = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)

Times = list[list[float]]  # of each stream, when its tokens came


def measure(model: Any, rounds: int) -> tuple[list[float], list[float], dict[str, Any]]:
    """-> (ratios of the 99th percentiles, first tokens of the prompt in ms, what else stands in the lines)."""
    ratios, first_ms, alone_ms, steps = [], [], [], []
    with Engine(model, EngineLimits(max_stretch=CPU_STRETCH)) as engine:
        for round_ in range(rounds):
            prompt = np.random.default_rng(round_).integers(0, model.limits.vocab_size, PROMPT)
            [right] = engine.generate([prompt], PARAMS)
            beside, first_s, said = asyncio.run(_with_prompt(engine, prompt))
            assert said == right.token_ids, "the answer depends on what runs beside it"
            alone = asyncio.run(_without(engine, [len(times) for times in beside]))
            alone_s, beside_s = (float(np.percentile(_between(times), 99)) for times in (alone, beside))
            ratios.append(beside_s / alone_s)
            first_ms.append(1e3 * first_s)
            alone_ms.append(round(1e3 * alone_s, 2))
            steps.append(len(beside[0]) - LEAD)
    return ratios, first_ms, {"max_stretch": CPU_STRETCH, "p99_alone_ms": alone_ms, "steps": steps}


async def _with_prompt(engine: Engine, prompt: np.ndarray) -> tuple[Times, float, tuple[int, ...]]:
    """-> (tokens of the streams until the prompt's first one, seconds to that, the prompt's answer)."""
    async with _streams(engine) as times:
        await _until(times, LEAD)
        arrived_s, first_s, answer, beside = time.perf_counter(), 0.0, None, times
        async for event in engine.stream(prompt, PARAMS):
            if not first_s:
                first_s, beside = time.perf_counter() - arrived_s, [own.copy() for own in times]
            answer = event.completion
    assert answer is not None
    return beside, first_s, answer.token_ids


async def _without(engine: Engine, tokens: list[int]) -> Times:
    """So many tokens of each stream, without the prompt."""
    async with _streams(engine) as times:
        await _until(times, max(tokens))
    return [own[:count] for own, count in zip(times, tokens, strict=True)]


@asynccontextmanager
async def _streams(engine: Engine) -> AsyncIterator[Times]:
    times: Times = [[] for _ in range(STREAMS)]
    endless = SamplingParams(temperature=0, max_tokens=engine.capacity - STREAM_PROMPT, ignore_eos=True)

    async def listen(own: list[float]) -> None:
        async for _ in engine.stream([1 + len(times)] * STREAM_PROMPT, endless):
            own.append(time.perf_counter())

    tasks = [asyncio.create_task(listen(own)) for own in times]
    try:
        yield times
        assert not any(task.done() for task in tasks), "a stream ended before the prompt's answer began"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until(times: Times, tokens: int) -> None:
    while min(map(len, times)) < tokens:
        await asyncio.sleep(0.01)


def _between(streams: Times) -> list[float]:
    return [b - a for times in streams for a, b in pairwise(times[LEAD - 1 :])]
