"""Headers that stand in for CCCL's and the driver's, in whose place the source that TVM generates includes them.

It uses a few names of each. The real ones take five times as long to read as a large kernel takes to compile, and leave
a thousand symbols in every cubin, which a driver then loads.
"""

_INTEGERS = """\
#pragma once
namespace cuda { namespace std {
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
} }
"""

_TYPE_TRAITS = """\
#pragma once
namespace cuda { namespace std {
template <bool V> struct bool_constant { static constexpr bool value = V; };
template <class A, class B> struct is_same : bool_constant<false> {};
template <class A> struct is_same<A, A> : bool_constant<true> {};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <class T> struct is_floating_point : bool_constant<false> {};
template <> struct is_floating_point<float> : bool_constant<true> {};
template <> struct is_floating_point<double> : bool_constant<true> {};
template <class T> struct is_integral : bool_constant<false> {};
template <> struct is_integral<bool> : bool_constant<true> {};
template <> struct is_integral<char> : bool_constant<true> {};
template <> struct is_integral<signed char> : bool_constant<true> {};
template <> struct is_integral<unsigned char> : bool_constant<true> {};
template <> struct is_integral<short> : bool_constant<true> {};
template <> struct is_integral<unsigned short> : bool_constant<true> {};
template <> struct is_integral<int> : bool_constant<true> {};
template <> struct is_integral<unsigned int> : bool_constant<true> {};
template <> struct is_integral<long> : bool_constant<true> {};
template <> struct is_integral<unsigned long> : bool_constant<true> {};
template <> struct is_integral<long long> : bool_constant<true> {};
template <> struct is_integral<unsigned long long> : bool_constant<true> {};
template <class T> struct is_signed : bool_constant<(T(-1) < T(0))> {};
template <class T> struct is_unsigned : bool_constant<!(T(-1) < T(0))> {};
template <bool C, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool C, class A, class B> struct conditional { typedef A type; };
template <class A, class B> struct conditional<false, A, B> { typedef B type; };
} }
"""

# A block's rank of a thread is all that is asked of groups.
_GROUPS = """\
#pragma once
namespace cooperative_groups {
struct thread_block {
  __device__ __forceinline__ unsigned thread_rank() const {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  }
};
__device__ __forceinline__ thread_block this_thread_block() { return thread_block(); }
}
"""

# The type of a kernel's parameter that describes a tensor to the copy engine.
_DRIVER = """\
#pragma once
struct alignas(64) CUtensorMap_st {
  unsigned long long opaque[16];
};
typedef struct CUtensorMap_st CUtensorMap;
"""

HEADERS: dict[str, str] = {
    "cuda.h": _DRIVER,
    "cuda/barrier": "#pragma once\n",
    "cuda/std/cstdint": _INTEGERS,
    "cuda/std/type_traits": _TYPE_TRAITS,
    "cooperative_groups.h": _GROUPS,
}

# What nvcc gives to every source, and NVRTC does not.
PREAMBLE = """\
#include <cuda.h>
#include <cuda/std/cstdint>
using namespace cuda::std;
#define INFINITY __int_as_float(0x7f800000)
#define __asm__ asm
#define __volatile__ volatile
"""
