"""A model that says the alphabet, and an artifact of it: the command line and the engine without a compiler.

A token is a character's code; after the letter it last read, the model says the next, and after "z" it stops.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.compiler import artifact as sealed
from tilewright.compiler.artifact import Artifact, Manifest
from tilewright.runtime.types import DeviceLimits, StepBatch, StepResult

STOP = 0
VOCAB = 128
TOP = 3


class FakeModel:
    """What an engine and the commands need of a model (runtime/model.py)."""

    costs = None
    load_s = 0.25
    threads = 1

    def __init__(self, max_context: int = 256, max_batch: int = 4) -> None:
        self.limits = DeviceLimits(
            max_batch=max_batch,
            max_tokens=32,
            max_context=max_context,
            page_size=16,
            num_pages=max_batch * max_context // 16,
            vocab_size=VOCAB,
            top_logprobs=TOP,
        )
        self.tokenizer = FakeTokenizer()

    runs_ahead = False
    swap = None

    def launch(self, batch: StepBatch) -> StepResult:
        return self.step(batch)

    def collect(self, pending: StepResult) -> StepResult:
        return pending

    def step(self, batch: StepBatch) -> StepResult:
        said = batch.tokens[batch.rows]
        letters = (said >= ord("a")) & (said < ord("z"))
        ids = np.where(letters, said + 1, np.where(said == ord("z"), STOP, ord("a"))).astype(np.int32)
        rows = len(ids)
        top_ids = np.stack([ids, (ids + 1) % VOCAB, (ids + 2) % VOCAB], axis=1).astype(np.int32)
        top_logprobs = np.tile(np.array([-0.5, -1.5, -np.inf], np.float32), (rows, 1))
        unwanted = np.arange(TOP) >= batch.alternatives[:, None]
        top_ids[unwanted], top_logprobs[unwanted] = -1, np.nan
        return StepResult(ids, np.full(rows, -0.5, np.float32), top_ids, top_logprobs)

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        pass


class FakeTokenizer:
    stop_token_ids = (STOP,)

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.encode("".join(f"{m['role'][0].upper()}:{m['content']}" for m in messages))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def spelling(self, token: int) -> bytes:
        return chr(token).encode()

    def detokenizer(self) -> "FakeStream":
        return FakeStream()


class FakeStream:
    def push(self, token: int) -> str:
        return chr(token)

    def tail(self) -> str:
        return ""

    def finish(self) -> str:
        return ""


def fake_artifact(path: Path, **changes: Any) -> Artifact:
    """A sealed artifact directory whose files are whole but hold no model."""
    path.mkdir(parents=True)
    (path / sealed.LIBRARY).write_bytes(b"library")
    (path / sealed.COSTS).write_text(
        '{"step_1": {"floor": {"bytes_fixed": 98000000, "bytes_per_row": 500000, "flops_per_row": 270000000}}}'
    )
    limits = {"max_batch": 4, "max_tokens": 32, "max_context": 256, "page_size": 16} | changes.get("limits", {})
    fields: dict[str, Any] = {
        "name": "alphabet",
        "target": {"name": "cpu", "kind": "cpu", "arch": "x86_64", "features": ["avx2"]},
        "model": {"family": "llama", "hidden": 576, "qk_norm": False, "tied": True, "vocab": VOCAB, "window": None},
        "limits": limits,
        "kv": {"layers": 30, "kv_heads": 3, "head_dim": 64, "page_size": 16, "dtype": "float16", "k_transposed": True},
        "step": {
            "inputs": [],
            "top_logprobs": TOP,
            "buckets": [
                {"function": "step_1", "tokens": 1, "static": True},
                {"function": "step", "tokens": limits["max_tokens"], "static": False},
            ],
        },
        "params": (),
        "kernels": (
            {
                "name": "linear_block_gemv_0",
                "schedule": "linear_block_gemv",
                "tile": {"rows": 16},
                "floor": {"bytes_fixed": 1_234_567, "bytes_per_row": 2048, "flops_per_row": 3_000_000},
                "calls": {"step_1": 30},
            },
            {"name": "embedding_0", "schedule": "embedding", "tile": None, "floor": None, "calls": {"step": 1}},
        ),
        "memory": {"weights_bytes": 98_000_000, "workspace_bytes": 4_000_000, "page_bytes": 737_280},
        "tokenizer": {},
        "provenance": {"tilewright": "0.1.0", "source": {"kind": "gguf"}},
    }
    return Artifact(path, sealed.seal(path, Manifest(**(fields | changes))))
