"""A compiled program with the step's signature and next to nothing in it: the runtime on a device, without a model.

The token after t at position p is (31 t + 7 p + shift) % vocab, where shift is the program's only weight.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tests.runtime.fake_cuda import fake_manifest
from tilewright.compiler import artifact as sealed
from tilewright.compiler.artifact import Artifact, Manifest, Param, TensorWriter
from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS
from tilewright.runtime.sizes import pages_shape
from tilewright.runtime.types import DeviceLimits

SHIFT = 11
LIMITS = DeviceLimits(
    max_batch=8, max_tokens=64, max_context=256, page_size=16, num_pages=64, vocab_size=1000, top_logprobs=3
)


def next_token(token: int, position: int) -> int:
    return (31 * token + 7 * position + SHIFT) % LIMITS.vocab_size


def answer(prompt: list[int], count: int) -> list[int]:
    """What greedy decoding says after a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens[-1], len(tokens) - 1))
    return tokens[len(prompt) :]


def toy_artifact(path: Path, target: Any, statics: tuple[int, ...] = (1, 2, 4)) -> Artifact:
    """The program compiled for a TVM target, as an artifact."""
    import tvm

    manifest = fake_manifest(LIMITS, statics)
    weight = Param("shift", (1,), "int32", ("shift",), "f32", 1, None)
    (path / sealed.PARAMS).parent.mkdir(parents=True)
    writer = TensorWriter(path / sealed.PARAMS, (weight,))
    writer.write(weight, np.array([SHIFT], np.int32))
    writer.close()
    with target:
        tvm.compile(program(manifest), target).export_library(str(path / sealed.LIBRARY))
    fields = {**{k: getattr(manifest, k) for k in manifest.__dataclass_fields__}, "params": (weight,)}
    return Artifact(path, sealed.seal(path, Manifest(**fields)))


def program(manifest: Manifest) -> Any:
    """The Relax module: every bucket's step, and the feed."""
    from tvm import relax

    builder = relax.BlockBuilder()
    for bucket in manifest.buckets:
        _step(builder, bucket.function, manifest, bucket.tokens if bucket.static else None)
    _feed(builder)
    return builder.get()


def _step(builder: Any, name: str, manifest: Manifest, size: int | None) -> None:
    from tvm import relax, tirx

    extents: dict[str, Any] = {s: tirx.Var(s, "int64") for s in "tbrpce"}
    if size is not None:
        extents |= dict.fromkeys("tbr", size)
    inputs = {}
    for key, (shape, dtype) in (STEP_INPUTS | SAMPLING_INPUTS).items():
        symbol, _, more = shape.partition("+")
        inputs[key] = relax.Var(key, relax.TensorType([extents[symbol] + int(more or 0)], dtype))
    pages = relax.Var("pages", relax.TensorType([3, tirx.Var("n", "int64"), *pages_shape(manifest, 1)[2:]], "float32"))
    weights = relax.Var("weights", relax.TupleType([relax.TensorType([1], "int32")]))
    with builder.function(name, [*inputs.values(), pages, weights]):
        with builder.dataflow():
            emit, op = builder.emit, relax.op
            tokens = emit(op.take(inputs["tokens"], inputs["rows"], axis=0))
            positions = emit(op.take(inputs["positions"], inputs["rows"], axis=0))
            terms = [emit(op.multiply(x, relax.const(k, "int32"))) for x, k in ((tokens, 31), (positions, 7))]
            total = emit(op.add(emit(op.add(*terms)), emit(relax.TupleGetItem(weights, 0))))
            ids = emit(op.floor_mod(total, relax.const(LIMITS.vocab_size, "int32")))
            logprobs = emit(op.negative(emit(op.astype(ids, "float32"))))
            wide = [emit(op.broadcast_to(op.expand_dims(x, 1), [extents["r"], 3])) for x in (ids, logprobs)]
            result = builder.emit_output((ids, logprobs, *wide))
        builder.emit_func_output(result)


def _feed(builder: Any) -> None:
    from tvm import relax, tirx

    tokens = relax.Var("tokens", relax.TensorType([tirx.Var("t", "int64")], "int32"))
    ids = relax.Var("ids", relax.TensorType([tirx.Var("r", "int64")], "int32"))
    with builder.function("feed", [tokens, ids]):
        with builder.dataflow():
            emit, op, zero = builder.emit, relax.op, relax.const(0, "int32")
            row = emit(op.subtract(relax.const(-1, "int32"), tokens))
            drawn = emit(op.take(ids, emit(op.maximum(row, zero)), axis=0))
            result = builder.emit_output(op.where(emit(op.less(tokens, zero)), drawn, tokens))
        builder.emit_func_output(result)
