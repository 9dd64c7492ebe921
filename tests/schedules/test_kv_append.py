"""kv_append against numpy: every slot named is written, no other byte of the pages changes."""

import numpy as np
import pytest

from tests.kernel_runner import KernelRunner, host_target, lower
from tests.pages import FORMATS, IDS, empty_pages, some_slots, write
from tilewright.compiler.composites import AppendSpec, KVFormat
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cpu.kv_append import KVAppend


@pytest.mark.parametrize("kv", FORMATS, ids=IDS)
def test_matches_numpy(kv: KVFormat) -> None:
    rng = np.random.default_rng()
    run = KernelRunner(lower(KVAppend(), Call("kv_append", AppendSpec(kv), None, 64)))
    for rows in (1, 17, 40):
        k, v = rng.standard_normal((2, rows, kv.kv_heads, kv.head_dim)).astype(np.float32)
        slots = some_slots(kv, 4, rows, rng)
        pages, expected = empty_pages(kv, 4), empty_pages(kv, 4)
        write(kv, expected, slots, k, v, kv.layers - 1)
        run(pages, k, v, slots, kv.layers - 1, m=rows)
        np.testing.assert_array_equal(pages, expected)


@pytest.mark.parametrize(
    "kv, target, reason",
    [
        (KVFormat(1, 1, 20, 16), host_target(), "head size 20"),
        (KVFormat(1, 1, 64, 16, "int8"), host_target(), "pages of int8"),
        (KVFormat(1, 1, 64, 16, "float16"), Target("old", "cpu", "x86_64"), "f16c, which old lacks"),
    ],
)
def test_rejects_with_a_reason(kv: KVFormat, target: Target, reason: str) -> None:
    rejected = KVAppend().match(Call("kv_append", AppendSpec(kv), None, 8), target)
    assert isinstance(rejected, Reject) and reason in rejected.reason


def test_floor_counts_each_byte_once() -> None:
    facts = KVAppend().match(Call("kv_append", AppendSpec(KVFormat(1, 3, 64, 16)), None, 1), host_target())
    assert KVAppend().floor(facts, host_target()).bytes_per_row == 2 * 192 * 8 + 4
