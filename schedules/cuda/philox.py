"""The sampler's random numbers on a GPU: Philox4x32-10 (Salmon et al. 2011), one number a draw."""

from typing import Any

from tvm.script import tirx as T

# As CUDA source: TVM simplifies products and sums of uint32 as if they never wrapped around.
_UNIFORM = """
__device__ __forceinline__ float tw_uniform(long long seed, int draws) {
  unsigned int c0 = (unsigned int)draws, c1 = 0, c2 = 0, c3 = 0;
  unsigned int k0 = (unsigned int)seed, k1 = (unsigned int)((unsigned long long)seed >> 32);
  #pragma unroll
  for (int i = 0; i < 10; ++i) {
    unsigned int high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    unsigned int high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (float)(c0 >> 8) * 0x1p-24f;
}
"""


def uniform(seed: Any, draws: Any) -> Any:
    """The float32 in [0, 1) of a request's draw. seed: int64, its halves are the key; draws: int32, the counter."""
    return T.cuda.func_call("tw_uniform", seed, draws, source_code=_UNIFORM, return_type="float32")
