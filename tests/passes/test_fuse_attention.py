"""Attention is found in every spelling, near-misses stay, and the composite means the same."""

import json
import time

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.passes.spellings import (
    SIZES,
    SPELLINGS,
    Sizes,
    attention,
    by_hand,
    check_fused,
    check_unchanged,
    composites,
    model,
    operators,
    program,
    random_weights,
    run,
    runner,
    spec_of,
    tril_mask,
    weight_shapes,
)
from tests.tolerances import assert_close
from tilewright.compiler.composites import AttentionSpec
from tilewright.compiler.errors import CompileError
from tilewright.compiler.relax_utils import main_function
from tilewright.compiler.verify import verify
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.fuse_attention import FuseAttention

op = relax.op
CAUSAL = AttentionSpec(heads=4, kv_heads=2, head_dim=6, scale=0.25)


def qkv(emit, x, n, heads=4, kv_heads=2, dim=6):
    """q[n,H,D], k, v[n,G,D] as columns of x."""
    parts, begin = [], 0
    for count in (heads, kv_heads, kv_heads):
        part = emit(op.strided_slice(x, [1], [begin], [begin + count * dim]))
        parts.append(emit(op.reshape(part, (n, count, dim))))
        begin += count * dim
    return parts


def attending(attend, rows=48):
    """A program of one attention on q, k, v made by `attend(emit, n, q, k, v)`."""

    def body(emit, x, weights):
        n = x.ty.shape[0]
        return attend(emit, n, *qkv(emit, x, n))

    return program({}, body, rows=rows)


def positions(emit, n):
    index = emit(op.arange(0, n, 1, dtype="int64"))
    return emit(op.expand_dims(index, 1)), emit(op.expand_dims(index, 0))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_found_in_every_spelling(spelling):
    fused = FuseAttention()(Canonicalize()(model(spelling)))
    verify(fused, "fused")
    assert composites(fused) == {"attention": SIZES.layers}
    assert operators(fused)["nn.softmax"] == operators(fused)["tril"] == operators(fused)["where"] == 0
    spec = spec_of(fused, "attention")
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.causal) == (6, 2, 10, True)
    assert spec.scale == pytest.approx(SIZES.scale, rel=1e-6)


def test_one_function_for_equal_layers_and_its_result_needs_no_transpose():
    fused = FuseAttention()(by_hand())
    assert [gv.name_hint for gv in fused.get_global_vars()].count("attention") == 1
    assert len(fused.get_global_vars()) == 2
    script = main_function(fused)[1].script()
    assert script.count("R.permute_dims(") == 7 * SIZES.layers + 1, "only the weights' transposes are left"


@pytest.mark.parametrize("spelling", ["by_hand", "transformers"])
def test_fused_equals_plain(spelling):
    plain = Canonicalize()(model(spelling))
    fused = FuseAttention()(plain)
    weights = random_weights(weight_shapes(SIZES), seed=3)
    tokens = np.random.default_rng(3).integers(0, SIZES.vocab, 11)
    assert_close(run(fused, tokens, weights), run(plain, tokens, weights))


def test_rows_before_a_changed_token_keep_their_bits():
    fused = FuseAttention()(by_hand())
    weights = random_weights(weight_shapes(SIZES), seed=4)
    tokens = np.random.default_rng(4).integers(0, SIZES.vocab, 9)
    changed = tokens.copy()
    changed[5] = (changed[5] + 1) % SIZES.vocab
    forward = runner(fused, weights)
    a, b = forward(tokens), forward(changed)
    assert np.array_equal(a[:5], b[:5])
    assert (a[5:] != b[5:]).any(axis=1).all()


def _scaled_before(emit, n, q, k, v):
    q = emit(op.multiply(q, relax.const(0.5)))
    k = emit(op.divide(k, relax.const(2.0)))
    return attention(emit, q, k, v, 1.0, tril_mask(emit, n))


def _grouped(emit, n, q, k, v):
    """Query heads as [KV head, head of its group], KV heads broadcast."""
    q = emit(op.permute_dims(emit(op.reshape(q, (n, 2, 2, 6))), [1, 2, 0, 3]))
    k, v = (emit(op.expand_dims(emit(op.permute_dims(t, [1, 0, 2])), 1)) for t in (k, v))
    scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2]))))
    scores = emit(op.where(tril_mask(emit, n), emit(op.multiply(relax.const(0.25), scores)), relax.const(-1e30)))
    out = emit(op.matmul(emit(op.nn.softmax(scores, axis=-1)), v))
    return emit(op.reshape(emit(op.permute_dims(out, [2, 0, 1, 3])), (n, 4, 6)))


def _repeated_by_take(emit, n, q, k, v):
    """KV heads repeated by a broadcast and a reshape."""

    def repeat(t):
        t = emit(op.broadcast_to(emit(op.expand_dims(t, 2)), (n, 2, 2, 6)))
        return emit(op.reshape(t, (n, 4, 6)))

    return attention(emit, q, repeat(k), repeat(v), 0.25, tril_mask(emit, n))


def _masked_fill(emit, n, q, k, v):
    """where(hidden, low, scores) with hidden = triu(1)."""
    q, k, v = (emit(op.permute_dims(emit(op.repeat(t, 4 // int(t.ty.shape[1]), 1)), [1, 0, 2])) for t in (q, k, v))
    scores = emit(op.multiply(emit(op.matmul(q, emit(op.permute_dims(k, [0, 2, 1])))), relax.const(0.25)))
    hidden = emit(op.triu(emit(op.ones((n, n), "bool")), 1))
    scores = emit(op.where(hidden, relax.const(-1e30), scores))
    return emit(op.permute_dims(emit(op.matmul(emit(op.nn.softmax(scores, axis=-1)), v)), [1, 0, 2]))


def _additive(emit, n, q, k, v):
    """(1 - visible) * -1e9 added before the scale."""
    q, k, v = (emit(op.permute_dims(emit(op.repeat(t, 4 // int(t.ty.shape[1]), 1)), [1, 0, 2])) for t in (q, k, v))
    visible = emit(op.astype(tril_mask(emit, n), "float32"))
    bias = emit(op.multiply(emit(op.subtract(relax.const(1.0), visible)), relax.const(-1e10)))
    scores = emit(op.add(emit(op.matmul(q, emit(op.permute_dims(k, [0, 2, 1])))), bias))
    scores = emit(op.multiply(scores, relax.const(0.25)))
    return emit(op.permute_dims(emit(op.matmul(emit(op.nn.softmax(scores, axis=-1)), v)), [1, 0, 2]))


def _window(less_equal):
    def attend(emit, n, q, k, v):
        i, j = positions(emit, n)
        distance = emit(op.subtract(i, j))
        near = (
            op.less_equal(distance, relax.const(2, "int64"))
            if less_equal
            else op.less(distance, relax.const(3, "int64"))
        )
        mask = emit(op.logical_and(emit(op.greater_equal(i, j)), emit(near)))
        return attention(emit, q, k, v, 0.25, mask)

    return attend


VARIANTS = {
    "scale_on_q_and_k": (_scaled_before, CAUSAL),
    "query_heads_in_groups": (_grouped, CAUSAL),
    "repeat_by_broadcast": (_repeated_by_take, CAUSAL),
    "masked_fill": (_masked_fill, CAUSAL),
    "additive_mask_before_scale": (_additive, CAUSAL),
    "window_below": (_window(False), AttentionSpec(4, 2, 6, 0.25, window=3)),
    "window_up_to": (_window(True), AttentionSpec(4, 2, 6, 0.25, window=3)),
    "soft_cap": (
        lambda emit, n, q, k, v: attention(emit, q, k, v, 0.25, tril_mask(emit, n), soft_cap=1.5),
        AttentionSpec(4, 2, 6, 0.25, soft_cap=1.5),
    ),
    "no_mask": (
        lambda emit, n, q, k, v: attention(emit, q, k, v, 0.25, None),
        AttentionSpec(4, 2, 6, 0.25, causal=False),
    ),
    "one_kv_head": (
        lambda emit, n, q, k, v: attention(
            emit, q, *(emit(op.strided_slice(t, [1], [0], [1])) for t in (k, v)), 0.25, tril_mask(emit, n)
        ),
        AttentionSpec(4, 1, 6, 0.25),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_found_and_equal(name):
    attend, spec = VARIANTS[name]
    before = attending(attend)
    after = FuseAttention()(before)
    assert composites(after) == {"attention": 1}
    assert spec_of(after, "attention") == spec
    check_fused(before, after)


def _softmax_over_queries(emit, n, q, k, v):
    return attention(emit, q, k, v, 0.25, tril_mask(emit, n), axis=-2)


def _anti_causal(emit, n, q, k, v):
    i, j = positions(emit, n)
    return attention(emit, q, k, v, 0.25, emit(op.greater_equal(j, i)))


def _off_by_one(emit, n, q, k, v):
    return attention(emit, q, k, v, 0.25, emit(op.tril(emit(op.ones((n, n), "bool")), 1)))


def _weak_mask(emit, n, q, k, v):
    i, j = positions(emit, n)
    bias = emit(op.where(emit(op.less_equal(j, i)), relax.const(0.0), relax.const(-5.0)))
    scores = emit(
        op.matmul(emit(op.permute_dims(q, [1, 0, 2])), emit(op.permute_dims(emit(op.repeat(k, 2, 1)), [1, 2, 0])))
    )
    weights = emit(op.nn.softmax(emit(op.add(scores, bias)), axis=-1))
    out = emit(op.matmul(weights, emit(op.permute_dims(emit(op.repeat(v, 2, 1)), [1, 0, 2]))))
    return emit(op.permute_dims(out, [1, 0, 2]))


def _values_of_other_heads(emit, n, q, k, v):
    """Query head h reads value head h % 2, not h // 2."""
    tiled = emit(op.reshape(emit(op.broadcast_to(emit(op.expand_dims(v, 1)), (n, 2, 2, 6))), (n, 4, 6)))
    return attention(emit, q, k, tiled, 0.25, tril_mask(emit, n))


def _masked_before_cap(emit, n, q, k, v):
    q, k, v = (emit(op.permute_dims(emit(op.repeat(t, 4 // int(t.ty.shape[1]), 1)), [1, 0, 2])) for t in (q, k, v))
    scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 2, 1]))))
    scores = emit(op.where(tril_mask(emit, n), scores, relax.const(-1e30)))
    weights = emit(op.nn.softmax(emit(op.tanh(scores)), axis=-1))
    return emit(op.permute_dims(emit(op.matmul(weights, v)), [1, 0, 2]))


NEAR_MISSES = {
    "softmax_over_queries": (_softmax_over_queries, "not over the keys"),
    "anti_causal": (_anti_causal, "neither causal nor a sliding window"),
    "off_by_one": (_off_by_one, "neither causal nor a sliding window"),
    "weak_mask": (_weak_mask, "neither causal nor a sliding window"),
    "values_of_other_heads": (_values_of_other_heads, "k and v have 2 and 4 heads"),
    "masked_before_cap": (_masked_before_cap, "before the soft cap"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_stays_and_is_named(name, caplog):
    attend, reason = NEAR_MISSES[name]
    before = attending(attend)
    with caplog.at_level("DEBUG"):
        after = FuseAttention()(before)
    assert composites(after) == {}
    (refused,) = json.loads(str(main_function(after)[1].attrs["tw.refused"])).values()
    assert reason in refused
    assert reason in caplog.text
    gv, func = main_function(after)
    check_unchanged(before, tvm.IRModule({gv: func.without_attr("tw.refused")}))
    with pytest.raises(CompileError, match=reason):
        verify(after, "fused")


def test_thirty_two_layers_take_seconds():
    mod = by_hand(Sizes(layers=32))
    start = time.monotonic()
    assert composites(FuseAttention()(mod)) == {"attention": 32}
    assert time.monotonic() - start < 10
