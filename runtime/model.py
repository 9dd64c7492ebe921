"""A loaded artifact: its tokenizer, and the executor that runs its compiled steps on a device."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.compiler.artifact import TOKENIZER, Artifact
from tilewright.compiler.errors import ArtifactError, RequestError, TargetError
from tilewright.runtime.step_floor import floor_of
from tilewright.runtime.tokenizer import Tokenizer
from tilewright.runtime.types import StepBatch, StepResult, Swap, Work

_DEVICES = ("auto", "cpu", "cuda")


class Model:
    """Weights, compiled step and KV pages of one artifact, on the kind of device that it was compiled for.

    Implements the engine's Executor. One thread at a time may call it.
    """

    def __init__(self, artifact: Artifact, kv_tokens: int | None = None, threads: int | None = None):
        self.artifact = artifact
        self.manifest = artifact.manifest
        self.executor = _executor(artifact, kv_tokens, threads)
        self.limits = self.executor.limits
        self.threads = self.executor.threads
        self._tokenizer: Tokenizer | None = None
        self.load_s = 0.0  # seconds, files and checksums included; `load` knows

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, read when first asked for; None where the artifact has none."""
        if self._tokenizer is None and TOKENIZER in self.manifest.files:
            self._tokenizer = Tokenizer(_text(self.artifact.path / TOKENIZER), dict(self.manifest.tokenizer))
        return self._tokenizer

    # ---- the executor ------------------------------------------------------------------------------------------------

    @property
    def runs_ahead(self) -> bool:
        return self.executor.runs_ahead

    @property
    def swap(self) -> Swap | None:
        return self.executor.swap

    def launch(self, batch: StepBatch) -> Any:
        return self.executor.launch(batch)

    def collect(self, pending: Any) -> StepResult:
        return self.executor.collect(pending)

    def hidden(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.executor.hidden(inputs)

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        self.executor.copy_pages(pairs)

    def step(self, batch: StepBatch) -> StepResult:
        """Launches a step and waits for it."""
        return self.collect(self.launch(batch))

    @property
    def floor(self) -> Callable[[Work], float] | None:
        """The least seconds of a step here, where they are known."""
        return floor_of(self.artifact)

    # ---- whole sequences ---------------------------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32[n, vocab]: the logits after each of n tokens. Independent of the engine's pages."""
        return np.concatenate(self._whole("logits", tokens))

    def layers(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """The logits float32[n, vocab], then each layer's output float32[n, hidden]: to compare, not to serve."""
        return [np.concatenate(values) for values in zip(*self._whole("layers", tokens), strict=True)]

    def _whole(self, function: str, tokens: Sequence[int]) -> list[Any]:
        """Results of a function that wants every row, for chunks of one sequence on pages of its own."""
        ids = np.asarray(tokens, np.int32)
        self._check_tokens(ids)
        pages = -(-len(ids) // self.limits.page_size)
        return self.executor.whole(function, _chunks(ids, self.executor.whole_tokens, pages), pages)

    def _check_tokens(self, ids: np.ndarray) -> None:
        if ids.ndim != 1 or len(ids) == 0:
            raise RequestError("there are no tokens; give at least one")
        if len(ids) > self.limits.max_context:
            raise RequestError(
                f"{len(ids)} tokens are more than the context of {self.limits.max_context}; shorten them"
            )
        if ids.min() < 0 or ids.max() >= self.limits.vocab_size:
            bad = int(ids[(ids < 0) | (ids >= self.limits.vocab_size)][0])
            raise RequestError(f"token {bad} is outside the vocabulary of {self.limits.vocab_size}")


def _chunks(ids: np.ndarray, size: int, pages: int) -> Iterator[dict[str, np.ndarray]]:
    """STEP_INPUTS of a prompt on the first pages, `size` tokens at a time, every row wanted."""
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        positions = np.arange(start, start + len(part), dtype=np.int32)
        yield {
            "tokens": part,
            "positions": positions,
            "slots": positions,
            "indptr": np.array([0, len(part)], np.int32),
            "page_indptr": np.array([0, pages], np.int32),
            "page_indices": np.arange(pages, dtype=np.int32),
            "kv_len": np.array([start + len(part)], np.int32),
            "phases": np.zeros(1, np.int32),
            "rows": np.arange(len(part), dtype=np.int32),
        }


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} can't be read ({error}); compile the model again") from None


def _executor(artifact: Artifact, kv_tokens: int | None, threads: int | None) -> Any:
    kind = artifact.manifest.target["kind"]
    if kind == "cpu":
        from tilewright.runtime.cpu_executor import CpuExecutor

        return CpuExecutor(artifact, kv_tokens, threads)
    if kind == "cuda":
        from tilewright.runtime.cuda.executor import CudaExecutor

        return CudaExecutor.open(artifact, kv_tokens)
    raise TargetError(f"{artifact.path} is for a device of kind {kind!r}, which this version does not know; upgrade it")


def load(
    path: str | os.PathLike[str],
    device: str = "auto",
    threads: int | None = None,
    kv_tokens: int | None = None,
    check: bool = True,
) -> Model:
    """The model in an artifact, ready to run.

    device: "cpu" or "cuda", which must be what the artifact is for; "auto" takes that. threads: for kernels on a CPU,
    default one per processor. kv_tokens: size of the KV pool, by default at most a quarter of the free memory on a CPU,
    and nine tenths of a GPU's memory with the weights and all else. check: compare every file's checksum first.
    Raises ArtifactError, TargetError.
    """
    if device not in _DEVICES:
        raise TargetError(f"device {device!r} is not known; use {', '.join(_DEVICES[:-1])} or {_DEVICES[-1]}")
    if threads is not None and threads < 1:
        raise TargetError(f"{threads} threads can't run anything; give 1 or more")
    started = time.perf_counter()
    artifact = Artifact.open(Path(path), check)
    target = artifact.manifest.target
    if device not in ("auto", target["kind"]):
        raise TargetError(
            f"{artifact.path} is for {target['name']}, not for {device}; use auto, or compile the model for {device}"
        )
    model = Model(artifact, kv_tokens, threads)
    model.load_s = time.perf_counter() - started
    return model
