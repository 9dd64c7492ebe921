"""From the format a model file stores a weight in to one that kernels read, without needless rounding.

| stored as | becomes | error |
|---|---|---|
| f32, f16, bf16, q4_0, q4_1, q8_0 | itself | none |
| q4_k | q4_1 | scales and minima rounded to float16, the 4-bit values kept |
| any other quantised type | q8_0 | rounded to 8 bits a block of 32 |

A weight made of several (q, k and v side by side) takes one format that holds all: q4_0 beside q4_1 is q4_1 exactly,
other mixtures of quantised parts are q8_0, and a dense part makes the whole f32.
"""

from collections.abc import Sequence

import numpy as np

from tilewright.compiler.checkpoint import DENSE_FORMATS, LazyTensor
from tilewright.models.quant import FORMATS
from tilewright.models.quant.base import BLOCK, half_bytes

_SUPER_BLOCK = 256  # inputs of a q4_k block: 8 sub-blocks of 32


def kernel_format(stored: Sequence[str], in_features: int) -> str:
    """The weight format for the rows of tensors stored as `stored`, put together. Reads no data."""
    own = {_own_format(s, in_features) for s in stored}
    if len(own) == 1:
        return own.pop()
    if own & set(DENSE_FORMATS):
        return "f32"
    return "q4_1" if own == {"q4_0", "q4_1"} else "q8_0"


def _own_format(stored: str, in_features: int) -> str:
    if stored in FORMATS:
        return stored
    if in_features % BLOCK:
        return "f16"
    return "q4_1" if stored == "q4_k" and in_features % _SUPER_BLOCK == 0 else "q8_0"


def requested_format(wanted: str, in_features: int) -> str:
    """`wanted`, or f16 where a block format does not divide the inputs."""
    return "f16" if FORMATS[wanted].block > 1 and in_features % BLOCK else wanted


def pack_tensors(tensors: Sequence[LazyTensor], weight_format: str) -> np.ndarray:
    """The rows of all tensors, one after the other, packed as `weight_format`. Raw data is kept wherever it can be."""
    target = FORMATS[weight_format]
    return target.pack_raw(np.concatenate([_raw_as(t, weight_format) for t in tensors]))


def _raw_as(tensor: LazyTensor, weight_format: str) -> np.ndarray:
    """The raw form of one tensor in another format, by the most exact way there is."""
    raw = tensor.read_raw() if tensor.read_raw is not None else None
    if raw is not None and tensor.format == weight_format:
        return raw.view(np.uint16) if weight_format == "bf16" else raw
    if raw is not None and weight_format == "q4_1" and tensor.format in _TO_Q4_1:
        return _TO_Q4_1[tensor.format](raw)
    made = FORMATS[weight_format].quantize(tensor.read())
    return made.view(np.uint16) if weight_format == "bf16" else made


def q4_1_from_q4_0(raw: np.ndarray) -> np.ndarray:
    """uint8[n, KB, 18] -> [n, KB, 20], exact: (q - 8) d = q d + (-8 d)."""
    scales = np.ascontiguousarray(raw[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    return np.concatenate([raw[..., :2], half_bytes(-8 * scales), raw[..., 2:]], axis=-1)


def q4_1_from_q4_k(raw: np.ndarray) -> np.ndarray:
    """uint8[n, k / 256, 144] -> [n, k / 32, 20]: each sub-block's d * scale and -dmin * min, rounded to float16.

    A q4_k block: float16 d, float16 dmin, 12 bytes with 8 scales and 8 minima of 6 bits, 128 bytes of nibbles (32 bytes
    for each pair of sub-blocks: the first in the low nibbles). ggml, `block_q4_K`.
    """
    n, supers, _ = raw.shape
    d, d_min = (np.ascontiguousarray(raw[..., i : i + 2]).view(np.float16).astype(np.float32) for i in (0, 2))
    scales, minima = _six_bits(raw[..., 4:16])
    pairs = raw[..., 16:].reshape(n, supers, 4, 1, 32)
    q = np.concatenate([pairs & 15, pairs >> 4], axis=3).reshape(n, supers, 8, BLOCK)
    halves = [half_bytes(d * scales), half_bytes(-d_min * minima)]
    blocks = np.concatenate([*halves, q[..., :16] | (q[..., 16:] << 4)], axis=-1)
    return blocks.reshape(n, supers * 8, 20)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8[..., 12] -> 8 scales, 8 minima: bytes 0-3 and 4-7 hold the first four of each, and two high bits of the
    last four; bytes 8-11 their low four bits."""
    a, b, c = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=-1)
    minima = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=-1)
    return scales, minima


_TO_Q4_1 = {"q4_0": q4_1_from_q4_0, "q4_k": q4_1_from_q4_k}
