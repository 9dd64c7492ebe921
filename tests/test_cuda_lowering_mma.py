"""A model lowered for GPUs older than Hopper: every operator of a step has a kernel there too."""

import json
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.test_model_cuda import SIZES
from tilewright.compiler.build import lower, weight_formats
from tilewright.compiler.describe import references, split_kernels
from tilewright.compiler.frontends import load_checkpoint
from tilewright.compiler.options import Options
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.order import Chooser


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", **SIZES)


@pytest.mark.parametrize("name", ["nvidia-a100", "nvidia-rtx-4090"])
def test_nothing_runs_by_its_reference_body(source: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    target = RECORDS[name]
    checkpoint = load_checkpoint(str(source))
    options = Options(target, max_batch=16, max_tokens=128)
    scheduled = lower(checkpoint, weight_formats(checkpoint, options), options, lambda _: None, Chooser(target))
    assert references(scheduled) == ()
    assert "reference body" not in caplog.text
    _, kernels = split_kernels(scheduled)
    assert {"linear_mma", "paged_attention_mma"} <= {
        json.loads(str(func.attrs["tw.kernel"]))["schedule"] for func in kernels.values()
    }
