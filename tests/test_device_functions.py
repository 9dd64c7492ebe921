"""What an artifact does on the device besides its steps: hand tokens on, and make random weights."""

import json

import numpy as np
import pytest
import tvm
from tvm import relax

from tilewright.compiler.feed import add_feed
from tilewright.compiler.random_fill import DEVIATION, NORM_DEVIATION, add_fill

WEIGHTS = (("layers.0.mlp.up", (96, 160), "float16"), ("embed", (96, 160), "float16"), ("norm", (4096,), "float32"))


def run(mod: tvm.IRModule, function: str, *arrays: np.ndarray):
    vm = relax.VirtualMachine(tvm.compile(mod, tvm.target.Target("llvm")), tvm.cpu())
    return vm[function](*(tvm.runtime.tensor(a) for a in arrays))


def scheduled() -> tvm.IRModule:
    """A step of one input that only passes its weights."""
    tokens = relax.Var("tokens", relax.TensorType((3,), "int32"))
    weights = [relax.Var(name, relax.TensorType(shape, dtype)) for name, shape, dtype in WEIGHTS]
    entries = [{"name": n, "sources": [n], "shape": list(s), "format": d} for n, s, d in WEIGHTS]
    builder = relax.BlockBuilder()
    attributes = {"num_input": 1, "tw.stage": "scheduled", "tw.params": json.dumps(entries)}
    with builder.function("step", [tokens, *weights], attrs=attributes):
        with builder.dataflow():
            output = builder.emit_output(relax.Tuple(weights))
        builder.emit_func_output(output)
    return builder.get()


def test_feed_replaces_what_the_step_before_drew() -> None:
    tokens, ids = np.array([7, -1, 0, -3, -2], np.int32), np.array([40, 50, 60, 70], np.int32)
    fed = run(add_feed(tvm.IRModule({})), "feed", tokens, ids)
    assert fed.numpy().tolist() == [7, 40, 0, 60, 50]


@pytest.fixture(scope="module")
def filled() -> list[np.ndarray]:
    return fill(seed=3)


def fill(seed: int) -> list[np.ndarray]:
    empty = [np.full(shape, np.nan, dtype) for _, shape, dtype in WEIGHTS]
    return [t.numpy().astype(np.float64) for t in run(add_fill(scheduled(), seed), "fill", *empty)]


def test_fill_gives_the_mean_and_deviation_of_a_new_model(filled) -> None:
    up, embed, norm = filled
    for values, mean, deviation in ((up, 0, DEVIATION), (embed, 0, DEVIATION), (norm, 1, NORM_DEVIATION)):
        assert abs(values.mean() - mean) < 5 * deviation / values.size**0.5
        assert abs(values.std() / deviation - 1) < 0.05


def test_fill_depends_on_name_place_and_seed_alone(filled) -> None:
    up, embed, _ = filled
    for other in (embed, up.T.reshape(up.shape), fill(seed=4)[0]):
        assert abs(np.corrcoef(up.ravel(), other.ravel())[0, 1]) < 5 / up.size**0.5
    for once, again in zip(filled, fill(seed=3), strict=True):
        np.testing.assert_array_equal(once, again)
