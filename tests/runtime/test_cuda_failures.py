"""A GPU that fails or hangs in mid-step: every caller is told why, nobody waits for ever, and the process says so."""

import asyncio
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cli_runner import make_runner
from tests.fake_model import FakeStream, fake_artifact
from tests.runtime.fake import LIMITS, FakeModel
from tests.runtime.fake_cuda import FakeCudart, fake_executor
from tests.runtime.test_cuda_device import Served
from tilewright.runtime import model as runtime_model
from tilewright.runtime.cuda import executor
from tilewright.runtime.engine import Engine
from tilewright.runtime.types import DeviceError, EngineError, SamplingParams

PARAMS = SamplingParams(max_tokens=40, ignore_eos=True, seed=0)
SOON_S = 5.0

Break = Callable[[Any, FakeCudart], None]


def fail(words: str) -> Callable[..., Any]:
    def call(*_: object) -> None:
        raise DeviceError(f"{words} failed on the GPU: an illegal memory access was encountered")

    return call


def failing(name: str, call: str) -> Break:
    """Breaks one of CUDA's calls."""
    return lambda on_gpu, cuda: setattr(cuda, name, fail(call))


def failing_launches(on_gpu: Any, cuda: FakeCudart) -> None:
    """Breaks graphs, and steps that are none."""
    cuda.launch = fail("cudaGraphLaunch")  # type: ignore[method-assign]
    for function in on_gpu._functions:
        on_gpu._functions[function] = cuda.launch


def failing_step(on_gpu: Any, cuda: FakeCudart) -> None:
    """Breaks the compiled step, as a launch that TVM makes would fail."""

    def step(*_: object) -> None:
        raise RuntimeError("CUDALaunch Error: CUDA_ERROR_ILLEGAL_ADDRESS")

    cuda.launch = step  # type: ignore[method-assign]
    for function in on_gpu._functions:
        on_gpu._functions[function] = step


def hanging(on_gpu: Any, cuda: FakeCudart) -> None:
    cuda.stuck = True


FAILURES = {
    "launch": (failing_launches, "cudaGraphLaunch failed on the GPU: an illegal memory access"),
    "copy": (failing("copy", "cudaMemcpyAsync"), "cudaMemcpyAsync failed on the GPU"),
    "record": (failing("record", "cudaEventRecord"), "cudaEventRecord failed on the GPU"),
    "wait": (failing("reached", "cudaEventQuery"), "cudaEventQuery failed on the GPU"),
    "step": (failing_step, "CUDA_ERROR_ILLEGAL_ADDRESS"),
    "hang": (hanging, r"the GPU has not finished a step in 0\.2 seconds; it hangs"),
}


@pytest.fixture(params=FAILURES)
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, Any, str]]:
    """(engine, breaks its GPU, the reason that callers get)"""
    monkeypatch.setattr(executor, "_WATCHDOG_S", 0.2)
    break_it, reason = FAILURES[request.param]
    on_gpu, cuda = fake_executor(LIMITS, FakeModel(LIMITS))
    engine = Engine(Served(on_gpu))
    yield engine, lambda: break_it(on_gpu, cuda), reason
    within(engine.close)
    assert cuda.abandoned == (request.param == "hang"), "memory that CUDA would wait with is not given back"


def within(run: Callable[[], Any]) -> None:
    """Runs it in a thread of its own, and fails where it does not end soon."""
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SOON_S)
    assert not thread.is_alive(), "it waits for ever"


class Caller:
    """A call that has to end with EngineError, in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.error: BaseException | None = None

        def run() -> None:
            try:
                call()
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def told(self, reason: str) -> None:
        self._thread.join(SOON_S)
        assert not self._thread.is_alive(), "the caller waits for ever"
        assert isinstance(self.error, EngineError)
        with pytest.raises(EngineError, match=f"^the engine is dead: .*{reason}"):
            raise self.error


async def drain(engine: Engine, prompt: list[int]) -> None:
    async for _ in engine.stream(prompt, PARAMS):
        pass


def test_every_caller_is_told_why(broken) -> None:
    """Those that run, those that wait, in every form, and those that come later."""
    engine, break_it, reason = broken
    assert engine.generate([[1, 2]], SamplingParams(max_tokens=5, ignore_eos=True))[0].finish_reason == "length"
    break_it()
    calls: list[Callable[[], Any]] = [
        lambda: engine.generate([[1, 2]] * 12, PARAMS),
        lambda: asyncio.run(drain(engine, [3])),
        lambda: list(engine.stream_sync([5, 6, 7], PARAMS)),
    ]
    callers = [Caller(call) for call in calls * 2]
    for caller in callers:
        caller.told(reason)
    assert engine.failure is not None
    with pytest.raises(EngineError, match=reason):
        engine.generate([[1]], PARAMS)


def test_a_stream_that_has_begun_ends_with_the_reason(broken) -> None:
    engine, break_it, reason = broken
    events = engine.stream_sync([4, 5], PARAMS)
    assert next(events).token_id is not None
    break_it()
    Caller(lambda: list(events)).told(reason)


def test_the_command_ends_with_one_sentence(broken, capsys, monkeypatch, tmp_path) -> None:
    """And a code that is neither success nor the caller's mistake."""
    engine, break_it, reason = broken
    path = fake_artifact(tmp_path / "m.tw").path
    served = _Spoken(engine._core.executor.executor)
    monkeypatch.setattr(runtime_model, "load", lambda path, threads: served)
    break_it()
    run = make_runner(capsys, monkeypatch)
    start = time.monotonic()
    code, _, err = run("generate", str(path), "--prompt", "x", "--raw")
    assert time.monotonic() - start < SOON_S
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: ")
    assert re.search(reason, err)
    if "ILLEGAL_ADDRESS" not in reason:  # CUDA's words; TVM's are taken for a bug
        assert err.startswith("error: the engine is dead: ")
        assert err.endswith("; nvidia-smi shows its state, and the kernel's log why\n")


class _Spoken(Served):
    """A served model that reads any text."""

    class tokenizer:
        stop_token_ids = ()
        encode = staticmethod(lambda text: [ord(c) % LIMITS.vocab_size for c in text])
        detokenizer = FakeStream


def test_a_process_that_has_abandoned_its_gpu_ends_at_once() -> None:
    """With its own status and all that it printed, though an earlier handler of exit(), as CUDA's, would wait."""
    script = """
import ctypes, sys
from tests.runtime.test_cuda_executor import FakeLibrary
from tilewright.runtime.cuda.cudart import Cudart
libc = ctypes.CDLL(None)
libc.on_exit(libc.pause, None)
cuda = Cudart(FakeLibrary())
cuda.abandon()
cuda.abandon()
print("said")
sys.exit(7)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (7, "said\n")
