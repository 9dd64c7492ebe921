"""What several files share: compiled artifacts of the real model, and a quick way to compile tiny checkpoints.

Kernels are cached in a directory of the run's own, which xdist's workers share, so that a run neither finds nor leaves
anything on the machine; set TILEWRIGHT_CACHE_DIR to keep them between runs. No tuning records are read.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import tilewright
from tilewright.compiler import env

REAL_MODEL = "smollm2-135m"

LONGEST = (
    "test_real_weights.py",
    "test_soak.py",
    "test_cuda_artifact.py",
    "test_end_to_end_cli.py",
    "test_compiled_parity.py",
    "test_artifact.py",
    "test_linear_block.py",
    "test_parity.py",
    "test_apply_schedules.py",
    "test_linear_mma.py",
    "test_operators.py",
    "test_killed_sweep.py",
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background; tested programs would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: a worker that began one last would work on it alone."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run's, one for all of xdist's workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(shared_folder: Path) -> Iterator[None]:
    if env.CACHE_DIR in os.environ:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.CACHE_DIR, str(shared_folder / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests compile with default tiles, whatever was measured on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.TUNING_LOGS, str(tmp_path_factory.mktemp("tuning_logs")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cores() -> Iterator[None]:
    """A model computes with this worker's share of the cores: threads that wait for each other on cores that another
    worker keeps busy take many times as long."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    with pytest.MonkeyPatch.context() as patch:
        if workers > 1 and env.THREADS not in os.environ:
            patch.setenv(env.THREADS, str(max(1, len(os.sched_getaffinity(0)) // workers)))
        yield


@pytest.fixture(scope="session")
def smollm2(shared_folder: Path) -> Path:
    """The real model compiled as it is stored: weights of 4-bit blocks."""
    return _compiled_once(shared_folder / "quantised.tw")


@pytest.fixture(scope="session")
def smollm2_float(shared_folder: Path) -> Path:
    """The real model compiled to compute in float32."""
    return _compiled_once(shared_folder / "float.tw", quant="none")


def _compiled_once(output: Path, **options: Any) -> Path:
    """By the first of xdist's workers that asks for it; the others wait."""
    with FileLock(output.with_suffix(".lock")):
        if not output.exists():
            tilewright.compile(REAL_MODEL, output=output, **options)
    return output


@pytest.fixture(scope="session")
def compile_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compile_tiny(checkpoint, **options of compile) -> the artifact's directory; sized for small steps by default."""

    def run(checkpoint: Path, **options: Any) -> Path:
        output = tmp_path_factory.mktemp("artifact") / f"{checkpoint.stem}.tw"
        sizes = {"max_batch": 4, "max_tokens": 64}
        return tilewright.compile(checkpoint, **{"output": output, **sizes, **options}).path

    return run
