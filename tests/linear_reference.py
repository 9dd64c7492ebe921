"""Linear layers in numpy: the exact arithmetic of the block kernels, plain float64, and random arguments for both."""

from dataclasses import dataclass

import numpy as np

from tests.tolerances import TOLERANCE
from tilewright.compiler.composites import LinearSpec
from tilewright.models.quant import FORMATS, base
from tilewright.schedules.cpu.linear_common import LinearFacts

GREATEST = {8: 127, 16: 32639}  # magnitude of an activation, by bits
STEPS = 254  # from the least activation of a block to the greatest, where there is an offset


def random_arguments(spec: LinearSpec, m: int) -> list[np.ndarray]:
    """The composite's arguments in order. One input in 50 is an outlier, as in real residual streams."""
    rng = np.random.default_rng()
    x = rng.normal(size=(m, LinearFacts(spec, m).prologue.in_width)).astype(np.float32)
    x[rng.random(x.shape) < 0.02] *= 20
    weight = rng.normal(scale=0.1, size=(spec.out_features, spec.in_features)).astype(np.float32)
    arguments = [x, FORMATS[spec.weight_format].pack(weight)]
    if spec.norm:
        arguments.append(rng.normal(size=spec.in_features).astype(np.float32))
    if spec.bias:
        arguments.append(rng.normal(size=spec.out_features).astype(np.float32))
    if spec.residual:
        arguments.append(rng.normal(size=(m, spec.out_features)).astype(np.float32))
    return arguments


def rows_of(spec: LinearSpec, arguments: list[np.ndarray], first: int, end: int) -> list[np.ndarray]:
    """The arguments of a call on rows first .. end alone."""
    chosen = [arguments[0][first:end].copy(), *arguments[1:]]
    if spec.residual:
        chosen[-1] = arguments[-1][first:end].copy()
    return chosen


@dataclass(frozen=True)
class _Split:
    weight: np.ndarray  # packed
    inputs: np.ndarray  # float64[m, k], after the prologue
    added: np.ndarray | float  # bias and residual


def _split(spec: LinearSpec, arguments: list[np.ndarray]) -> _Split:
    x, _, *rest = (a.astype(np.float64) if a.dtype == np.float32 else a for a in arguments)
    if spec.norm:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + spec.norm.eps) * rest.pop(0)
    if spec.gated:
        gate, up = np.split(x, 2, axis=-1)
        x = _activation(spec.gated.activation, gate) * up
    return _Split(arguments[1], x, sum(rest, 0.0))


def _activation(name: str, x: np.ndarray) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def float_reference(spec: LinearSpec, arguments: list[np.ndarray]) -> np.ndarray:
    """float64 with the exact values of the weight."""
    parts = _split(spec, arguments)
    weight = FORMATS[spec.weight_format].unpack(parts.weight, spec.out_features, spec.in_features)
    return parts.inputs @ weight.astype(np.float64).T + parts.added


def rounding_bound(spec: LinearSpec, arguments: list[np.ndarray]) -> np.ndarray:
    """float64[m, n]: how far off an output may be. Activations are integers, off by half a step s of their block each,
    which is sum(s / 2 * |w|); the rest is float32, off in proportion to the sum of the magnitudes of its terms."""
    parts = _split(spec, arguments)
    weight = np.abs(FORMATS[spec.weight_format].unpack(parts.weight, spec.out_features, spec.in_features)).astype(float)
    blocks = lambda a: a.reshape(len(a), -1, base.BLOCK)  # noqa: E731
    steps = _step(spec, blocks(parts.inputs))[..., 0]
    magnitudes = np.abs(parts.inputs) @ weight.T + np.abs(parts.added)
    return steps / 2 @ blocks(weight).sum(-1).T + TOLERANCE["float32"] * magnitudes


def has_offset(spec: LinearSpec) -> bool:
    return spec.activation_bits == 8 and spec.weight_format != "q8_0"


def _extent(spec: LinearSpec, blocks: np.ndarray) -> tuple[np.ndarray, int]:
    """What the steps of each block span, and how many they are."""
    if has_offset(spec):
        ends = blocks.max(-1, keepdims=True), blocks.min(-1, keepdims=True)
        return np.maximum(ends[0], 0) - np.minimum(ends[1], 0), STEPS
    return np.abs(blocks).max(-1, keepdims=True), GREATEST[spec.activation_bits]


def _step(spec: LinearSpec, blocks: np.ndarray) -> np.ndarray:
    extent, steps = _extent(spec, blocks)
    return extent / steps


def integer_reference(spec: LinearSpec, arguments: list[np.ndarray]) -> np.ndarray:
    """int8 or int16 activations in blocks of 32, exact block dots, float64 sums. Without a prologue the integers are
    those of the kernels; behind one a value at a tie may fall on the other side."""
    parts = _split(spec, arguments)
    m, n, blocks = len(parts.inputs), spec.out_features, spec.in_features // base.BLOCK
    x = parts.inputs.astype(np.float32).reshape(m, blocks, base.BLOCK)
    extent, steps = _extent(spec, x)
    inverse = np.divide(np.float32(steps), extent, out=np.zeros_like(extent), where=extent > 0)
    q = np.rint(x * inverse).astype(np.int64)
    scale = (extent * np.float32(1 / steps)).astype(np.float64)[..., 0]
    w, d, low = _weight_blocks(spec, parts.weight)
    dots = np.einsum("mbi,nbi->mnb", q, w)
    sums = np.einsum("mnb,nb,mb->mn", dots, d, scale) + np.einsum("nb,mb,mb->mn", low, scale, q.sum(-1))
    assert sums.shape == (m, n)
    return sums + parts.added


def _weight_blocks(spec: LinearSpec, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 values [n, KB, 32], scales and minima float64[n, KB]."""
    n = spec.out_features
    if spec.weight_format == "q8_0":
        vectors = packed[..., :512].reshape(*packed.shape[:2], 8, 64)
        values, start = base.from_vectors(vectors, n).view(np.int8).astype(np.int64), 512
    else:
        values, start = base.unpack_nibbles(packed[..., :256], n).astype(np.int64), 256
    if spec.weight_format == "q4_0":
        values = values - 8
    d = base.unpack_halves(packed[..., start : start + 32], n).astype(np.float64)
    if spec.weight_format != "q4_1":
        return values, d, np.zeros_like(d)
    return values, d, base.unpack_halves(packed[..., start + 32 :], n).astype(np.float64)
