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

import tilewright
from tilewright.compiler import env

REAL_MODEL = "smollm2-135m"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background; tested programs would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if env.CACHE_DIR in os.environ:
        yield
        return
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.CACHE_DIR, str(folder / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests compile with default tiles, whatever was measured on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.TUNING_LOGS, str(tmp_path_factory.mktemp("tuning_logs")))
        yield


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model compiled as it is stored: weights of 4-bit blocks."""
    return tilewright.compile(REAL_MODEL, output=tmp_path_factory.mktemp("smollm2") / "quantised.tw").path


@pytest.fixture(scope="session")
def smollm2_float(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model compiled to compute in float32."""
    output = tmp_path_factory.mktemp("smollm2") / "float.tw"
    return tilewright.compile(REAL_MODEL, output=output, quant="none").path


@pytest.fixture(scope="session")
def compile_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compile_tiny(checkpoint, **options of compile) -> the artifact's directory; sized for small steps by default."""

    def run(checkpoint: Path, **options: Any) -> Path:
        output = tmp_path_factory.mktemp("artifact") / f"{checkpoint.stem}.tw"
        sizes = {"max_batch": 4, "max_tokens": 64}
        return tilewright.compile(checkpoint, **{"output": output, **sizes, **options}).path

    return run
