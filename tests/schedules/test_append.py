"""kv_append and qkv_append against numpy: every slot named is written, no other byte of the pages changes."""

import numpy as np
import pytest

from tests.kernel_runner import KernelRunner, aligned_empty, host_target, lower
from tests.tolerances import assert_close
from tilewright.compiler.composites import AppendSpec, KVFormat, NormSpec, QKVAppendSpec, RopeSpec
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cpu.kv_append import KVAppend
from tilewright.schedules.cpu.qkv_append import QKVAppend
from tilewright.schedules.cpu.rms_norm import RMSNorm
from tilewright.schedules.cpu.rope import Rope

FORMATS = [
    KVFormat(2, 3, 64, 16),
    KVFormat(1, 2, 48, 32, k_transposed=False),
    KVFormat(3, 1, 80, 48),
    KVFormat(2, 2, 40, 16, "float16"),
]
IDS = ["3x64", "rows-2x48", "80-page48", "float16-40"]


def empty_pages(kv: KVFormat, count: int) -> np.ndarray:
    return aligned_empty((kv.layers, count, 2, kv.kv_heads, kv.page_size * kv.head_dim), kv.dtype)


def some_slots(kv: KVFormat, pages: int, rows: int, rng: np.random.Generator) -> np.ndarray:
    slots = rng.permutation(pages * kv.page_size)[:rows].astype(np.int32)
    slots[rng.random(rows) < 0.2] = -1
    return slots


def write(kv: KVFormat, pages: np.ndarray, slots: np.ndarray, k: np.ndarray, v: np.ndarray, layer: int) -> None:
    for t, slot in enumerate(slots):
        if slot >= 0:
            page, offset = pages[layer, slot // kv.page_size], slot % kv.page_size
            shape = (kv.kv_heads, kv.head_dim, kv.page_size)
            rows = (
                page[0].reshape(shape).swapaxes(1, 2) if kv.k_transposed else page[0].reshape(kv.kv_heads, -1, shape[1])
            )
            rows[:, offset] = k[t].astype(kv.dtype)
            page[1].reshape(kv.kv_heads, kv.page_size, kv.head_dim)[:, offset] = v[t].astype(kv.dtype)


@pytest.mark.parametrize("kv", FORMATS, ids=IDS)
def test_kv_append(kv: KVFormat) -> None:
    rng = np.random.default_rng()
    run = KernelRunner(lower(KVAppend(), Call("kv_append", AppendSpec(kv), None, 64)))
    for rows in (1, 17, 40):
        k, v = rng.standard_normal((2, rows, kv.kv_heads, kv.head_dim)).astype(np.float32)
        slots = some_slots(kv, 4, rows, rng)
        pages, expected = empty_pages(kv, 4), empty_pages(kv, 4)
        write(kv, expected, slots, k, v, kv.layers - 1)
        run(pages, k, v, slots, kv.layers - 1, m=rows)
        np.testing.assert_array_equal(pages, expected)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("kv", FORMATS, ids=IDS)
def test_qkv_append(kv: KVFormat, norm: bool) -> None:
    """Bit for bit what split, rms_norm, rope and kv_append give one after the other."""
    rng = np.random.default_rng()
    heads, groups, dim = 3 * kv.kv_heads, kv.kv_heads, kv.head_dim
    spec = QKVAppendSpec(heads, kv, NormSpec(dim, 1e-6) if norm else None)
    run = KernelRunner(lower(QKVAppend(), Call("qkv_append", spec, None, 64)))
    normalise = KernelRunner(lower(RMSNorm(), Call("rms_norm", NormSpec(dim, 1e-6), None, 64)))
    weights = [rng.standard_normal(dim).astype(np.float32) for _ in range(2)] if norm else []
    for rows in (1, 17):
        qkv = rng.standard_normal((rows, (heads + 2 * groups) * dim)).astype(np.float32)
        angle = rng.uniform(0, 100, (rows, dim // 2))
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        q, k, v = (part.reshape(rows, -1, dim) for part in np.split(qkv, [heads * dim, (heads + groups) * dim], -1))
        if norm:
            q, k = (
                normalise(x.reshape(-1, dim).copy(), w)[0].reshape(x.shape)
                for x, w in zip((q, k), weights, strict=True)
            )
        q, k = (
            KernelRunner(lower(Rope(), Call("rope", RopeSpec(x.shape[1], dim), None, 64)))(x.copy(), cos, sin)[0]
            for x in (q, k)
        )
        slots = some_slots(kv, 3, rows, rng)
        pages, expected = empty_pages(kv, 3), empty_pages(kv, 3)
        write(kv, expected, slots, k, v, 0)
        got, same = run(qkv, cos, sin, *weights, pages, slots, 0)
        np.testing.assert_array_equal(got, q)
        assert same is pages
        np.testing.assert_array_equal(pages, expected)
        assert_close(got[0], q[0])


def test_rejects_with_a_reason() -> None:
    for kv, reason in [(KVFormat(1, 1, 20, 16), "head size 20"), (KVFormat(1, 1, 64, 16, "int8"), "pages of int8")]:
        for schedule, spec in [(KVAppend(), AppendSpec(kv)), (QKVAppend(), QKVAppendSpec(2, kv))]:
            rejected = schedule.match(Call(schedule.composite, spec, None, 8), host_target())
            assert isinstance(rejected, Reject) and reason in rejected.reason
    spec = QKVAppendSpec(2, KVFormat(1, 1, 64, 16), NormSpec(32, 1e-5))
    rejected = QKVAppend().match(Call("qkv_append", spec, None, 8), host_target())
    assert isinstance(rejected, Reject) and "norm over 32" in rejected.reason


def test_floors_count_each_byte_once() -> None:
    target, kv = host_target(), KVFormat(1, 3, 64, 16)
    facts = KVAppend().match(Call("kv_append", AppendSpec(kv), None, 1), target)
    assert KVAppend().floor(facts, target).bytes_per_row == 2 * 192 * 8 + 4
    facts = QKVAppend().match(Call("qkv_append", QKVAppendSpec(9, kv), None, 1), target)
    assert QKVAppend().floor(facts, target).bytes_per_row == 4 * (15 * 64 + 64 + 1 + 9 * 64) + 2 * 192 * 4
