"""A GPU of host memory that is as late as it may be, and a compiled step on it that reasons as FakeModel does.

What is put on its stream runs when somebody waits for it, so inputs that are overwritten too soon, and results that are
read too soon, show. Its step keeps tokens, positions and phases in the page tensor, and its graphs replay it.
"""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from tests.runtime.fake import HIDDEN, FakeModel
from tilewright.compiler.artifact import Manifest
from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS
from tilewright.runtime.cuda.executor import CudaExecutor
from tilewright.runtime.library import load_runtime
from tilewright.runtime.types import DeviceLimits, StepBatch

_NAMES = (*STEP_INPUTS, *SAMPLING_INPUTS)
_STORES = 3  # layers of the page tensor: tokens, positions, phases


class FakeCudart:
    """Cudart's calls. Every allocation is full of 0xEE at first."""

    device_type = 1  # DLPack's CPU, so that arrays can be made over the tensors

    def __init__(self, max_pitch: int = 2**31 - 1, total: int = 1 << 30) -> None:
        self.max_pitch, self.total = max_pitch, total
        self.blocks: dict[int, Any] = {}
        self.used = 0
        self.queue: list[Callable[[], None]] = []
        self.noted: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.pending: dict[int, int] = {}  # records of each event that are not reached
        self.launches = 0
        self.stuck = self.abandoned = False
        self._ids = iter(range(1, 1 << 30))

    def put(self, work: Callable[[], None]) -> None:
        (self.queue if self.noted is None else self.noted).append(work)

    def malloc(self, size: int) -> int:
        block = (ctypes.c_uint8 * (size + 64))()
        ctypes.memset(block, 0xEE, size + 64)
        address = -(-ctypes.addressof(block) // 64) * 64
        self.blocks[address] = block
        self.used += size
        return address

    host_malloc = malloc

    def free(self, address: int) -> None:
        self.used -= len(self.blocks.pop(address)) - 64

    host_free = free

    def abandon(self) -> None:
        self.abandoned = True

    def memory(self) -> tuple[int, int]:
        return self.total - self.used, self.total

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._check(target, size)
        self.put(lambda: ctypes.memmove(target, source, size))

    def copy_2d(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        assert max(target_pitch, source_pitch) <= self.max_pitch
        for row in range(rows):
            self.copy(target + row * target_pitch, source + row * source_pitch, width, stream)

    def _check(self, address: int, size: int) -> None:
        assert any(a <= address and address + size <= a + len(b) - 64 for a, b in self.blocks.items()), "out of bounds"

    def stream(self) -> int:
        return next(self._ids)

    event = stream

    def drop_stream(self, stream: int) -> None:
        pass

    def synchronize(self, stream: int) -> None:
        while self.queue:
            self.queue.pop(0)()

    def record(self, event: int, stream: int) -> None:
        assert self.noted is None
        self.pending[event] = self.pending.get(event, 0) + 1

        def reach() -> None:
            self.pending[event] -= 1

        self.put(reach)

    def reached(self, event: int) -> bool:
        while self.pending.get(event) and self.queue and not self.stuck:
            self.queue.pop(0)()
        return not self.pending.get(event)

    def begin_capture(self, stream: int) -> None:
        assert self.noted is None
        self.noted = []

    def end_capture(self, stream: int) -> int:
        graph = next(self._ids)
        self.graphs[graph], self.noted = self.noted or [], None
        return graph

    def abort_capture(self, stream: int) -> None:
        self.noted = None

    def launch(self, graph: int, stream: int) -> None:
        self.launches += 1
        self.queue += self.graphs[graph]

    def drop_graph(self, graph: int) -> None:
        del self.graphs[graph]


def array_over(tensor: Any, dtype: str = "") -> np.ndarray:
    """A writable array over a tensor."""
    shape = tuple(tensor.shape)
    size = int(np.prod(shape)) * np.dtype(str(tensor.dtype)).itemsize
    raw = (
        np.frombuffer((ctypes.c_uint8 * size).from_address(tensor.data_ptr()), np.uint8) if size else np.empty(0, "u1")
    )
    return raw.view(dtype or str(tensor.dtype)).reshape(shape)


class FakeVM(dict):
    """The compiled functions by name."""

    def __init__(self, cuda: FakeCudart, model: FakeModel, manifest: Manifest, feeds: bool) -> None:
        super().__init__()
        self.cuda, self.model, self.ffi = cuda, model, load_runtime()
        self.calls: list[str] = []
        self.pool: list[np.ndarray] = []  # memory of results, which is never given back
        for bucket in manifest.buckets:
            self[bucket.function] = lambda *args, b=bucket: self.step(b, *args)
        self["hidden"] = self.hidden
        if feeds:
            self["feed"] = self.feed

    def __missing__(self, name: str) -> None:
        raise AttributeError(name)

    def feed(self, tokens: Any, ids: Any) -> Any:
        result = np.full(tuple(tokens.shape), -(10**6), np.int32)
        self.pool.append(result)

        def run() -> None:
            result[:] = array_over(tokens)
            unknown = result < 0
            result[unknown] = array_over(ids)[-1 - result[unknown]]

        self.cuda.put(run)
        return self.ffi.from_dlpack(result)

    def step(self, bucket: Any, *args: Any) -> list[Any]:
        *inputs, pages, _ = args
        arrays = dict(zip(_NAMES, (array_over(tensor) for tensor in inputs), strict=True))
        tokens, rows = len(arrays["tokens"]), len(arrays["rows"])
        assert tokens == bucket.tokens if bucket.static else 1 <= tokens <= bucket.tokens
        top = self.model.limits.top_logprobs
        results = [np.zeros(rows, "i4"), np.zeros(rows, "f4"), np.zeros((rows, top), "i4"), np.zeros((rows, top), "f4")]
        self.pool += results

        def run() -> None:
            self.calls.append(bucket.function)
            self._load(pages)
            batch = unpadded(arrays) if bucket.static else as_batch(arrays)
            drawn = self.model.step(batch)
            values = (drawn.token_ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
            for target, value in zip(results, values, strict=True):
                target[: len(value)] = value
                target[len(value) :] = 0
            self._save(pages)

        self.cuda.put(run)
        return [self.ffi.from_dlpack(result) for result in results]

    def hidden(self, *args: Any) -> Any:
        *inputs, pages, _ = args
        arrays = dict(zip(STEP_INPUTS, (array_over(tensor) for tensor in inputs), strict=True))
        result = np.full((len(arrays["rows"]), HIDDEN), np.nan, np.float32)
        self.pool.append(result)

        def run() -> None:
            self._load(pages)
            result[:] = self.model.hidden({name: array.copy() for name, array in arrays.items()})
            self._save(pages)

        self.cuda.put(run)
        return self.ffi.from_dlpack(result)

    def _load(self, pages: Any) -> None:
        for store, layer in zip(self.model.stores, array_over(pages), strict=True):
            with np.errstate(invalid="ignore"):  # of pages that nothing was written to
                store[:] = layer[:, 0, 0].ravel()

    def _save(self, pages: Any) -> None:
        for store, layer in zip(self.model.stores, array_over(pages), strict=True):
            layer[:, 0, 0] = store.reshape(layer[:, 0, 0].shape)


def as_batch(arrays: dict[str, np.ndarray]) -> StepBatch:
    """The inputs without what the lists have room for beyond their ends."""
    ends = {"page_indices": "page_indptr"} | {f"penalty_{n}": "penalty_indptr" for n in ("tokens", "counts")}
    ends |= {f"bias_{n}": "bias_indptr" for n in ("tokens", "values")}
    lists = {name: arrays[name][: arrays[indptr][-1]] for name, indptr in ends.items()}
    return StepBatch(**{name: array.copy() for name, array in (arrays | lists).items()})


def unpadded(arrays: dict[str, np.ndarray]) -> StepBatch:
    """A static step's inputs without its padding, which is looked at."""
    count = int((arrays["kv_len"] > 0).sum())
    batch = as_batch(arrays)
    assert (batch.indptr == np.arange(len(batch.indptr))).all() and (batch.rows == np.arange(len(batch.rows))).all()
    padding = {name: getattr(batch, name)[count:] for name in _NAMES if len(getattr(batch, name)) == len(batch.rows)}
    expected = {"slots": -1, "phases": 1, "top_p": 1, "repetition_penalty": 1}
    for name in ("tokens", "positions", "slots", "kv_len", "phases", "temperature", "top_p", "min_p", "draws", "seeds",
                 "repetition_penalty", "presence_penalty", "frequency_penalty", "alternatives", "top_k"):  # fmt: skip
        assert (padding[name] == expected.get(name, 0)).all(), f"padding of {name} is {padding[name]}"
    for name in ("page_indptr", "penalty_indptr", "bias_indptr"):
        assert (np.diff(getattr(batch, name)[count:]) == 0).all(), f"padding of {name} is not empty"
    cut = {n: getattr(batch, n)[: count + (n.endswith("indptr"))] for n in _NAMES if len(getattr(batch, n)) > count}
    lists = ("page_indices", "penalty_tokens", "penalty_counts", "bias_tokens", "bias_values")
    return replace(batch, **{name: array for name, array in cut.items() if name not in lists})


def fake_manifest(limits: DeviceLimits, statics: tuple[int, ...] = (1, 2, 4)) -> Manifest:
    kv = {"layers": _STORES, "kv_heads": 1, "head_dim": 1, "page_size": limits.page_size, "dtype": "float32"}
    buckets = [{"function": f"step_{n}", "tokens": n, "static": True} for n in statics]
    buckets += [{"function": f"step_t{n}", "tokens": n, "static": False} for n in (5,) if n < limits.max_tokens]
    buckets += [{"function": "step", "tokens": limits.max_tokens, "static": False}]
    return Manifest(
        name="hash",
        target={"name": "nvidia-h100", "kind": "cuda", "arch": "sm_90a", "features": []},
        model={"vocab": limits.vocab_size},
        limits={n: getattr(limits, n) for n in ("max_batch", "max_tokens", "max_context", "page_size")},
        kv=kv,
        step={"inputs": list(_NAMES), "top_logprobs": limits.top_logprobs, "buckets": buckets},
        params=(),
        kernels=(),
        memory={"weights_bytes": 0, "workspace_bytes": 1000, "page_bytes": _STORES * 2 * limits.page_size * 4},
        tokenizer={},
        provenance={},
        embedding={"pooling": limits.pooling, "dimensions": limits.hidden},
    )


class _NoWeights:
    tensors = ()


def fake_executor(
    limits: DeviceLimits, model: FakeModel, host_pages: int = 1000, feeds: bool = True, max_pitch: int = 2**31 - 1
) -> tuple[CudaExecutor, FakeCudart]:
    """A CudaExecutor on a fake GPU whose step reasons with `model`."""
    cuda, manifest = FakeCudart(max_pitch), fake_manifest(limits)
    vm = FakeVM(cuda, model, manifest, feeds)
    executor = CudaExecutor(manifest, cuda, load_runtime(), vm, _NoWeights(), limits.num_pages, host_pages)
    return executor, cuda
