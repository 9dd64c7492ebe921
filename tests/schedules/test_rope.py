"""Rotary embedding as a kernel of its own, against numpy."""

import numpy as np
import pytest

from tests.kernel_runner import KernelRunner, host_target, lower
from tests.tolerances import assert_close
from tilewright.compiler.composites import RopeSpec
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cpu.rope import Rope

ROWS = (1, 3, 17)


def compile_kernel(spec: RopeSpec) -> KernelRunner:
    return KernelRunner(lower(Rope(), Call("rope", spec, None, 64)))


@pytest.mark.parametrize("heads, dim", [(9, 64), (3, 80), (2, 48), (1, 8), (2, 256)])
def test_matches_numpy(heads: int, dim: int) -> None:
    rng = np.random.default_rng()
    run = compile_kernel(RopeSpec(heads, dim))
    for rows in ROWS:
        x = rng.standard_normal((rows, heads, dim)).astype(np.float32)
        angle = rng.uniform(0, 1000, (rows, dim // 2))
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = np.split(x.astype(np.float64), 2, -1)
        c, s = cos[:, None], sin[:, None]
        assert_close(run(x, cos, sin)[0], np.concatenate([a * c - b * s, b * c + a * s], -1))


def test_rejects_with_a_reason() -> None:
    rejected = Rope().match(Call("rope", RopeSpec(2, 20), None, 8), host_target())
    assert isinstance(rejected, Reject) and "head size 20" in rejected.reason


def test_floor_counts_each_byte_once() -> None:
    facts = Rope().match(Call("rope", RopeSpec(3, 64), None, 1), host_target())
    assert Rope().floor(facts, host_target()).bytes_per_row == 4 * (2 * 192 + 64)
