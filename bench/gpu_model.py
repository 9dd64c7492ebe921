"""Whole models on a GPU: step times, time to first token, throughput, start, and what the host adds. An artifact with
random weights will do.

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

import gpu_step
import numpy as np
from cases import MODEL_CASES

BATCHES = (1, 4, 16, 64, 128, 256)
BATCH_PROMPT = {1: 128}  # tokens before the first drawn one; 512 for all other batches
PROMPTS = (128, 512, 2048, 8192)
_SETTLING = 4  # steps
FULL_STEPS = 96  # tokens of an answer after the last prompt was computed
REQUESTS = 1000
CHAT_MEANS, CHAT_SPREAD, CHAT_MOST = (179, 186), 0.8, 1024  # tokens in and out; sigma of their logarithms; the longest

Add = Callable[..., None]  # (case, samples, **facts)
Mark = tuple[float, int, int]  # seconds; steps launched, and tokens in them, since the engine's start


def time_model(artifact: str, add: Add, wanted: set[str], requests: int = REQUESTS) -> None:
    """Every case of `wanted`, which are names of MODEL_CASES."""
    import tilewright
    from tilewright import Engine

    if "start" in wanted:  # before this process takes the GPU's memory
        time_start(artifact, add)
    if not wanted - {"start"}:
        return
    model = tilewright.load(artifact)
    with Engine(model) as engine:
        check(engine, model.limits)
        if "step" in wanted:
            for batch in BATCHES:
                if batch <= model.limits.max_batch:
                    time_step(engine, model.limits, batch, add)
        if "idle" in wanted:
            time_idle(engine, model, add)
        if "first" in wanted:
            for length in PROMPTS:
                if length + 2 <= model.limits.max_context:
                    time_first(engine, model.limits, length, add)
        if "chat" in wanted:
            time_chat(engine, model.limits, add, requests)
    if "host" in wanted:  # without an engine, whose pages it writes to
        samples, facts = gpu_step.host_us(model)
        add("host", samples, **facts)


def time_idle(engine: Any, model: Any, add: Add) -> None:
    """The GPU's idle time between steps of one stream."""
    [prompt] = _prompts(model.limits, [BATCH_PROMPT[1]], 3)
    samples, facts = gpu_step.idle_percent(engine, model, prompt, _params(gpu_step.IDLE_STEPS))
    add("idle", samples, **facts)


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
    """Milliseconds of a step of `batch` greedy streams of one length, drawn and handed out, while all of them run and
    no prompt is computed."""
    length = BATCH_PROMPT.get(batch, 512)
    prompts = _prompts(limits, [length] * batch, 2)
    engine.generate(prompts, _params(4))  # captures the graphs
    arriving = -(-batch * length // (limits.max_tokens - batch))  # steps until the last prompt is computed
    samples = []
    for _ in range(3):
        marks = _watched(engine, lambda: engine.generate(prompts, _params(FULL_STEPS + arriving)))
        first, last = full_steps(marks, batch)
        samples.append((last[0] - first[0]) / (last[1] - first[1]) * 1e3)
    add("step", samples, batch=batch, prompt=length)


def _watched(engine: Any, run: Callable[[], Any]) -> list[Mark]:
    """Marks every fraction of a millisecond while `run` runs."""
    thread = threading.Thread(target=run)
    thread.start()
    marks = []
    while thread.is_alive():
        marks.append((time.perf_counter(), engine.stats.steps, engine.stats.tokens))
        time.sleep(3e-4)
    return marks


def full_steps(marks: list[Mark], batch: int) -> tuple[Mark, Mark]:
    """The first marks of two steps, between which each step computed one token of each of `batch` streams: tokens less
    steps times batch stay the same there. A step is launched while the one before runs, so the first few are left out:
    the time between their launches is that of the step with the last prompt."""
    runs: dict[int, list[Mark]] = {}
    seen = set()
    for mark in marks:
        if mark[1:] not in seen:
            runs.setdefault(mark[2] - mark[1] * batch, []).append(mark)
        seen.add(mark[1:])
    best = max(runs.values(), key=lambda run: run[-1][1] - run[0][1])
    inner = best[_SETTLING:]
    if len(inner) < 2 or inner[-1][1] - inner[0][1] < 16:
        raise SystemExit(f"no 16 steps of {batch} streams followed one another: not timed")
    return inner[0], inner[-1]


def time_first(engine: Any, limits: Any, length: int, add: Add) -> None:
    """Milliseconds from submission to the first token of one prompt."""
    samples = [engine.generate(_prompts(limits, [length], 10 + i), _params(2))[0].timings.ttft_ms for i in range(6)]
    add("first", samples[1:], prompt=length)


def chat_lengths(rng: np.random.Generator, mean: float, count: int) -> np.ndarray:
    """int[count] in 4..CHAT_MOST, lognormal, of that mean."""
    drawn = rng.lognormal(0.0, CHAT_SPREAD, count)
    for _ in range(20):  # what is cut off at the top is given to the others
        drawn = np.clip(drawn * (mean / drawn.mean()), 4, CHAT_MOST)
    return np.rint(drawn).astype(int)


def time_chat(engine: Any, limits: Any, add: Add, requests: int) -> None:
    """Output tokens a second of many requests of chat-like lengths, all submitted at once."""
    rng = np.random.default_rng(7)
    ins, outs = (chat_lengths(rng, mean, requests) for mean in CHAT_MEANS)
    prompts = _prompts(limits, ins, 8)
    params = [_params(int(n)) for n in outs]
    start = time.perf_counter()
    done = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    drawn = sum(len(c.token_ids) for c in done)
    if drawn != int(outs.sum()):
        raise SystemExit(f"{drawn} tokens came where {outs.sum()} were asked for: not counted")
    add("chat", [drawn / seconds], requests=requests, mean_in=float(ins.mean()), mean_out=float(outs.mean()))


_START = """
import time
from tilewright import Engine, SamplingParams, load
model = load({artifact!r})
with Engine(model) as engine:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    next(engine.stream_sync([5], params))
    print(time.monotonic(), model.load_s)
"""


def time_start(artifact: str, add: Add) -> None:
    """Seconds from before a process is made to the first token of a prompt of one token. All processes share the clock.
    The first one only brings the files into the system's cache."""
    samples, loads = [], []
    for i in range(4):
        start = time.monotonic()
        command = [sys.executable, "-c", _START.format(artifact=artifact)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(result.stderr)
        end, load_s = map(float, result.stdout.split()[-2:])
        if i:
            samples.append(end - start)
            loads.append(load_s)
    add("start", samples, load_s=round(statistics.median(loads), 3))


def main() -> None:
    """For a look without a results file: gpu_model.py ARTIFACT [KIND ...]."""

    def show(case: str, samples: list[float], **facts: Any) -> None:
        spread = f"({min(samples):.3f} to {max(samples):.3f})"
        words = " ".join(f"{k}={v}" for k, v in facts.items())
        print(f"{case:6} {statistics.median(samples):10.3f} {spread} {words}", flush=True)

    time_model(sys.argv[1], show, set(sys.argv[2:] or MODEL_CASES))


if __name__ == "__main__":
    main()
