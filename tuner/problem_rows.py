"""Composites that treat rows by themselves: norms, gates, rotations, linears and embeddings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright.compiler.composites import AnglesSpec, EmbeddingSpec, GatedSpec, LinearSpec, NormSpec, RopeSpec
from tilewright.tuner.problem_base import (
    CLOSE,
    CLOSE_BITS,
    Array,
    Compared,
    Composite,
    Rng,
    gated,
    norm,
    normal,
    rotated,
    some,
)

PANEL = 16  # rows of a weight side by side in the formats that are no plain rows
_ROWS = {"bf16_rows": "bfloat16", "f16_rows": "float16"}
_DISTINCT = 4096  # rows of a weight before they repeat: to pack a large one whole would take a minute


class Norm(Composite):
    spec: NormSpec

    def arguments(self, rng: Rng) -> list[Array | int]:
        shape = (self.rows, *self.problem.inner, self.spec.features)
        return [normal(shape, rng, self.spec.dtype), normal((self.spec.features,), rng)]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        at = some(self.rows, np.random.default_rng(1))
        return [Compared("y", results[0][at], norm(self.spec, arguments[0][at], arguments[1]), self.close)]


class Gated(Composite):
    spec: GatedSpec

    def arguments(self, rng: Rng) -> list[Array | int]:
        return [normal((self.rows, 2 * self.spec.features), rng, self.spec.dtype)]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        at = some(self.rows, np.random.default_rng(1))
        return [Compared("y", results[0][at], gated(self.spec, arguments[0][at]), self.close)]


class Rope(Composite):
    spec: RopeSpec

    def arguments(self, rng: Rng) -> list[Array | int]:
        angles = normal((self.rows, self.spec.head_dim // 2), rng)
        x = normal((self.rows, self.spec.heads, self.spec.head_dim), rng)
        return [x, np.cos(angles), np.sin(angles)]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        return [Compared("y", results[0], rotated(*arguments), self.close)]


class Angles(Composite):
    spec: AnglesSpec

    def arguments(self, rng: Rng) -> list[Array | int]:
        half = self.spec.head_dim // 2
        frequencies = 1e4 ** (-np.arange(half) / half)
        return [rng.integers(0, 1 << 17, self.rows).astype(np.int32), frequencies.astype(np.float32)]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        positions, frequencies = arguments
        angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)
        return [
            Compared(name, result, turn(angles), self.close)
            for name, result, turn in zip(("cos", "sin"), results, (np.cos, np.sin), strict=True)
        ]


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


class Linear(Composite):
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
            return max(CLOSE[spec.dtype], CLOSE[spec.out_dtype]) if spec.out_dtype != "float32" else 1e-4
        return CLOSE_BITS[spec.activation_bits]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        spec, rest = self.spec, list(arguments[2:])
        rng = np.random.default_rng(1)
        rows = some(self.rows, rng)
        columns = self._columns(rng)
        x = arguments[0][rows].astype(np.float32)
        if spec.norm:
            x = norm(spec.norm, x, rest.pop(0))
        if spec.gated:
            x = gated(spec.gated, x)
        bias = rest.pop(0) if spec.bias else None
        y = self._product(x, arguments[1], bias, columns)
        if spec.gate:
            up = self._product(x, arguments[1], bias, columns + spec.out_features // 2)
            y = gated(spec.gate, np.concatenate([y, up], axis=-1))
        if spec.residual:
            y = y + rest.pop(0)[rows][:, columns].astype(np.float32)
        return [Compared("y", results[0][rows][:, columns], y, self.close)]

    def _columns(self, rng: Rng) -> Array:
        """Some columns of the result, in runs."""
        starts = some(-(-self.spec.result_features // PANEL), rng) * PANEL
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


class Embedding(Composite):
    spec: EmbeddingSpec

    def arguments(self, rng: Rng) -> list[Array | int]:
        tokens = rng.integers(0, self.spec.vocab, self.rows).astype(np.int32)
        return [_weight(self.spec.weight_format, self.spec.vocab, self.spec.features, rng), tokens]

    def compared(self, arguments: Sequence[Any], results: Sequence[Array]) -> list[Compared]:
        spec, at = self.spec, some(self.rows, np.random.default_rng(1))
        tokens = arguments[1][at]
        if spec.weight_format in _ROWS:
            rows = arguments[0][tokens].astype(np.float32)
        else:
            panels = _unpacked(spec.weight_format, arguments[0], spec.features, tokens // PANEL)
            rows = panels.reshape(len(at), PANEL, spec.features)[np.arange(len(at)), tokens % PANEL]
        return [Compared("y", results[0][at], rows * np.float32(spec.scale), self.close)]
