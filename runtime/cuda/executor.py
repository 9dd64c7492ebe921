"""The executor on a GPU: every step is put on one stream, and its results are waited for when they are wanted.

A step is one copy of its inputs, the step itself (one graph for each static size, captured at its first use) and one
copy of what it drew. Tokens that the step before draws are fed to it on the GPU.
"""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.compiler.artifact import LIBRARY, Artifact, Bucket, Manifest
from tilewright.compiler.composites import STEP_INPUTS
from tilewright.compiler.errors import TargetError
from tilewright.runtime.cuda.arena import SLOTS, Arena
from tilewright.runtime.cuda.buckets import choose, most, padded
from tilewright.runtime.cuda.budget import plan_pages
from tilewright.runtime.cuda.cudart import Cudart, load_cudart
from tilewright.runtime.cuda.graphs import StepGraph, capture
from tilewright.runtime.cuda.hidden import HiddenStates, widened
from tilewright.runtime.cuda.machine import check_machine
from tilewright.runtime.cuda.memory import DeviceMemory, PinnedMemory, tensor, tensor_bytes
from tilewright.runtime.cuda.pages import HostPages, Pages
from tilewright.runtime.cuda.results import Results
from tilewright.runtime.cuda.weights import Weights, weights_bytes
from tilewright.runtime.library import load_cuda_runtime
from tilewright.runtime.sizes import device_limits
from tilewright.runtime.types import DeviceError, StepBatch, StepResult

_CPU = 1  # DLPack's device type
_POOLED = 2  # TVM's pooled allocator
_FEED = "feed"  # (tokens[t], ids[R]) -> tokens[t], where -1 - r has become ids[r]
_FILL = "fill"  # (weights): makes them on the GPU
_POLL_S = 20e-6
_WATCHDOG_S = 60.0
_LOGITS_BYTES = 256 << 20  # at a time, where all logits of a sequence are wanted
_HOST_SHARE = 0.25  # of the host's free memory, for pages of preempted sequences
# Room for list entries at first, a sequence. More is made when it is needed, and graphs are captured again.
_PENALTIES, _BIASES = 4096, 64


@dataclass(frozen=True)
class Pending:
    """A launched step: how many rows it has, and the slot and event of its results."""

    rows: int
    slot: int


class CudaExecutor:
    """Weights, compiled step and KV pages of one artifact on the first visible GPU. Implements the engine's Executor.

    CUDA's errors come as DeviceError, TVM's as its own; a step that takes longer than a minute is one. After any of
    them the GPU is in no state to go on.
    """

    threads = 1

    def __init__(
        self, manifest: Manifest, cuda: Cudart, ffi: Any, vm: Any, weights: Any, num_pages: int, host_pages: int
    ) -> None:
        self.manifest, self.cuda, self.ffi, self.vm, self.weights = manifest, cuda, ffi, vm, weights
        self.limits = limits = device_limits(manifest, num_pages)
        self.whole_tokens = max(1, min(limits.max_tokens, _LOGITS_BYTES // (4 * limits.vocab_size)))
        self.stream = cuda.stream()
        self._on_stream = ffi.use_raw_stream(_device(ffi, cuda), self.stream)
        self._buckets = manifest.buckets
        self._functions = {b.function: vm[b.function] for b in self._buckets}
        self._feed = vm[_FEED] if _has(vm, _FEED) else None
        self._pages = Pages(cuda, ffi, manifest, num_pages)
        self.swap = HostPages(cuda, self._pages, host_pages, self.stream)
        batch = limits.max_batch
        sizes = {b.name: most(b, batch) for b in self._buckets}
        lists = {"p": num_pages + batch, "c": batch * _PENALTIES, "e": batch * _BIASES}
        self._arena = Arena(cuda, ffi, sizes, lists)
        self._results = Results(cuda, ffi, max(size["r"] for size in sizes.values()), limits.top_logprobs)
        self._events = [cuda.event() for _ in range(SLOTS)]
        self._all = cuda.event()
        self._hidden: HiddenStates | None = None  # made when embeddings are first asked for
        self._graphs: dict[str, StepGraph] = {}
        self._launched = 0

    @staticmethod
    def open(artifact: Artifact, kv_tokens: int | None) -> "CudaExecutor":
        """Loads an artifact. Raises TargetError where the GPU is not the one, has too little memory, or refuses."""
        check_machine(artifact)
        try:
            return CudaExecutor._open(artifact, kv_tokens)
        except DeviceError as error:
            raise TargetError(
                f"{artifact.path} can't be loaded: {error}; nvidia-smi shows the GPU's state and what else uses it"
            ) from error

    @staticmethod
    def _open(artifact: Artifact, kv_tokens: int | None) -> "CudaExecutor":
        cuda, ffi = load_cudart(), load_cuda_runtime()
        manifest = artifact.manifest
        pages = plan_pages(manifest, kv_tokens, weights_bytes(manifest.params), *cuda.memory())
        vm = ffi.load_module(str((artifact.path / LIBRARY).resolve()))["vm_load_executable"]()
        vm["vm_initialization"](cuda.device_type, 0, _POOLED, _CPU, 0, _POOLED)
        weights = Weights(cuda, ffi, artifact)
        host_pages = int(_HOST_SHARE * _available_bytes()) // manifest.memory["page_bytes"]
        executor = CudaExecutor(manifest, cuda, ffi, vm, weights, pages, min(pages, host_pages))
        if not weights.stored:
            with executor._on_stream:
                vm[_FILL](weights.tensors)
            cuda.synchronize(executor.stream)
        return executor

    # ---- the executor ------------------------------------------------------------------------------------------------

    @property
    def runs_ahead(self) -> bool:
        return self._feed is not None

    def launch(self, batch: StepBatch) -> Pending:
        """Puts the step on the stream. A slot's memory is free again: the step two before this one is done."""
        slot = self._launched % SLOTS
        self._wait(slot)
        self._launched += 1
        if not self._arena.holds(batch):
            self._grow(batch)
        bucket = choose(self._buckets, batch)
        extents = padded(bucket, batch)
        self._arena.send(bucket.name, batch, extents, slot, self.stream)
        with self._on_stream:
            if bucket.static:
                self._launch_static(bucket, batch, extents, slot)
            else:
                self._finish(self._work(bucket, extents, bool((batch.tokens < 0).any())), batch, extents, slot)
        return Pending(len(batch.rows), slot)

    def collect(self, pending: Pending) -> StepResult:
        self._wait(pending.slot)
        return self._results.read(pending.rows, pending.slot)

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            self._pages.copy(source, target, self.stream)

    def _launch_static(self, bucket: Bucket, batch: StepBatch, extents: Mapping[str, int], slot: int) -> None:
        fed = self._feed is not None
        known = self._graphs.get(bucket.name)
        if known is not None:
            self.cuda.launch(known.graph, self.stream)
            self._finish(known.outputs, batch, extents, slot)
            return
        self._finish(self._work(bucket, extents, fed), batch, extents, slot)
        self._graphs[bucket.name] = capture(self.cuda, self.stream, lambda: self._work(bucket, extents, fed))

    def _work(self, bucket: Bucket, extents: Mapping[str, int], fed: bool) -> Any:
        """The step on what the arena holds; its tokens are where the next step and `_finish` look for them."""
        tokens, *others = self._arena.tensors(bucket.name, extents)
        if fed:
            tokens = self._fed(tokens)
        outputs = self._functions[bucket.function](tokens, *others, self._pages.tensor, self.weights.tensors)
        self._results.keep(outputs, extents["r"], self.stream)
        return outputs

    def _fed(self, tokens: Any) -> Any:
        if self._feed is None:
            raise DeviceError(
                "a step names tokens of the one before it, and the artifact has no feed; compile it again"
            )
        return self._feed(tokens, self._results.ids)

    def _finish(self, outputs: Any, batch: StepBatch, extents: Mapping[str, int], slot: int) -> None:
        """Brings the results to the host."""
        alternatives = bool(batch.alternatives.any())
        if alternatives:
            self._results.keep_alternatives(outputs, extents["r"], self.stream)
        self._results.fetch(alternatives, slot, self.stream)
        self.cuda.record(self._events[slot], self.stream)

    def hidden(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        if self._hidden is None:
            limits = self.limits
            most = {"t": limits.max_tokens, "r": limits.max_tokens, "b": limits.max_batch, "p": limits.num_pages}
            self._hidden = HiddenStates(self.cuda, self.ffi, most, self.stream, self._finish_all)
        with self._on_stream:
            return self._hidden(self.vm["hidden"], inputs, self._pages.tensor, self.weights.tensors)

    def _finish_all(self) -> None:
        """Waits for all that is on the stream."""
        self.cuda.record(self._all, self.stream)
        self._reach(self._all)

    def _wait(self, slot: int) -> None:
        """Until the slot's last step is done."""
        self._reach(self._events[slot])

    def _reach(self, event: int) -> None:
        """A kernel that never ends must not take the engine with it."""
        reached = self.cuda.reached
        if reached(event):
            return
        end_s = time.monotonic() + _WATCHDOG_S
        while not reached(event):
            if time.monotonic() > end_s:
                self.cuda.abandon()
                raise DeviceError(f"the GPU has not finished a step in {_WATCHDOG_S:g} seconds; it hangs")
            time.sleep(_POLL_S)

    def _grow(self, batch: StepBatch) -> None:
        for slot in range(SLOTS):
            self._wait(slot)
        for graph in self._graphs.values():
            self.cuda.drop_graph(graph.graph)
        self._graphs.clear()
        self._arena.grow(batch)

    # ---- whole sequences ---------------------------------------------------------------------------------------------

    def whole(self, function: str, chunks: Iterable[Mapping[str, np.ndarray]], num_pages: int) -> list[Any]:
        """What `function` gives for each chunk, as arrays, over fresh pages. chunks: STEP_INPUTS by name."""
        pages = Pages(self.cuda, self.ffi, self.manifest, num_pages)
        run, results = self.vm[function], []
        with self._on_stream:
            for chunk in chunks:
                held = [self._upload(chunk[name]) for name in STEP_INPUTS]
                result = run(*(t for t, _ in held), pages.tensor, self.weights.tensors)
                results.append([self._download(r) for r in result] if function == "layers" else self._download(result))
        return results

    def _upload(self, array: np.ndarray) -> tuple[Any, DeviceMemory]:
        """An array on the GPU, and the memory that it lies in."""
        array = np.ascontiguousarray(array)
        memory = DeviceMemory(self.cuda, array.nbytes)
        self.cuda.copy(memory.address, array.ctypes.data, array.nbytes, self.stream)
        self.cuda.synchronize(self.stream)
        return tensor(self.ffi, self.cuda.device_type, memory.address, array.shape, str(array.dtype)), memory

    def _download(self, value: Any) -> np.ndarray:
        """A tensor of the GPU as an array, bfloat16 as the float32 of the same value."""
        shape, dtype = tuple(value.shape), str(value.dtype)
        staging = PinnedMemory(self.cuda, tensor_bytes(shape, dtype))
        self.cuda.copy(staging.address, value.data_ptr(), staging.size, self.stream)
        self.cuda.synchronize(self.stream)
        return widened(staging.array, shape, dtype)


def _has(vm: Any, function: str) -> bool:
    try:
        return vm[function] is not None
    except AttributeError:
        return False


def _device(ffi: Any, cuda: Cudart) -> Any:
    return ffi.device("cuda" if cuda.device_type != _CPU else "cpu", 0)


def _available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
