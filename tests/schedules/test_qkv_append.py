"""qkv_append against its parts: every slot named is written, no other byte of the pages changes."""

import numpy as np
import pytest

from tests.kernel_runner import KernelRunner, host_target, lower
from tests.pages import FORMATS, IDS, empty_pages, some_slots, write
from tilewright.compiler.composites import KVFormat, NormSpec, QKVAppendSpec, RopeSpec
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cpu.qkv_append import QKVAppend
from tilewright.schedules.cpu.rms_norm import RMSNorm
from tilewright.schedules.cpu.rope import Rope


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("kv", FORMATS, ids=IDS)
def test_has_the_bits_of_its_parts(kv: KVFormat, norm: bool) -> None:
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


@pytest.mark.parametrize(
    "spec, reason",
    [
        (QKVAppendSpec(2, KVFormat(1, 1, 20, 16)), "head size 20"),
        (QKVAppendSpec(2, KVFormat(1, 1, 64, 16, "int8")), "pages of int8"),
        (QKVAppendSpec(2, KVFormat(1, 1, 64, 16), NormSpec(32, 1e-5)), "norm over 32"),
    ],
)
def test_rejects_with_a_reason(spec: QKVAppendSpec, reason: str) -> None:
    rejected = QKVAppend().match(Call("qkv_append", spec, None, 8), host_target())
    assert isinstance(rejected, Reject) and reason in rejected.reason


def test_one_thread_takes_as_many_rows_as_their_keys_allow() -> None:
    def few_rows(kv_heads: int, dim: int) -> int:
        spec = QKVAppendSpec(kv_heads, KVFormat(1, kv_heads, dim, 16))
        facts = QKVAppend().match(Call("qkv_append", spec, None, 8), host_target())
        return QKVAppend().space(facts, host_target())[0].few_rows

    assert (few_rows(3, 64), few_rows(8, 128), few_rows(64, 128)) == (16, 3, 1)


def test_floor_counts_each_byte_once() -> None:
    facts = QKVAppend().match(Call("qkv_append", QKVAppendSpec(9, KVFormat(1, 3, 64, 16)), None, 1), host_target())
    assert QKVAppend().floor(facts, host_target()).bytes_per_row == 4 * (15 * 64 + 64 + 1 + 9 * 64) + 2 * 192 * 4
