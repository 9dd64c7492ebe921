"""Products with weights and rows of tables are found; computed and transposed weights stay."""

from collections import Counter

import pytest
from tvm import relax

from tests.passes.spellings import check_fused, composites, operators, program, spec_of
from tilewright.compiler.composites import EmbeddingSpec, LinearSpec
from tilewright.compiler.relax_utils import bindings, main_function
from tilewright.passes.fuse_linear import FuseLinear

op = relax.op
ROWS = 24


def times_weight(emit, x, w):
    return emit(op.matmul(x, emit(op.permute_dims(w))))


@pytest.mark.parametrize("bias", ["none", "right", "left"])
def test_linear_with_and_without_bias(bias):
    def body(emit, x, weights):
        y = times_weight(emit, x, weights["w"])
        terms = {"none": None, "right": (y, weights["b"]), "left": (weights["b"], y)}[bias]
        return y if terms is None else emit(op.add(*terms))

    before = program({"w": (7, ROWS), "b": (7,)}, body)
    after = FuseLinear()(before)
    assert composites(after) == {"linear": 1, "embedding": 1}
    assert spec_of(after, "linear") == LinearSpec(7, ROWS, bias=bias != "none")
    assert spec_of(after, "embedding") == EmbeddingSpec(13, ROWS)
    assert not operators(after)
    check_fused(before, after)


def test_scaled_embedding_and_a_head_tied_to_it():
    def body(emit, x, weights):
        return times_weight(emit, emit(op.multiply(x, relax.const(4.5))), weights["table"])

    before = program({}, body)
    after = FuseLinear()(before)
    assert composites(after) == {"linear": 1, "embedding": 1}
    assert spec_of(after, "embedding") == EmbeddingSpec(13, ROWS, scale=4.5)
    assert spec_of(after, "linear") == LinearSpec(13, ROWS)
    _, func = main_function(after)
    tied = [a for b in bindings(func) for a in b.value.args if a.same_as(func.params[1])]
    assert len(tied) == 2, "one parameter, read by both"
    check_fused(before, after)


def test_rows_that_are_read_unscaled_too_keep_the_product():
    def body(emit, x, weights):
        return emit(op.add(x, emit(op.multiply(x, relax.const(4.5)))))

    before = program({}, body)
    after = FuseLinear()(before)
    assert spec_of(after, "embedding") == EmbeddingSpec(13, ROWS)
    assert operators(after) == {"multiply": 1, "add": 1}
    check_fused(before, after)


def test_a_product_that_is_read_twice_keeps_its_bias_apart():
    def body(emit, x, weights):
        y = times_weight(emit, x, weights["w"])
        return emit(op.multiply(y, emit(op.add(y, weights["b"]))))

    before = program({"w": (7, ROWS), "b": (7,)}, body)
    after = FuseLinear()(before)
    assert spec_of(after, "linear") == LinearSpec(7, ROWS)
    assert operators(after) == {"multiply": 1, "add": 1}
    check_fused(before, after)


def _stored_transposed(emit, x, weights):
    return emit(op.matmul(x, weights["square"]))


def _computed(emit, x, weights):
    return times_weight(emit, x, emit(op.add(weights["square"], relax.const(1.0))))


def _data_times_data(emit, x, weights):
    return emit(op.matmul(x, emit(op.matmul(emit(op.permute_dims(x)), x))))


def _reshaped(emit, x, weights):
    """The weight's elements in another order."""
    return emit(op.matmul(x, emit(op.reshape(weights["wide"], (ROWS, 12)))))


@pytest.mark.parametrize("body", [_stored_transposed, _computed, _data_times_data, _reshaped])
def test_near_miss_stays(body):
    before = program({"square": (ROWS, ROWS), "wide": (12, ROWS)}, body)
    after = FuseLinear()(before)
    assert composites(after) == {"embedding": 1}
    assert operators(after) + Counter(take=1) == operators(before)
