"""The CUDA tool chain: kernels to cubins, a program around them to one library, and, on a GPU, that library run."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue

import numpy as np
import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tests.cuda_runner import cuda_target
from tilewright.compiler.codegen import cuda_nvrtc, cuda_toolchain
from tilewright.compiler.codegen.cuda_module import compile_function
from tilewright.compiler.codegen.cuda_source import cubin
from tilewright.compiler.codegen.held_calls import hold_calls, release_calls
from tilewright.compiler.codegen.kernels import compile_kernels
from tilewright.compiler.codegen.program import build_program, link
from tilewright.compiler.describe import split_kernels
from tilewright.compiler.errors import CompileError, TargetError
from tilewright.compiler.relax_utils import bindings

PDL = ["blockIdx.x", "threadIdx.x", "tirx.use_programtic_dependent_launch"]
ROWS, COLUMNS = 5, 96


@T.prim_func
def scale(x: T.handle, w: T.handle, y: T.handle):
    """y[n, 96] = x * w, and nothing approximate about it."""
    n = T.int32()
    X = T.match_buffer(x, (n, COLUMNS), "float32")
    W = T.match_buffer(w, (COLUMNS,), "float32")
    Y = T.match_buffer(y, (n, COLUMNS), "float32")
    T.device_entry()
    row = T.cta_id([n])
    column = T.thread_id([COLUMNS])
    T.ptx["griddepcontrol.launch_dependents"]()
    T.ptx["griddepcontrol.wait"]()
    Y[row, column] = X[row, column] * W[column]


@T.prim_func
def mark(y: T.handle, done: T.handle):
    """Writes into another kernel's output: y[:, 0] = layer. Its own output is a formality."""
    n = T.int32()
    Y = T.match_buffer(y, (n, COLUMNS), "float32")
    Done = T.match_buffer(done, (1,), "int32")
    T.device_entry()
    row = T.cta_id([n])
    lane = T.thread_id([32])
    T.ptx["griddepcontrol.launch_dependents"]()
    T.ptx["griddepcontrol.wait"]()
    if lane == 0:
        Y[row, 0] = T.float32(7)
        if row == 0:
            Done[0] = 1


@I.ir_module
class Step:
    @R.function
    def step(
        x: R.Tensor(("n", COLUMNS), "float32"),
        positions: R.Tensor(("n",), "int32"),
        rows: R.Tensor(("r",), "int32"),
        w: R.Tensor((COLUMNS,), "float32"),
    ) -> R.Tuple(R.Tensor(("r", COLUMNS), "float32"), R.Tensor(("n",), "float32")):
        n = T.int64()
        R.func_attr({"num_input": 3, "tir_var_upper_bound": {"n": 64, "r": 64}})
        with R.dataflow():
            y = R.call_dps_packed("scale_1", (x, w), out_ty=R.Tensor((n, COLUMNS), "float32"))
            done = R.call_dps_packed("mark_1", (y,), out_ty=R.Tensor((1,), "int32"))  # noqa: F841
            angles = R.cos(R.multiply(R.astype(positions, "float32"), R.const(0.5, "float32")))
            wanted = R.take(y, rows, axis=0)
            result = (wanted, angles)
            R.output(result)
        return result


def scheduled() -> tvm.IRModule:
    functions = dict(Step.functions.items())
    for name, func in (("scale_1", scale), ("mark_1", mark)):
        attrs = {"global_symbol": name, "tw.kernel": "{}", "tirx.kernel_launch_params": PDL}
        functions[tvm.ir.GlobalVar(name)] = func.with_attrs(attrs)
    return tvm.IRModule(functions, Step.attrs)


def compile_to(folder: Path, cache: Path) -> tuple[Path, list[tuple[str, bool]]]:
    """The library of the tiny program, and which of its kernels were in the cache."""
    said: list[tuple[str, bool]] = []
    program, kernels = split_kernels(scheduled())
    objects = compile_kernels(kernels, cuda_target(), cache, 2, lambda *state: said.append(state))
    executable, workspace = build_program(program, cuda_target())
    assert workspace["step"] > 0
    library = folder / "model.so"
    link(executable, objects.values(), library)
    return library, said


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    library, said = compile_to(tmp_path_factory.mktemp("model"), cache)
    assert sorted(said) == [("mark_1", False), ("scale_1", False)]
    return library


def test_equal_input_gives_equal_bytes(library: Path, cache: Path, tmp_path: Path) -> None:
    again, said = compile_to(tmp_path, cache)
    assert sorted(said) == [("mark_1", True), ("scale_1", True)]
    assert again.read_bytes() == library.read_bytes()
    fresh, said = compile_to(tmp_path, tmp_path / "cache")
    assert [cached for _, cached in said] == [False, False]
    assert fresh.read_bytes() == library.read_bytes()


def test_the_library_holds_cubins_and_no_source(library: Path, cache: Path) -> None:
    content = library.read_bytes()
    parts = [part.read_bytes() for part in cache.glob("*.cuda")]
    assert len(parts) == 2
    assert all(part in content for part in parts)
    # The library itself, the kernels, and one cubin of all plain operators.
    assert content.count(b"\x7fELF\x02\x01\x01") == 1 + 2 + 1
    assert content.count(b"-arch sm_90a") == 3
    assert b".target sm_90a" not in content  # PTX, which a driver would compile at load
    assert b"__global__" not in content


def test_a_call_that_writes_into_what_it_is_given_is_kept() -> None:
    program, _ = split_kernels(scheduled())
    executable, _ = build_program(program, cuda_target())
    assert "mark_1" in executable.as_text()


def test_calls_are_held_and_released() -> None:
    """One call is used, one not, one gives two results of which none is used."""

    @I.ir_module
    class Calls:
        @R.function
        def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
            with R.dataflow():
                used = R.call_dps_packed("used", (x,), out_ty=R.Tensor((4,), "float32"))
                one = R.call_dps_packed("one", (used,), out_ty=R.Tensor((1,), "int32"))  # noqa: F841
                two = R.call_dps_packed("two", (used,), out_ty=[R.Tensor((1,), "int32"), R.Tensor((2,), "int32")])
                part = two[0]  # noqa: F841
                R.output(used)
            return used

    held = hold_calls(Calls)
    assert str(held["main"].ret_ty).count("Tensor") == 4
    dead = tvm.relax.transform.DeadCodeElimination()
    kept = release_calls(dead(held))
    assert [str(b.value.args[0].global_symbol) for b in bindings(kept["main"])] == ["used", "one", "two"]
    tvm.ir.assert_structural_equal(kept["main"].ret_ty, Calls["main"].ret_ty)
    assert [str(b.value.args[0].global_symbol) for b in bindings(dead(Calls)["main"])] == ["used"]
    tvm.ir.assert_structural_equal(hold_calls(kept), hold_calls(release_calls(hold_calls(kept))))


def test_the_library_loads_without_the_compiler(library: Path) -> None:
    result = subprocess.run([sys.executable, "-c", LOAD, str(library)], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "loaded", result.stderr


# As the runtime does it, but for a stub where there is no driver.
LOAD = """
import ctypes, importlib.util, pathlib, sys
from tilewright.compiler.codegen import cuda_toolchain
from tilewright.runtime.library import load_runtime
ffi = load_runtime()
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    ctypes.CDLL(str(cuda_toolchain._driver_stub()))
ctypes.CDLL(str(cuda_toolchain.find_toolchain().cudart))
folder = pathlib.Path(importlib.util.find_spec("tvm").origin).parent / "lib"
ctypes.CDLL(str(folder / "libtvm_runtime_cuda.so"))
machine = ffi.load_module(sys.argv[1])["vm_load_executable"]()
assert machine["vm_initialization"] is not None
assert "tvm" not in sys.modules
print("loaded")
"""


def test_kernels_are_compiled_for_their_architecture() -> None:
    kernel = compile_function(scale.with_attr("tirx.kernel_launch_params", PDL), "scale", cuda_target())
    assert kernel.cubin.startswith(b"\x7fELF")
    assert b"-arch sm_90a" in kernel.cubin
    assert PDL[-1].encode() in kernel.device


def test_both_kinds_of_functions_compile() -> None:
    @T.prim_func(s_tir=True)
    def double(x: T.Buffer((256,), "float32"), y: T.Buffer((256,), "float32")):
        T.func_attr({"tirx.is_scheduled": True})
        for block in T.thread_binding(2, thread="blockIdx.x"):
            for thread in T.thread_binding(128, thread="threadIdx.x"):
                y[block * 128 + thread] = x[block * 128 + thread] * T.float32(2)

    assert compile_function(double, "double", cuda_target()).cubin


def test_sources_are_compiled_by_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_nvrtc, "_idle", LifoQueue())
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda i: cubin(EMPTY.replace("f", f"f{i}"), "sm_90a"), range(4)))
    assert [f"f{i}".encode() in code for i, code in enumerate(cubins)] == [True] * 4
    workers = [cuda_nvrtc._idle.get_nowait() for _ in range(cuda_nvrtc._idle.qsize())]
    assert 1 <= len(workers) <= 2
    for worker in workers:
        worker.close()


EMPTY = 'extern "C" __global__ void f() {}'


def test_source_that_does_not_compile() -> None:
    with pytest.raises(CompileError, match=r"NVRTC could not compile a kernel: .*error: identifier \"y\" is undefined"):
        cubin('extern "C" __global__ void f(float* x) { *x = y; }', "sm_90a")


def test_an_error_of_nvrtc_comes_out_of_tvm_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise TargetError("no compiler")

    monkeypatch.setattr("tilewright.compiler.codegen.cuda_module.cubin", refuse)
    with pytest.raises(TargetError, match="no compiler"):
        compile_function(scale, "scale", cuda_target())


def test_a_compiling_process_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_nvrtc, "_idle", LifoQueue())
    cubin(EMPTY, "sm_90a")
    worker = cuda_nvrtc._idle.get_nowait()
    worker.close()
    cuda_nvrtc._idle.put(worker)
    with pytest.raises(CompileError, match="the process that compiles kernels ended with status 0"):
        cubin(EMPTY, "sm_90a")
    assert cubin(EMPTY, "sm_90a")  # by another one


def test_a_lacking_wheel_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("lib/libnvrtc.so.13", "lib/libcudart.so.13", "include/cuda_runtime.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(cuda_toolchain, "_wheel_roots", lambda: [tmp_path])
    monkeypatch.setattr(cuda_toolchain, "TOOLKIT", tmp_path / "none")
    with pytest.raises(
        TargetError, match=r"by nvidia-cuda-crt of CUDA 13, not found; pip install 'tilewright\[cuda\]'"
    ):
        cuda_toolchain.find_toolchain.__wrapped__()


@pytest.mark.gpu
def test_the_library_runs_and_is_captured(library: Path) -> None:
    import torch
    import tvm_ffi

    machine = tvm_ffi.load_module(str(library))["vm_load_executable"]()
    gpu, cpu, pooled = 2, 1, 2
    machine["vm_initialization"](gpu, 0, pooled, cpu, 0, pooled)
    seed = int(np.random.default_rng().integers(2**31))
    print(f"{seed=}")
    rng = np.random.default_rng(seed)
    w = torch.from_numpy(rng.standard_normal(COLUMNS, np.float32)).cuda()
    x = torch.empty(ROWS, COLUMNS, device="cuda")
    positions, rows = torch.arange(ROWS, dtype=torch.int32).cuda(), torch.tensor([3, 0], dtype=torch.int32).cuda()
    given = [tvm_ffi.from_dlpack(t) for t in (x, positions, rows)]
    weights = (tvm_ffi.from_dlpack(w),)

    def step() -> list[torch.Tensor]:
        return [torch.from_dlpack(part) for part in machine["step"](*given, weights)]

    def check(outputs: list[torch.Tensor]) -> None:
        expected = (x * w).cpu().numpy()
        expected[:, 0] = 7
        assert np.array_equal(outputs[0].cpu().numpy(), expected[[3, 0]])
        np.testing.assert_allclose(outputs[1].cpu().numpy(), np.cos(np.arange(ROWS) * 0.5), rtol=1e-6, atol=1e-6)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), tvm_ffi.use_torch_stream():
        for _ in range(3):
            x.normal_()
            outputs = step()
            stream.synchronize()
            check(outputs)
        del outputs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            outputs = step()
        for _ in range(2):
            x.normal_()
            graph.replay()
            stream.synchronize()
            check(outputs)
