"""Linears on one input are joined where their weights may be, and the parameters' description follows."""

import numpy as np
import pytest
from tvm import relax

from tests.passes.spellings import (
    SIZES,
    SPELLINGS,
    at_stage,
    check_round_trip,
    composites,
    model,
    operators,
    program,
    random_weights,
    run,
    runner,
    weight_shapes,
)
from tests.tolerances import assert_close
from tilewright.compiler.composites import LinearSpec
from tilewright.compiler.relax_utils import bindings, composite_of, main_function, param_entries
from tilewright.compiler.verify import verify
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.combine_projections import CombineProjections, join_names
from tilewright.passes.fuse_attention import FuseAttention
from tilewright.passes.fuse_gated_mlp import FuseGatedMlp
from tilewright.passes.fuse_linear import FuseLinear
from tilewright.passes.fuse_norm import FuseNorm
from tilewright.passes.fuse_rope import FuseRope

op = relax.op
ROWS = 24
PASSES = (FuseAttention(), FuseRope(), FuseNorm(), FuseGatedMlp(), FuseLinear(), CombineProjections())


def projecting(names, biases=(), tied=None):
    """A program of linears on x, one a name, their results side by side; `tied` is read once more."""
    shapes = {f"layers.0.{name}": (3 + k, ROWS) for k, name in enumerate(names)}
    shapes |= {f"layers.0.{name}.bias": (3 + names.index(name),) for name in biases}

    def body(emit, x, weights):
        def linear(x, name):
            y = emit(op.matmul(x, emit(op.permute_dims(weights[f"layers.0.{name}"]))))
            return emit(op.add(y, weights[f"layers.0.{name}.bias"])) if name in biases else y

        parts = [linear(x, name) for name in names]
        if tied is not None:
            parts.append(linear(emit(op.negative(x)), tied))
        return emit(op.concat(parts[::-1], axis=1))

    return FuseLinear()(program(shapes, body))


def entries(mod):
    return {e["name"]: e for e in param_entries(main_function(mod)[1])}


def linears(mod):
    found = (composite_of(mod, b.value) for b in bindings(main_function(mod)[1]))
    return [c[1] for c in found if c is not None and c[0] == "linear"]


def test_projections_become_one_in_their_order():
    before = projecting(["attn.q", "attn.k", "attn.v"])
    after = CombineProjections()(before)
    assert linears(after) == [LinearSpec(3 + 4 + 5, ROWS)]
    joined = entries(after)["layers.0.attn.qkv"]
    assert joined["sources"] == ["layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v"]
    assert joined["shape"] == [12, ROWS]
    _, func = main_function(after)
    assert [p.name for p in func.params] == ["tokens", "table", "layers_0_attn_qkv"]
    check_fused_sources(before, after)


def check_fused_sources(before, after):
    """Like check_fused; the joined parameters take their rows from the sources of the old ones."""
    after = at_stage(after, "fused")
    verify(after, "fused")
    check_round_trip(after)
    shapes = {s: tuple(e["shape"]) for e in entries(before).values() for s in e["sources"]}
    weights, tokens = random_weights(shapes, seed=5), np.random.default_rng(5).integers(0, 13, 6)
    assert_close(run(after, tokens, weights), run(before, tokens, weights))


def test_biases_are_joined_too():
    before = projecting(["attn.q", "attn.k", "attn.v"], biases=["attn.q", "attn.k", "attn.v"])
    after = CombineProjections()(before)
    assert linears(after) == [LinearSpec(12, ROWS, bias=True)]
    assert entries(after)["layers.0.attn.qkv.bias"]["shape"] == [12]
    check_fused_sources(before, after)


def test_a_bias_of_some_keeps_them_apart():
    before = projecting(["attn.q", "attn.k", "attn.v"], biases=["attn.q"])
    after = CombineProjections()(before)
    assert sorted(s.out_features for s in linears(after)) == [3, 9]
    assert set(entries(after)) == {"table", "layers.0.attn.q", "layers.0.attn.q.bias", "layers.0.attn.kv"}
    check_fused_sources(before, after)


def test_formats_keep_apart_what_is_stored_differently():
    before = projecting(["attn.q", "attn.k", "attn.v"])
    formats = (("layers.0.attn.q", "q4_1"), ("layers.0.attn.k", "q4_1"), ("layers.0.attn.v", "q8_0"))
    after = CombineProjections(formats)(before)
    assert set(entries(after)) == {"table", "layers.0.attn.qk", "layers.0.attn.v"}
    check_fused_sources(before, after)
    alone = CombineProjections((("layers.0.attn.q", "q4_1"), ("layers.0.attn.k", "q8_0")))(before)
    assert set(entries(alone)) == set(entries(before)), "v is f32, so each is of its own format"


def test_a_weight_that_is_used_elsewhere_stays_out():
    before = projecting(["attn.q", "attn.k", "attn.v"], tied="attn.k")
    after = CombineProjections()(before)
    assert set(entries(after)) == {"table", "layers.0.attn.qv", "layers.0.attn.k"}
    check_fused_sources(before, after)


def test_one_linear_stays():
    before = projecting(["attn.o"])
    assert set(entries(CombineProjections()(before))) == {"table", "layers.0.attn.o"}


@pytest.mark.parametrize(
    "names, joined",
    [
        (["layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v"], "layers.0.attn.qkv"),
        (["layers.0.mlp.gate", "layers.0.mlp.up"], "layers.0.mlp.gate_up"),
        (["layers.0.attn.q.bias", "layers.0.attn.k.bias"], "layers.0.attn.qk.bias"),
        (["gate", "up"], "gate_up"),
    ],
)
def test_names(names, joined):
    assert join_names(names) == joined


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_whole_model_fuses(spelling):
    fused = Canonicalize()(model(spelling))
    verify(fused, "model")
    for p in PASSES:
        fused = p(fused)
        verify(fused, "fused")
    assert composites(fused) == {
        "embedding": 1,
        "rms_norm": 2 * SIZES.layers + 1,
        "linear": 4 * SIZES.layers + 1,
        "rope": 2 * SIZES.layers,
        "attention": SIZES.layers,
        "gated": SIZES.layers,
    }
    left = operators(fused)
    assert left["add"] == 2 * SIZES.layers and left["strided_slice"] == 3 * SIZES.layers and left["concat"] == 0
    assert left["nn.softmax"] == left["permute_dims"] - (spelling == "transformers") == 0


@pytest.mark.parametrize("spelling", ["by_hand", "transformers"])
def test_whole_model_equals_plain(spelling):
    plain = Canonicalize()(model(spelling))
    fused = plain
    for p in PASSES:
        fused = p(fused)
    check_round_trip(fused)
    weights = random_weights(weight_shapes(SIZES), seed=6)
    actual, expected = runner(fused, weights), runner(plain, weights)
    for length in (1, 2, 9):
        tokens = np.random.default_rng(length).integers(0, SIZES.vocab, length)
        assert_close(actual(tokens), expected(tokens))
