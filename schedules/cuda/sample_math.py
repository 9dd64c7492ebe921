"""Scalar functions of the sampler's kernel, as CUDA source where TIR has no word for them."""

from typing import Any

from tvm.script import tirx as T

LOG2_E = 1.4426950408889634
LOWEST = -3.4028234663852886e38  # the lowest finite float32
LOWEST_KEY = 0x00800000  # its key
EVERY_LANE = 0xFFFFFFFF

_KEY = """
__device__ __forceinline__ unsigned int tw_key(float x) {
  unsigned int bits = __float_as_uint(x + 0.0f);
  return bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}
"""
_KEY_VALUE = """
__device__ __forceinline__ float tw_key_value(unsigned int key) {
  return __uint_as_float(key ^ ((key >> 31) ? 0x80000000u : 0xFFFFFFFFu));
}
"""
_EXP = """
__device__ __forceinline__ float tw_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
"""
_BETWEEN = """
__device__ __forceinline__ unsigned int tw_between(unsigned int low, unsigned int high, unsigned int eighths) {
  return low + (unsigned int)(((unsigned long long)(high - low) * eighths) >> 3);
}
"""
_COUNT_UP = """
__device__ __forceinline__ int tw_count_up(int* counter, int by) { return atomicAdd(counter, by); }
"""
_HIGHEST_LANE = """
__device__ __forceinline__ int tw_highest_lane(unsigned int ballot) { return 31 - __clz(ballot); }
"""
_PLACE = """
__device__ __forceinline__ unsigned long long tw_place(float x, int token) {
  unsigned int bits = __float_as_uint(x + 0.0f);
  bits ^= (bits >> 31) ? 0xFFFFFFFFu : 0x80000000u;
  return ((unsigned long long)bits << 32) | (0xFFFFFFFFu - (unsigned int)token);
}
"""
_PLACE_TOKEN = """
__device__ __forceinline__ int tw_place_token(unsigned long long place) {
  return (int)(0xFFFFFFFFu - (unsigned int)place);
}
"""


def key(x: Any) -> Any:
    """float32 -> uint32 in the same order; both zeros are one."""
    return T.cuda.func_call("tw_key", x, source_code=_KEY, return_type="uint32")


def key_value(k: Any) -> Any:
    """The float32 of a key."""
    return T.cuda.func_call("tw_key_value", k, source_code=_KEY_VALUE, return_type="float32")


def exp(x: Any) -> Any:
    """e^x by the processor's power of two: relative error 2^-22 + |x| 2^-24, results below 2^-126 are 0."""
    return T.cuda.func_call("tw_exp", x, source_code=_EXP, return_type="float32")


def between(low: Any, high: Any, eighths: Any) -> Any:
    """The uint32 so many eighths of the way from low to high, rounded down."""
    return T.cuda.func_call("tw_between", low, high, T.uint32(eighths), source_code=_BETWEEN, return_type="uint32")


def count_up(counter: Any, by: Any) -> Any:
    """Adds to an int32 in memory that others add to as well; what it was before."""
    return T.cuda.func_call("tw_count_up", counter, by, source_code=_COUNT_UP, return_type="int32")


def place(x: Any, token: Any) -> Any:
    """A uint64 that orders (float32, token): larger floats first, then lower tokens; the largest comes first."""
    return T.cuda.func_call("tw_place", x, token, source_code=_PLACE, return_type="uint64")


def place_token(p: Any) -> Any:
    """The token of a place."""
    return T.cuda.func_call("tw_place_token", p, source_code=_PLACE_TOKEN, return_type="int32")


def highest_lane(ballot: Any) -> Any:
    """The highest lane of a ballot that is not empty."""
    return T.cuda.func_call("tw_highest_lane", ballot, source_code=_HIGHEST_LANE, return_type="int32")


def lowest_lane(ballot: Any) -> Any:
    """The lowest lane of a ballot that is not empty."""
    return T.cuda.ffs_u32(ballot) - 1


def ballot(condition: Any) -> Any:
    """A bit for every lane of the warp."""
    return T.cuda.ballot_sync(T.uint32(EVERY_LANE), T.cast(condition, "int32"))


def across(x: Any, mask: int) -> Any:
    """x of the lane whose number differs in the bits of `mask`."""
    return T.tvm_warp_shuffle_xor(T.uint32(EVERY_LANE), x, mask, 32, 32)


def below(x: Any, distance: int) -> Any:
    """x of the lane so many below; its own in the lowest ones."""
    return T.tvm_warp_shuffle_up(T.uint32(EVERY_LANE), x, distance, 32, 32)


def of_lane(x: Any, lane: Any) -> Any:
    """x of one lane."""
    return T.tvm_warp_shuffle(T.uint32(EVERY_LANE), x, lane, 32, 32)
