"""Rotary embeddings are found in both spellings and layouts; other rotations stay."""

import numpy as np
import pytest
from tvm import relax

from tests.passes.spellings import (
    SIZES,
    SPELLINGS,
    Sizes,
    by_hand,
    check_fused,
    check_unchanged,
    composites,
    model,
    operators,
    program,
    rotate_half,
    spec_of,
)
from tilewright.compiler.composites import RopeSpec
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.fuse_attention import FuseAttention
from tilewright.passes.fuse_rope import FuseRope

op = relax.op
HEADS, DIM = 3, 10
HALF = DIM // 2


def angles(emit, n, size=HALF):
    """f32[n, size]: position times frequency."""
    positions = emit(op.expand_dims(emit(op.astype(emit(op.arange(0, n, 1, dtype="int64")), "float32")), 1))
    frequencies = (0.5 ** np.arange(size)).astype("float32")
    return emit(op.multiply(positions, relax.const(frequencies[None])))


def halves(emit, x):
    return (emit(op.strided_slice(x, [2], [s], [s + HALF])) for s in (0, HALF))


def times(emit, a, b):
    return emit(op.multiply(a, b))


def rotating(rotate):
    """A program that rotates heads of x: `rotate(emit, n, x[n, 3, 10])`."""

    def body(emit, x, weights):
        n = x.ty.shape[0]
        return rotate(emit, n, emit(op.reshape(x, (n, HEADS, DIM))))

    return program({}, body, rows=HEADS * DIM)


def _half(emit, n, x):
    a, b = halves(emit, x)
    angle = angles(emit, n)
    cos, sin = (emit(op.expand_dims(emit(f(angle)), 1)) for f in (op.cos, op.sin))
    first = emit(op.subtract(times(emit, a, cos), times(emit, b, sin)))
    second = emit(op.add(times(emit, b, cos), times(emit, a, sin)))
    return emit(op.concat([first, second], axis=-1))


def _half_by_split(emit, n, x):
    """Parts of a split, factors and terms the other way round."""
    parts = emit(op.split(x, 2, axis=-1))
    a, b = (emit(relax.TupleGetItem(parts, k)) for k in (0, 1))
    angle = angles(emit, n)
    cos, sin = (emit(op.expand_dims(emit(f(angle)), 1)) for f in (op.cos, op.sin))
    first = emit(op.add(emit(op.negative(times(emit, sin, b))), times(emit, cos, a)))
    second = emit(op.add(times(emit, sin, a), times(emit, cos, b)))
    return emit(op.concat([first, second], axis=-1))


def _joined_tables(scale=None):
    """cos(concat(angles, angles)), as transformers writes it, with yarn's factor on the tables."""

    def rotate(emit, n, x):
        angle = angles(emit, n)
        angle = emit(op.concat([angle, angle], axis=-1))
        tables = [emit(f(angle)) for f in (op.cos, op.sin)]
        if scale is not None:
            tables = [emit(op.multiply(t, relax.const(scale))) for t in tables]
        return rotate_half(emit, x, *(emit(op.expand_dims(t, 1)) for t in tables))

    return rotate


def _heads_first(emit, n, x):
    """On [h, n, D]."""
    angle = angles(emit, n)
    angle = emit(op.concat([angle, angle], axis=-1))
    cos, sin = (emit(f(angle)) for f in (op.cos, op.sin))
    turned = rotate_half(emit, emit(op.permute_dims(x, [1, 0, 2])), cos, sin)
    return emit(op.permute_dims(turned, [1, 0, 2]))


VARIANTS = {
    "half": _half,
    "half_by_split": _half_by_split,
    "rotate_half": _joined_tables(),
    "rotate_half_with_factor": _joined_tables(1.25),
    "heads_first": _heads_first,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_found_and_equal(name):
    before = rotating(VARIANTS[name])
    after = FuseRope()(before)
    assert composites(after) == {"rope": 1}
    assert spec_of(after, "rope") == RopeSpec(HEADS, DIM)
    left = operators(after)
    assert left["concat"] == left["strided_slice"] == left["split"] == left["permute_dims"] == 0
    check_fused(before, after)


def test_a_slice_of_heads_is_rotated_and_no_more():
    """q's heads are a slice of joint heads: the deeper tensor is not what is rotated."""

    def rotate(emit, n, x):
        return _half(emit, n, emit(op.strided_slice(x, [1], [0], [2])))

    before = rotating(rotate)
    after = FuseRope()(before)
    assert spec_of(after, "rope") == RopeSpec(2, DIM)
    check_fused(before, after)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_found_in_the_model(spelling):
    fused = FuseRope()(FuseAttention()(Canonicalize()(model(spelling))))
    assert composites(fused) == {"attention": SIZES.layers, "rope": 2 * SIZES.layers}
    assert operators(fused)["cos"] == operators(fused)["sin"] == 1, "the tables are made once"


def test_two_functions_for_q_and_k_of_all_layers():
    fused = FuseRope()(by_hand(Sizes(layers=3)))
    assert sum(gv.name_hint.startswith("rope") for gv in fused.get_global_vars()) == 2


def _unequal_halves(emit, n, x):
    """Tables of D different angles: no rotation."""
    angle = angles(emit, n, DIM)
    return rotate_half(emit, x, *(emit(op.expand_dims(emit(f(angle)), 1)) for f in (op.cos, op.sin)))


def _other_direction(emit, n, x):
    a, b = halves(emit, x)
    angle = angles(emit, n)
    cos, sin = (emit(op.expand_dims(emit(f(angle)), 1)) for f in (op.cos, op.sin))
    first = emit(op.add(times(emit, a, cos), times(emit, b, sin)))
    second = emit(op.subtract(times(emit, b, cos), times(emit, a, sin)))
    return emit(op.concat([first, second], axis=-1))


def _halves_swapped(emit, n, x):
    a, b = halves(emit, x)
    angle = angles(emit, n)
    cos, sin = (emit(op.expand_dims(emit(f(angle)), 1)) for f in (op.cos, op.sin))
    first = emit(op.subtract(times(emit, a, cos), times(emit, b, sin)))
    second = emit(op.add(times(emit, b, cos), times(emit, a, sin)))
    return emit(op.concat([second, first], axis=-1))


def _interleaved(emit, n, x):
    """Pairs (2i, 2i + 1)."""
    a, b = (emit(op.strided_slice(x, [2], [s], [DIM], [2])) for s in (0, 1))
    angle = angles(emit, n)
    cos, sin = (emit(op.expand_dims(emit(f(angle)), 1)) for f in (op.cos, op.sin))
    first = emit(op.subtract(times(emit, a, cos), times(emit, b, sin)))
    second = emit(op.add(times(emit, b, cos), times(emit, a, sin)))
    return emit(op.concat([first, second], axis=-1))


@pytest.mark.parametrize("rotate", [_unequal_halves, _other_direction, _halves_swapped, _interleaved])
def test_near_miss_stays(rotate):
    before = rotating(rotate)
    check_unchanged(before, FuseRope()(before))
