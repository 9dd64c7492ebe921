"""One engine in a process of its own, driven line by line over stdin: what bench/run.py alternates between.

    python bench/worker.py tilewright smollm2.tw 2
    python bench/worker.py llama_cpp SmolLM2.gguf 2

The first line out is {"version": "..."}. A command is a JSON line, and so is the answer:
{"op": "prefill", "tokens": [...]} -> {"ms": 1.2};
{"op": "decode", "tokens": [...], "count": 40} -> {"ms": [...]} after a prefill of the tokens;
{"op": "top", "tokens": [...]} -> {"top": [...]}, the most likely next token at each; {"op": "peak"} -> {"mib": 300}.
"""

import importlib.metadata
import json
import resource
import sys
import time
from typing import Any

import numpy as np


class Tilewright:
    """A Model's step, called as the engine calls it, for one greedy sequence."""

    def __init__(self, path: str, threads: int):
        from tilewright import load

        self.model = load(path, threads=threads, kv_tokens=2048)
        self.page_size = self.model.limits.page_size

    def _step(self, tokens: list[int], start: int) -> int:
        from tilewright.runtime.types import StepBatch

        count, end = len(tokens), start + len(tokens)
        positions = np.arange(start, end, dtype=np.int32)
        pages = np.arange(-(-end // self.page_size), dtype=np.int32)
        i32 = lambda *values: np.array(values, np.int32)  # noqa: E731
        f32 = lambda *values: np.array(values, np.float32)  # noqa: E731
        result = self.model.step(
            StepBatch(
                tokens=np.array(tokens, np.int32),
                positions=positions,
                slots=positions,
                indptr=i32(0, count),
                page_indptr=i32(0, len(pages)),
                page_indices=pages,
                kv_len=i32(end),
                phases=i32(int(count == 1)),
                rows=i32(count - 1),
                temperature=f32(0),
                top_k=i32(0),
                top_p=f32(1),
                min_p=f32(0),
                repetition_penalty=f32(1),
                presence_penalty=f32(0),
                frequency_penalty=f32(0),
                seeds=np.zeros(1, np.int64),
                draws=i32(0),
                penalty_indptr=i32(0, 0),
                penalty_tokens=i32(0),
                penalty_counts=i32(0),
                bias_indptr=i32(0, 0),
                bias_tokens=i32(0),
                bias_values=f32(0),
                alternatives=i32(0),
            )
        )
        return int(result.token_ids[0])

    def prefill(self, tokens: list[int]) -> None:
        chunk = self.model.limits.max_tokens
        for start in range(0, len(tokens), chunk):
            self._step(tokens[start : start + chunk], start)

    def decode(self, token: int, position: int) -> None:
        self._step([token], position)

    def top(self, tokens: list[int]) -> list[int]:
        return self.model.logits(tokens).argmax(-1).tolist()


class LlamaCpp:
    """llama.cpp through llama-cpp-python, as its own `eval` runs it."""

    def __init__(self, path: str, threads: int):
        from llama_cpp import Llama

        self.llama = Llama(path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
        self._make_all = lambda: Llama(
            path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=True
        )

    def prefill(self, tokens: list[int]) -> None:
        self.llama.reset()
        self.llama.eval(tokens)

    def decode(self, token: int, position: int) -> None:
        self.llama.eval([token])

    def top(self, tokens: list[int]) -> list[int]:
        llama = self._make_all()
        llama.eval(tokens)
        return np.asarray(llama.scores[: len(tokens)]).argmax(-1).tolist()


def answer(engine: Any, command: dict[str, Any]) -> dict[str, Any]:
    op = command["op"]
    if op == "peak":
        return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if op == "top":
        return {"top": engine.top(command["tokens"])}
    if op == "prefill":
        return {"ms": _timed(engine.prefill, command["tokens"])}
    if op == "decode":
        prompt = command["tokens"]
        engine.prefill(prompt)
        fresh = np.random.default_rng(0).integers(100, 40000, command["count"]).tolist()
        return {"ms": [_timed(engine.decode, t, len(prompt) + i) for i, t in enumerate(fresh)]}
    raise ValueError(f"unknown op {op}")


def _timed(call: Any, *args: Any) -> float:
    start = time.perf_counter()
    call(*args)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    kind, path, threads = sys.argv[1:4]
    engine = {"tilewright": Tilewright, "llama_cpp": LlamaCpp}[kind](path, int(threads))
    package = {"tilewright": "tilewright", "llama_cpp": "llama-cpp-python"}[kind]
    print(json.dumps({"version": f"{package} {importlib.metadata.version(package)}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
