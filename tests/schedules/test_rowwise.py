"""rms_norm, gated and rope as kernels of their own, against numpy."""

import numpy as np
import pytest

from tests.kernel_runner import KernelRunner, host_target, lower
from tests.tolerances import assert_close
from tilewright.compiler.composites import GatedSpec, NormSpec, RopeSpec
from tilewright.schedules.base import Call, Reject, Schedule
from tilewright.schedules.cpu.gated import Gated
from tilewright.schedules.cpu.rms_norm import RMSNorm
from tilewright.schedules.cpu.rope import Rope
from tilewright.schedules.cpu.rowwise import RowTile

ROWS = (1, 3, 17)


def compile_kernel(schedule: Schedule, spec: object) -> KernelRunner:
    return KernelRunner(lower(schedule, Call(schedule.composite, spec, None, 64)))


@pytest.mark.parametrize("features", [576, 80, 37, 5])
def test_rms_norm(features: int) -> None:
    rng = np.random.default_rng()
    run = compile_kernel(RMSNorm(), NormSpec(features, 1e-5))
    weight = rng.standard_normal(features).astype(np.float32)
    for rows in ROWS:
        x = rng.standard_normal((rows, features)).astype(np.float32) * 3
        wide = x.astype(np.float64)
        expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
        assert_close(run(x, weight)[0], expected)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("features", [1536, 80, 21])
def test_gated(activation: str, features: int) -> None:
    rng = np.random.default_rng()
    run = compile_kernel(Gated(), GatedSpec(features, activation))
    for rows in ROWS:
        x = rng.standard_normal((rows, 2 * features)).astype(np.float32) * 4
        gate, up = np.split(x.astype(np.float64), 2, -1)
        tanh = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
        active = gate / (1 + np.exp(-gate)) if activation == "silu" else gate * 0.5 * (1 + tanh)
        assert_close(run(x)[0], active * up)


@pytest.mark.parametrize("heads, dim", [(9, 64), (3, 80), (2, 48), (1, 8), (2, 256)])
def test_rope(heads: int, dim: int) -> None:
    rng = np.random.default_rng()
    run = compile_kernel(Rope(), RopeSpec(heads, dim))
    for rows in ROWS:
        x = rng.standard_normal((rows, heads, dim)).astype(np.float32)
        angle = rng.uniform(0, 1000, (rows, dim // 2))
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = np.split(x.astype(np.float64), 2, -1)
        c, s = cos[:, None], sin[:, None]
        assert_close(run(x, cos, sin)[0], np.concatenate([a * c - b * s, b * c + a * s], -1))


def test_rows_do_not_depend_on_their_number() -> None:
    rng = np.random.default_rng()
    run = compile_kernel(RMSNorm(), NormSpec(40, 1e-6))
    x, weight = rng.standard_normal((9, 40)).astype(np.float32), np.ones(40, np.float32)
    (whole,) = run(x, weight)
    for row in range(9):
        np.testing.assert_array_equal(run(x[row : row + 1].copy(), weight)[0], whole[row : row + 1])


def test_rejects_with_a_reason() -> None:
    rejected = Rope().match(Call("rope", RopeSpec(2, 20), None, 8), host_target())
    assert isinstance(rejected, Reject) and "head size 20" in rejected.reason
    rejected = Gated().match(Call("gated", GatedSpec(8, "relu"), None, 8), host_target())
    assert isinstance(rejected, Reject) and "'relu' is none of silu, gelu_tanh" in rejected.reason


def test_tile_checks_itself() -> None:
    with pytest.raises(ValueError, match="few_rows -1 is negative"):
        RowTile(-1)


def test_floors_count_each_byte_once() -> None:
    target = host_target()
    norm = RMSNorm().floor(RMSNorm().match(Call("rms_norm", NormSpec(64, 1e-5), None, 1), target), target)
    assert (norm.bytes_fixed, norm.bytes_per_row) == (256, 512)
    gated = Gated().floor(Gated().match(Call("gated", GatedSpec(64, "silu"), None, 1), target), target)
    assert gated.bytes_per_row == 4 * (128 + 64)
    rope = Rope().floor(Rope().match(Call("rope", RopeSpec(3, 64), None, 1), target), target)
    assert rope.bytes_per_row == 4 * (2 * 192 + 64)
