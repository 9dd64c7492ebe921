"""Weights in every format: the packed model computes with exactly what the format holds."""

import json

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.passes.served_models import TARGET, Batch, Tiny, fused_model, random_params, round_trip
from tests.tolerances import assert_close
from tilewright.compiler.errors import CompileError
from tilewright.compiler.packed_weights import dequantise_kernel, packed_dtype, packed_shape
from tilewright.compiler.relax_utils import Scope, bindings, param_entries, rebuild
from tilewright.compiler.verify import verify
from tilewright.models.quant import FORMATS
from tilewright.passes.insert_paged_kv import InsertPagedKV
from tilewright.passes.quantize_weights import QuantizeWeights

SMALL = Tiny(windows=(None,))


def formats_for(mod, choose) -> tuple[tuple[str, str], ...]:
    entries = param_entries(mod["logits"])
    return tuple((s, choose(e["name"])) for e in entries for s in e["sources"] if len(e["shape"]) == 2)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("rows,columns", [(1, 32), (16, 96), (37, 64)])
def test_bodies_read_the_layout_that_packing_writes(name, rows, columns):
    values = np.random.default_rng().normal(size=(rows, columns)).astype("float32")
    packed = FORMATS[name].pack(values)
    assert packed_shape(name, rows, columns) == packed.shape
    assert packed_dtype(name) == str(packed.dtype)
    mod = tvm.IRModule({"main": dequantise_kernel(name, rows, columns).with_attr("global_symbol", "main")})
    weight = tvm.runtime.empty((rows, columns), "float32")
    tvm.compile(mod, TARGET)["main"](tvm.runtime.tensor(packed), weight)
    np.testing.assert_array_equal(weight.numpy(), FORMATS[name].unpack(packed, rows, columns))


def test_a_model_of_mixed_formats_computes_with_the_rounded_weights():
    rng = np.random.default_rng()
    names = iter(["q4_1", "q8_0", "bf16", "q4_0", "f16", "f32"])
    chosen: dict[str, str] = {}
    plain = InsertPagedKV(4).run(fused_model(SMALL))
    formats = formats_for(plain, lambda name: chosen.setdefault(name, next(names)))
    packed = QuantizeWeights(formats).run(plain)
    verify(packed, "served")
    round_trip(packed)
    params = random_params(plain["logits"], rng)
    rounded, stored = [], []
    for entry, value in zip(param_entries(packed["logits"]), params, strict=True):
        matrix = entry["name"] in chosen
        assert entry["format"] == chosen.get(entry["name"], "f32") and entry["shape"] == list(value.shape)
        pack = FORMATS[entry["format"]]
        stored.append(pack.pack(value) if matrix else value)
        rounded.append(pack.unpack(stored[-1], *value.shape) if matrix else value)
    expected, actual = Batch(plain, rounded, 4), Batch(packed, stored, 4)
    for request in ({0: [1, 2, 3, 4, 5], 1: [6]}, {1: [7, 8], 0: [9]}):
        assert_close(actual.step(request), expected.step(request))


def test_every_weight_needs_a_format():
    plain = InsertPagedKV(4).run(fused_model(SMALL))
    formats = tuple(f for f in formats_for(plain, lambda name: "f32") if f[0] != "l0.o.weight")
    with pytest.raises(CompileError, match=r"weight 'l0.o.weight' has no format"):
        QuantizeWeights(formats).run(plain)


def test_unknown_formats_and_cut_blocks_are_refused():
    plain = InsertPagedKV(4).run(fused_model(Tiny(hidden=48, windows=(None,))))
    with pytest.raises(CompileError, match=r"weight format 'q9' is unknown; use one of .*q4_1"):
        QuantizeWeights(formats_for(plain, lambda name: "q9")).run(plain)
    with pytest.raises(CompileError, match=r"a weight of 48 columns can't be q8_0 in blocks of 32"):
        QuantizeWeights(formats_for(plain, lambda name: "q8_0")).run(plain)


def test_tensors_joined_in_one_parameter_must_agree():
    plain = InsertPagedKV(4).run(fused_model(SMALL))
    entries = param_entries(plain["logits"])
    for entry in entries:
        if entry["name"] == "l0.qkv":
            entry["sources"] = ["q", "k", "v"]
    joined = rebuild(plain, {}, attrs={"tw.params": json.dumps(entries)})
    formats = formats_for(joined, lambda name: "f32")
    changed = tuple((s, "f16" if s == "v" else f) for s, f in formats)
    with pytest.raises(CompileError, match=r"parameter 'l0.qkv' joins tensors of several formats"):
        QuantizeWeights(changed).run(joined)


def test_a_weight_that_something_else_reads_is_refused():
    plain = InsertPagedKV(4).run(fused_model(SMALL))
    embed = next(p for p in plain["logits"].params if p.name == "embed")
    last = bindings(plain["logits"])[-2].var  # the logits [r, V]

    def spoil(emit):
        column = emit(relax.op.strided_slice(emit.map(embed), [1], [0], [1]))
        return relax.op.add(emit.map(definition), emit(relax.op.permute_dims(column)))

    definition = Scope(plain["logits"]).definition[last]
    with pytest.raises(CompileError, match="weight embed is packed for a linear, but operator strided_slice reads it"):
        QuantizeWeights(formats_for(plain, lambda name: "f32")).run(rebuild(plain, {last: spoil}))
