"""A model lowered for Hopper: every operator of a step has a kernel, and kernels are written down when asked for."""

from itertools import pairwise
from pathlib import Path

import pytest
import tvm

from tests.checkpoints import make_checkpoint
from tests.test_model_cuda import SIZES
from tilewright.compiler.build import lower, weight_formats
from tilewright.compiler.codegen.by_rows import by_rows
from tilewright.compiler.describe import kernel_calls, references, split_kernels
from tilewright.compiler.frontends import load_checkpoint
from tilewright.compiler.options import Options
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.base import Deferred, KernelCall, deferred
from tilewright.schedules.order import Chooser

CHOOSE = Chooser(RECORDS["nvidia-h100"])


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def scheduled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tvm.IRModule:
    source = make_checkpoint(tmp_path_factory.mktemp("model"), request.param, **SIZES)
    return lowered(source)


def lowered(source: Path, strict: bool = False) -> tvm.IRModule:
    checkpoint = load_checkpoint(str(source))
    options = Options(RECORDS["nvidia-h100"], max_batch=16, max_tokens=128, strict=strict)
    return lower(checkpoint, weight_formats(checkpoint, options), options, lambda _: None, CHOOSE)


def test_nothing_runs_by_its_reference_body(scheduled: tvm.IRModule) -> None:
    assert references(scheduled) == ()


def test_kernels_are_written_when_asked_for(scheduled: tvm.IRModule) -> None:
    _, kernels = split_kernels(scheduled)
    waiting = {name: func for name, func in kernels.items() if "tw.call" in func.attrs}
    choices = {name for name, func in kernels.items() if by_rows(func) is not None}
    assert waiting.keys() | choices == kernels.keys()
    name, func = next(item for item in waiting.items() if item[0].startswith("rms_norm"))
    assert len(func.params) == 0
    written = CHOOSE.written(func)
    assert len(written.params) == 3  # x, weight, y
    assert str(written.attrs["global_symbol"]) == name


def test_the_number_of_tokens_picks_a_linear(scheduled: tvm.IRModule) -> None:
    """Of those that the step's choices name, each is there, and each is for more tokens than the one before."""
    _, kernels = split_kernels(scheduled)
    choices = [parts for name, func in kernels.items() if name.startswith("linear") and (parts := by_rows(func))]
    assert len(choices) >= 4
    for parts in choices:
        rows = [most for most, _ in parts]
        assert rows == sorted(set(rows)) and rows[-1] in (16, 128)
        assert all("tw.call" in kernels[name].attrs for _, name in parts if name)
    nothing = [parts for parts in choices if not parts[0][1]]
    assert len(nothing) == 2, "norms before q, k, v and before gate and up, which linears for few tokens take"


def test_a_strict_step_treats_generated_tokens_as_a_prompts(tmp_path: Path) -> None:
    """One plan and one kernel of attention in both steps, for more or fewer tokens; else prompts have theirs."""
    source = make_checkpoint(tmp_path, "llama", **SIZES)
    layers = SIZES["num_hidden_layers"]

    def attention(strict: bool) -> dict[str, dict[str, int]]:
        calls = kernel_calls(lowered(source, strict))
        steps = ("step", "step_decode")
        return {s: {n: c for n, c in calls[s].items() if n.startswith("paged_attention")} for s in steps}

    strict, usual = attention(True), attention(False)
    assert sorted(strict["step"].values()) == sorted(strict["step_decode"].values()) == [1, layers]
    assert sorted(usual["step_decode"].values()) == [1, layers]
    assert sorted(usual["step"].values()) == [1, 1, layers, layers]
    assert not usual["step_decode"].keys() & strict["step_decode"].keys()


@pytest.mark.parametrize("most", [1, 17, 256, 1000, 2048])
def test_decode_batches_of_any_size_are_padded_little(most: int) -> None:
    sizes = Options(RECORDS["nvidia-h100"], max_batch=most, max_tokens=4096).decode_buckets
    assert sizes[0] == 1 and sizes[-1] == most
    for size, following in pairwise(sizes):
        assert size < following <= size * (2 if size < 16 else 1.5 if size < 128 else 1.25)


def test_equal_keys_are_one_kernel() -> None:
    calls: list[int] = []

    @deferred
    def make(rows: int) -> int:
        calls.append(rows)
        return rows

    one, same, other = make(3), make(3), make(4)
    assert isinstance(one, Deferred)
    assert one == same != other
    assert one.content == same.content != other.content
    assert calls == []
    assert KernelCall(other, (), ()).written() == 4
    assert calls == [4]
