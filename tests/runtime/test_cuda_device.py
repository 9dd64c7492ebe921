"""The GPU's executor on a real GPU, with a program that is as small as can be; and that program on this processor."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tvm.script import tirx as T

from tests.runtime.test_cuda_executor import EagerCudart
from tests.runtime.toy_program import LIMITS, answer, toy_artifact
from tilewright.runtime.cuda.executor import CudaExecutor
from tilewright.runtime.cuda.weights import Weights
from tilewright.runtime.engine import Engine
from tilewright.runtime.library import load_runtime
from tilewright.runtime.types import DeviceError, SamplingParams


class Served:
    """An executor as an engine takes it."""

    tokenizer, load_s = None, 0.0

    def __init__(self, executor: CudaExecutor) -> None:
        self.executor = executor

    def __getattr__(self, name: str) -> object:
        return getattr(self.executor, name)


def check_answers(executor: CudaExecutor, rounds: int = 1) -> None:
    rng = np.random.default_rng()
    with Engine(Served(executor)) as engine:
        for _ in range(rounds):
            prompts = [rng.integers(0, LIMITS.vocab_size, n).tolist() for n in (1, 3, 20, 33, 7, 64, 2)]
            params = [SamplingParams(temperature=0, max_tokens=5 + 6 * i, logprobs=i % 3 or None) for i in range(7)]
            found = engine.generate(prompts, params)
            for prompt, completion in zip(prompts, found, strict=True):
                assert list(completion.token_ids) == answer(prompt, len(completion.token_ids))
                for token, logprob in zip(completion.token_ids, completion.logprobs or (), strict=False):
                    assert logprob.logprob == -token and all(top == (token, -token) for top in logprob.top)
        engine.check_invariants()


def test_the_program_is_what_it_says(tmp_path: Path) -> None:
    import tvm

    artifact = toy_artifact(tmp_path / "toy.tw", tvm.target.Target("llvm"), statics=())
    cuda, ffi = EagerCudart(), load_runtime()
    vm = ffi.load_module(str(tmp_path / "toy.tw" / "model.so"))["vm_load_executable"]()
    vm["vm_initialization"](1, 0, 2)
    weights = Weights(cuda, ffi, artifact)
    executor = CudaExecutor(artifact.manifest, cuda, ffi, vm, weights, LIMITS.num_pages, 16)
    check_answers(executor)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> CudaExecutor:
    import tvm

    path = tmp_path_factory.mktemp("toy") / "toy.tw"
    return CudaExecutor.open(
        toy_artifact(path, tvm.target.Target({"kind": "cuda", "arch": "sm_90"}, host="llvm")), 1024
    )


@pytest.mark.gpu
def test_graphs_feeds_and_results_on_a_gpu(on_gpu: CudaExecutor) -> None:
    check_answers(on_gpu, rounds=3)
    assert set(on_gpu._graphs) >= {"step_1 of 1", "step_4 of 4"}


@pytest.mark.gpu
def test_pages_move_on_a_gpu(on_gpu: CudaExecutor) -> None:
    """Saved, restored elsewhere, and copied, by strides and by layers."""
    cuda, pages, rng = on_gpu.cuda, on_gpu._pages, np.random.default_rng()
    fresh = rng.standard_normal(tuple(pages.tensor.shape)).astype(np.float32)
    cuda.copy(pages.tensor.data_ptr(), fresh.ctypes.data, fresh.nbytes, on_gpu.stream)
    cuda.synchronize(on_gpu.stream)
    for pitch in (cuda.max_pitch, 16):
        cuda.max_pitch = pitch
        handle = on_gpu.swap.out([3, 5])
        on_gpu.swap.back(handle, [9, 8])
        on_gpu.copy_pages([(1, 2), (3, 4)])
        for source, target in ((3, 9), (5, 8), (1, 2), (3, 4)):
            fresh[:, target] = fresh[:, source]
        assert (on_gpu._download(pages.tensor) == fresh).all()
        fresh[:, 9] = fresh[:, 8] = 0
        cuda.copy(pages.tensor.data_ptr(), fresh.ctypes.data, fresh.nbytes, on_gpu.stream)
    del cuda.max_pitch


@pytest.mark.gpu
def test_cuda_refuses_in_its_own_words(on_gpu: CudaExecutor) -> None:
    with pytest.raises(DeviceError, match="cudaMalloc failed on the GPU: out of memory"):
        on_gpu.cuda.malloc(1 << 50)
    check_answers(on_gpu)


# A kernel that keeps the GPU busy for about 25 s, before a step that has a second; then the process ends by itself.
HANG = """
import sys, time
from pathlib import Path
from tests.runtime.test_cuda_device import Served, spin
from tilewright import Engine, SamplingParams, load
from tilewright.compiler import env
from tilewright.compiler.codegen.kernels import compile_kernels, read_kernel
from tilewright.compiler.targets import resolve_target
from tilewright.measure_gpu import load_function
from tilewright.runtime.cuda import executor as module
from tilewright.runtime.cuda.memory import DeviceMemory, tensor

module._WATCHDOG_S = 1.0
model = load({path!r}, kv_tokens=1024)
executor = model.executor
[file] = compile_kernels({{"spin": spin}}, resolve_target("cuda"), env.cache_dir() / "kernels", 1).values()
function = load_function("spin", read_kernel(file), Path({folder!r}))
memory = DeviceMemory(executor.cuda, 128)
numbers = tensor(executor.ffi, executor.cuda.device_type, memory.address, (32,), "float32")
params = SamplingParams(max_tokens=4, ignore_eos=True)
with Engine(model) as engine:
    engine.generate([[5]], params)
    with executor._on_stream:
        function(numbers, 11 * 10**9)
    start = time.monotonic()
    try:
        engine.generate([[5]], params)
    except Exception as error:
        print(f"{{time.monotonic() - start:.1f}} s: {{error}}")
del engine, model, executor, memory, numbers
print(time.monotonic())
sys.exit(3)
"""


@T.prim_func
def spin(y_ptr: T.handle, turns: T.int64):
    T.func_attr({"global_symbol": "spin"})
    y = T.match_buffer(y_ptr, (32,), "float32")
    T.device_entry()
    block = T.cta_id([1])  # noqa: F841
    thread = T.thread_id([32])
    number = T.alloc_local([1], "float32")
    number[0] = y[thread]
    for _ in T.serial(turns):
        number[0] = number[0] * T.float32(0.999) + T.float32(0.5)
    y[thread] = number[0]


@pytest.mark.gpu
def test_a_process_whose_gpu_hangs_ends(tmp_path: Path) -> None:
    """The callers are told by the watchdog; neither what is dropped nor the end of the process waits for the GPU."""
    import tvm

    path = tmp_path / "toy.tw"
    toy_artifact(path, tvm.target.Target({"kind": "cuda", "arch": "sm_90"}, host="llvm"))
    script = HANG.format(path=str(path), folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    end_s = time.monotonic()
    assert result.returncode == 3, result.stderr
    said, dropped_s = result.stdout.splitlines()[-2:]
    assert said.startswith("1.") and "has not finished a step in 1 seconds; it hangs" in said
    assert end_s - float(dropped_s) < 8, "the process waits for the GPU"
