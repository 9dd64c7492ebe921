"""Activations in 16 bits: what is rounded, what stays float32, and how far the logits move."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import tvm

from tests.passes.served_models import Batch, Tiny, composite_names, fused_model, random_params, round_trip
from tilewright.compiler.errors import CompileError
from tilewright.compiler.relax_utils import bindings, composite_of, param_entries
from tilewright.compiler.verify import verify
from tilewright.models.quant import FORMATS
from tilewright.passes.fuse_linear_neighbours import FuseLinearNeighbours
from tilewright.passes.fuse_qkv_append import FuseQKVAppend
from tilewright.passes.insert_paged_kv import InsertPagedKV
from tilewright.passes.lower_precision import LowerPrecision
from tilewright.passes.quantize_weights import QuantizeWeights

MODEL = replace(Tiny(), windows=(None, 2))
PAGE_SIZE = 4


def served(weight_format: str) -> tvm.IRModule:
    """The model with plain pages and weights in `weight_format`, gates behind their linears."""
    mod = fused_model(MODEL)
    sources = [s for e in param_entries(mod["forward"]) if len(e["shape"]) == 2 for s in e["sources"]]
    for p in (
        InsertPagedKV(page_size=PAGE_SIZE, k_transposed=False),
        QuantizeWeights(formats=tuple((s, weight_format) for s in sources)),
        FuseQKVAppend(),
        FuseLinearNeighbours(gate_after=True, takes_norm=lambda spec: False),
    ):
        mod = p.run(mod)
    return mod


def specs(mod: tvm.IRModule) -> list[tuple[str, object]]:
    found = (composite_of(mod, b.value) for b in bindings(mod["logits"]))
    return [f for f in found if f is not None]


def packed(mod: tvm.IRModule, params: list[np.ndarray]) -> list[np.ndarray]:
    entries = param_entries(mod["logits"])
    return [FORMATS[e["format"]].pack(v) if len(e["shape"]) == 2 else v for e, v in zip(entries, params, strict=True)]


def test_composites_take_16_bits_and_the_logits_stay_float32() -> None:
    before = served("f16_rows")
    after = LowerPrecision("float16").run(before)
    verify(after, "served")
    round_trip(after)
    assert composite_names(after) == composite_names(before)
    lowered = [(n, s) for n, s in specs(after) if hasattr(s, "dtype")]
    assert lowered and all(s.dtype == "float16" for _, s in lowered)
    outs = [s.out_dtype for n, s in lowered if n == "linear"]
    assert outs[:-1] == ["float16"] * (len(outs) - 1) and outs[-1] == "float32"
    assert {s.gate.activation for n, s in lowered if n == "linear" and s.gate} == {"silu"}
    assert str(after["logits"].ret_ty.dtype) == "float32"


def test_logits_are_those_of_float32_up_to_rounding() -> None:
    rng = np.random.default_rng()
    before = served("f16_rows")
    after = LowerPrecision("float16").run(before)
    params = packed(before, random_params(fused_params(), rng))
    wide, narrow = Batch(before, params, PAGE_SIZE), Batch(after, params, PAGE_SIZE)
    for request in ({0: [1, 2, 3, 4, 5], 1: [6]}, {1: [7, 8], 0: [9]}):
        expected, actual = wide.step(request), narrow.step(request)
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert 0 < error < 5e-3  # float16 rounds by 2^-12 at each of some ten places


def fused_params():
    """A function with the float32 parameters, to draw values for."""
    return InsertPagedKV(PAGE_SIZE).run(fused_model(MODEL))["logits"]


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(CompileError, match="'float8' is neither bfloat16 nor float16"):
        LowerPrecision("float8")


def test_rows_keep_their_values() -> None:
    values = np.random.default_rng().standard_normal((5, 48)).astype(np.float32)
    for name, dtype in (("bf16_rows", ml_dtypes.bfloat16), ("f16_rows", np.float16)):
        np.testing.assert_array_equal(FORMATS[name].unpack(FORMATS[name].pack(values), 5, 48), values.astype(dtype))
