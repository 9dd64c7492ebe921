"""A loaded artifact: the executor that runs compiled steps on this machine."""

import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.compiler import env
from tilewright.compiler.artifact import LIBRARY, TOKENIZER, Artifact, aligned_empty
from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS
from tilewright.compiler.errors import RequestError, TargetError
from tilewright.compiler.targets import host
from tilewright.runtime.library import load_runtime, set_threads
from tilewright.runtime.tokenizer import Tokenizer
from tilewright.runtime.types import DeviceLimits, StepBatch, StepResult

# The pool may take this share of the memory that is free when a model is loaded, unless told otherwise.
_POOL_SHARE = 0.25
_INPUTS = (*STEP_INPUTS, *SAMPLING_INPUTS)
_CPU = 1  # DLPack's device type
_POOLED = 2  # TVM's pooled allocator


class Model:
    """Weights, compiled step and KV pages of one artifact.

    Implements the engine's Executor: `limits`, `step`, `copy_pages`. One thread at a time may call it.
    """

    def __init__(self, artifact: Artifact, kv_tokens: int | None = None, threads: int | None = None):
        self.artifact = artifact
        self.manifest = artifact.manifest
        _check_machine(artifact)
        self.threads = set_threads(threads or env.threads())
        self._ffi = load_runtime()
        library = self._ffi.load_module(str((artifact.path / LIBRARY).resolve()))
        self._vm = library["vm_load_executable"]()
        self._vm["vm_initialization"](_CPU, 0, _POOLED)
        self._functions = {b.function: self._vm[b.function] for b in self.manifest.buckets}
        self._weight_arrays = artifact.map_params()
        self._weights = self._ffi.Array([self._ffi.from_dlpack(a) for a in self._weight_arrays])
        limits = self.manifest.limits
        self.limits = DeviceLimits(
            max_batch=limits["max_batch"],
            max_tokens=limits["max_tokens"],
            max_context=limits["max_context"],
            page_size=limits["page_size"],
            num_pages=self._num_pages(kv_tokens),
            vocab_size=self.manifest.model["vocab"],
            top_logprobs=self.manifest.step["top_logprobs"],
        )
        self._pages, self._pages_tensor = self._make_pages(self.limits.num_pages)
        self._buffers = _InputBuffers(self._ffi)
        self._tokenizer: Tokenizer | None = None
        self.load_s = 0.0  # seconds, files and checksums included; `load` knows

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, read when first asked for; None where the artifact has none."""
        if self._tokenizer is None and TOKENIZER in self.manifest.files:
            text = (self.artifact.path / TOKENIZER).read_text()
            self._tokenizer = Tokenizer(text, dict(self.manifest.tokenizer))
        return self._tokenizer

    # ---- the executor ------------------------------------------------------------------------------------------------

    def step(self, batch: StepBatch) -> StepResult:
        """Appends the batch's tokens to their pages and samples one token for each wanted row."""
        arrays = (*batch.step_inputs(), *batch.sampling_inputs())
        inputs = [self._buffers.fill(name, array) for name, array in zip(_INPUTS, arrays, strict=True)]
        function = self._functions[self._bucket(len(batch.tokens), len(batch.kv_len), len(batch.rows))]
        ids, logprobs, top_ids, top_logprobs = function(*inputs, self._pages_tensor, self._weights)
        return StepResult(
            token_ids=np.from_dlpack(ids).copy(),
            logprobs=np.from_dlpack(logprobs).copy(),
            top_ids=np.from_dlpack(top_ids).copy(),
            top_logprobs=np.from_dlpack(top_logprobs).copy(),
        )

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole pages (source, destination), in every layer."""
        for source, destination in pairs:
            self._pages[:, destination] = self._pages[:, source]

    def _bucket(self, tokens: int, sequences: int, rows: int) -> str:
        for bucket in self.manifest.buckets:
            if bucket.static and tokens == sequences == rows == bucket.tokens:
                return bucket.function
        return next(b.function for b in self.manifest.buckets if not b.static)

    # ---- whole sequences ---------------------------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32[n, vocab]: the logits after each of n tokens. Independent of the engine's pages."""
        return np.concatenate([np.from_dlpack(part) for part in self._run("logits", tokens)])

    def layers(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """The logits float32[n, vocab], then each layer's output float32[n, hidden]: to compare, not to serve."""
        parts = [[np.from_dlpack(value) for value in part] for part in self._run("layers", tokens)]
        return [np.concatenate(values) for values in zip(*parts, strict=True)]

    def _run(self, function: str, tokens: Sequence[int]) -> list[Any]:
        """Results of a function that wants every row, for chunks of one sequence on pages of its own."""
        ids = np.asarray(tokens, np.int32)
        self._check_tokens(ids)
        chunk = self.limits.max_tokens
        count = -(-len(ids) // self.limits.page_size)
        _, pages = self._make_pages(count)
        results = []
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            positions = np.arange(start, start + len(part), dtype=np.int32)
            inputs = {
                "tokens": part,
                "positions": positions,
                "slots": positions,
                "indptr": np.array([0, len(part)], np.int32),
                "page_indptr": np.array([0, count], np.int32),
                "page_indices": np.arange(count, dtype=np.int32),
                "kv_len": np.array([start + len(part)], np.int32),
                "rows": np.arange(len(part), dtype=np.int32),
            }
            tensors = [self._buffers.fill(name, inputs[name]) for name in STEP_INPUTS]
            results.append(self._vm[function](*tensors, pages, self._weights))
        return results

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

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _num_pages(self, kv_tokens: int | None) -> int:
        limits = self.manifest.limits
        page_size = limits["page_size"]
        most = limits["max_batch"] * -(-limits["max_context"] // page_size)
        if kv_tokens is not None:
            if kv_tokens < page_size:
                raise RequestError(f"room for {kv_tokens} KV tokens is less than one page of {page_size}; give more")
            return min(most, kv_tokens // page_size)
        budget = int(_available_bytes() * _POOL_SHARE) // self.manifest.memory["page_bytes"]
        return max(1, min(most, budget))

    def _make_pages(self, count: int) -> tuple[np.ndarray, Any]:
        """Fresh pages; the system gives memory only to those that are used."""
        kv = self.manifest.kv
        shape = (kv["layers"], count, 2, kv["kv_heads"], kv["page_size"] * kv["head_dim"])
        size = int(np.prod(shape)) * np.dtype(kv["dtype"]).itemsize
        array = np.frombuffer(mmap.mmap(-1, size), np.uint8).view(kv["dtype"]).reshape(shape)
        return array, self._ffi.from_dlpack(array)


class _InputBuffers:
    """Aligned copies of a step's small input arrays, reused from step to step by name and length."""

    _MOST = 4096  # entries; lengths vary with the batch, so the table is emptied when it has grown past use

    def __init__(self, ffi: Any):
        self._from_dlpack = ffi.from_dlpack
        self._entries: dict[tuple[str, int], tuple[np.ndarray, Any]] = {}

    def fill(self, name: str, values: np.ndarray) -> Any:
        key = (name, len(values))
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) >= self._MOST:
                self._entries.clear()
            array = aligned_empty(values.shape, values.dtype)
            entry = self._entries[key] = (array, self._from_dlpack(array))
        entry[0][...] = values
        return entry[1]


def _check_machine(artifact: Artifact) -> None:
    target = artifact.manifest.target
    if target["kind"] != "cpu":
        raise TargetError(f"{artifact.path} is for {target['name']}, and this build runs CPU artifacts only")
    if target["arch"] != host.arch():
        raise TargetError(f"{artifact.path} is for {target['arch']}, this machine is {host.arch()}; compile it here")
    # Asking also grants this process the use of AMX tiles, where the kernels need them.
    if missing := host.missing(target["features"]):
        raise TargetError(
            f"{artifact.path} needs CPU features that this machine lacks ({', '.join(missing)}); "
            "compile it here, or with a lower --target"
        )


def _available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load(
    path: str | os.PathLike[str],
    device: str = "auto",
    threads: int | None = None,
    kv_tokens: int | None = None,
    check: bool = True,
) -> Model:
    """The model in an artifact, ready to run.

    device: "auto" or "cpu". threads: for kernels, default one per processor. kv_tokens: size of the KV pool, default a
    quarter of the free memory at most. check: compare every file's checksum first. Raises ArtifactError, TargetError.
    """
    if device not in ("auto", "cpu"):
        raise TargetError(f"device {device!r} is not known; use auto or cpu")
    if threads is not None and threads < 1:
        raise TargetError(f"{threads} threads can't run anything; give 1 or more")
    started = time.perf_counter()
    model = Model(Artifact.open(Path(path), check), kv_tokens, threads)
    model.load_s = time.perf_counter() - started
    return model
