"""Root-mean-square norms are found in each spelling; others stay."""

import pytest
from tvm import relax

from tests.passes.spellings import check_fused, check_unchanged, composites, operators, program, spec_of
from tilewright.compiler.composites import NormSpec
from tilewright.passes.fuse_norm import FuseNorm

op = relax.op
ROWS, EPS = 24, 1e-5


def normalising(normalise, heads=None, features=ROWS):
    """A program of `normalise(emit, x, weight[features])`, x[n, 24] or [n, heads, 24 / heads]."""

    def body(emit, x, weights):
        if heads is not None:
            x = emit(op.reshape(x, (x.ty.shape[0], heads, ROWS // heads)))
        return normalise(emit, x, weights["w"])

    return program({"w": (features,)}, body, rows=ROWS)


def root(emit, square, axis=-1, keepdims=True, eps=EPS):
    mean = emit(op.mean(square, axis=[axis], keepdims=keepdims))
    if not keepdims:
        mean = emit(op.expand_dims(mean, -1))
    return emit(op.rsqrt(emit(op.add(mean, relax.const(eps)))))


def _power(emit, x, w):
    normal = emit(op.multiply(x, root(emit, emit(op.power(x, relax.const(2.0))))))
    return emit(op.multiply(w, normal))


def _square(emit, x, w):
    normal = emit(op.multiply(root(emit, emit(op.square(x))), x))
    return emit(op.multiply(normal, w))


def _product(emit, x, w):
    """x * (root * w), x * x through a cast to its own dtype."""
    same = emit(op.astype(x, "float32"))
    return emit(op.multiply(x, emit(op.multiply(root(emit, emit(op.multiply(same, x))), w))))


def _without_keepdims(emit, x, w):
    return emit(op.multiply(emit(op.multiply(x, root(emit, emit(op.square(x)), keepdims=False))), w))


def _power_of_minus_half(emit, x, w):
    mean = emit(op.mean(emit(op.square(x)), axis=[-1], keepdims=True))
    scale = emit(op.power(emit(op.add(relax.const(EPS), mean)), relax.const(-0.5)))
    return emit(op.multiply(emit(op.multiply(x, scale)), w))


def _operator(emit, x, w):
    return emit(op.nn.rms_norm(x, w, axes=[-1], epsilon=EPS))


def _one_plus_weight(emit, x, w):
    """Gemma's weight, as its checkpoints store it."""
    return _square(emit, x, emit(op.add(relax.const(1.0), w)))


def _of_a_product(emit, x, w):
    """x is itself a product: a scaled embedding."""
    return _square(emit, emit(op.multiply(x, relax.const(4.9))), w)


VARIANTS = [
    _power,
    _square,
    _product,
    _without_keepdims,
    _power_of_minus_half,
    _operator,
    _one_plus_weight,
    _of_a_product,
]


@pytest.mark.parametrize("normalise", VARIANTS)
def test_variant_is_found_and_equal(normalise):
    before = normalising(normalise)
    after = FuseNorm()(before)
    assert composites(after) == {"rms_norm": 1}
    assert spec_of(after, "rms_norm") == NormSpec(ROWS, EPS)
    assert operators(after)["mean"] == operators(after)["rsqrt"] == 0
    check_fused(before, after)


@pytest.mark.parametrize("normalise", [_power, _operator])
def test_heads_are_normalised_by_one_function(normalise):
    """q and k differ in heads, not in their norm."""

    def body(emit, x, weights):
        n = x.ty.shape[0]
        parts = []
        for begin, heads in ((0, 4), (16, 2)):
            part = emit(op.strided_slice(x, [1], [begin], [begin + 4 * heads]))
            part = normalise(emit, emit(op.reshape(part, (n, heads, 4))), weights["w"])
            parts.append(emit(op.reshape(part, (n, 4 * heads))))
        return emit(op.concat(parts, axis=1))

    before = program({"w": (4,)}, body, rows=ROWS)
    after = FuseNorm()(before)
    assert composites(after) == {"rms_norm": 2}
    assert spec_of(after, "rms_norm") == NormSpec(4, EPS)
    assert len(after.get_global_vars()) == 2
    check_fused(before, after)


def _over_tokens(emit, x, w):
    return emit(op.multiply(emit(op.multiply(x, root(emit, emit(op.square(x)), axis=0))), w))


def _of_another_tensor(emit, x, w):
    other = emit(op.add(x, relax.const(1.0)))
    return emit(op.multiply(emit(op.multiply(x, root(emit, emit(op.square(other))))), w))


def _twice(emit, x, w):
    """Doubled: no rms_norm has a factor of its own."""
    return emit(
        op.multiply(emit(op.multiply(x, relax.const(2.0))), emit(op.multiply(root(emit, emit(op.square(x))), w)))
    )


def _without_weight(emit, x, w):
    return emit(op.add(emit(op.multiply(x, root(emit, emit(op.square(x))))), w))


def _centred(emit, x, w):
    """A layer norm's variance."""
    centred = emit(op.subtract(x, emit(op.mean(x, axis=[-1], keepdims=True))))
    return emit(op.multiply(emit(op.multiply(x, root(emit, emit(op.square(centred))))), w))


@pytest.mark.parametrize("normalise", [_over_tokens, _of_another_tensor, _twice, _without_weight, _centred])
def test_near_miss_stays(normalise):
    before = normalising(normalise)
    check_unchanged(before, FuseNorm()(before))


def test_operator_over_two_axes_stays():
    def body(emit, x, weights):
        x = emit(op.reshape(x, (x.ty.shape[0], 4, 6)))
        return emit(op.nn.rms_norm(x, weights["w"], axes=[-2, -1], epsilon=EPS))

    before = program({"w": (4, 6)}, body, rows=ROWS)
    check_unchanged(before, FuseNorm()(before))
