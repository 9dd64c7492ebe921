"""The gated activation as a kernel of its own, against numpy."""

import numpy as np
import pytest

from tests.kernel_runner import KernelRunner, host_target, lower
from tests.tolerances import assert_close
from tilewright.compiler.composites import GatedSpec
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cpu.gated import Gated

ROWS = (1, 3, 17)


def compile_kernel(spec: GatedSpec) -> KernelRunner:
    return KernelRunner(lower(Gated(), Call("gated", spec, None, 64)))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("features", [1536, 80, 21])
def test_matches_numpy(activation: str, features: int) -> None:
    rng = np.random.default_rng()
    run = compile_kernel(GatedSpec(features, activation))
    for rows in ROWS:
        x = rng.standard_normal((rows, 2 * features)).astype(np.float32) * 4
        gate, up = np.split(x.astype(np.float64), 2, -1)
        tanh = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
        active = gate / (1 + np.exp(-gate)) if activation == "silu" else gate * 0.5 * (1 + tanh)
        assert_close(run(x)[0], active * up)


def test_rejects_with_a_reason() -> None:
    rejected = Gated().match(Call("gated", GatedSpec(8, "relu"), None, 8), host_target())
    assert isinstance(rejected, Reject) and "'relu' is none of silu, gelu_tanh" in rejected.reason


def test_floor_counts_each_byte_once() -> None:
    facts = Gated().match(Call("gated", GatedSpec(64, "silu"), None, 1), host_target())
    assert Gated().floor(facts, host_target()).bytes_per_row == 4 * (128 + 64)
