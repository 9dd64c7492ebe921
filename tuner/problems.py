"""What a task computes: arguments for a composite of so many rows, and what its result has to be, in numpy.

Free of TVM where weights are rows, as they are on GPUs: it runs in the process that measures, which needs no compiler.
Results are held to float32 on some of their rows and columns here, enough to find any mistake of a kernel; the others
are held to the default tile's, bit for bit (measuring.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.compiler.calls import Call
from tilewright.compiler.composites import (
    SAMPLING_INPUTS,
    AppendSpec,
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

PANEL = 16  # rows of a weight side by side in the formats that are no plain rows
_ROWS = {"bf16_rows": "bfloat16", "f16_rows": "float16"}
_DISTINCT = 4096  # rows of a weight before they repeat: to pack a large one whole would take a minute
_CHECKED = 32  # rows of a result, and panels of its columns, that are compared with numpy
_PAGES_BYTES = 8 << 30  # of a KV cache at most

# How far a result may be off, by its norm and by its largest entry: rounding of results, or of the activations that a
# kernel multiplies. What is wrong is off by far more.
_CLOSE = {"float32": 1e-4, "bfloat16": 6e-3, "float16": 1e-3}
_CLOSE_BITS = {16: 1e-3, 8: 3e-2}

Array = np.ndarray
Rng = np.random.Generator


@dataclass(frozen=True)
class Problem:
    """A composite call to be measured. context: tokens in the cache of a sequence that decodes."""

    composite: str
    spec: Any
    rows: int
    inner: tuple[int, ...]
    decode: bool
    context: int

    @cached_property
    def _kind(self) -> "_Composite":
        return _COMPOSITES[self.composite](self)

    def arguments(self) -> list[Array | int]:
        """The composite's arguments, the same in every process."""
        return self._kind.arguments(np.random.default_rng(0))

    def complaint(self, arguments: Sequence[Any], results: Sequence[Array]) -> str:
        """What is wrong with the results, "" where nothing is."""
        for compared in self._kind.compared(arguments, results):
            error = distance(compared.actual, compared.expected)
            if not error <= compared.most_error:
                return f"{compared.what} is off by {error:.2g}, more than {compared.most_error:g}"
        return ""

    @property
    def layer_argument(self) -> int | None:
        """The index of the layer among the arguments, where pages are."""
        return self._kind.layer_argument

    @property
    def layers(self) -> int:
        """Of the pages, 1 where there are none."""
        return self.spec.kv.layers if hasattr(self.spec, "kv") else 1

    @property
    def settled(self) -> tuple[int, ...]:
        """The results whose every bit a kernel has to settle, by their place."""
        return self._kind.settled

    @property
    def more_bytes(self) -> int:
        """What a call reads beyond its schedule's floor, which knows no positions."""
        return self._kind.more_bytes

    @property
    def more_operations(self) -> int:
        return self._kind.more_operations


@dataclass(frozen=True)
class Compared:
    what: str
    actual: Array
    expected: Array
    most_error: float


def problem_of(call: Call, context: int) -> Problem | str:
    """The problem of a call, or why there is none."""
    if call.composite not in _COMPOSITES:
        return f"nothing here knows what {call.composite} computes"
    return Problem(call.composite, call.spec, call.rows, call.inner, call.decode, context)


def distance(actual: Array, expected: Array) -> float:
    """The larger of: the norm of the difference by the expected's; its largest entry by that of the expected. NaN where
    there is a NaN."""
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    difference = actual - expected
    norm, peak = np.linalg.norm(expected), np.abs(expected).max()
    if not norm:
        return float(np.abs(difference).max())
    return float(np.maximum(np.linalg.norm(difference) / norm, np.abs(difference).max() / peak))


def numpy_dtype(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def normal(shape: Sequence[int], rng: Rng, dtype: str = "float32", scale: float = 1.0) -> Array:
    """Normal numbers, which repeat after a prime number of them: to draw hundreds of millions would take seconds."""
    block = (rng.standard_normal(262147, np.float32) * np.float32(scale)).astype(numpy_dtype(dtype))
    return np.resize(block, tuple(shape))


def _some(count: int, rng: Rng) -> Array:
    """Some of so many indices, the first and the last among them, in order."""
    if count <= _CHECKED:
        return np.arange(count)
    between = rng.choice(np.arange(1, count - 1), _CHECKED - 2, replace=False)
    return np.sort(np.concatenate([[0, count - 1], between]))


class _Composite:
    """What Problem asks of one composite."""

    layer_argument: int | None = None
    settled: tuple[int, ...] = (0,)
    more_bytes = 0
    more_operations = 0

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.spec: Any = problem.spec
        self.rows = problem.rows

    @property
    def close(self) -> float:
        return _CLOSE[getattr(self.spec, "dtype", "float32")]

    def arguments(self, rng: Rng) -> list[Array | int]:
        raise NotImplementedError

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        raise NotImplementedError


def _norm(spec: NormSpec, x: Array, weight: Array) -> Array:
    x = x.astype(np.float32)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(spec.eps)) * weight


def _gated(spec: GatedSpec, x: Array) -> Array:
    gate, up = np.split(x.astype(np.float32), 2, axis=-1)
    with np.errstate(over="ignore"):
        if spec.activation == "silu":
            return gate / (1 + np.exp(-gate)) * up
    return 0.5 * gate * (1 + np.tanh(np.float32(0.7978845608) * (gate + 0.044715 * gate**3))) * up


class _Norm(_Composite):
    spec: NormSpec

    def arguments(self, rng: Rng) -> list[Array | int]:
        shape = (self.rows, *self.problem.inner, self.spec.features)
        return [normal(shape, rng, self.spec.dtype), normal((self.spec.features,), rng)]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        at = _some(self.rows, np.random.default_rng(1))
        return [Compared("y", results[0][at], _norm(self.spec, arguments[0][at], arguments[1]), self.close)]


class _Gated(_Composite):
    spec: GatedSpec

    def arguments(self, rng: Rng) -> list[Array | int]:
        return [normal((self.rows, 2 * self.spec.features), rng, self.spec.dtype)]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        at = _some(self.rows, np.random.default_rng(1))
        return [Compared("y", results[0][at], _gated(self.spec, arguments[0][at]), self.close)]


class _Rope(_Composite):
    spec: RopeSpec

    def arguments(self, rng: Rng) -> list[Array | int]:
        angles = normal((self.rows, self.spec.head_dim // 2), rng)
        x = normal((self.rows, self.spec.heads, self.spec.head_dim), rng)
        return [x, np.cos(angles), np.sin(angles)]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        return [Compared("y", results[0], _rotated(*arguments), self.close)]


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    a, b = np.split(x.astype(np.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


# ---- weights ---------------------------------------------------------------------------------------------------------


def _weight(name: str, n: int, k: int, rng: Rng) -> Array:
    """A packed weight [n, k]; the rows of a large one repeat."""
    if name in _ROWS:
        return normal((n, k), rng, _ROWS[name], k**-0.5)
    from tilewright.models.quant import FORMATS

    panels = -(-n // PANEL)
    packed = FORMATS[name].pack(normal((min(n, _DISTINCT), k), rng, scale=k**-0.5))
    return np.ascontiguousarray(packed[np.arange(panels) % len(packed)])


def _unpacked(name: str, packed: Array, k: int, panels: Array) -> Array:
    """float32 rows of the given panels of a packed weight."""
    if name in _ROWS:
        return packed[(panels[:, None] * PANEL + np.arange(PANEL)).ravel()].astype(np.float32)
    from tilewright.models.quant import FORMATS

    return FORMATS[name].unpack(packed[panels], len(panels) * PANEL, k)


class _Linear(_Composite):
    spec: LinearSpec

    def arguments(self, rng: Rng) -> list[Array | int]:
        spec, rows = self.spec, self.rows
        width = 2 * spec.in_features if spec.gated else spec.in_features
        arguments: list[Array | int] = [normal((rows, width), rng, spec.dtype)]
        arguments.append(_weight(spec.weight_format, spec.out_features, spec.in_features, rng))
        if spec.norm:
            arguments.append(normal((spec.in_features,), rng))
        if spec.bias:
            arguments.append(normal((spec.out_features,), rng))
        if spec.residual:
            arguments.append(normal((rows, spec.result_features), rng, spec.dtype))
        return arguments

    @property
    def close(self) -> float:
        spec = self.spec
        if spec.weight_format in _ROWS or spec.weight_format in ("f32", "f16", "bf16"):
            return max(_CLOSE[spec.dtype], _CLOSE[spec.out_dtype]) if spec.out_dtype != "float32" else 1e-4
        return _CLOSE_BITS[spec.activation_bits]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        spec, rest = self.spec, list(arguments[2:])
        rng = np.random.default_rng(1)
        rows = _some(self.rows, rng)
        columns = self._columns(rng)
        x = arguments[0][rows].astype(np.float32)
        if spec.norm:
            x = _norm(spec.norm, x, rest.pop(0))
        if spec.gated:
            x = _gated(spec.gated, x)
        bias = rest.pop(0) if spec.bias else None
        y = self._product(x, arguments[1], bias, columns)
        if spec.gate:
            up = self._product(x, arguments[1], bias, columns + spec.out_features // 2)
            y = _gated(spec.gate, np.concatenate([y, up], axis=-1))
        if spec.residual:
            y = y + rest.pop(0)[rows][:, columns].astype(np.float32)
        return [Compared("y", results[0][rows][:, columns], y, self.close)]

    def _columns(self, rng: Rng) -> Array:
        """Some columns of the result, in runs."""
        starts = _some(-(-self.spec.result_features // PANEL), rng) * PANEL
        columns = (starts[:, None] + np.arange(PANEL)).ravel()
        return columns[columns < self.spec.result_features]

    def _product(self, x: Array, packed: Array, bias: Array | None, columns: Array) -> Array:
        if self.spec.weight_format in _ROWS:
            weight = packed[columns].astype(np.float32)
        else:
            panels = np.unique(columns // PANEL)
            rows = (panels[:, None] * PANEL + np.arange(PANEL)).ravel()
            whole = _unpacked(self.spec.weight_format, packed, self.spec.in_features, panels)
            weight = whole[np.searchsorted(rows, columns)]
        y = x @ weight.T
        return y if bias is None else y + bias[columns]


class _Embedding(_Composite):
    spec: EmbeddingSpec

    def arguments(self, rng: Rng) -> list[Array | int]:
        tokens = rng.integers(0, self.spec.vocab, self.rows).astype(np.int32)
        return [_weight(self.spec.weight_format, self.spec.vocab, self.spec.features, rng), tokens]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        spec, at = self.spec, _some(self.rows, np.random.default_rng(1))
        tokens = arguments[1][at]
        if spec.weight_format in _ROWS:
            rows = arguments[0][tokens].astype(np.float32)
        else:
            panels = _unpacked(spec.weight_format, arguments[0], spec.features, tokens // PANEL)
            rows = panels.reshape(len(at), PANEL, spec.features)[np.arange(len(at)), tokens % PANEL]
        return [Compared("y", results[0][at], rows * np.float32(spec.scale), self.close)]


# ---- pages -----------------------------------------------------------------------------------------------------------


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


class _Append(_Composite):
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
    return [Compared("keys", keys, k, _CLOSE[kv.dtype]), Compared("values", values, v, _CLOSE[kv.dtype])]


class _QKVAppend(_Composite):
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
            q, k = _norm(spec.norm, q, arguments[3]), _norm(spec.norm, k, arguments[4])
        q, k = (_rotated(x, arguments[1], arguments[2]) for x in (q, k))
        slots = arguments[4 + self._norms]
        return [Compared("q", results[0], q, self.close), *_appended(kv, results[1], slots, k, v)]


class _Attention(_Composite):
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
        at = _some(self.rows, np.random.default_rng(1))
        expected = np.stack([self._row(arguments, int(row)) for row in at])
        return [Compared("out", results[0][at], expected, max(self.close, _CLOSE[self.spec.kv.dtype]))]

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


# ---- sampling --------------------------------------------------------------------------------------------------------


class _Sample(_Composite):
    """Rows by turns greedy and drawn with top-k and top-p; what is greedy is compared with numpy."""

    spec: SampleSpec
    settled = (0, 1)

    def arguments(self, rng: Rng) -> list[Array | int]:
        rows, drawn = self.rows, np.arange(self.rows) % 2
        values: dict[str, Any] = {
            "temperature": drawn * 0.8,
            "top_k": drawn * 50,
            "top_p": 1 - drawn * 0.1,
            "repetition_penalty": np.ones(rows),
            "seeds": np.arange(rows) + 1,
        }
        lists = {"r": rows, "r+1": rows + 1, "c": 1, "e": 1}
        inputs = [np.asarray(values.get(n, np.zeros(lists[e])), d) for n, (e, d) in SAMPLING_INPUTS.items()]
        return [normal((rows, self.spec.vocab), rng, scale=4.0), *inputs]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        logits = arguments[0][::2].astype(np.float64)
        peak = logits.max(1, keepdims=True)
        expected = -np.log(np.exp(logits - peak).sum(1))
        said, last = results[0][::2], self.spec.vocab - 1
        theirs = np.take_along_axis(logits, np.clip(said, 0, last)[:, None], 1)[:, 0]
        chosen = np.where((said >= 0) & (said <= last), theirs, np.nan)
        return [
            Compared("the greedy choice", chosen, peak[:, 0], 0.0),
            Compared("its log-probability", results[1][::2], expected, 1e-4),
        ]


_COMPOSITES: dict[str, Callable[[Problem], _Composite]] = {
    "linear": _Linear,
    "rms_norm": _Norm,
    "gated": _Gated,
    "rope": _Rope,
    "embedding": _Embedding,
    "kv_append": _Append,
    "qkv_append": _QKVAppend,
    "paged_attention": _Attention,
    "sample": _Sample,
}


def with_layer(arguments: Sequence[Any], problem: Problem, layer: int) -> list[Any]:
    """The arguments with another layer in them."""
    return [layer if i == problem.layer_argument else a for i, a in enumerate(arguments)]
