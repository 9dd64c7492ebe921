"""Rows of a table on a GPU: exact where nothing scales them."""

import pytest

from tests.cuda_runner import CudaRunner, cuda_target
from tests.kernel_runner import lower
from tests.schedules.cuda.row_inputs import RandomRows, compare
from tilewright.compiler.composites import EmbeddingSpec
from tilewright.compiler.packed_weights import ROWS
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cuda.embedding import Embedding
from tilewright.schedules.cuda.rows import VectorTile

# Vocabulary, features, format, scale, dtype.
CASES = [
    EmbeddingSpec(101, 576, "bf16_rows", dtype="bfloat16"),
    EmbeddingSpec(1000, 4096, "bf16_rows", 64.0, "bfloat16"),
    EmbeddingSpec(33, 37, "f16_rows", 3.3, "float16"),
    EmbeddingSpec(7, 1, "bf16_rows", dtype="float16"),
    EmbeddingSpec(57, 68, "f16_rows", 0.1, "float32"),
]
IDS = [f"{s.vocab}x{s.features}-{s.weight_format}-{s.dtype}" for s in CASES]


def call(spec: EmbeddingSpec) -> Call:
    return Call("embedding", spec, None, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", CASES, ids=IDS)
def test_values_and_equal_bits_for_any_number_of_rows(spec: EmbeddingSpec) -> None:
    import torch

    random = RandomRows()
    run = CudaRunner(lower(Embedding(), call(spec), cuda_target()))
    table = random.normal(spec.vocab, spec.features, dtype=ROWS[spec.weight_format])
    tokens = random.integers(-3, spec.vocab + 3, 131)
    tokens[:4] = torch.tensor([-(2**31), 2**31 - 1, spec.vocab - 1, 0])
    (whole,) = run(table, tokens, m=131)
    rows = table[tokens.clamp(0, spec.vocab - 1)].double()
    compare(whole, rows * spec.scale, spec.dtype)
    if spec.scale == 1.0:
        assert torch.equal(whole, rows.to(whole.dtype))
    for part in (slice(0, 1), slice(130, 131), slice(17, 64)):
        assert torch.equal(run(table, tokens[part], m=part.stop - part.start)[0], whole[part])


@pytest.mark.gpu
def test_a_table_of_more_values_than_an_int32_counts() -> None:
    import torch

    spec = EmbeddingSpec(2**19 + 11, 4096, "bf16_rows", dtype="bfloat16")
    run = CudaRunner(lower(Embedding(), call(spec), cuda_target()))
    table = torch.empty(spec.vocab, spec.features, dtype=torch.bfloat16, device="cuda")
    table[-1] = row = RandomRows().normal(1, spec.features, dtype="bfloat16")[0]
    tokens = torch.tensor([spec.vocab - 1], dtype=torch.int32, device="cuda")
    assert torch.equal(run(table, tokens, m=1)[0][0], row)


@pytest.mark.parametrize("record", ["nvidia-h100", "nvidia-a100", "nvidia-l40s"])
def test_compiles_for_every_architecture(record: str) -> None:
    target = RECORDS[record]
    run = CudaRunner(lower(Embedding(), call(CASES[1]), target), target)
    assert " LOCAL:0" in run.resources(0)


@pytest.mark.parametrize(
    "spec, reason",
    [
        (EmbeddingSpec(10, 64, "bf16"), "a table in bf16 is none of bf16_rows, f16_rows"),
        (EmbeddingSpec(10, 64, "q8_0"), "a table in q8_0"),
        (EmbeddingSpec(10, 64, "bf16_rows", dtype="int8"), "values in int8"),
    ],
)
def test_rejects_with_a_reason(spec: EmbeddingSpec, reason: str) -> None:
    rejected = Embedding().match(call(spec), cuda_target())
    assert isinstance(rejected, Reject) and reason in rejected.reason


@pytest.mark.parametrize("threads", [0, 48, 2048])
def test_tile_checks_itself(threads: int) -> None:
    with pytest.raises(ValueError, match=f"{threads} threads are no block"):
        VectorTile(threads)


def test_floor_counts_each_byte_once() -> None:
    facts = Embedding().match(call(CASES[0]), cuda_target())
    floor = Embedding().floor(facts, cuda_target())
    assert (floor.bytes_fixed, floor.bytes_per_row) == (0, 4 + 576 * 4)
