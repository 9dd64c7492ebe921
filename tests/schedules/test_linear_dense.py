"""Dense linears against float64, with equal bits for every number of rows and every tile."""

import numpy as np
import pytest

from tests.kernel_runner import KernelRunner, host_target, lower
from tests.linear_reference import float_reference, random_arguments, rows_of
from tests.tolerances import assert_close
from tilewright.compiler.composites import GatedSpec, LinearSpec, NormSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cpu.linear_dense import DenseTile, LinearDense

DENSE = LinearDense()
ROWS = (1, 2, 3, 7, 16, 33)
AVX2_TARGET = Target("avx2", "cpu", "x86_64", ("avx2", "fma", "f16c"), "x86-64-v3")
AVX512_TARGET = Target("avx512", "cpu", "x86_64", ("avx2", "fma", "f16c", "avx512"), "x86-64-v4")

CASES = [
    LinearSpec(17, 129, "f32", bias=True, norm=NormSpec(129, 1e-6), residual=True),
    LinearSpec(200, 48, "f16", gated=GatedSpec(48, "silu")),
    LinearSpec(64, 144, "bf16", gated=GatedSpec(144, "gelu_tanh"), residual=True),
    LinearSpec(1, 1, "f32"),
    LinearSpec(48, 5, "bf16", bias=True, norm=NormSpec(5, 1e-5)),
    LinearSpec(32, 5, "f16", residual=True),
]
IDS = [f"{s.weight_format}-{s.out_features}x{s.in_features}" for s in CASES]


@pytest.mark.parametrize("spec", CASES, ids=IDS)
def test_values_and_equal_bits_for_any_number_of_rows(spec):
    arguments = random_arguments(spec, max(ROWS))
    run = KernelRunner(lower(DENSE, Call("linear", spec, None, 64)))
    whole = run(*arguments)[0]
    assert_close(whole, float_reference(spec, arguments), "float32")
    for m in ROWS:
        np.testing.assert_array_equal(run(*rows_of(spec, arguments, 33 - m, 33))[0], whole[33 - m :])


@pytest.mark.parametrize("form", ["f32", "f16", "bf16"])
def test_every_tile_and_instruction_set_gives_the_same_bits(form):
    spec = LinearSpec(64, 21, form)
    arguments = random_arguments(spec, 13)
    call = Call("linear", spec, None, 64)
    facts = DENSE.match(call, host_target())
    results = [KernelRunner(lower(DENSE, call, tile=t))(*arguments)[0] for t in DENSE.space(facts, host_target())[:3]]
    results.append(KernelRunner(lower(DENSE, call, AVX2_TARGET), AVX2_TARGET)(*arguments)[0])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("target", [AVX2_TARGET, AVX512_TARGET], ids=lambda t: t.name)
@pytest.mark.parametrize("outputs,panels", [(17 * 3, 4), (17, 2), (16, 1)])
def test_only_tiles_that_divide_the_panels_are_offered(target, outputs, panels):
    facts = DENSE.match(Call("linear", LinearSpec(outputs, 8), None, 8), target)
    offered = {t.panels for t in DENSE.space(facts, target)}
    assert offered == {p for p in ((1, 2, 4) if target.has("avx512") else (1, 2)) if panels % p == 0}


def test_a_tile_checks_itself():
    with pytest.raises(ValueError, match="not within 16 by 4"):
        DenseTile(17, 1)


def test_nan_stays_in_its_row():
    spec = CASES[1]
    arguments = random_arguments(spec, 9)
    run = KernelRunner(lower(DENSE, Call("linear", spec, None, 64)))
    clean = run(*arguments)[0]
    arguments[0][4] = np.nan
    touched = run(*arguments)[0]
    assert np.isnan(touched[4]).all()
    np.testing.assert_array_equal(np.delete(touched, 4, 0), np.delete(clean, 4, 0))


def test_block_formats_are_rejected():
    rejected = DENSE.match(Call("linear", LinearSpec(4, 32, "q8_0"), None, 8), host_target())
    assert isinstance(rejected, Reject)
    assert "takes weights in f32, f16, bf16, not q8_0" in rejected.reason
