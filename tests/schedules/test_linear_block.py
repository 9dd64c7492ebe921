"""Block-quantised linears: the exact arithmetic, its closeness to floats, and equal bits in every kernel."""

import dataclasses
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tvm

from tests.kernel_runner import KernelRunner, aligned, aligned_empty, host_target, lower
from tests.linear_reference import float_reference, integer_reference, random_arguments, rounding_bound, rows_of
from tests.tolerances import assert_close
from tilewright.compiler.checkpoint import BLOCK_FORMATS
from tilewright.compiler.codegen.llvm_target import build_llvm
from tilewright.compiler.composites import GatedSpec, LinearSpec, NormSpec
from tilewright.compiler.targets.base import Target
from tilewright.models.quant import FORMATS
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cpu import linear_block_gemm
from tilewright.schedules.cpu.linear_block_amx import AmxTile, LinearBlockAmx
from tilewright.schedules.cpu.linear_block_gemm import GemmTile, LinearBlockGemm
from tilewright.schedules.cpu.linear_block_gemv import GemvTile, LinearBlockGemv
from tilewright.schedules.cpu.tile_ops import AmxTiles, PlainTiles

ROWS = (1, 2, 3, 7, 16, 33)
GEMV, GEMM = LinearBlockGemv(), LinearBlockGemm()
AMX_TARGET = dataclasses.replace(host_target(), features=(*host_target().features, "amx_int8"))
# The same arithmetic without the int8 dot-product instruction and with 256-bit vectors.
AVX2_TARGET = Target("avx2", "cpu", "x86_64", ("avx2", "fma", "f16c"), "x86-64-v3")
BASIC_TARGET = Target("avx2-without-f16c", "cpu", "x86_64", ("avx2", "fma"), "x86-64-v3", ("-f16c",))
MACHINES = list({t.mcpu: t for t in (AVX2_TARGET, host_target())}.values())
# Quick to compile; that bits do not depend on the tile is a test of its own.
SMALL_TILE = GemmTile(2)


class EmulatedAmx(LinearBlockAmx):
    tile_ops = PlainTiles


def spec_of(
    form: str, n: int, k: int, prologue: str = "", bias: bool = False, residual: bool = False, bits: int = 16
) -> LinearSpec:
    return LinearSpec(
        n,
        k,
        form,
        bias,
        NormSpec(k, 1e-5) if prologue == "norm" else None,
        GatedSpec(k, prologue) if prologue not in ("", "norm") else None,
        residual,
        bits,
    )


CASES = [
    spec_of("q4_1", 200, 96, "norm", bias=True, residual=True),
    spec_of("q4_0", 17, 32, "gelu_tanh", residual=True),
    spec_of("q8_0", 48, 96, "silu", bias=True, bits=8),
    spec_of("q4_1", 1, 32, bits=8),
    spec_of("q4_0", 48, 576, bits=8),
    spec_of("q8_0", 33, 576, residual=True),
    spec_of("q4_1", 40, 192),
    spec_of("q4_0", 24, 96),
    spec_of("q8_0", 20, 64, "norm", bits=8),
]
IDS = [f"{s.weight_format}-{s.out_features}x{s.in_features}-{s.activation_bits}" for s in CASES]
PLAIN = [s for s in CASES if not s.norm and not s.gated]


@cache
def gemv(spec: LinearSpec) -> KernelRunner:
    return KernelRunner(lower(GEMV, Call("linear", spec, 1, 1)))


@cache
def gemm(spec: LinearSpec) -> KernelRunner:
    return KernelRunner(lower(GEMM, Call("linear", spec, None, 64), tile=SMALL_TILE))


def by_gemv(spec: LinearSpec, arguments: list[np.ndarray]) -> np.ndarray:
    m = len(arguments[0])
    return np.concatenate([gemv(spec)(*rows_of(spec, arguments, i, i + 1))[0] for i in range(m)])


def assert_same_bits(run: KernelRunner, spec: LinearSpec, arguments: list[np.ndarray], expected: np.ndarray) -> None:
    for m in ROWS:
        actual = run(*rows_of(spec, arguments, 0, m))[0]
        np.testing.assert_array_equal(actual, expected[:m], err_msg=f"{m} rows")


@pytest.mark.parametrize("spec", CASES, ids=IDS)
def test_any_number_of_rows_gives_the_bits_of_single_rows(spec):
    arguments = random_arguments(spec, max(ROWS))
    assert_same_bits(gemm(spec), spec, arguments, by_gemv(spec, arguments))


@pytest.mark.parametrize("spec", PLAIN, ids=[IDS[CASES.index(s)] for s in PLAIN])
def test_the_arithmetic_is_the_documented_one(spec):
    arguments = random_arguments(spec, 5)
    assert_close(gemm(spec)(*arguments)[0], integer_reference(spec, arguments), "float32")


@pytest.mark.parametrize("spec", CASES, ids=IDS)
def test_activations_are_off_by_no_more_than_their_rounding(spec):
    arguments = random_arguments(spec, max(ROWS))
    error = np.abs(gemm(spec)(*arguments)[0] - float_reference(spec, arguments))
    assert (error <= rounding_bound(spec, arguments)).all()


@pytest.mark.parametrize("form", BLOCK_FORMATS)
@pytest.mark.parametrize("target", MACHINES, ids=lambda t: t.name)
def test_the_largest_values_are_exact(form, target):
    """All weights and activations at their extremes, where a sum that leaves its integers would show."""
    spec = spec_of(form, 16, 32)
    signs = np.where(np.arange(32) % 2, 1, -1) * np.array([[1], [-1]])
    x = np.concatenate([signs, np.ones((1, 32)), -np.ones((1, 32))]).astype(np.float32)
    x *= np.array([1.0, 32639 / 32512 - 2**-20, 3.0, 1e-3], np.float32)[:, None]  # low bytes from end to end
    weight = np.sign(np.random.default_rng().normal(size=(16, 32))).astype(np.float32)
    weight[:4] = 1
    weight[4:8] = signs[0]
    arguments = [x, FORMATS[form].pack(weight)]
    run = KernelRunner(lower(GEMM, Call("linear", spec, None, 64), target, SMALL_TILE), target)
    assert_close(run(*arguments)[0], integer_reference(spec, arguments), "float32")


@pytest.mark.parametrize("form", ["q4_0", "q4_1"])
@pytest.mark.parametrize("target", MACHINES, ids=lambda t: t.name)
def test_an_offset_is_exact_wherever_zero_lies(form, target):
    """Blocks of 8-bit activations on one side of zero, on both, and with all values at the ends of their range."""
    spec = spec_of(form, 33, 64, bits=8)
    rng = np.random.default_rng()
    x = rng.uniform(size=(9, 64)).astype(np.float32)
    x[1] *= -1
    x[2:4] = np.where(rng.random((2, 64)) < 0.5, -1, 1)
    x[4:6] = np.where(rng.random((2, 64)) < 0.5, 0, [[1], [-1]])
    x[6, :32] = 0
    x[7, ::32] = -200
    arguments = [x, FORMATS[form].pack(rng.normal(size=(33, 64)).astype(np.float32))]
    run = KernelRunner(lower(GEMM, Call("linear", spec, None, 64), target, SMALL_TILE), target)
    assert_close(run(*arguments)[0], integer_reference(spec, arguments), "float32")


@pytest.mark.parametrize("number", [0, 1], ids=["default", "second"])
@pytest.mark.parametrize("spec", [CASES[4], CASES[6], CASES[8]], ids=lambda s: IDS[CASES.index(s)])
def test_every_tile_gives_the_same_bits(spec, number):
    arguments = random_arguments(spec, max(ROWS))
    expected = by_gemv(spec, arguments)
    facts = GEMM.match(Call("linear", spec, None, 64), host_target())
    tile = GEMM.space(facts, host_target())[number]
    assert_same_bits(KernelRunner(lower(GEMM, Call("linear", spec, None, 64), tile=tile)), spec, arguments, expected)


@pytest.mark.parametrize("spec,unroll", [(CASES[0], 3), (CASES[4], 2)], ids=[IDS[0], IDS[4]])
def test_an_unrolled_row_gives_the_same_bits(spec, unroll):
    arguments = random_arguments(spec, 1)
    unrolled = KernelRunner(lower(GEMV, Call("linear", spec, 1, 1), tile=GemvTile(unroll)))
    np.testing.assert_array_equal(unrolled(*arguments)[0], gemv(spec)(*arguments)[0])


def chunks_of_7_rows(spec: LinearSpec) -> int:
    """CHUNK_BYTES for it: the last of the chunks may end within a group of rows, or be empty."""
    return 7 * spec.in_features // 32 * (spec.activation_bits // 8 * 32 + 8)


def test_chunks_of_rows_give_the_same_bits(monkeypatch):
    spec = CASES[6]
    arguments = random_arguments(spec, max(ROWS))
    monkeypatch.setattr(linear_block_gemm, "CHUNK_BYTES", chunks_of_7_rows(spec))
    run = KernelRunner(lower(GEMM, Call("linear", spec, None, 64), tile=GemmTile(4)))
    assert_same_bits(run, spec, arguments, by_gemv(spec, arguments))


def test_no_rows_are_no_work():
    spec = CASES[0]
    assert gemm(spec)(*random_arguments(spec, 0))[0].shape == (0, spec.out_features)


@pytest.mark.parametrize(
    "target,form,bits",
    [
        (AVX2_TARGET, "q4_0", 16),
        (AVX2_TARGET, "q4_1", 8),
        (AVX2_TARGET, "q8_0", 8),
        (AVX2_TARGET, "q8_0", 16),
        (BASIC_TARGET, "q4_1", 16),  # two float16 a block and output, made floats by hand
        (BASIC_TARGET, "q8_0", 8),
    ],
    ids=lambda value: value.name if isinstance(value, Target) else str(value),
)
def test_other_instruction_sets_give_the_same_bits(target, form, bits):
    spec = spec_of(form, 17, 64, "silu", bits=bits)
    arguments = random_arguments(spec, max(ROWS))
    run = KernelRunner(lower(GEMM, Call("linear", spec, None, 64), target, SMALL_TILE), target)
    assert_same_bits(run, spec, arguments, by_gemv(spec, arguments))
    single = KernelRunner(lower(GEMV, Call("linear", spec, 1, 1), target), target)
    np.testing.assert_array_equal(single(*rows_of(spec, arguments, 0, 1))[0], by_gemv(spec, arguments)[:1])


# Few, as compiling these takes long. In chunks 33 rows are two groups that go through tiles, a row and nothing.
@pytest.mark.parametrize(
    "spec,tile,chunked",
    [
        (spec_of("q4_1", 40, 96, "norm", bias=True, residual=True, bits=16), AmxTile(1, 2), True),
        (spec_of("q8_0", 20, 64, bits=8), AmxTile(2, 2), False),
        (spec_of("q8_0", 20, 32, bits=16), AmxTile(1, 1), False),
        (spec_of("q4_0", 20, 96, bits=8), AmxTile(1, 1), False),
    ],
    ids=["q4_1-16-chunks", "q8_0-8-depth-2", "q8_0-16", "q4_0-8"],
)
def test_matrix_tiles_give_the_same_bits(spec, tile, chunked, monkeypatch):
    arguments = random_arguments(spec, max(ROWS))
    if chunked:
        monkeypatch.setattr(linear_block_gemm, "CHUNK_BYTES", chunks_of_7_rows(spec))
    run = KernelRunner(lower(EmulatedAmx(), Call("linear", spec, None, 64), AMX_TARGET, tile))
    assert_same_bits(run, spec, arguments, by_gemv(spec, arguments))


def test_few_rows_have_the_kernel_of_machines_without_matrix_tiles():
    spec = spec_of("q4_1", 40, 96)
    few = Call("linear", spec, None, 64, rows=LinearBlockAmx().bounds(Call("linear", spec, None, 64), AMX_TARGET)[0])
    assert few.rows == 15
    (kernel,) = lower(LinearBlockAmx(), few, AMX_TARGET).kernels
    tvm.ir.assert_structural_equal(kernel.func, lower(GEMM, few, AMX_TARGET).kernels[0].func)


def tile_registers_granted() -> bool:
    """Ask the operating system for AMX state (arch_prctl ARCH_REQ_XCOMP_PERM, 18)."""
    import ctypes

    present = re.search(r"^flags\s*:.*\bamx_int8\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return bool(present) and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


@pytest.mark.parametrize(
    "form,bits,tile,product",
    [("q4_1", 8, AmxTile(2, 2), "tdpbsud"), ("q8_0", 16, AmxTile(1, 2), "tdpbssd")],
    ids=["q4_1-8", "q8_0-16"],
)
def test_matrix_tiles_become_their_instructions(form, bits, tile, product):
    """Where this machine has them they are run as well."""
    spec = spec_of(form, 40, 64, bits=bits)
    lowering = lower(LinearBlockAmx(), Call("linear", spec, None, 64), AMX_TARGET, tile)
    target = tvm.target.Target(
        {"kind": "llvm", "mcpu": "x86-64-v4", "mattr": ["+avx512vnni", "+amx-tile", "+amx-int8"]}
    )
    assembly = build_llvm(tvm.IRModule({"f": lowering.kernels[0].func}), target).mod.inspect_source("asm")
    for instruction in ("ldtilecfg", "tilezero", "tileloadd", product, "tilestored", "tilerelease"):
        assert re.search(rf"\b{instruction}\b", assembly), instruction
    if tile_registers_granted():
        arguments = random_arguments(spec, max(ROWS))
        assert_same_bits(KernelRunner(lowering, AMX_TARGET), spec, arguments, by_gemv(spec, arguments))


@pytest.mark.parametrize("spec", [CASES[1], CASES[5]], ids=["gemv", "gemm"])
def test_nothing_is_written_behind_the_result(spec):
    """The last panel is partly filled, and the rows lie without gaps."""
    m = 1 if spec.gated else 3
    run = gemv(spec) if m == 1 else gemm(spec)
    arguments = random_arguments(spec, m)
    expected = run(*arguments)[0]
    guarded = aligned_empty((m * spec.out_features + 32,), np.float32)
    made = {"y": guarded[: expected.size].reshape(expected.shape)}
    for kernel, function in zip(run.lowering.kernels, run.functions, strict=True):
        for output in kernel.outputs:
            made.setdefault(output.name, aligned_empty([m if d == "m" else d for d in output.shape], output.dtype))
        inputs = [aligned(arguments[i]) if isinstance(i, int) else made[i] for i in kernel.inputs]
        function(*map(tvm.runtime.from_dlpack, [*inputs, *(made[o.name] for o in kernel.outputs)]))
    np.testing.assert_array_equal(made["y"], expected)
    assert np.isnan(guarded[expected.size :]).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_row_of_zeros_and_a_row_of_nan_stay_apart(bits):
    """A zero block has no scale; NaN of either sign shows in its own row only."""
    spec = spec_of("q4_1", 20, 64, bits=bits)
    arguments = random_arguments(spec, 5)
    arguments[0][1] = 0
    arguments[0][2, 5] = np.nan
    arguments[0][4, 40] = -np.nan
    clean = [arguments[0][[0, 3]].copy(), *arguments[1:]]
    actual = gemm(spec)(*arguments)[0]
    assert not actual[1].any()
    assert np.isnan(actual[[2, 4]]).all()
    np.testing.assert_array_equal(actual[[0, 3]], gemm(spec)(*clean)[0])


def test_weights_are_asked_for_ahead_of_their_use():
    spec = spec_of("q4_1", 40, 64)
    for schedule, m, tile in ((GEMV, 1, None), (GEMM, None, SMALL_TILE)):
        lowering = lower(schedule, Call("linear", spec, m, m or 8), tile=tile)
        target = {"kind": "llvm", "mcpu": host_target().mcpu, "mattr": list(host_target().mattr)}
        assembly = tvm.compile(tvm.IRModule({"f": lowering.kernels[0].func}), target=target).mod.inspect_source("asm")
        assert re.search(r"\bprefetcht1\b", assembly), schedule.name


@pytest.mark.parametrize(
    "schedule,call,target,reason",
    [
        (GEMV, Call("linear", CASES[0], None, 64), host_target(), "single row"),
        (GEMV, Call("linear", spec_of("f32", 4, 4), 1, 1), host_target(), "takes weights in q4_0"),
        (GEMM, Call("linear", spec_of("q8_0", 4, 40), None, 8), host_target(), "40 inputs are no multiple"),
        (GEMM, Call("linear", spec_of("q8_0", 4, 32, bits=12), None, 8), host_target(), "of 8 or 16 bits, not 12"),
        (GEMM, Call("linear", CASES[0], None, 64), Target("gpu", "cuda", "sm_90a"), "needs a cpu target, not cuda"),
        (
            GEMM,
            Call("linear", LinearSpec(4, 32, "q8_0", gated=GatedSpec(32, "relu")), None, 8),
            host_target(),
            "'relu' is none of silu, gelu_tanh",
        ),
        (LinearBlockAmx(), Call("linear", CASES[0], None, 64), AVX2_TARGET, "needs the target feature amx_int8"),
        (
            LinearBlockAmx(),
            Call("linear", CASES[0], 8, 8),
            AMX_TARGET,
            "fills tiles of 16 rows, and there are",
        ),
    ],
)
def test_a_call_that_does_not_fit_is_rejected_with_the_reason(schedule, call, target, reason):
    rejected = schedule.match(call, target)
    assert isinstance(rejected, Reject)
    assert reason in rejected.reason


def test_tiles_check_themselves():
    for bad in (
        lambda: GemmTile(0),
        lambda: GemmTile(17),
        lambda: GemmTile(8, 3),
        lambda: AmxTiles(17),
        lambda: GemvTile(0),
        lambda: AmxTile(3),
        lambda: AmxTile(1, 3),
    ):
        with pytest.raises(ValueError):
            bad()


def test_the_floor_counts_the_weight_once():
    spec = CASES[0]
    facts = GEMM.match(Call("linear", spec, None, 64), host_target())
    floor = GEMM.floor(facts, host_target())
    assert floor.bytes_fixed == 13 * 3 * 320 + 4 * 96 + 4 * 200
    assert floor.bytes_per_row == 4 * (96 + 200 + 200)
    assert floor.flops_per_row == 2 * 200 * 96
