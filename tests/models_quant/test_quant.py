"""Weight formats: layouts, agreement with ggml's own quantisation, conversions."""

import gguf
import ml_dtypes
import numpy as np
import pytest

from tests.tolerances import assert_close
from tilewright.compiler.checkpoint import BLOCK_FORMATS, DENSE_FORMATS, LazyTensor
from tilewright.compiler.errors import CompileError
from tilewright.compiler.packed_weights import ROWS
from tilewright.models.quant import FORMATS
from tilewright.models.quant.convert import kernel_format, pack_tensors, q4_1_from_q4_k, requested_format

SHAPES = [(1, 32), (16, 64), (17, 96), (48, 256)]
GGML = gguf.GGMLQuantizationType


def weights(n: int, k: int) -> np.ndarray:
    return np.random.default_rng().normal(size=(n, k)).astype(np.float32)


def ggml_blocks(values: np.ndarray, name: str) -> np.ndarray:
    n, k = values.shape
    return gguf.quants.quantize(values, GGML[name.upper()]).reshape(n, k // 32, -1)


def test_the_formats_are_those_of_the_checkpoint_contract():
    assert set(FORMATS) == {*DENSE_FORMATS, *BLOCK_FORMATS, *ROWS}


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("n,k", SHAPES)
def test_block_formats_hold_exactly_what_ggml_dequantises(name, n, k):
    raw = ggml_blocks(weights(n, k), name)
    packed = FORMATS[name].pack_raw(raw)
    assert packed.shape == FORMATS[name].packed_shape(n, k)
    assert packed.dtype == FORMATS[name].packed_dtype
    expected = gguf.quants.dequantize(raw.reshape(n, -1), GGML[name.upper()])
    np.testing.assert_array_equal(FORMATS[name].unpack(packed, n, k), expected)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_quantise_makes_the_blocks_that_ggml_makes(name):
    values = weights(5, 96)
    values[2, 32:64] = 0  # a block without a scale
    np.testing.assert_array_equal(FORMATS[name].quantize(values), ggml_blocks(values, name))


@pytest.mark.parametrize("name", DENSE_FORMATS)
@pytest.mark.parametrize("n,k", [(1, 1), (17, 5), (48, 129)])
def test_dense_formats_round_once(name, n, k):
    values = weights(n, k)
    packed = FORMATS[name].pack(values)
    assert packed.shape == FORMATS[name].packed_shape(n, k) == (-(-n // 16), k, 16)
    dtype = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[name]
    np.testing.assert_array_equal(FORMATS[name].unpack(packed, n, k), values.astype(dtype).astype(np.float32))


def test_the_q4_1_layout_is_the_documented_one():
    """Byte 4 * row + i of vector j: input 4 j + i in the low nibble, 16 later in the high one."""
    raw = np.random.default_rng().integers(0, 256, (20, 2, 20), dtype=np.uint8)
    packed = FORMATS["q4_1"].pack_raw(raw)
    row, block, j, i = 18, 1, 2, 3
    byte = packed[row // 16, block, 64 * j + 4 * (row % 16) + i]
    source = raw[row, block, 4 + 4 * j + i]
    assert byte == source  # ggml pairs input x with x + 16 as well
    assert not packed[1, :, [4 * lane + b for lane in range(4, 16) for b in range(4)]].any()  # rows 20..31


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_a_ragged_k_is_refused_with_a_remedy(name):
    with pytest.raises(CompileError, match=r"40 columns can't be .* use f32, f16 or bf16"):
        FORMATS[name].packed_shape(16, 40)
    assert requested_format(name, 40) == "f16"
    assert requested_format(name, 64) == name


def test_a_scale_beyond_float16_is_refused():
    with pytest.raises(CompileError, match="keep this weight in f32"):
        FORMATS["q8_0"].pack(weights(1, 32) * np.float32(1e9))


def test_q4_k_becomes_q4_1_without_new_rounding_of_the_values():
    n, k = 3, 512
    raw = np.random.default_rng().integers(0, 256, (n, k // 256, 144), dtype=np.uint8)
    raw[..., :4] = np.random.default_rng().uniform(1e-3, 1e-2, (n, k // 256, 2)).astype(np.float16).view(np.uint8)
    expected = gguf.quants.dequantize(raw.reshape(n, -1), GGML.Q4_K)
    packed = FORMATS["q4_1"].pack_raw(q4_1_from_q4_k(raw))
    assert_close(FORMATS["q4_1"].unpack(packed, n, k), expected, "float16")


def tensor(values: np.ndarray, stored: str, raw: np.ndarray | None = None) -> LazyTensor:
    return LazyTensor(values.shape, stored, lambda: values, None if raw is None else lambda: raw)


def test_rows_of_equal_format_are_joined_as_they_are():
    parts = [weights(5, 64), weights(20, 64)]
    raws = [ggml_blocks(p, "q4_0") for p in parts]
    packed = pack_tensors([tensor(p * np.nan, "q4_0", r) for p, r in zip(parts, raws, strict=True)], "q4_0")
    np.testing.assert_array_equal(packed, FORMATS["q4_0"].pack_raw(np.concatenate(raws)))


def test_q4_0_beside_q4_1_is_exact_as_q4_1():
    first, second = weights(3, 32), weights(4, 32)
    raws = ggml_blocks(first, "q4_0"), ggml_blocks(second, "q4_1")
    packed = pack_tensors([tensor(first, "q4_0", raws[0]), tensor(second, "q4_1", raws[1])], "q4_1")
    expected = np.concatenate(
        [gguf.quants.dequantize(r.reshape(len(r), -1), t) for r, t in zip(raws, (GGML.Q4_0, GGML.Q4_1), strict=True)]
    )
    np.testing.assert_array_equal(FORMATS["q4_1"].unpack(packed, 7, 32), expected)


def test_other_types_are_rounded_to_8_bits():
    values = weights(4, 256)
    packed = pack_tensors([tensor(values, "q6_k")], kernel_format(["q6_k"], 256))
    error = np.abs(FORMATS["q8_0"].unpack(packed, 4, 256) - values)
    step = np.abs(values.reshape(4, 8, 32)).max(-1, keepdims=True) / 127
    assert (error.reshape(4, 8, 32) <= step * (0.5 + 127 * 2**-11)).all()  # half a step, and the scale in float16


@pytest.mark.parametrize(
    "stored,k,expected",
    [
        (["q4_1"], 64, "q4_1"),
        (["bf16", "bf16"], 5, "bf16"),
        (["q4_k", "q4_k"], 512, "q4_1"),
        (["q4_k", "q6_k"], 512, "q8_0"),
        (["q5_0"], 40, "f16"),
        (["q4_1", "q4_0"], 64, "q4_1"),
        (["f16", "q8_0"], 64, "f32"),
        (["f16", "bf16"], 64, "f32"),
    ],
)
def test_the_kernel_format_of_a_weight(stored, k, expected):
    assert kernel_format(stored, k) == expected


def test_bfloat16_is_taken_as_an_array_or_as_bits():
    values = weights(17, 3).astype(ml_dtypes.bfloat16)
    as_array = pack_tensors([tensor(values.astype(np.float32), "bf16", values)], "bf16")
    as_bits = pack_tensors([tensor(values.astype(np.float32), "bf16", values.view(np.uint16))], "bf16")
    np.testing.assert_array_equal(as_array, as_bits)
    np.testing.assert_array_equal(FORMATS["bf16"].unpack(as_array, 17, 3), values.astype(np.float32))
