"""A model on a processor, beside llama.cpp: prefill, decode, streams, memory, and what starting and compiling costs.

Two engines take turns, so that the machine's moods hit both; only ratios of one run are worth quoting. What fails its
check is not timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cases import CPU_CASES as CASES
from cases import SMOLLM2
from compile_time import processor, python, time_compile
from results_file import Results, about

HERE = Path(__file__).parent
CHECK_TOKENS = 64
# Greedy choices on random text hang on small differences; two engines with int8 activations agree this often.
LEAST_AGREEMENT = 0.9


class Worker:
    """An engine in its own process (bench/worker.py)."""

    def __init__(self, python: str, kind: str, path: str, threads: int):
        self.name = kind
        command = [python, str(HERE / "worker.py"), kind, path, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._read()["version"]

    def __call__(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} died; its error stands above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def check(workers: list[Worker]) -> None:
    """Every engine reads the same text alike, or nothing is timed."""
    tokens = np.random.default_rng(7).integers(100, 40000, CHECK_TOKENS).tolist()
    tops = [w(op="top", tokens=tokens)["top"] for w in workers]
    for worker, top in zip(workers[1:], tops[1:], strict=True):
        same = float(np.mean(np.array(top) == np.array(tops[0])))
        if same < LEAST_AGREEMENT:
            raise SystemExit(f"{workers[0].name} and {worker.name} agree on {same:.0%} of tokens: not timed")
        print(f"check: {workers[0].name} and {worker.name} agree on {same:.0%} of {CHECK_TOKENS} random tokens")


def time_model(workers: list[Worker], results: Results, rounds: int, wanted: set[str]) -> None:
    """Prefill, decode and memory, the engines taking turns."""
    prompt = np.random.default_rng(1).integers(100, 40000, 512).tolist()
    prefill: dict[str, list[float]] = {w.name: [] for w in workers}
    decode: dict[tuple[str, int], list[float]] = {(w.name, n): [] for w in workers for n in (4, 512)}
    for worker in workers:
        worker(op="prefill", tokens=prompt)
    for _ in range(rounds):
        for worker in workers:
            prefill[worker.name].append(worker(op="prefill", tokens=prompt)["ms"])
        for length in (4, 512):
            for worker in workers:
                times = worker(op="decode", tokens=prompt[:length], count=32)["ms"]
                decode[worker.name, length].append(statistics.median(times))
    for worker in workers:
        if "prefill-512" in wanted:
            results.add("prefill-512", worker.name, prefill[worker.name], engine_version=worker.version)
        for length in (4, 512):
            if f"decode-{length}" in wanted:
                times = decode[worker.name, length]
                results.add(f"decode-{length}", worker.name, times, engine_version=worker.version)
    if len(workers) == 2:
        for case in ("prefill-512", "decode-4", "decode-512"):
            if case in wanted:
                results.ratio(case)


def time_memory(start: Sequence[Callable[[], Worker]], results: Results) -> None:
    """Peak memory of fresh processes that did nothing but load, prefill and decode."""
    prompt = np.random.default_rng(1).integers(100, 40000, 512).tolist()
    for make in start:
        worker = make()
        worker(op="decode", tokens=prompt, count=16)
        results.add("memory", worker.name, [worker(op="peak")["mib"]], engine_version=worker.version)
        worker.close()
    if len(start) == 2:
        results.ratio("memory")


def time_streams(artifact: str, threads: int, results: Results) -> None:
    """Greedy tokens a second of 1 and 8 streams through the engine, after a check that both give the same tokens."""
    from tilewright import Engine, SamplingParams, load

    model = load(artifact, threads=threads)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(100, 40000, 32).tolist() for _ in range(8)]
    params = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)
    engine = Engine(model)
    together = [c.token_ids for c in engine.generate(prompts, params)]
    alone = [engine.generate([p], params)[0].token_ids for p in prompts]
    if together != alone:
        raise SystemExit("8 streams give other tokens than each alone: not timed")
    for count in (1, 8):
        rates = []
        for _ in range(5):
            start = time.perf_counter()
            done = engine.generate(prompts[:count], params)
            rates.append(sum(len(c.token_ids) for c in done) / (time.perf_counter() - start))
        results.add(f"streams-{count}", "tilewright", rates)
    one, eight = (results.medians[f"streams-{n}", "tilewright"] for n in (1, 8))
    print(f"{'streams':16} {'8 to 1':12} {eight / one:10.2f} ×")


def time_processes(results: Results, artifact: str, wanted: set[str]) -> None:
    """Figures of whole processes: import, load, compile."""
    if "import" in wanted:
        code = "import time; t = time.perf_counter(); import tilewright; print((time.perf_counter() - t) * 1e3)"
        results.add("import", "tilewright", [float(python(code)) for _ in range(10)])
    if "load" in wanted:
        code = (
            "import tilewright, time; t = time.perf_counter(); "
            f"tilewright.load({artifact!r}); print((time.perf_counter() - t) * 1e3)"
        )
        results.add("load", "tilewright", [float(python(code)) for _ in range(5)])
    if "compile-cold" in wanted:
        time_compile(SMOLLM2, results)


def time_bandwidth(results: Results, threads: int) -> float:
    """GB/s that `threads` threads read at: the ceiling of decode at batch 1."""
    from concurrent.futures import ThreadPoolExecutor

    parts = np.array_split(np.ones(1 << 27, np.float64), threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(6):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            rates.append((1 << 30) / (time.perf_counter() - start) / 1e9)
    results.add("read-bandwidth", "numpy", rates[1:])
    return statistics.median(rates[1:])


def _features() -> list[str]:
    from tilewright.compiler.targets import host

    return list(host.features())


def run(args: argparse.Namespace) -> None:
    wanted = set(args.only or CASES)
    known = about(args.commit, processor(), features=_features(), threads=args.threads)
    results = Results(args.results or HERE / "results" / "cpu.jsonl", CASES, known)
    start = [partial(Worker, sys.executable, "tilewright", args.artifact, args.threads)]
    if args.peer_python:
        start.append(partial(Worker, args.peer_python, "llama_cpp", args.gguf, args.threads))
    workers = [make() for make in start]
    check(workers)
    time_model(workers, results, args.rounds, wanted)
    for worker in workers:
        worker.close()
    if "memory" in wanted:
        time_memory(start, results)
    if "read-bandwidth" in wanted:
        time_bandwidth(results, args.threads)
    if "streams-8" in wanted:
        time_streams(args.artifact, args.threads, results)
    time_processes(results, args.artifact, wanted)
