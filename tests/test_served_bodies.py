"""The append body writes the slots it is given, in the layout of the cache, and nothing else."""

import numpy as np
import pytest
import tvm

from tests.reference import TARGET
from tilewright.compiler.composites import KVFormat
from tilewright.compiler.served_bodies import append_kernel


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("k_transposed", [True, False], ids=["k-dim-slot", "k-slot-dim"])
def test_append_writes_its_slots_and_skips_negative_ones(k_transposed, dtype):
    kv = KVFormat(layers=2, kv_heads=3, head_dim=5, page_size=4, dtype=dtype, k_transposed=k_transposed)
    rng = np.random.default_rng()
    k, v = (rng.normal(size=(4, kv.kv_heads, kv.head_dim)).astype("float32") for _ in range(2))
    slots = np.array([9, -1, 3, 24], "int32")  # page 2 slot 1, none, page 0 slot 3, page 6 slot 0
    before = np.full((kv.layers, 7, 2, kv.kv_heads, kv.page_size * kv.head_dim), np.nan, dtype)
    pages = tvm.runtime.tensor(before)
    mod = tvm.IRModule({"main": append_kernel(kv).with_attr("global_symbol", "main")})
    tvm.compile(mod, tvm.target.Target(TARGET))["main"](pages, *map(tvm.runtime.tensor, (k, v, slots)), 1)

    slot_dim = before.reshape(2, 7, 2, 3, 4, 5).copy()  # as [slot, dim] first
    for token, slot in enumerate(slots):
        if slot >= 0:
            slot_dim[1, slot // 4, 0, :, slot % 4] = k[token]
            slot_dim[1, slot // 4, 1, :, slot % 4] = v[token]
    expected = slot_dim.reshape(before.shape)
    if k_transposed:
        expected[:, :, 0] = slot_dim[:, :, 0].swapaxes(-1, -2).reshape(2, 7, 3, 20)
    np.testing.assert_array_equal(pages.numpy(), expected)
