"""RMS norm as a kernel of its own, against numpy."""

import numpy as np
import pytest
from tvm import relax, tirx

from tests.kernel_runner import KernelRunner, host_target, lower
from tests.passes.scheduled_models import kernel_names
from tests.tolerances import assert_close
from tilewright.compiler.bodies import add_composite
from tilewright.compiler.composites import NormSpec
from tilewright.passes.apply_schedules import ApplySchedules
from tilewright.schedules.base import Call
from tilewright.schedules.cpu.rms_norm import RMSNorm
from tilewright.schedules.cpu.rowwise import RowTile
from tilewright.schedules.order import Chooser

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


@pytest.mark.parametrize("inner", [(3,), (2, 3)])
def test_each_head_is_a_row(inner: tuple[int, ...]) -> None:
    rng = np.random.default_rng()
    spec = NormSpec(40, 1e-6)
    run = KernelRunner(lower(RMSNorm(), Call("rms_norm", spec, None, 64, inner)))
    for rows in (1, 7):
        x = rng.standard_normal((rows, *inner, 40)).astype(np.float32)
        weight = rng.standard_normal(40).astype(np.float32)
        expected = compile_kernel(spec)(x.reshape(-1, 40), weight)[0]
        np.testing.assert_array_equal(run(x, weight)[0], expected.reshape(x.shape))


def test_a_call_on_heads_is_lowered_to_a_kernel_on_heads() -> None:
    """The pass tells the schedule of the dimension between rows and features."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((tirx.Var("n", "int64"), 3, 40), "float32"))
    weight = relax.Var("weight", relax.TensorType((40,), "float32"))
    norm = add_composite(builder, "rms_norm", NormSpec(40, 1e-6), rank=3)
    with builder.function("logits", [x, weight], attrs={"tir_var_upper_bound": {"n": 16}}):
        with builder.dataflow():
            y = builder.emit_output(relax.Call(norm, [x, weight]))
        builder.emit_func_output(y)
    mod = ApplySchedules(choose=Chooser(host_target())).run(builder.get())
    assert str(mod["logits"].ret_ty) == str(x.ty)
    assert len(kernel_names(mod)) == 1


def test_tile_checks_itself() -> None:
    with pytest.raises(ValueError, match="few_rows -1 is negative"):
        RowTile(-1)


def test_floor_counts_each_byte_once() -> None:
    facts = RMSNorm().match(Call("rms_norm", NormSpec(64, 1e-5), None, 1), host_target())
    floor = RMSNorm().floor(facts, host_target())
    assert (floor.bytes_fixed, floor.bytes_per_row) == (256, 512)
