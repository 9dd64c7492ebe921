"""The GPU's executor on a fake GPU: what it copies, pads, captures, feeds and waits for, and that tokens come out."""

import ctypes
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fake import LIMITS, Bench, FakeModel
from tests.runtime.fake_cuda import FakeCudart, array_over, fake_executor, fake_manifest
from tests.runtime.test_core import PARAMS as SAMPLING
from tests.runtime.test_core import PROMPTS, check, device
from tilewright.compiler.artifact import PARAMS, Artifact, Bucket, Param, TensorWriter, numpy_dtype
from tilewright.compiler.composites import STEP_INPUTS
from tilewright.compiler.errors import ArtifactError, RequestError, TargetError
from tilewright.runtime.cuda import cudart, executor, memory, weights
from tilewright.runtime.cuda.arena import Arena, Layout, extents_of
from tilewright.runtime.cuda.buckets import choose, padded
from tilewright.runtime.cuda.budget import plan_pages
from tilewright.runtime.cuda.cudart import Cudart
from tilewright.runtime.library import load_runtime
from tilewright.runtime.model import _chunks
from tilewright.runtime.types import DeviceError, DeviceLimits, EngineLimits, SamplingParams, StepBatch


def bench_on(limits: DeviceLimits, chunk: int | None = None, **options) -> tuple[Bench, FakeCudart]:
    """A bench whose core runs on a fake GPU."""
    model = FakeModel(limits)
    on_gpu, cuda = fake_executor(limits, model, **options)
    bench = Bench(limits, EngineLimits(max_chunk=chunk), executor=on_gpu)
    bench.model = model  # what the fake step reasons with
    return bench, cuda


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(PROMPTS, SAMPLING, st.integers(0, 5), st.booleans()), min_size=1, max_size=8),
    pages=st.integers(6, 40),
    chunk=st.sampled_from([1, 3, None]),
    feeds=st.booleans(),
)
def test_tokens_are_those_of_each_request_alone(arrivals, pages: int, chunk: int | None, feeds: bool) -> None:
    limits = device(num_pages=pages)
    bench, _ = bench_on(limits, chunk, feeds=feeds)
    requests = []
    for prompt, params, turns, cancelled in arrivals:
        requests.append(bench.submit(prompt, params))
        for _ in range(turns):
            bench.core.turn()
            bench.core.check_invariants()
        if cancelled:
            bench.core.cancel(requests[-1])
    bench.run()
    for request in requests:
        check(request, limits)
    swap = bench.core.executor.swap
    assert swap.room == 1000, "pages are leaked on the host"


def test_decode_replays_one_graph_for_each_size() -> None:
    bench, cuda = bench_on(LIMITS)
    for count in (1, 3):
        requests = [bench.submit([i, 1], SamplingParams(max_tokens=12, seed=0)) for i in range(count)]
        bench.run()
        for request in requests:
            check(request, LIMITS)
    assert len(cuda.graphs) == 2, "for one sequence, and for three in the step of four"
    assert cuda.launches == 2 * 10, "eleven decodes each, whose first is captured"


def test_pages_move_by_layers_where_the_pool_is_too_large_for_a_pitch() -> None:
    limits = device(num_pages=8)
    bench, _ = bench_on(limits, max_pitch=16)
    requests = [bench.submit([i] * 3, SamplingParams(max_tokens=14, seed=i, n=2)) for i in range(4)]
    bench.run()
    for request in requests:
        check(request, limits)
    assert bench.core.stats.preemptions > 0 and bench.core.stats.copied_pages > 0


def test_lists_that_outgrow_their_room_get_more(monkeypatch) -> None:
    monkeypatch.setattr(executor, "_PENALTIES", 0)
    monkeypatch.setattr(executor, "_BIASES", 0)
    bench, _ = bench_on(LIMITS)
    params = SamplingParams(max_tokens=9, seed=3, frequency_penalty=0.5, logit_bias={1: -2.5, 7: 3.0})
    requests = [bench.submit([5] * (i + 1), params) for i in range(5)]
    bench.run()
    for request in requests:
        check(request, LIMITS)


def test_a_hanging_gpu_ends_the_engine(monkeypatch) -> None:
    monkeypatch.setattr(executor, "_WATCHDOG_S", 0.05)
    bench, cuda = bench_on(LIMITS)
    request = bench.submit([1, 2], SamplingParams(max_tokens=9))
    bench.core.turn()
    cuda.stuck = True
    with pytest.raises(DeviceError, match=r"not finished a step in 0\.05 seconds"):
        bench.core.turn()
    assert request.finished and isinstance(bench.core.failure, DeviceError)


def test_a_new_engine_goes_on_where_one_was_closed_in_mid_step() -> None:
    bench, _ = bench_on(LIMITS)
    bench.submit([1, 2], SamplingParams(max_tokens=30, seed=1))
    for _ in range(3):
        bench.core.turn()
    bench.core.fail(RuntimeError("it was closed"))
    after = Bench(LIMITS, executor=bench.core.executor)
    after.model = bench.model
    request = after.submit([7, 8, 9], SamplingParams(max_tokens=12, seed=2))
    after.run()
    check(request, LIMITS)


def test_a_failing_capture_ends_the_engine() -> None:
    bench, cuda = bench_on(LIMITS)
    request = bench.submit([1, 2], SamplingParams(max_tokens=9))
    bench.core.turn()

    def refuse(stream: int) -> int:
        raise DeviceError("cudaStreamEndCapture failed on the GPU: not permitted")

    cuda.end_capture = refuse
    with pytest.raises(DeviceError, match="not permitted"):
        bench.core.turn()
    assert request.finished


def batch_of(bench: Bench, chunks: list[tuple[list[int], int]]) -> StepBatch:
    """The first step of prompts, with as many tokens of each."""
    samples = [(bench.submit(p, SamplingParams(max_tokens=2, seed=0)).samples[0], n) for p, n in chunks]
    for sample, tokens in samples:
        bench.core.pool.extend(sample.table, 0, tokens)
    return bench.core._builder.build(samples)[0]


def test_buckets() -> None:
    buckets = fake_manifest(LIMITS).buckets
    prompts = batch_of(Bench(), [([1], 1), ([2], 1), ([3], 1)])
    assert choose(buckets, prompts) == Bucket("step_t5", 5, False), "a prompt of one token is a prompt"
    decodes = replace(prompts, phases=np.ones(3, np.int32))
    assert choose(buckets, decodes) == Bucket("step_4", 4, True)
    assert padded(choose(buckets, decodes), decodes) == {"t": 4, "b": 4, "r": 4}
    for rows in ([0, 2, 1], [0, 0, 2], [0, 1]):
        chosen = choose(buckets, replace(decodes, rows=np.array(rows, np.int32)))
        assert chosen.function == "step_t5", "a static step gives the rows in the order of its tokens"
    many = batch_of(Bench(), [([1], 1)] * 5)
    many = replace(many, phases=np.ones(5, np.int32))
    assert choose(buckets, many).function == "step_t5", "no static step is large enough"
    chunk = batch_of(Bench(), [(list(range(20)), 17)])
    assert choose(buckets, chunk).function == "step"
    assert padded(choose(buckets, chunk), chunk) == {"t": 17, "b": 1, "r": 1} and len(chunk.rows) == 0
    wide = replace(prompts, rows=np.zeros(6, np.int32))
    assert choose(buckets, wide).function == "step", "rows count as well"


def test_one_copy_holds_a_step_without_biases_and_penalties() -> None:
    batch = batch_of(Bench(), [([1, 2, 3], 3), ([4, 5], 2)])
    layout = Layout({"t": 8, "b": 4, "r": 4, "p": 100, "c": 50, "e": 50})
    memory = np.full(layout.size, 0xEE, np.uint8)
    arrays = layout.over(memory)
    extents = {**extents_of(batch), "b": 4, "r": 4}
    [(offset, size)] = layout.fill(arrays, batch, extents)
    assert (offset, size) == (0, layout.offsets["page_indices"] + batch.page_indices.nbytes)
    assert all(at % 64 == 0 for at in layout.offsets.values())
    assert layout.offsets["penalty_tokens"] > layout.offsets["page_indices"], "lists come last"
    spans = sorted((layout.offsets[name], array.nbytes) for name, array in arrays.items())
    assert all(a + size <= b for (a, size), (b, _) in pairwise(spans)), "inputs overlap"
    assert arrays["kv_len"].tolist() == [3, 2, 0, 0] and arrays["page_indptr"].tolist() == [0, 1, 2, 2, 2]
    biased = replace(batch, bias_tokens=np.ones(3, np.int32), bias_values=np.ones(3, np.float32))
    assert len(layout.fill(arrays, biased, extents)) == 3


def test_tensors_are_kept_by_length() -> None:
    cuda = FakeCudart()
    arena = Arena(cuda, load_runtime(), {"step": {"t": 8, "b": 4, "r": 4}}, {"p": 9, "c": 1, "e": 1})
    first, second = (arena.tensors("step", {"t": n, "b": 1, "r": 1}) for n in (3, 5))
    assert [t.shape[0] for t in first[:2]] == [3, 3] and [t.shape[0] for t in second[:2]] == [5, 5]
    assert first[0].data_ptr() == second[0].data_ptr() and first[3] is second[3]
    assert str(first[0].device) == "cpu:0" and str(first[-1].dtype) == "int32"


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_pool_takes_what_is_left_of_nine_tenths() -> None:
    manifest = fake_manifest(device(max_batch=64, max_context=4096))
    page = manifest.memory["page_bytes"]
    total = 10_000 * page
    assert plan_pages(manifest, None, 1000 * page - 1000, total, total) == 8000
    assert plan_pages(manifest, None, 1000 * page - 1000, total - 500 * page, total) == 7500
    assert plan_pages(manifest, 40, 0, total, total) == 10
    assert plan_pages(manifest, None, 0, 10**9 * page, 10**9 * page) == 64 * 1024, "more can't be used"


def test_too_little_memory_is_told_with_numbers() -> None:
    manifest = fake_manifest(device(max_batch=64, max_context=4096))
    with pytest.raises(TargetError, match=r"needs 16\.00 GB of GPU memory \(16\.00 GB weights.* 14\.40 GB of 16\.00"):
        plan_pages(manifest, None, 16 * 10**9, 16 * 10**9, 16 * 10**9)
    page, total = manifest.memory["page_bytes"], 10**6
    fit = (int(0.97 * total) - 1000) // page
    with pytest.raises(TargetError, match=rf"{fit} pages of 4 tokens fit, {4 * fit} tokens in all, such as .* of 4096"):
        plan_pages(manifest, 10**6, 0, total, total)
    with pytest.raises(RequestError, match="less than one page"):
        plan_pages(manifest, 3, 0, total, total)


def test_weights_arrive_in_pieces_from_several_readers(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    rng = np.random.default_rng()
    shapes = {"a": ((33, 97), "float32"), "b": ((7,), "uint8"), "c": ((640,), "bfloat16"), "d": ((0,), "float32")}
    params = tuple(Param(name, shape, dtype, (name,), "f32", 1, None) for name, (shape, dtype) in shapes.items())
    (tmp_path / PARAMS).parent.mkdir()
    writer = TensorWriter(tmp_path / PARAMS, params)
    values = {}
    for param in writer.order:
        raw = rng.integers(0, 256, param.bytes, np.uint8)
        values[param.name] = raw
        writer.write(param, raw.view(numpy_dtype(param.dtype)).reshape(param.shape))
    writer.close()
    manifest = replace(fake_manifest(LIMITS), params=params, files={PARAMS: {}})
    cuda = EagerCudart()
    loaded = weights.Weights(cuda, load_runtime(), Artifact(tmp_path, manifest))
    assert loaded.stored
    for param, tensor in zip(params, loaded.tensors, strict=True):
        assert tuple(tensor.shape) == param.shape and str(tensor.dtype) == param.dtype
        assert tensor.data_ptr() % 64 == 0
        assert bytes((ctypes.c_uint8 * param.bytes).from_address(tensor.data_ptr())) == values[param.name].tobytes()
    (tmp_path / PARAMS).write_bytes((tmp_path / PARAMS).read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="is cut short"):
        weights.Weights(cuda, load_runtime(), Artifact(tmp_path, manifest))


class EagerCudart(FakeCudart):
    """Copies at once, from any thread."""

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)


def test_whole_sequences_run_on_pages_of_their_own() -> None:
    on_gpu, cuda = fake_executor(LIMITS, FakeModel(LIMITS))
    chunks = list(_chunks(np.arange(10, dtype=np.int32), 6, 3))

    def logits(*args: object) -> object:
        inputs = dict(zip(STEP_INPUTS, (array_over(a) for a in args[: len(STEP_INPUTS)]), strict=True))
        assert tuple(args[-2].shape)[1] == 3
        return on_gpu.ffi.from_dlpack(np.stack([inputs["tokens"], inputs["positions"]], 1).astype(np.float32))

    on_gpu.vm["logits"] = logits
    first, second = on_gpu.whole("logits", chunks, 3)
    assert first[:, 0].tolist() == [0, 1, 2, 3, 4, 5] and second[:, 1].tolist() == [6, 7, 8, 9]
    before = cuda.used
    on_gpu.whole("logits", chunks, 3)
    assert cuda.used == before, "memory is leaked"


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_prompts_are_embedded_between_the_steps_of_others(pooling: str) -> None:
    limits = device(pooling=pooling)
    bench, cuda = bench_on(limits, 7)
    requests = [bench.submit([i, 1], SamplingParams(max_tokens=12, seed=0)) for i in range(3)]
    requests += [bench.embed([*range(length)], SamplingParams()) for length in (1, 20, 33)]
    bench.run()
    for request in requests:
        check(request, limits)
    used = cuda.used
    bench.embed([1, 2, 3], SamplingParams())
    bench.run()
    assert cuda.used == used, "memory is leaked"


def test_a_gpu_that_hangs_while_it_embeds(monkeypatch) -> None:
    on_gpu, cuda = fake_executor(LIMITS, FakeModel(LIMITS))
    monkeypatch.setattr(executor, "_WATCHDOG_S", 0.01)
    cuda.stuck = True
    with pytest.raises(DeviceError, match="it hangs"):
        on_gpu.hidden(next(iter(_chunks(np.arange(4, dtype=np.int32), 4, 1))))
    assert cuda.abandoned


def test_bfloat16_comes_back_as_the_float32_of_its_value() -> None:
    on_gpu, cuda = fake_executor(LIMITS, FakeModel(LIMITS))
    bits = np.array([0x3F80, 0xC040], np.uint16)  # 1, -3
    value = memory.tensor(on_gpu.ffi, cuda.device_type, bits.ctypes.data, (1, 2), "bfloat16")
    assert on_gpu._download(value).tolist() == [[1, -3]]


# -- CUDA's library ----------------------------------------------------------------------------------------------------


class FakeLibrary:
    """Every call succeeds but those named, which return their code."""

    def __init__(self, **codes: int) -> None:
        for name in (*cudart._SIGNATURES, "cudaGetLastError"):
            setattr(self, name, _Call(codes.get(name, 0)))
        self.cudaGetErrorString = _Call(b"out of memory")
        self.cudaGetErrorName = _Call(b"cudaErrorMemoryAllocation")


class _Call:
    def __init__(self, result: object) -> None:
        self._result = result

    def __call__(self, *_: object) -> object:
        return self._result


def test_an_error_names_the_call_and_cudas_words() -> None:
    with pytest.raises(
        DeviceError, match=r"^cudaMalloc failed on the GPU: out of memory \(cudaErrorMemoryAllocation\)$"
    ):
        Cudart(FakeLibrary(cudaMalloc=2)).malloc(10)
    with pytest.raises(DeviceError, match="cudaEventQuery failed"):
        Cudart(FakeLibrary(cudaEventQuery=719)).reached(1)
    assert not Cudart(FakeLibrary(cudaEventQuery=600)).reached(1)
    assert Cudart(FakeLibrary()).reached(1)


def test_no_cuda_library_is_one_sentence(monkeypatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(cudart.ctypes, "CDLL", absent)
    with pytest.raises(TargetError, match=r"libcudart\.so\.13 is neither .*pip install"):
        cudart.load_cudart.__wrapped__()
