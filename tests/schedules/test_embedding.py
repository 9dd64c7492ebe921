"""Embedding rows are exactly the values of the format, times the scale."""

import numpy as np
import pytest

from tests.kernel_runner import KernelRunner, host_target, lower
from tilewright.compiler.checkpoint import BLOCK_FORMATS, DENSE_FORMATS
from tilewright.compiler.composites import EmbeddingSpec
from tilewright.compiler.targets.base import Target
from tilewright.models.quant import FORMATS
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cpu.embedding import Embedding

EMBEDDING = Embedding()
TARGETS = [host_target(), Target("avx2", "cpu", "x86_64", ("avx2", "fma"), "x86-64-v3", ("-f16c",))]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize(
    "form,vocab,features,scale",
    [(f, 77, 96, 1.0) for f in BLOCK_FORMATS]
    + [(f, 33, 32, 48.5) for f in BLOCK_FORMATS]
    + [(f, 50, 37, 24.0) for f in DENSE_FORMATS]
    + [("f32", 1, 1, 1.0), ("f16", 16, 48, 1.0)],
)
def test_rows_are_exact(form, vocab, features, scale, target):
    rng = np.random.default_rng()
    packed = FORMATS[form].pack(rng.normal(size=(vocab, features)).astype(np.float32))
    tokens = np.concatenate([[0, vocab - 1, vocab - 1], rng.integers(0, vocab, 10)]).astype(np.int32)
    spec = EmbeddingSpec(vocab, features, form, scale)
    run = KernelRunner(lower(EMBEDDING, Call("embedding", spec, None, 64), target), target)
    expected = FORMATS[form].unpack(packed, vocab, features)[tokens] * np.float32(scale)
    for m in (1, len(tokens)):
        np.testing.assert_array_equal(run(packed, tokens[:m].copy(), m=m)[0], expected[:m])


@pytest.mark.parametrize(
    "spec,target,reason",
    [
        (EmbeddingSpec(8, 8, "q9"), host_target(), "'q9' is none of"),
        (EmbeddingSpec(8, 40, "q4_0"), host_target(), "40 features are no multiple"),
        (EmbeddingSpec(8, 8), Target("gpu", "cuda", "sm_90a"), "needs a cpu target, not cuda"),
    ],
)
def test_what_does_not_fit_is_rejected_with_the_reason(spec, target, reason):
    rejected = EMBEDDING.match(Call("embedding", spec, None, 8), target)
    assert isinstance(rejected, Reject)
    assert reason in rejected.reason
