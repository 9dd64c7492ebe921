"""Whole models on a GPU: step times, time to first token, throughput, start. An artifact with random weights will do.

What is timed is what a caller of the engine sees. Before anything is timed, requests must get the tokens beside others
that they get alone.
"""

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BATCHES = (1, 4, 16, 64, 128, 256)
BATCH_PROMPT = {1: 128}  # tokens before the first drawn one; 512 for all other batches
PROMPTS = (128, 512, 2048, 8192)
ANSWER = 96
REQUESTS = 1000

Add = Callable[..., None]  # (case, samples, **facts)


def time_model(artifact: str, add: Add, wanted: set[str], requests: int = REQUESTS) -> None:
    """Every case of `wanted`, of the kinds step, first, chat and start."""
    import tilewright
    from tilewright import Engine

    start = time.perf_counter()
    model = tilewright.load(artifact)
    loaded_s = time.perf_counter() - start
    with Engine(model) as engine:
        check(engine, model.limits)
        if "step" in wanted:
            for batch in BATCHES:
                if batch <= model.limits.max_batch:
                    time_step(engine, model.limits, batch, add)
        if "first" in wanted:
            for length in PROMPTS:
                if length + 2 <= model.limits.max_context:
                    time_first(engine, model.limits, length, add)
        if "chat" in wanted:
            time_chat(engine, model.limits, add, requests)
    if "start" in wanted:
        time_start(artifact, add, loaded_s)


def _params(tokens: int) -> Any:
    from tilewright import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def _prompts(limits: Any, lengths: Sequence[int], seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(10, limits.vocab_size, int(n)).tolist() for n in lengths]


def check(engine: Any, limits: Any) -> None:
    """Raises SystemExit where tokens depend on what runs beside a request."""
    prompts = _prompts(limits, (5, 70, 300, 33), 1)
    together = [c.token_ids for c in engine.generate(prompts, _params(24))]
    alone = [engine.generate([p], _params(24))[0].token_ids for p in prompts]
    if together != alone:
        raise SystemExit("requests get other tokens together than alone: not timed")


def time_step(engine: Any, limits: Any, batch: int, add: Add) -> None:
    """Milliseconds of a step of `batch` greedy streams of one length, drawn and handed out, while all of them run."""
    length = BATCH_PROMPT.get(batch, 512)
    prompts = _prompts(limits, [length] * batch, 2)
    engine.generate(prompts, _params(4))  # captures the graphs
    samples = []
    for _ in range(3):
        marks = _watched(engine, lambda: engine.generate(prompts, _params(ANSWER + batch)))
        first, last = _full_steps(marks, batch)
        samples.append((last[0] - first[0]) / (last[1] - first[1]) * 1e3)
    add("step", samples, batch=batch, prompt=length)


def _watched(engine: Any, run: Callable[[], Any]) -> list[tuple[float, int, int]]:
    """(seconds, steps, tokens drawn) every few milliseconds while `run` runs."""
    thread = threading.Thread(target=run)
    thread.start()
    marks = []
    while thread.is_alive():
        marks.append((time.perf_counter(), engine.stats.steps, engine.stats.drawn))
        time.sleep(2e-3)
    return marks


def _full_steps(marks: list[tuple[float, int, int]], batch: int) -> tuple[tuple[float, int, int], ...]:
    """The ends of the longest span whose every step drew for the whole batch, but for one in flight at each end."""
    best = (marks[0], marks[0])
    start = 0
    for i in range(1, len(marks)):
        steps, drawn = marks[i][1] - marks[start][1], marks[i][2] - marks[start][2]
        while start < i and abs(drawn - steps * batch) > batch:
            start += 1
            steps, drawn = marks[i][1] - marks[start][1], marks[i][2] - marks[start][2]
        if marks[i][1] - marks[start][1] > best[1][1] - best[0][1]:
            best = (marks[start], marks[i])
    if best[1][1] - best[0][1] < 16:
        raise SystemExit(f"no 16 steps of {batch} streams followed one another: not timed")
    return best


def time_first(engine: Any, limits: Any, length: int, add: Add) -> None:
    """Milliseconds from submission to the first token of one prompt."""
    samples = [engine.generate(_prompts(limits, [length], 10 + i), _params(2))[0].timings.ttft_ms for i in range(6)]
    add("first", samples[1:], prompt=length)


def time_chat(engine: Any, limits: Any, add: Add, requests: int) -> None:
    """Output tokens a second of many requests of chat-like lengths, all submitted at once: lognormal, means 179 in and
    186 out."""
    rng = np.random.default_rng(7)
    ins = np.clip(rng.lognormal(np.log(179) - 0.5, 1.0, requests), 4, 2048).astype(int)
    outs = np.clip(rng.lognormal(np.log(186) - 0.5, 1.0, requests), 4, 2048).astype(int)
    prompts = _prompts(limits, ins, 8)
    params = [_params(int(n)) for n in outs]
    start = time.perf_counter()
    done = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    drawn = sum(len(c.token_ids) for c in done)
    if drawn != int(outs.sum()):
        raise SystemExit(f"{drawn} tokens came where {outs.sum()} were asked for: not counted")
    add("chat", [drawn / seconds], requests=requests, mean_in=float(ins.mean()), mean_out=float(outs.mean()))


def time_start(artifact: str, add: Add, first_s: float) -> None:
    """Seconds from a fresh interpreter to the first token."""
    code = f"""
import time; start = time.perf_counter()
from tilewright import Engine, SamplingParams, load
with Engine(load({artifact!r})) as engine:
    engine.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
print(time.perf_counter() - start)
"""
    samples = []
    for _ in range(2):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(result.stderr)
        samples.append(float(result.stdout.split()[-1]))
    add("start", samples, first_load_s=round(first_s, 3))


def main() -> None:
    """For a look without a results file: gpu_model.py ARTIFACT [KIND ...]."""

    def show(case: str, samples: list[float], **facts: Any) -> None:
        spread = f"({min(samples):.3f} to {max(samples):.3f})"
        words = " ".join(f"{k}={v}" for k, v in facts.items())
        print(f"{case:6} {statistics.median(samples):10.3f} {spread} {words}", flush=True)

    time_model(sys.argv[1], show, set(sys.argv[2:] or ("step", "first", "chat", "start")))


if __name__ == "__main__":
    main()
