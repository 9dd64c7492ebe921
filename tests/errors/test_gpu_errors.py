"""What can be wrong with a GPU, or with the machine around it: one sentence each, exit code 2; no GPU is needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli_runner import make_runner
from tests.fake_model import fake_artifact
from tests.runtime.fake_cuda import FakeCudart
from tilewright import load
from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import cuda, host
from tilewright.runtime.cuda import cudart, executor
from tilewright.runtime.library import load_runtime
from tilewright.runtime.types import DeviceError

H100 = cuda.Device("NVIDIA H100 80GB HBM3", (9, 0), 132)
A100 = cuda.Device("NVIDIA A100-SXM4-80GB", (8, 0), 108)
B200 = cuda.Device("NVIDIA B200", (10, 0), 148)
TARGET = {"name": "nvidia-h100", "kind": "cuda", "arch": "sm_90a", "features": ["tma", "wgmma", "pdl", "fp8"]}
GB = 10**9


@pytest.fixture
def refused(capsys, monkeypatch) -> Callable[..., str]:
    """refused(artifact, **of the manifest's target) -> what `generate` says of it."""
    run = make_runner(capsys, monkeypatch)

    def check(artifact: Path) -> str:
        code, out, err = run("generate", str(artifact), "--prompt", "x")
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return check


@pytest.fixture
def artifact(tmp_path: Path) -> Callable[..., Path]:
    """artifact(**of the target) -> one for a GPU whose step takes 4 GB, and each of whose pages a megabyte."""

    def make(**changes: Any) -> Path:
        memory = {"weights_bytes": 0, "workspace_bytes": 4 * GB, "page_bytes": 10**6}
        limits = {"max_batch": 64, "max_tokens": 512, "max_context": 4096, "page_size": 16}
        return fake_artifact(tmp_path / "m.tw", target=TARGET | changes, memory=memory, limits=limits).path

    return make


@pytest.fixture
def gpu(monkeypatch) -> Callable[..., FakeCudart]:
    """gpu(total, held) -> a GPU of so many bytes, of which others hold some."""

    def become(total: int, held: int = 0) -> FakeCudart:
        monkeypatch.setattr(cuda, "find_driver", lambda: cuda.Driver((13, 0), (H100,)))
        fake = FakeCudart(total=total)
        fake.used = held
        monkeypatch.setattr(executor, "load_cudart", lambda: fake)
        monkeypatch.setattr(executor, "load_cuda_runtime", load_runtime)
        return fake

    return become


@pytest.mark.parametrize(
    ("driver", "sentence"),
    [
        (None, "this machine has no NVIDIA driver; install release 580 or newer, or compile the model for cpu"),
        (
            cuda.Driver((13, 0), ()),
            "this machine has no NVIDIA GPU, or hides it; "
            "set CUDA_VISIBLE_DEVICES to show it, or compile the model for cpu",
        ),
        (
            cuda.Driver((13, 0), (), 803),
            "the NVIDIA driver here does not start (error 803 of cuInit); "
            "restart the machine, or install release 580 or newer",
        ),
        (
            cuda.Driver((12, 9), (H100,)),
            "the NVIDIA driver here serves CUDA 12.9 and not 13.0; install release 580 or newer",
        ),
        (
            cuda.Driver((13, 0), (A100,)),
            "the GPU here, NVIDIA A100-SXM4-80GB, is sm_80, and nvidia-h100 is sm_90; "
            "compile the model for nvidia-a100",
        ),
        (
            cuda.Driver((13, 0), (B200,)),
            "the GPU here, NVIDIA B200, is sm_100, and nvidia-h100 is sm_90; compile the model for cpu",
        ),
    ],
    ids=["no_driver", "no_gpu", "dead_driver", "old_driver", "older_gpu", "newer_gpu"],
)
def test_a_machine_that_cannot_run_it(refused, artifact, monkeypatch, driver, sentence: str) -> None:
    monkeypatch.setattr(cuda, "find_driver", lambda: driver)
    path = artifact()
    assert refused(path) == f"{path} is for nvidia-h100 and can't run here: {sentence}"


def test_host_code_for_another_processor(refused, artifact, gpu) -> None:
    """Said before the library is loaded, which the system would refuse in words of its own."""
    gpu(80 * GB)
    path = artifact(host="aarch64" if host.arch() == "x86_64" else "x86_64")
    said = refused(path)
    assert said.startswith(f"{path} has host code for ") and f"and this machine is {host.arch()}; compile" in said


def test_no_cuda_library(refused, artifact, gpu, monkeypatch) -> None:
    gpu(80 * GB)
    monkeypatch.setattr(executor, "load_cudart", cudart.load_cudart.__wrapped__)

    def absent(*_: object, **__: object) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(cudart.ctypes, "CDLL", absent)
    assert refused(artifact()) == (
        "CUDA's runtime library libcudart.so.13 is neither installed with pip nor known to the system; "
        "pip install 'tilewright[cuda]'"
    )


def test_a_gpu_that_is_too_small(refused, artifact, gpu) -> None:
    gpu(4 * GB)
    assert refused(artifact()) == (
        "alphabet needs 4.00 GB of GPU memory (0.00 GB weights, the rest for a step and one page of KV cache) and "
        "3.60 GB of 4.00 GB are free for it; end what else runs there, take a larger GPU, or compile the model with "
        "smaller --max-tokens"
    )


def test_a_gpu_that_others_fill(refused, artifact, gpu) -> None:
    gpu(80 * GB, held=70 * GB)
    assert (
        "2.00 GB of 80.00 GB are free for it, since 70.00 GB are held by other processes and CUDA itself; end what else"
    ) in refused(artifact())


def test_a_pool_that_does_not_fit(artifact, gpu) -> None:
    """What fits: pages, tokens, sequences and their length."""
    gpu(8 * GB, held=2 * GB)
    with pytest.raises(TargetError) as raised:
        load(artifact(), kv_tokens=64 * 4096)
    assert str(raised.value) == (
        "262144 KV tokens need 16.38 GB of GPU memory and 1.76 GB are left beside 4.00 GB for weights and a step, "
        "since 2.00 GB are held by other processes and CUDA itself; 1760 pages of 16 tokens fit, 28160 tokens in all, "
        "such as 6 sequences of 4096"
    )


@pytest.mark.parametrize("name", ["memory", "malloc"])
def test_a_gpu_that_refuses_while_it_is_loaded(refused, artifact, gpu, monkeypatch, name: str) -> None:
    """Such as one that another process has for itself, or fills meanwhile."""
    fake = gpu(80 * GB)
    path = artifact()

    def refuse(*_: object) -> None:
        raise DeviceError("cudaMalloc failed on the GPU: out of memory (cudaErrorMemoryAllocation)")

    monkeypatch.setattr(executor, "Weights", lambda cuda, *_: cuda.malloc(10))
    monkeypatch.setattr(fake, name, refuse)
    monkeypatch.setattr(executor, "load_cuda_runtime", lambda: _Library())
    assert refused(path) == (
        f"{path} can't be loaded: cudaMalloc failed on the GPU: out of memory (cudaErrorMemoryAllocation); "
        "nvidia-smi shows the GPU's state and what else uses it"
    )


class _Library:
    """tvm_ffi, as far as loading needs it before the weights."""

    def load_module(self, path: str) -> Any:
        return {"vm_load_executable": lambda: {"vm_initialization": lambda *_: None}}


@pytest.mark.parametrize("name", ["nvidia-b200", "nvidia-rtx-5090", "NVIDIA-GB200", "sm_100a", "sm_120"])
def test_blackwell_is_refused(capsys, monkeypatch, name: str) -> None:
    code, out, err = make_runner(capsys, monkeypatch)("compile", "x", "--target", name)
    assert (code, out) == (2, "")
    assert err == (
        f"error: the GPU {name} (Blackwell) is newer than what this version has kernels for; "
        "the supported ones are nvidia-h100, nvidia-h200, nvidia-a100, nvidia-l40s, nvidia-rtx-4090\n"
    )
