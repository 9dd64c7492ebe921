"""Graphs of every source come to one form: no batch, no identities, forward over n."""

import numpy as np
import pytest
import torch
import tvm
from tvm import relax, tirx

from tests.passes.spellings import (
    SIZES,
    SPELLINGS,
    TARGET,
    check_round_trip,
    model,
    operators,
    random_weights,
    run,
    weight_shapes,
)
from tests.tolerances import assert_close
from tilewright.compiler.relax_utils import main_function, param_entries, static_shape
from tilewright.compiler.verify import verify
from tilewright.passes.canonicalize import Canonicalize

op = relax.op


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_a_model(spelling):
    mod = Canonicalize()(model(spelling))
    verify(mod, "model")
    check_round_trip(mod)
    _, func = main_function(mod)
    assert static_shape(func.params[0]) == [None] and func.params[0].ty.shape.values[0].name == "n"
    assert static_shape(func.body.body) == [None, SIZES.vocab]
    assert len(param_entries(func)) == len(weight_shapes(SIZES))


def test_transformers_spelling_keeps_its_numbers():
    import tests.passes.spellings as spellings

    weights = random_weights(weight_shapes(SIZES), seed=2)
    tokens = np.random.default_rng(2).integers(0, SIZES.vocab, 8).astype("int32")
    module = spellings._Llama(SIZES, "transformers").eval()
    module.load_state_dict({k: torch.from_numpy(weights[k]) for k in module.state_dict()})
    expected = module(torch.from_numpy(tokens)[None]).detach().numpy()[0]
    assert_close(run(Canonicalize()(model("transformers")), tokens, weights), expected, "logits_float32")


def batched(body, rows=12, shapes=()):
    """main(tokens[1, s], table[13, rows], *weights) with x[1, s, rows] = table[tokens]."""
    builder = relax.BlockBuilder()
    length = tirx.Var("s", "int64")
    tokens = relax.Var("tokens", relax.TensorType([1, length], "int32"))
    weights = [relax.Var(f"w{k}", relax.TensorType(s, "float32")) for k, s in enumerate(((13, rows), *shapes))]
    with builder.function("main", [tokens, *weights], attrs={"num_input": 1}):
        with builder.dataflow():
            x = builder.emit(op.take(weights[0], tokens, axis=0, mode="clip"))
            out = builder.emit_output(relax.Tuple([body(builder.emit, x, length, *weights[1:])]))
        builder.emit_func_output(out)
    return builder.get()


def _split(emit, x, n):
    parts = emit(op.split(x, 3, axis=-1))
    return emit(op.concat([emit(relax.TupleGetItem(parts, k)) for k in (2, 0, 1)], axis=2))


def _normal(emit, x, n):
    centred = emit(op.subtract(x, emit(op.mean(x, axis=[2], keepdims=True))))
    return emit(op.nn.softmax(emit(op.multiply(centred, relax.const(np.full((1, 1, 12), 0.5, "float32")))), axis=2))


def _heads(emit, x, n):
    """[1, n, 3, 4] -> [1, 3, n, 4], repeated, a slice of the batch that keeps it, back."""
    h = emit(op.permute_dims(emit(op.reshape(x, (1, n, 3, 4))), [0, 2, 1, 3]))
    h = emit(op.repeat(h, 2, 1))
    h = emit(op.strided_slice(h, [0, 1], [0, 1], [1, 6], [1, 2]))
    return emit(op.reshape(emit(op.permute_dims(h, [0, 2, 1, 3])), (1, n, 12)))


def _batch_in_the_middle(emit, x, n):
    """torch's attention goes through [n, 1, ..]."""
    middle = emit(op.permute_dims(x, [1, 0, 2]))
    return emit(op.permute_dims(emit(op.multiply(middle, middle)), [1, 0, 2]))


def _products(emit, x, n):
    scores = emit(op.matmul(x, emit(op.permute_dims(x, [0, 2, 1]))))
    scores = emit(op.multiply(scores, emit(op.tril(emit(op.ones((1, n, n), "float32"))))))
    return emit(op.matmul(scores, x))


def _first_of_batch(emit, x, n):
    inner = emit(op.nn.relu(emit(op.take(x, relax.const(0, "int64"), axis=0))))
    return emit(op.expand_dims(inner, 0))


def _reduced_over_batch(emit, x, n):
    """An operator that needs the axis gets it back."""
    return emit(op.add(x, emit(op.sum(x, axis=[0, 2], keepdims=True))))


BODIES = [_split, _normal, _heads, _batch_in_the_middle, _products, _first_of_batch, _reduced_over_batch]


@pytest.mark.parametrize("body", BODIES)
def test_batch_of_one_goes_and_numbers_stay(body):
    before = batched(body)
    after = Canonicalize()(before)
    verify(after, "model")
    _, func = main_function(after)
    assert len(static_shape(func.body.body)) == 2
    table = np.random.default_rng(7).standard_normal((13, 12)).astype("float32")
    tokens = np.random.default_rng(8).integers(0, 13, 5).astype("int32")
    executable = tvm.compile(before, TARGET, relax_pipeline=relax.get_default_pipeline(TARGET))
    arguments = [tvm.runtime.tensor(a) for a in (tokens[None], table)]
    expected = relax.VirtualMachine(executable, tvm.cpu())["main"](*arguments)[0].numpy()
    assert_close(run(after, tokens, {"w0": table}), expected[0])


def test_identities_and_dead_code_vanish():
    def body(emit, x, n):
        emit(op.exp(x))
        x = emit(op.astype(emit(op.multiply(x, relax.const(1.0))), "float32"))
        x = emit(relax.TupleGetItem(emit(op.nn.dropout(x)), 0))
        return emit(op.divide(x, relax.const(1.0)))

    after = Canonicalize()(batched(body))
    assert operators(after) == {"take": 1}


def test_one_over_x_is_no_identity():
    def body(emit, x, n):
        return emit(op.divide(relax.const(1.0), x))

    assert operators(Canonicalize()(batched(body))) == {"take": 1, "divide": 1}
