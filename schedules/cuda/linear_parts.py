"""Where a linear's sum over K is taken in parts on Hopper GPUs: that makes its bits, so all its kernels agree on it."""

from tilewright.compiler.composites import LinearSpec

_PARTS = 4
_LONG = 1024  # values of K
_DEEPEST = 128  # stage of K that a kernel loads; a part is made of whole ones
_SMALL_BYTES = 8 << 20
_NARROW = 2048  # outputs


def is_small(spec: LinearSpec) -> bool:
    """Whether launches and latencies, rather than reading the weight, are most of the time with few tokens."""
    return 2 * spec.out_features * spec.in_features <= _SMALL_BYTES


def is_narrow(spec: LinearSpec) -> bool:
    """Whether one chain of all K takes a wgmma longer than all multiprocessors take to read the weight: 16 values of K
    are 30 ns in a chain, and 10 ns of reading for a thousand outputs."""
    return spec.out_features <= _NARROW


def parts_of(spec: LinearSpec) -> int:
    """Equal parts that every kernel takes a linear's sum over K in, for any tokens: they depend on N and K alone. One
    chain of all K would be most of the time of a small or narrow weight, and parts are work for more warps at once."""
    k = spec.in_features
    return _PARTS if (is_small(spec) or is_narrow(spec)) and k >= _LONG and k % (_PARTS * _DEEPEST) == 0 else 1
