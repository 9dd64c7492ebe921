"""Norms, gates and residuals join their linear, and only where nothing else needs them."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.passes.served_models import Batch, Tiny, composite_names, fused_model, random_params, round_trip
from tests.tolerances import assert_close
from tilewright.compiler.relax_utils import Scope, bindings, composite_of, op_name, param_entries, rebuild
from tilewright.compiler.verify import verify
from tilewright.models.quant import FORMATS
from tilewright.passes.fuse_linear_neighbours import FuseLinearNeighbours
from tilewright.passes.insert_paged_kv import InsertPagedKV
from tilewright.passes.quantize_weights import QuantizeWeights

SMALL = Tiny(windows=(None,), bias=True)


def packed_model(c: Tiny) -> tvm.IRModule:
    mod = InsertPagedKV(4).run(fused_model(c))
    return QuantizeWeights(tuple((s, "f32") for e in param_entries(mod["logits"]) for s in e["sources"])).run(mod)


def linear_specs(mod: tvm.IRModule):
    found = [composite_of(mod, b.value) for b in bindings(mod["logits"])]
    return [spec for name, spec in filter(None, found) if name == "linear"]


def calls(mod: tvm.IRModule, name: str):
    return [b for b in bindings(mod["logits"]) if (composite_of(mod, b.value) or ("",))[0] == name]


def test_steps_are_as_before_and_the_neighbours_are_gone():
    c = replace(SMALL, windows=(None, 2))
    before = packed_model(c)
    after = FuseLinearNeighbours().run(before)
    verify(after, "served")
    round_trip(after)
    assert not {"rms_norm", "gated"} & set(composite_names(after))
    assert "add" not in [op_name(b.value) for b in bindings(after["logits"])]
    assert [(s.norm is not None, s.gated is not None, s.bias, s.residual) for s in linear_specs(after)] == [
        *[
            (True, False, True, False),
            (False, False, False, True),
            (True, False, False, False),
            (False, True, False, True),
        ]
        * 2,
        (True, False, False, False),
    ]
    plain = InsertPagedKV(4).run(fused_model(c))
    params = random_params(plain["logits"], np.random.default_rng())
    entries = param_entries(after["logits"])
    packed = [FORMATS["f32"].pack(v) if len(e["shape"]) == 2 else v for e, v in zip(entries, params, strict=True)]
    expected, actual = Batch(before, packed, 4), Batch(after, packed, 4)
    for request in ({0: [1, 2, 3, 4, 5], 1: [6]}, {1: [7, 8], 0: [9]}):
        assert_close(actual.step(request), expected.step(request))


def test_a_norm_that_something_else_reads_stays():
    before = packed_model(SMALL)
    norm = calls(before, "rms_norm")[0]
    add = next(b for b in bindings(before["logits"]) if op_name(b.value) == "add")
    rows = next(p for p in before["logits"].params if p.name == "rows")

    def read_the_norm(emit):
        total = emit(emit.map(add.value))
        return relax.op.add(total, emit(relax.op.take(emit.map(norm.var), emit.map(rows), axis=0, mode="clip")))

    after = FuseLinearNeighbours().run(rebuild(before, {add.var: read_the_norm}))
    assert composite_names(after).count("rms_norm") == 1
    assert [s.norm is not None for s in linear_specs(after)].count(True) == 2  # of the MLP and the head


def test_a_gate_with_two_readers_stays():
    before = packed_model(SMALL)
    (down,) = Scope(before["logits"]).users[calls(before, "gated")[0].var]
    call = Scope(before["logits"]).definition[down]
    twice = rebuild(before, {down: lambda emit: relax.op.add(emit(emit.map(call)), emit(emit.map(call)))})
    assert composite_names(FuseLinearNeighbours().run(twice)).count("gated") == 1


@pytest.mark.parametrize("shape", [(1, 32), (32,)], ids=["row", "vector"])
def test_an_addend_of_another_shape_is_no_residual(shape):
    before = packed_model(SMALL)
    add = [b for b in bindings(before["logits"]) if op_name(b.value) == "add"][-1]  # down + residual
    addend = relax.op.zeros(shape, "float32")
    other = rebuild(before, {add.var: lambda emit: relax.op.add(emit.map(add.value.args[0]), emit(addend))})
    after = FuseLinearNeighbours().run(other)
    assert [op_name(b.value) for b in bindings(after["logits"])].count("add") == 1


def test_a_norm_joins_the_linears_that_take_it() -> None:
    """Here the joint projection alone: that of gate and up has as many inputs, but other outputs."""
    before = packed_model(SMALL)
    (outs, *_) = [spec.out_features for spec in linear_specs(before)]
    takes = lambda spec: spec.norm is not None and spec.out_features == outs and not spec.residual  # noqa: E731
    after = FuseLinearNeighbours(gate_after=True, takes_norm=takes).run(before)
    verify(after, "served")
    specs = linear_specs(after)
    assert [s.norm is not None for s in specs] == [s.out_features == outs for s in specs]
    layers = sum(s.norm is not None for s in specs)
    assert layers and composite_names(after).count("rms_norm") == composite_names(before).count("rms_norm") - layers


def test_a_gate_joins_the_linear_before_it_where_asked() -> None:
    before = packed_model(SMALL)
    after = FuseLinearNeighbours(gate_after=True, takes_norm=lambda spec: False).run(before)
    verify(after, "served")
    round_trip(after)
    assert "gated" not in composite_names(after)
    assert composite_names(after).count("rms_norm") == composite_names(before).count("rms_norm")
    specs = linear_specs(after)
    assert [s.gate is not None for s in specs].count(True) == 1 and all(s.norm is s.gated is None for s in specs)
    plain = random_params(InsertPagedKV(4).run(fused_model(SMALL))["logits"], np.random.default_rng())
    entries = param_entries(after["logits"])
    packed = [FORMATS["f32"].pack(v) if len(e["shape"]) == 2 else v for e, v in zip(entries, plain, strict=True)]
    expected, actual = Batch(before, packed, 4), Batch(after, packed, 4)
    for request in ({0: [1, 2, 3, 4, 5], 1: [6]}, {1: [7, 8], 0: [9]}):
        assert_close(actual.step(request), expected.step(request))
