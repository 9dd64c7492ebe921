"""Gated activations are found as operators and spelled out; others stay."""

import pytest
from tvm import relax

from tests.passes.spellings import check_fused, check_unchanged, composites, operators, program, spec_of
from tilewright.compiler.composites import GatedSpec
from tilewright.passes.fuse_gated_mlp import FuseGatedMlp

op = relax.op
FEATURES = 10


def gating(gate):
    """A program of `gate(emit, gate[n, 10], up[n, 10])`, both linear in x."""

    def body(emit, x, weights):
        gate_and_up = (emit(op.matmul(x, emit(op.permute_dims(weights[k])))) for k in ("gate", "up"))
        return gate(emit, *gate_and_up)

    return program({"gate": (FEATURES, 24), "up": (FEATURES, 24)}, body)


def _silu(emit, g, u):
    return emit(op.multiply(emit(op.nn.silu(g)), u))


def _silu_second(emit, g, u):
    return emit(op.multiply(u, emit(op.nn.silu(g))))


def _sigmoid(emit, g, u):
    return emit(op.multiply(emit(op.multiply(g, emit(op.sigmoid(g)))), u))


def _sigmoid_regrouped(emit, g, u):
    return emit(op.multiply(emit(op.sigmoid(g)), emit(op.multiply(u, g))))


def _gelu(emit, g, u):
    return emit(op.multiply(emit(op.nn.gelu_tanh(g)), u))


def _spelled_gelu(cube, root=0.7978845608028654, cubic=0.044715):
    def gate(emit, g, u):
        inner = emit(op.add(g, emit(op.multiply(relax.const(cubic), cube(emit, g)))))
        tanh = emit(op.tanh(emit(op.multiply(inner, relax.const(root)))))
        half = emit(op.multiply(relax.const(0.5), g))
        return emit(op.multiply(emit(op.multiply(half, emit(op.add(relax.const(1.0), tanh)))), u))

    return gate


def _power(emit, g):
    return emit(op.power(g, relax.const(3.0)))


def _products(emit, g):
    return emit(op.multiply(emit(op.multiply(g, g)), g))


VARIANTS = {
    "silu": (_silu, "silu"),
    "silu_second": (_silu_second, "silu"),
    "sigmoid": (_sigmoid, "silu"),
    "sigmoid_regrouped": (_sigmoid_regrouped, "silu"),
    "gelu": (_gelu, "gelu_tanh"),
    "gelu_by_power": (_spelled_gelu(_power), "gelu_tanh"),
    "gelu_by_products": (_spelled_gelu(_products), "gelu_tanh"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_found_and_equal(name):
    gate, activation = VARIANTS[name]
    before = gating(gate)
    after = FuseGatedMlp()(before)
    assert composites(after) == {"gated": 1}
    assert spec_of(after, "gated") == GatedSpec(FEATURES, activation)
    assert operators(after)["multiply"] == 0
    assert operators(after)["concat"] == 1, "gate and up come from two products"
    check_fused(before, after)


def test_parts_of_one_tensor_need_no_concat():
    def body(emit, x, weights):
        gate, up = (emit(op.strided_slice(x, [1], [s], [s + 12])) for s in (0, 12))
        return _silu(emit, gate, up)

    before = program({}, body)
    after = FuseGatedMlp()(before)
    assert composites(after) == {"gated": 1}
    assert operators(after)["concat"] == operators(after)["strided_slice"] == 0
    check_fused(before, after)


def test_parts_in_the_other_order_keep_their_concat():
    def body(emit, x, weights):
        up, gate = (emit(op.strided_slice(x, [1], [s], [s + 12])) for s in (0, 12))
        return _silu(emit, gate, up)

    before = program({}, body)
    after = FuseGatedMlp()(before)
    assert operators(after)["concat"] == 1
    check_fused(before, after)


def _other_sigmoid(emit, g, u):
    """sigmoid of another tensor."""
    shifted = emit(op.sigmoid(emit(op.add(g, relax.const(1.0)))))
    return emit(op.multiply(emit(op.multiply(g, shifted)), u))


def _scaled(emit, g, u):
    return emit(op.multiply(emit(op.multiply(g, emit(op.sigmoid(g)))), emit(op.multiply(relax.const(2.0), u))))


def _erf_gelu(emit, g, u):
    return emit(op.multiply(emit(op.nn.gelu(g)), u))


NEAR_MISSES = [
    _other_sigmoid,
    _scaled,
    _erf_gelu,
    _spelled_gelu(_power, root=0.79),
    _spelled_gelu(_power, cubic=0.05),
]


@pytest.mark.parametrize("gate", NEAR_MISSES)
def test_near_miss_stays(gate):
    before = gating(gate)
    check_unchanged(before, FuseGatedMlp()(before))
