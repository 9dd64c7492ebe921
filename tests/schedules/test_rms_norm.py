"""RMS norm as a kernel of its own, against numpy."""

import numpy as np
import pytest

from tests.kernel_runner import KernelRunner, host_target, lower
from tests.tolerances import assert_close
from tilewright.compiler.composites import NormSpec
from tilewright.schedules.base import Call
from tilewright.schedules.cpu.rms_norm import RMSNorm
from tilewright.schedules.cpu.rowwise import RowTile

ROWS = (1, 3, 17)


def compile_kernel(spec: NormSpec) -> KernelRunner:
    return KernelRunner(lower(RMSNorm(), Call("rms_norm", spec, None, 64)))


@pytest.mark.parametrize("features", [576, 80, 37, 5])
def test_matches_numpy(features: int) -> None:
    rng = np.random.default_rng()
    run = compile_kernel(NormSpec(features, 1e-5))
    weight = rng.standard_normal(features).astype(np.float32)
    for rows in ROWS:
        x = rng.standard_normal((rows, features)).astype(np.float32) * 3
        wide = x.astype(np.float64)
        expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
        assert_close(run(x, weight)[0], expected)


def test_rows_do_not_depend_on_their_number() -> None:
    rng = np.random.default_rng()
    run = compile_kernel(NormSpec(40, 1e-6))
    x, weight = rng.standard_normal((9, 40)).astype(np.float32), np.ones(40, np.float32)
    (whole,) = run(x, weight)
    for row in range(9):
        np.testing.assert_array_equal(run(x[row : row + 1].copy(), weight)[0], whole[row : row + 1])


def test_tile_checks_itself() -> None:
    with pytest.raises(ValueError, match="few_rows -1 is negative"):
        RowTile(-1)


def test_floor_counts_each_byte_once() -> None:
    facts = RMSNorm().match(Call("rms_norm", NormSpec(64, 1e-5), None, 1), host_target())
    floor = RMSNorm().floor(facts, host_target())
    assert (floor.bytes_fixed, floor.bytes_per_row) == (256, 512)
