"""The compiled step on this machine's processor: it is computed where it is launched."""

import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.compiler import env
from tilewright.compiler.artifact import LIBRARY, Artifact, aligned_empty
from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS
from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import host
from tilewright.runtime.library import load_runtime, set_threads
from tilewright.runtime.sizes import device_limits, pages_shape, pool_pages
from tilewright.runtime.types import StepBatch, StepResult

# The pool may take this share of the memory that is free when a model is loaded, unless told otherwise.
_POOL_SHARE = 0.25
_INPUTS = (*STEP_INPUTS, *SAMPLING_INPUTS)
_CPU = 1  # DLPack's device type
_POOLED = 2  # TVM's pooled allocator


class CpuExecutor:
    """Weights, compiled step and KV pages of one artifact. Implements the engine's Executor."""

    runs_ahead = False
    swap = None  # the step's tokens may be computed again in any chunks, with the same bits

    def __init__(self, artifact: Artifact, kv_tokens: int | None, threads: int | None) -> None:
        self.manifest = artifact.manifest
        _check_machine(artifact)
        self.threads = set_threads(threads or env.threads())
        self.ffi = load_runtime()
        library = self.ffi.load_module(str((artifact.path / LIBRARY).resolve()))
        self.vm = library["vm_load_executable"]()
        self.vm["vm_initialization"](_CPU, 0, _POOLED)
        self._functions = {b.function: self.vm[b.function] for b in self.manifest.buckets}
        self._weight_arrays = artifact.map_params()
        self.weights = self.ffi.Array([self.ffi.from_dlpack(a) for a in self._weight_arrays])
        memory = int(_available_bytes() * _POOL_SHARE)
        self.limits = device_limits(self.manifest, max(1, pool_pages(self.manifest, kv_tokens, memory)))
        self.whole_tokens = self.limits.max_tokens
        self._pages, self._pages_tensor = self.make_pages(self.limits.num_pages)
        self._buffers = _InputBuffers(self.ffi)

    def launch(self, batch: StepBatch) -> StepResult:
        """Appends the batch's tokens to their pages and samples one token for each wanted row."""
        arrays = (*batch.step_inputs(), *batch.sampling_inputs())
        inputs = [self._buffers.fill(name, array) for name, array in zip(_INPUTS, arrays, strict=True)]
        function = self._functions[self._bucket(batch)]
        ids, logprobs, top_ids, top_logprobs = function(*inputs, self._pages_tensor, self.weights)
        return StepResult(
            token_ids=np.from_dlpack(ids).copy(),
            logprobs=np.from_dlpack(logprobs).copy(),
            top_ids=np.from_dlpack(top_ids).copy(),
            top_logprobs=np.from_dlpack(top_logprobs).copy(),
        )

    def collect(self, pending: StepResult) -> StepResult:
        return pending

    def hidden(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        tensors = [self._buffers.fill(name, inputs[name]) for name in STEP_INPUTS]
        return np.from_dlpack(self.vm["hidden"](*tensors, self._pages_tensor, self.weights))

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole pages (source, destination), in every layer."""
        for source, destination in pairs:
            self._pages[:, destination] = self._pages[:, source]

    def whole(self, function: str, chunks: Iterable[Mapping[str, np.ndarray]], num_pages: int) -> list[Any]:
        """What `function` gives for each chunk, as arrays, over fresh pages. chunks: STEP_INPUTS by name."""
        _, pages = self.make_pages(num_pages)
        results = []
        for chunk in chunks:
            tensors = [self._buffers.fill(name, chunk[name]) for name in STEP_INPUTS]
            result = self.vm[function](*tensors, pages, self.weights)
            results.append([np.from_dlpack(r) for r in result] if function == "layers" else np.from_dlpack(result))
        return results

    def make_pages(self, count: int) -> tuple[np.ndarray, Any]:
        """Fresh pages; the system gives memory only to those that are used."""
        shape, dtype = pages_shape(self.manifest, count), self.manifest.kv["dtype"]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = np.frombuffer(mmap.mmap(-1, size), np.uint8).view(dtype).reshape(shape)
        return array, self.ffi.from_dlpack(array)

    def _bucket(self, batch: StepBatch) -> str:
        tokens = len(batch.tokens)
        for bucket in self.manifest.buckets:
            if bucket.static and tokens == bucket.tokens and batch.one_each:
                return bucket.function
        most = max(tokens, len(batch.kv_len), len(batch.rows))
        return next(b.function for b in self.manifest.buckets if not b.static and most <= b.tokens)


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
