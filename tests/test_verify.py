"""Each stage's grammar: what is legal passes, and each offence names its place."""

import json

import pytest
import tvm
from tvm import relax, tirx

from tests.passes.spellings import by_hand, program
from tilewright.compiler.bodies import add_composite
from tilewright.compiler.composites import (
    STEP_INPUTS,
    AppendSpec,
    AttentionSpec,
    KVFormat,
    LinearSpec,
    dump_spec,
)
from tilewright.compiler.errors import CompileError
from tilewright.compiler.relax_utils import main_function, remove_dead_code
from tilewright.compiler.verify import verify
from tilewright.passes.fuse_attention import FuseAttention

op = relax.op


def changed(mod, **attrs):
    """The module with other function attributes; None removes one."""
    gv, func = main_function(mod)
    for key, value in attrs.items():
        name = key.replace("__", ".")
        func = func.without_attr(name) if value is None else func.with_attr(name, value)
    return tvm.IRModule({**dict(mod.functions.items()), gv: func})


def small():
    return program({}, lambda emit, x, w: emit(op.exp(x)))


def test_stages():
    verify(by_hand(), "model")
    verify(FuseAttention()(by_hand()), "fused")
    with pytest.raises(CompileError, match="stage 'paged' is unknown; the stages are model, fused, served, scheduled"):
        verify(by_hand(), "paged")


@pytest.mark.parametrize(
    "attrs, message",
    [
        ({"tw__stage": "fused"}, "says stage 'fused', not 'model'"),
        ({"tw__params": None}, "lacks the attribute tw.params"),
        ({"num_input": 2}, "1 entries in tw.params|has 2 inputs"),
        ({"tw__params": "[]"}, "has 1 weights and 0 entries in tw.params"),
        (
            {"tw__params": json.dumps([{"name": "table", "sources": ["t"], "shape": [2, 2], "format": "f32"}])},
            r"parameter table is .* tw.params says table \[2, 2\] f32",
        ),
    ],
)
def test_attributes_of_forward(attrs, message):
    with pytest.raises(CompileError, match=message):
        verify(changed(small(), **attrs), "model")


def test_operators_are_a_closed_list():
    mod = program({}, lambda emit, x, w: emit(op.sort(x)))
    with pytest.raises(CompileError, match=r"lv1 = .*sort.*: operator sort is not one of stage 'model'"):
        verify(mod, "model")


def test_tokens_are_int32_of_one_symbolic_length():
    mod = small()
    gv, func = main_function(mod)
    fixed = func.bind_symbolic_vars({func.params[0].ty.shape.values[0]: 4})
    with pytest.raises(CompileError, match=r"must be int32\[n\] with a symbolic n"):
        verify(tvm.IRModule({gv: fixed}), "model")


def test_two_public_functions():
    mod = small()
    _, func = main_function(mod)
    twice = {"forward": func, "other": relax.utils.copy_with_new_vars(func).with_attr("global_symbol", "other")}
    with pytest.raises(CompileError, match=r"has 2 public functions \(forward, other\); give exactly one"):
        verify(tvm.IRModule(twice), "model")


def with_composite():
    """forward that calls a linear."""
    builder = relax.BlockBuilder()
    tokens = relax.Var("tokens", relax.TensorType([tirx.Var("n", "int64")], "int32"))
    table, weight = (relax.Var(k, relax.TensorType(s, "float32")) for k, s in (("table", (13, 24)), ("w", (5, 24))))
    entries = [
        {"name": v.name, "sources": [v.name], "shape": s, "format": "f32"}
        for v, s in ((table, [13, 24]), (weight, [5, 24]))
    ]
    attrs = {"num_input": 1, "tw.stage": "fused", "tw.params": json.dumps(entries)}
    with builder.function("forward", [tokens, table, weight], attrs=attrs):
        with builder.dataflow():
            x = builder.emit(op.take(table, tokens, axis=0))
            out = builder.emit_output(relax.Call(add_composite(builder, "linear", LinearSpec(5, 24)), [x, weight]))
        builder.emit_func_output(out)
    return builder.get()


def test_composites_belong_to_their_stages():
    mod = with_composite()
    verify(mod, "fused")
    with pytest.raises(CompileError, match="function linear is composite linear, which stage 'model' does not have"):
        verify(changed(mod, tw__stage="model"), "model")
    verify(changed(mod, tw__stage="scheduled"), "scheduled")  # it runs by its body, where no schedule takes it


def test_private_functions_are_composites():
    mod = with_composite()
    (gv,) = [g for g in mod.get_global_vars() if g.name_hint == "linear"]
    mod.update_func(gv, mod[gv].without_attr("tw.composite"))
    with pytest.raises(CompileError, match="function linear is a function that is no composite"):
        verify(mod, "fused")


def test_scores_outside_of_attention_are_named():
    def body(emit, x, w):
        scores = emit(op.matmul(x, emit(op.permute_dims(x))))
        return emit(op.matmul(scores, x))

    mod = changed(program({}, body), tw__stage="fused")
    with pytest.raises(CompileError, match=r"lv2 = R.matmul.*pairs tokens with tokens outside of an attention"):
        verify(mod, "fused")


def test_attention_takes_token_head_dim():
    spec = AttentionSpec(2, 1, 4, 0.5)
    builder = relax.BlockBuilder()
    n = tirx.Var("n", "int64")
    tokens = relax.Var("tokens", relax.TensorType([n], "int32"))
    table = relax.Var("table", relax.TensorType([13, 16], "float32"))
    entries = [{"name": "table", "sources": ["table"], "shape": [13, 16], "format": "f32"}]
    attrs = {"num_input": 1, "tw.stage": "fused", "tw.params": json.dumps(entries)}
    wrong = dump_spec(AttentionSpec(1, 2, 4, 0.5))
    with builder.function("forward", [tokens, table], attrs=attrs):
        with builder.dataflow():
            x = builder.emit(op.take(table, tokens, axis=0))
            q = builder.emit(op.reshape(builder.emit(op.strided_slice(x, [1], [0], [8])), (n, 2, 4)))
            k, v = (
                builder.emit(op.reshape(builder.emit(op.strided_slice(x, [1], [s], [s + 4])), (n, 1, 4)))
                for s in (8, 12)
            )
            out = builder.emit_output(relax.Call(add_composite(builder, "attention", spec), [q, k, v]))
        builder.emit_func_output(out)
    mod = builder.get()
    verify(mod, "fused")
    (gv,) = [g for g in mod.get_global_vars() if g.name_hint == "attention"]
    mod.update_func(gv, mod[gv].with_attr("tw.spec", wrong))
    with pytest.raises(CompileError, match=r"q is .*; it must be \[n, 1, 4\]"):
        verify(mod, "fused")


def served(order=(0, 1), inputs=None):
    """`logits` with two appends; `order` picks the version of the pages that each append takes."""
    kv = KVFormat(layers=1, kv_heads=1, head_dim=4, page_size=2)
    sizes = {k: tirx.Var(k, "int64") for k in ("t", "b", "p", "r", "c", "e", "num_pages")}

    def tensor(name, extent, dtype):
        shape = [sizes[extent[0]] + 1 if extent.endswith("+1") else sizes[extent[0]]]
        return relax.Var(name, relax.TensorType(shape, dtype))

    pages = relax.Var("pages", relax.TensorType([1, sizes["num_pages"], 2, 1, 8], "float32"))
    params = [tensor(n, *spec) for n, spec in (inputs or STEP_INPUTS).items()]
    table = relax.Var("table", relax.TensorType([13, 4], "float32"))
    entries = [{"name": "table", "sources": ["table"], "shape": [13, 4], "format": "f32"}]
    attrs = {"num_input": len(params) + 1, "tw.stage": "served", "tw.params": json.dumps(entries)}
    builder = relax.BlockBuilder()
    append = builder.add_func(_append(kv), "kv_append")
    with builder.function("logits", [*params, pages, table], attrs=attrs):
        with builder.dataflow():
            x = builder.emit(op.take(table, params[0], axis=0))
            k = builder.emit(op.reshape(x, (sizes["t"], 1, 4)))
            versions = [pages]
            for version in order:
                versions.append(builder.emit(relax.Call(append, [versions[version], k, k, params[2]])))
            out = builder.emit_output(op.sum(versions[-1], axis=[0]))
        builder.emit_func_output(out)
    return builder.get()


def _append(kv):
    """A stand-in for the composite's body: it gives its pages back."""
    t, pages = tirx.Var("t", "int64"), tirx.Var("num_pages", "int64")
    params = [
        relax.Var("pages", relax.TensorType([1, pages, 2, 1, 8], "float32")),
        relax.Var("k", relax.TensorType([t, 1, 4], "float32")),
        relax.Var("v", relax.TensorType([t, 1, 4], "float32")),
        relax.Var("slots", relax.TensorType([t], "int32")),
    ]
    builder = relax.BlockBuilder()
    with builder.function("kv_append", params, private=True):
        with builder.dataflow():
            out = builder.emit_output(op.negative(params[0]))
        builder.emit_func_output(out)
    return builder.get()["kv_append"].with_attrs({"tw.composite": "kv_append", "tw.spec": dump_spec(AppendSpec(kv))})


def test_pages_are_one_version_at_a_time():
    verify(served(), "served")
    with pytest.raises(CompileError, match="takes another version of the pages than the newest"):
        verify(served(order=(0, 0)), "served")


def test_step_inputs_are_the_contract():
    missing = {k: v for k, v in STEP_INPUTS.items() if k != "rows"}
    with pytest.raises(CompileError, match=r"logits has the inputs tokens, .*; they must be tokens, .*rows, pages"):
        verify(served(inputs=missing), "served")


def test_a_served_module_has_no_attention_over_a_whole_sequence():
    mod = FuseAttention()(by_hand())
    with pytest.raises(CompileError, match="function attention is composite attention, which stage 'served' does not"):
        verify(mod, "served")


def test_dead_composites_go_with_dead_code():
    mod = with_composite()
    gv = main_function(mod)[0]
    alone = tvm.IRModule({g: f for g, f in mod.functions.items() if g != gv} | {"forward": main_function(small())[1]})
    assert [g.name_hint for g in remove_dead_code(alone, "forward").get_global_vars()] == ["forward"]
