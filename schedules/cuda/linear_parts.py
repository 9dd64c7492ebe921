"""Where a linear's sum over K is taken in parts on Hopper GPUs: that makes its bits, so all its kernels agree on it."""

from tilewright.compiler.composites import LinearSpec

_PARTS = 4
_LONG = 1024  # values of K
_DEEPEST = 128  # stage of K that a kernel loads; a part is made of whole ones
_SMALL_BYTES = 8 << 20


def is_small(spec: LinearSpec) -> bool:
    """Whether launches and latencies, rather than reading the weight, are most of the time with few tokens."""
    return 2 * spec.out_features * spec.in_features <= _SMALL_BYTES


def parts_of(spec: LinearSpec) -> int:
    """Equal parts that every kernel takes a linear's sum over K in, for any tokens: they depend on N and K alone. One
    chain of all K would be most of the time of a small weight, and parts are work for more warps at once."""
    return _PARTS if is_small(spec) and spec.in_features >= _LONG and spec.in_features % (_PARTS * _DEEPEST) == 0 else 1
