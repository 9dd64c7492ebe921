"""What `bench` times: requests alone and many at once, on random prompts, beside the floor of the machine.

Nothing is timed on wrong results: streams that run together must give the tokens that each gives alone.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright import __version__
from tilewright.compiler.artifact import Artifact
from tilewright.compiler.errors import UserError
from tilewright.compiler.targets import host
from tilewright.measure import read_bandwidth_gbs
from tilewright.runtime.step_floor import decode_floor, rates_of
from tilewright.runtime.types import Completion, SamplingParams
from tilewright.session import Session

PROMPTS = (32, 128, 512, 2048)  # tokens, for latency
STREAMS = (1, 2, 4, 8, 16)  # for throughput
STREAM_PROMPT = 128
ANSWER = 64
ROUNDS = 5

Row = dict[str, float | int]


def latency(session: Session, artifact: Artifact) -> list[Row]:
    """One request at a time, a row for each prompt length that fits: medians over rounds, and their spread.

    `of floor` is the time that reading the weights once takes, over the time between tokens; it is left out for a GPU
    whose bandwidth nobody knows.
    """
    context = session.model.limits.max_context
    lengths = [n for n in PROMPTS if n + ANSWER <= context] or [max(1, context - ANSWER)]
    bandwidth_gbs = _bandwidth_gbs(session, artifact)
    floor_ms = decode_floor(artifact).bytes() / bandwidth_gbs / 1e6 if bandwidth_gbs else None
    rows: list[Row] = []
    for length in lengths:
        prompts = random_prompts(session, ROUNDS + 1, length)
        done = [session.engine.generate([prompt], _params(context - length))[0] for prompt in prompts]
        first, between = _times(done[1:])  # the first round warms up
        rows.append(
            {
                "prompt": length,
                "first token ms": statistics.median(first),
                "spread ms": max(first) - min(first),
                "token ms": statistics.median(between),
                "token spread ms": max(between) - min(between),
                "tokens/s": 1e3 / statistics.median(between),
                **({"floor ms": floor_ms, "of floor": floor_ms / statistics.median(between)} if floor_ms else {}),
            }
        )
    return rows


def _bandwidth_gbs(session: Session, artifact: Artifact) -> float | None:
    """Of the memory that the model runs from: a processor's is read now, by as many threads as the model has, a GPU's
    is as `doctor --measure` found it, or its record says; None where neither does."""
    if artifact.manifest.target["kind"] == "cpu":
        return read_bandwidth_gbs(session.model.threads)
    rates = rates_of(artifact.manifest)
    return rates.bandwidth_gbs if rates else None


def throughput(session: Session, artifact: Artifact) -> list[Row]:
    """Many requests at once, a row for each number of streams: all tokens of the answers over the time for all."""
    limits = session.model.limits
    length = min(STREAM_PROMPT, max(1, limits.max_context - ANSWER))
    params = _params(limits.max_context - length)
    prompts = random_prompts(session, min(STREAMS[-1], limits.max_batch), length)
    alone = [session.engine.generate([prompt], params)[0] for prompt in prompts]
    rows: list[Row] = []
    for streams in (n for n in STREAMS if n <= limits.max_batch):
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            together = session.engine.generate(prompts[:streams], params)
            seconds.append(time.perf_counter() - start)
            _check_same(alone, together)
        tokens = sum(len(each.token_ids) for each in together)
        rates = [tokens / each for each in seconds]
        rate = statistics.median(rates)
        rows.append(
            {
                "streams": streams,
                "tokens/s": rate,
                "spread": max(rates) - min(rates),
                "of one stream": rate / float(rows[0]["tokens/s"] if rows else rate),
            }
        )
    return rows


def circumstances(session: Session, artifact: Artifact) -> dict[str, Any]:
    """What a result depends on: model, target, machine, versions."""
    manifest = artifact.manifest
    return {
        "model": manifest.name,
        "target": dict(manifest.target),
        "limits": dict(manifest.limits),
        "processor": host.processor(),
        "cores": host.cores(),
        "threads": session.model.threads,
        "answer_tokens": ANSWER,
        "rounds": ROUNDS,
        "tilewright": __version__,
        "provenance": dict(manifest.provenance),
    }


def random_prompts(session: Session, count: int, length: int) -> list[list[int]]:
    """The same random tokens in every run."""
    rng = np.random.default_rng(count * 65537 + length)
    return rng.integers(0, session.model.limits.vocab_size, (count, length)).tolist()


def words(value: float | int) -> str:
    """A figure for the table: whole numbers as they are, others to three digits."""
    return str(value) if isinstance(value, int) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _params(room: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=min(ANSWER, room), ignore_eos=True)


def _times(completions: Sequence[Completion]) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token, and between tokens, of each completion."""
    timings = [completion.timings for completion in completions]
    first = [each.ttft_ms for each in timings if each.ttft_ms is not None]
    between = [each.itl_ms for each in timings if each.itl_ms is not None]
    if not first or not between:
        raise UserError("the context leaves no room for an answer of two tokens; compile for a longer one")
    return first, between


def _check_same(alone: Sequence[Completion], together: Sequence[Completion]) -> None:
    for i, completion in enumerate(together):
        if completion.token_ids != alone[i].token_ids:
            raise RuntimeError(f"stream {i} of {len(together)} gave other tokens than alone: nothing is timed")
