"""What a problem says a result has to be: kernels and reference bodies give it, and nothing that is wrong passes."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.kernel_runner import KernelRunner, host_target, lower
from tests.reference import TARGET
from tilewright.compiler.calls import Call
from tilewright.compiler.composites import (
    AppendSpec,
    AttentionSpec,
    EmbeddingSpec,
    GatedSpec,
    KVFormat,
    LinearSpec,
    NormSpec,
    PagedAttentionSpec,
    QKVAppendSpec,
    RopeSpec,
    SampleSpec,
)
from tilewright.compiler.served_bodies import BODIES, add_served_composite
from tilewright.compiler.targets import host
from tilewright.schedules.base import Reject
from tilewright.schedules.order import ORDER
from tilewright.tuner.problems import Problem, problem_of

KV = KVFormat(2, 2, 48, 16)
SILU, NORM = GatedSpec(64, "silu"), NormSpec(64, 1e-5)
ON_CPU = {
    "linear-q4_1": Call("linear", LinearSpec(200, 64, "q4_1", bias=True, norm=NORM, residual=True), 5, 5),
    "linear-q8_0-gated": Call("linear", LinearSpec(40, 64, "q8_0", gated=SILU, activation_bits=8), None, 37),
    "linear-f16": Call("linear", LinearSpec(131, 50, "f16", bias=True), None, 3),
    "rms_norm": Call("rms_norm", NORM, None, 41, (3,)),
    "gated": Call("gated", GatedSpec(24, "gelu_tanh"), None, 5),
    "rope": Call("rope", RopeSpec(3, 32), None, 7),
    "embedding-q4_0": Call("embedding", EmbeddingSpec(203, 64, "q4_0", 2.0), None, 9),
    "kv_append": Call("kv_append", AppendSpec(KV), None, 19),
    "qkv_append": Call("qkv_append", QKVAppendSpec(4, KV, NormSpec(48, 1e-6)), None, 19),
    "attention-prompt": Call(
        "paged_attention", PagedAttentionSpec(AttentionSpec(4, 2, 48, 0.2, window=7), KV), None, 37
    ),
    "attention-decode": Call("paged_attention", PagedAttentionSpec(AttentionSpec(4, 2, 48, 0.2), KV), 3, 3, (), True),
    "sample": Call("sample", SampleSpec(1000), None, 4),
}
ROWS = KVFormat(2, 2, 48, 16, "bfloat16", k_transposed=False)
BF16: dict[str, Any] = {"dtype": "bfloat16"}
CAPPED = AttentionSpec(4, 2, 48, 0.2, window=9, soft_cap=3.0, sinks=True)
BY_BODY = {
    "linear-gate": Call(
        "linear",
        LinearSpec(128, 40, "bf16_rows", bias=True, residual=True, gate=SILU, out_dtype="bfloat16", **BF16),
        5,
        5,
    ),
    "linear-logits": Call("linear", LinearSpec(203, 40, "f16_rows", dtype="float16"), None, 40),
    "embedding": Call("embedding", EmbeddingSpec(203, 64, "bf16_rows", 3.0, "bfloat16"), None, 9),
    "qkv_append": Call("qkv_append", QKVAppendSpec(4, ROWS, NormSpec(48, 1e-6), **BF16), None, 19),
    "attention-prompt": Call("paged_attention", PagedAttentionSpec(CAPPED, ROWS, **BF16), None, 37),
    "attention-decode": Call("paged_attention", PagedAttentionSpec(CAPPED, ROWS, **BF16), 3, 3, (), True),
}


def problem(call: Call) -> Problem:
    found = problem_of(call, context=50)
    assert isinstance(found, Problem)
    return found


def by_kernel(call: Call, arguments: list[Any]) -> list[np.ndarray]:
    """The results of the first schedule that takes a call."""
    host.features()  # asks the system for what kernels may use
    target = host_target()
    fitting = [s for s in ORDER if (s.composite, s.kind) == (call.composite, "cpu")]
    schedule = next(s for s in fitting if not isinstance(s.match(call, target), Reject))
    return list(KernelRunner(lower(schedule, call))(*arguments, m=call.rows))


def by_body(call: Call, arguments: list[Any]) -> list[np.ndarray]:
    """The results of the reference body, compiled by TVM."""
    builder = relax.BlockBuilder()
    params, _ = BODIES[call.composite](relax.BlockBuilder(), call.spec)
    composite = add_served_composite(builder, call.composite, call.spec)
    with builder.function("main", params):
        with builder.dataflow():
            output = builder.emit_output(relax.Call(composite, params))
        builder.emit_func_output(output)
    target = tvm.target.Target(TARGET)
    with target:
        built = tvm.compile(builder.get(), target, relax_pipeline=relax.get_default_pipeline(target))
    tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
    result = relax.VirtualMachine(built, tvm.cpu())["main"](*tensors)
    return [r.numpy() for r in (result if not hasattr(result, "numpy") else [result])]


def check(call: Call, arguments: list[Any], results: list[np.ndarray]) -> None:
    """The results pass, and stop passing where any settled one is spoilt."""
    found = problem(call)
    assert found.complaint(arguments, results) == ""
    for index in found.settled:
        spoilt = [r.copy() for r in results]
        spoilt[index].reshape(-1)[...] = spoilt[index].reshape(-1)[::-1].copy()
        assert "is off by" in found.complaint(arguments, spoilt), index
        if results[index].dtype.kind != "i":
            spoilt[index].fill(np.nan)
            assert "nan" in found.complaint(arguments, spoilt), index


@pytest.mark.parametrize("name", ON_CPU)
def test_kernels_pass(name: str) -> None:
    arguments = problem(ON_CPU[name]).arguments()
    check(ON_CPU[name], arguments, by_kernel(ON_CPU[name], arguments))


@pytest.mark.parametrize("name", BY_BODY)
def test_reference_bodies_pass(name: str) -> None:
    arguments = problem(BY_BODY[name]).arguments()
    check(BY_BODY[name], arguments, by_body(BY_BODY[name], arguments))


def test_arguments_are_the_same_in_every_process() -> None:
    for call in (*ON_CPU.values(), *BY_BODY.values()):
        first, second = (problem(call).arguments() for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert np.array_equal(a, b) if isinstance(a, int) else a.tobytes() == b.tobytes()


def test_attention_reads_its_keys() -> None:
    decode, prompt = (problem(ON_CPU[f"attention-{kind}"]) for kind in ("decode", "prompt"))
    each = 2 * 2 * 48 * 4  # of a key and a value in float32
    assert decode.more_bytes == 3 * 50 * each
    assert prompt.more_bytes == 37 * each
    assert prompt.more_operations == 4 * 4 * 48 * sum(min(i + 1, 7) for i in range(37))


def test_what_nobody_knows_has_a_reason() -> None:
    call = dataclasses.replace(ON_CPU["rope"], composite="attention")
    assert problem_of(call, 50) == "nothing here knows what attention computes"
