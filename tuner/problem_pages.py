"""Composites that read and write pages of the KV cache."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright.compiler.composites import AppendSpec, KVFormat, PagedAttentionSpec, QKVAppendSpec
from tilewright.tuner.problem_base import (
    CLOSE,
    Array,
    Compared,
    Composite,
    Rng,
    norm,
    normal,
    numpy_dtype,
    rotated,
    some,
)

_PAGES_BYTES = 8 << 30  # of a KV cache at most


def _page_bytes(kv: KVFormat) -> int:
    """Of a page in all layers."""
    return kv.layers * 2 * kv.kv_heads * kv.page_size * kv.head_dim * numpy_dtype(kv.dtype).itemsize


def _pages(kv: KVFormat, count: int, rng: Rng) -> Array:
    return normal((kv.layers, count, 2, kv.kv_heads, kv.page_size * kv.head_dim), rng, kv.dtype)


def _cached(kv: KVFormat, pages: Array, layer: int, slots: Array) -> tuple[Array, Array]:
    """float32 keys and values [slot, kv_head, dim] that lie in the given slots."""
    page, offset = slots // kv.page_size, slots % kv.page_size
    order = (kv.head_dim, kv.page_size) if kv.k_transposed else (kv.page_size, kv.head_dim)
    keys = pages[layer, page, 0].reshape(len(slots), kv.kv_heads, *order)
    keys = np.swapaxes(keys, 2, 3) if kv.k_transposed else keys
    values = pages[layer, page, 1].reshape(len(slots), kv.kv_heads, kv.page_size, kv.head_dim)
    at = np.arange(len(slots))
    return keys[at, :, offset].astype(np.float32), values[at, :, offset].astype(np.float32)


class Append(Composite):
    spec: AppendSpec
    layer_argument = 4

    def arguments(self, rng: Rng) -> list[Array | int]:
        kv = self.spec.kv
        pages, slots = _slots(kv, self.rows, rng)
        k, v = (normal((self.rows, kv.kv_heads, kv.head_dim), rng) for _ in range(2))
        return [pages, k, v, slots, 0]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        return _appended(self.spec.kv, results[0], arguments[3], arguments[1], arguments[2])


def _slots(kv: KVFormat, rows: int, rng: Rng) -> tuple[Array, Array]:
    """Pages with room for so many tokens, and a slot for each."""
    count = -(-rows // kv.page_size) + 1
    return _pages(kv, count, rng), rng.permutation(count * kv.page_size)[:rows].astype(np.int32)


def _appended(kv: KVFormat, pages: Array, slots: Array, k: Array, v: Array) -> list[Compared]:
    keys, values = _cached(kv, pages, 0, slots)
    return [Compared("keys", keys, k, CLOSE[kv.dtype]), Compared("values", values, v, CLOSE[kv.dtype])]


class QKVAppend(Composite):
    spec: QKVAppendSpec

    @property
    def _norms(self) -> int:
        return 2 if self.spec.norm else 0

    @property
    def layer_argument(self) -> int:  # type: ignore[override]
        return 5 + self._norms

    settled = (0, 1)

    def arguments(self, rng: Rng) -> list[Array | int]:
        spec, kv = self.spec, self.spec.kv
        qkv = normal((self.rows, (spec.heads + 2 * kv.kv_heads) * kv.head_dim), rng, spec.dtype)
        angles = normal((self.rows, kv.head_dim // 2), rng)
        norms = [normal((kv.head_dim,), rng) for _ in range(self._norms)]
        pages, slots = _slots(kv, self.rows, rng)
        return [qkv, np.cos(angles), np.sin(angles), *norms, pages, slots, 0]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        spec, kv = self.spec, self.spec.kv
        joint = arguments[0].astype(np.float32).reshape(self.rows, -1, kv.head_dim)
        q, k, v = np.split(joint, [spec.heads, spec.heads + kv.kv_heads], axis=1)
        if spec.norm:
            q, k = norm(spec.norm, q, arguments[3]), norm(spec.norm, k, arguments[4])
        q, k = (rotated(x, arguments[1], arguments[2]) for x in (q, k))
        slots = arguments[4 + self._norms]
        return [Compared("q", results[0], q, self.close), *_appended(kv, results[1], slots, k, v)]


class Attention(Composite):
    spec: PagedAttentionSpec
    layer_argument = 8

    @property
    def _length(self) -> int:
        """Tokens of each sequence: what a decoding one has cached, as far as memory goes; or the prompt."""
        if not self.problem.decode:
            return self.rows
        kv = self.spec.kv
        room = _PAGES_BYTES // (_page_bytes(kv) * self.rows) * kv.page_size
        return max(1, min(self.problem.context, room))

    @property
    def _sequences(self) -> int:
        return self.rows if self.problem.decode else 1

    def _seen(self, position: int) -> int:
        """Keys that the query at a position reads."""
        window = self.spec.attention.window
        return min(position + 1, window) if window else position + 1

    def _positions(self) -> Array:
        return np.full(self.rows, self._length - 1) if self.problem.decode else np.arange(self.rows)

    @property
    def more_bytes(self) -> int:  # type: ignore[override]
        kv = self.spec.kv
        keys = self._seen(self._length - 1) if self.problem.decode else self.rows
        return self._sequences * keys * 2 * kv.kv_heads * kv.head_dim * numpy_dtype(kv.dtype).itemsize

    @property
    def more_operations(self) -> int:  # type: ignore[override]
        attention = self.spec.attention
        keys = sum(self._seen(int(p)) for p in self._positions())
        return 4 * attention.heads * attention.head_dim * keys

    def arguments(self, rng: Rng) -> list[Array | int]:
        attention, kv, sequences = self.spec.attention, self.spec.kv, self._sequences
        each = -(-self._length // kv.page_size)
        count = sequences * each
        q = normal((self.rows, attention.heads, attention.head_dim), rng, self.spec.dtype)
        pages = _pages(kv, count, rng)
        indptr = np.arange(sequences + 1) * (self.rows // sequences)
        tables = (self._positions(), indptr, np.arange(sequences + 1) * each, rng.permutation(count))
        lengths, phases = np.full(sequences, self._length), np.full(sequences, int(self.problem.decode))
        integers = [np.asarray(a, np.int32) for a in (*tables, lengths, phases)]
        sinks = [normal((attention.heads,), rng)] if attention.sinks else []
        return [q, pages, *integers, 0, *sinks]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        at = some(self.rows, np.random.default_rng(1))
        expected = np.stack([self._row(arguments, int(row)) for row in at])
        return [Compared("out", results[0][at], expected, max(self.close, CLOSE[self.spec.kv.dtype]))]

    def _row(self, arguments: Sequence[Any], row: int) -> Array:
        attention, kv = self.spec.attention, self.spec.kv
        q, pages, positions, _, page_indptr, page_indices = arguments[:6]
        position, sequence = int(positions[row]), row if self.problem.decode else 0
        keys = np.arange(position + 1 - self._seen(position), position + 1)
        slots = page_indices[page_indptr[sequence] + keys // kv.page_size] * kv.page_size + keys % kv.page_size
        k, v = _cached(kv, pages, 0, slots)
        group = attention.heads // attention.kv_heads
        k, v = (np.repeat(x, group, axis=1) for x in (k, v))
        score = np.einsum("hd,jhd->hj", q[row].astype(np.float32), k) * np.float32(attention.scale)
        if attention.soft_cap:
            score = np.float32(attention.soft_cap) * np.tanh(score / np.float32(attention.soft_cap))
        if attention.sinks:
            score = np.concatenate([score, arguments[9][:, None]], axis=1)
        weight = np.exp(score - score.max(1, keepdims=True))
        weight /= weight.sum(1, keepdims=True)
        return np.einsum("hj,jhd->hd", weight[:, : len(keys)], v)
