"""qkv_append on a GPU: values against float64, every slot named is written, and no other byte of the pages changes."""

from typing import Any

import pytest

from tests.cuda_runner import CudaRunner, cuda_target
from tests.kernel_runner import lower
from tests.schedules.cuda.row_inputs import RandomRows, compare
from tilewright.compiler.composites import KVFormat, NormSpec, QKVAppendSpec
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cuda.qkv_append import QKVAppend

EPS = 1e-3


def spec_of(heads: int, kv_heads: int, dim: int, page_size: int, dtype: str, pages: str, norm: bool) -> QKVAppendSpec:
    kv = KVFormat(3, kv_heads, dim, page_size, pages, k_transposed=False)
    return QKVAppendSpec(heads, kv, NormSpec(dim, EPS, dtype) if norm else None, dtype)


CASES = [
    spec_of(9, 3, 64, 16, "bfloat16", "bfloat16", False),
    spec_of(4, 1, 256, 16, "bfloat16", "bfloat16", True),
    spec_of(32, 8, 128, 16, "float16", "float16", True),
    spec_of(5, 5, 80, 1, "bfloat16", "float16", True),
    spec_of(3, 1, 2, 3, "bfloat16", "bfloat16", False),
    spec_of(6, 2, 100, 5, "float16", "bfloat16", True),
    spec_of(2, 1, 1022, 2, "bfloat16", "bfloat16", True),
    spec_of(7, 1, 40, 64, "float32", "bfloat16", False),
]
IDS = [
    f"{s.heads}-{s.kv.kv_heads}-{s.kv.head_dim}-page{s.kv.page_size}-{s.dtype}{'-norm' * bool(s.norm)}" for s in CASES
]


def call(spec: QKVAppendSpec) -> Call:
    return Call("qkv_append", spec, None, 64)


def per_token(spec: QKVAppendSpec, random: RandomRows, m: int) -> tuple[Any, Any, Any]:
    """qkv, cos, sin"""
    dim = spec.kv.head_dim
    angles = random.normal(m, dim // 2, scale=50)
    qkv = random.normal(m, (spec.heads + 2 * spec.kv.kv_heads) * dim, dtype=spec.dtype)
    return qkv, angles.cos(), angles.sin()


def poisoned_pages(spec: QKVAppendSpec, count: int) -> Any:
    import torch

    kv = spec.kv
    shape = (kv.layers, count, 2, kv.kv_heads, kv.page_size * kv.head_dim)
    return torch.full(shape, float("nan"), dtype=getattr(torch, kv.dtype), device="cuda")


def reference(spec: QKVAppendSpec, qkv: Any, cos: Any, sin: Any, weights: list[Any]) -> tuple[Any, Any, Any]:
    """q[m,H,D], k, v[m,G,D] in float64."""
    import torch

    heads, groups, dim = spec.heads, spec.kv.kv_heads, spec.kv.head_dim
    q, k, v = qkv.double().view(len(qkv), -1, dim).split([heads, groups, groups], 1)

    def rotated(x: Any, weight: Any) -> Any:
        if spec.norm:
            x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        (a, b), c, s = x.chunk(2, -1), cos.double()[:, None], sin.double()[:, None]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    q_norm, k_norm = weights or (None, None)
    return rotated(q, q_norm), rotated(k, k_norm), v


def stored(spec: QKVAppendSpec, pages: Any, layer: int, slots: Any) -> Any:
    """[m, 2, G, D]: what the pages hold in the slots."""
    kv = spec.kv
    cells = pages[layer].unflatten(-1, (kv.page_size, kv.head_dim)).movedim(3, 1).flatten(0, 1)
    return cells[slots.long()]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", CASES, ids=IDS)
def test_values_and_equal_bits_for_any_number_of_rows(spec: QKVAppendSpec) -> None:
    import torch

    random, m, count, layer = RandomRows(), 131, 150, 1
    run = CudaRunner(lower(QKVAppend(), call(spec), cuda_target()))
    tokens = per_token(spec, random, m)
    weights = [random.normal(spec.kv.head_dim) for _ in range(2)] if spec.norm else []
    slots = torch.randperm(count * spec.kv.page_size, generator=random.generator, device="cuda")[:m].int()
    kept = torch.rand(m, generator=random.generator, device="cuda") < 0.8
    kept[0] = True
    slots[~kept] = -1
    pages = poisoned_pages(spec, count)
    q, same = run(*tokens, *weights, pages, slots, layer)
    assert same is pages
    expected = reference(spec, *tokens, weights)
    compare(q, expected[0], spec.dtype)
    found = stored(spec, pages, layer, slots[kept])
    compare(found[:, 0], expected[1][kept], spec.kv.dtype)
    compare(found[:, 1], expected[2][kept], spec.kv.dtype)
    written = int(kept.sum()) * 2 * spec.kv.kv_heads * spec.kv.head_dim
    assert int((~pages.isnan()).sum()) == written, "nothing else is written"

    for rows in (slice(0, 1), slice(130, 131), slice(17, 64)):
        fewer = poisoned_pages(spec, count)
        part, _ = run(*(t[rows] for t in tokens), *weights, fewer, slots[rows], layer)
        assert torch.equal(part, q[rows])
        some = slots[rows][kept[rows]]
        assert torch.equal(stored(spec, fewer, layer, some), stored(spec, pages, layer, some))


@pytest.mark.gpu
def test_pages_of_more_values_than_an_int32_counts() -> None:
    import torch

    spec = spec_of(2, 8, 128, 16, "bfloat16", "bfloat16", False)
    run = CudaRunner(lower(QKVAppend(), call(spec), cuda_target()))
    count = 2**31 // (2 * 2 * 8 * 128 * 16) + 9
    pages = torch.empty(3, count, 2, 8, 16 * 128, dtype=torch.bfloat16, device="cuda")
    tokens = per_token(spec, RandomRows(), 1)
    slots = torch.tensor([count * 16 - 1], dtype=torch.int32, device="cuda")
    run(*tokens, pages, slots, 2)
    found = stored(spec, pages[:, -1:], 2, torch.tensor([15], device="cuda"))
    compare(found[:, 1], reference(spec, *tokens, [])[2], "bfloat16")


@pytest.mark.parametrize("record", ["nvidia-h100", "nvidia-a100", "nvidia-l40s"])
@pytest.mark.parametrize("spec", [CASES[0], CASES[2], CASES[6]], ids=[IDS[0], IDS[2], IDS[6]])
def test_needs_no_local_memory(spec: QKVAppendSpec, record: str) -> None:
    target = RECORDS[record]
    assert " LOCAL:0" in CudaRunner(lower(QKVAppend(), call(spec), target), target).resources(0)


@pytest.mark.parametrize(
    "spec, reason",
    [
        (spec_of(2, 1, 63, 16, "bfloat16", "bfloat16", False), "head size 63"),
        (spec_of(2, 1, 2048, 16, "bfloat16", "bfloat16", False), "head size 2048"),
        (spec_of(2, 1, 64, 16, "bfloat16", "float32", False), "pages of float32"),
        (spec_of(2, 1, 64, 16, "float64", "float16", False), "values in float64"),
        (QKVAppendSpec(2, KVFormat(1, 1, 64, 16, "bfloat16", False), NormSpec(32, 1e-5)), "norm over 32"),
        (QKVAppendSpec(2, KVFormat(1, 1, 64, 16, "bfloat16")), "keys of a page lie [dim, slot]"),
    ],
)
def test_rejects_with_a_reason(spec: QKVAppendSpec, reason: str) -> None:
    rejected = QKVAppend().match(call(spec), cuda_target())
    assert isinstance(rejected, Reject) and reason in rejected.reason


def test_floor_counts_each_byte_once() -> None:
    facts = QKVAppend().match(call(CASES[0]), cuda_target())
    floor = QKVAppend().floor(facts, cuda_target())
    assert floor.bytes_per_row == 2 * (15 * 64 + 9 * 64) + 4 * 64 + 4 + 2 * 2 * 3 * 64
