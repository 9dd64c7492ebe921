"""Checks, then times: python bench/run.py ARTIFACT [--gguf FILE --peer-python PYTHON] [--only CASE ...]

Prints a table and appends one line a figure to bench/results/cpu.jsonl: case, engine, median, spread (least and
greatest), samples, commit, device, versions. Two engines take turns, so that the machine's moods hit both; only ratios
of one run are worth quoting. What fails its check is not timed.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cases import CASES, SMOLLM2

HERE = Path(__file__).parent
ROOT = HERE.parent
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


class Results:
    """Lines of results, written as they come."""

    def __init__(self, file: Path, threads: int):
        self._file = file
        self._about = {
            "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "device": _processor(),
            "features": _features(),
            "threads": threads,
            "versions": {"python": platform.python_version(), "apache-tvm": importlib.metadata.version("apache-tvm")},
        }
        self.medians: dict[tuple[str, str], float] = {}

    def add(self, case: str, engine: str, samples: list[float], **more: Any) -> None:
        median = statistics.median(samples)
        self.medians[case, engine] = median
        line = {
            "case": case,
            "engine": engine,
            "unit": CASES[case].unit,
            "median": round(median, 4),
            "spread": [round(min(samples), 4), round(max(samples), 4)],
            "samples": len(samples),
            **more,
            **self._about,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        spread = f"{min(samples):.2f} to {max(samples):.2f}"
        print(f"{case:16} {engine:12} {median:10.2f} {CASES[case].unit:9} ({spread})", flush=True)

    def ratio(self, case: str, ours: str = "tilewright", theirs: str = "llama_cpp") -> None:
        a, b = self.medians[case, ours], self.medians[case, theirs]
        print(f"{case:16} {'ratio':12} {(a / b if CASES[case].higher else b / a):10.2f} ×", flush=True)


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
        results.add("import", "tilewright", [float(_python(code)) for _ in range(10)])
    if "load" in wanted:
        code = (
            "import tilewright, time; t = time.perf_counter(); "
            f"tilewright.load({artifact!r}); print((time.perf_counter() - t) * 1e3)"
        )
        results.add("load", "tilewright", [float(_python(code)) for _ in range(5)])
    if "compile-cold" in wanted:
        _time_compile(results)


def _time_compile(results: Results) -> None:
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "TILEWRIGHT_CACHE_DIR": str(Path(place) / "cache")}
        code = (
            "import resource, time; t = time.perf_counter(); import tilewright; "
            f"tilewright.compile({SMOLLM2!r}, output={str(Path(place) / 'm.tw')!r}); "
            "print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        cold, memory = map(float, _python(code, environment).split())
        warm = [float(_python(code, environment).split()[0]) for _ in range(3)]
    results.add("compile-cold", "tilewright", [cold])
    results.add("compile-memory", "tilewright", [memory])
    results.add("compile-warm", "tilewright", warm)


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


def _python(code: str, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    return result.stdout


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    from tilewright.compiler.targets import host

    return f"{host.processor()}, {host.cores()} cores"


def _features() -> list[str]:
    from tilewright.compiler.targets import host

    return list(host.features())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--gguf", help="the same model's GGUF file, for llama.cpp")
    parser.add_argument("--peer-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", choices=sorted(CASES), help="cases, default all")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cpu.jsonl")
    args = parser.parse_args()
    wanted = set(args.only or CASES)
    results = Results(args.results, args.threads)
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


if __name__ == "__main__":
    main()
