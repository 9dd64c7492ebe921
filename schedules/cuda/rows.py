"""Rows of values in memory as kernels take them: vectors of up to 16 bytes in, float32 between, vectors out.

A row of K values is K / width vectors. Which thread holds which of them, and in what order their sums are added up,
follows from K and the dtype alone: neither other rows nor the number of them change a row's bits.

The functions emit statements into the kernel that is being written. Loads and stores are instructions by name, which no
compiler moves over a `griddepcontrol.wait`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from tvm.script import tirx as T

from tilewright.schedules.base import Reject
from tilewright.schedules.cuda.pairs import pack_pair, unpack_pair

WARP = 32
MOST_THREADS = 1024  # of a block
VECTOR_BYTES = 16
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of the dtypes that rows may have


def refuse_dtype(dtype: str) -> Reject | None:
    """A rejection of what is none of the dtypes of rows."""
    return None if dtype in BYTES else Reject(f"values in {dtype} are none of {', '.join(BYTES)}")


def power_of_two(count: int) -> int:
    """The smallest power of two that is no less than `count`."""
    return 1 << (count - 1).bit_length()


@dataclass(frozen=True)
class Vector:
    """`width` neighbouring values, a power of two of them, that one instruction loads or stores.

    In registers they lie as they do in memory: two 16-bit values to a word, or a word or half of one for each value.
    """

    dtype: str
    width: int

    @staticmethod
    def widest(dtypes: Sequence[str], *extents: int) -> "tuple[Vector, ...]":
        """One vector for each dtype, all as wide as the extents and the widest dtype allow. extents: counts of values
        between addresses of vectors, in tensors whose first value has the alignment of a vector."""
        width = gcd(*extents, *(VECTOR_BYTES // BYTES[dtype] for dtype in dtypes))
        return tuple(Vector(dtype, width) for dtype in dtypes)

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise ValueError(f"values in {self.dtype} are none of {', '.join(BYTES)}")
        if self.width < 1 or self.width & (self.width - 1) or self.width * BYTES[self.dtype] > VECTOR_BYTES:
            raise ValueError(f"{self.width} values in {self.dtype} are no vector of at most {VECTOR_BYTES} bytes")

    @property
    def words(self) -> int:
        """Registers of a vector."""
        return max(1, self.width * BYTES[self.dtype] // 4)

    @property
    def word(self) -> str:
        """What is in a register."""
        if self.dtype == "float32":
            return "float32"
        return "uint32" if self.width > 1 else "uint16"

    def registers(self, count: int = 1) -> Any:
        """A local buffer for `count` vectors."""
        return T.alloc_local([count * self.words], self.word)

    def load(self, registers: Any, address: Any, index: Any = 0) -> None:
        """Loads vector `index` of the registers."""
        T.evaluate(T.ptx[f"ld.global{self._suffix}"](*self._part(registers, index), address))

    def store(self, address: Any, registers: Any, index: Any = 0) -> None:
        """Stores vector `index` of the registers."""
        T.evaluate(T.ptx[f"st.global{self._suffix}"](address, *self._part(registers, index)))

    def clear(self, registers: Any, index: Any = 0) -> None:
        """Sets vector `index` of the registers to zeros."""
        for i in range(self.words):
            T.buffer_store(registers, T.Cast(self.word, 0), [index * self.words + i])

    def values(self, registers: Any, index: Any = 0) -> list[Any]:
        """The values of vector `index`, as expressions in float32."""
        words = self._part(registers, index)
        if self.dtype == "float32":
            return words
        if self.width == 1:
            return [_widened(words[0], self.dtype)]
        return [unpack_pair(words[i // 2], i % 2, self.dtype) for i in range(self.width)]

    def round(self, registers: Any, values: Sequence[Any], index: Any = 0) -> None:
        """Rounds float32 values into vector `index` of the registers."""
        for i, word in enumerate(self._part(registers, index)):
            if self.word == "uint32":
                T.evaluate(pack_pair(word, values[2 * i], values[2 * i + 1], self.dtype))
            else:
                value = values[i] if self.dtype == "float32" else _narrowed(values[i], self.dtype)
                T.buffer_store(registers, value, [index * self.words + i])

    @property
    def _suffix(self) -> str:
        return f".v{self.words}" * (self.words > 1) + (".b16" if self.word == "uint16" else ".b32")

    def _part(self, registers: Any, index: Any) -> list[Any]:
        return [registers[index * self.words + i] for i in range(self.words)]


@dataclass(frozen=True)
class VectorTile:
    """A thread for each vector of a matrix. threads: of a block."""

    threads: int

    def __post_init__(self) -> None:
        if not WARP <= self.threads <= MOST_THREADS or self.threads % WARP:
            raise ValueError(f"{self.threads} threads are no block of 1 to {MOST_THREADS // WARP} warps")


def load_floats(registers: Any, address: Callable[[Any], Any], at: Any, count: int, index: Any = 0) -> None:
    """Loads `count` float32 values, a power of two, to registers[index * count:]. address(i) is that of value i."""
    vector = Vector("float32", min(count, VECTOR_BYTES // 4))
    parts = count // vector.width
    for i in range(parts):
        vector.load(registers, address(at + i * vector.width), index * parts + i)


def add_squares(total: Any, values: Sequence[Any]) -> None:
    """Adds the values' squares to total[0], one after the other."""
    for value in values:
        T.evaluate(T.ptx["fma.rn.f32"](total[0], value, value, total[0]))


def add_up(total: Any, thread: Any, threads: int) -> None:
    """Sums total[0] over `threads` neighbouring threads, a power of two, in pairs; all of them get the sum.

    More than a warp of them are the whole block. Every thread of the block must take part, once in a kernel.
    """
    if threads > 1:
        T.buffer_store(total, T.cuda.warp_sum(total[0], min(threads, WARP)), [0])
    if threads > WARP:
        _add_up_warps(total, thread, threads // WARP)


def _add_up_warps(total: Any, thread: Any, warps: int) -> None:
    parts = T.alloc_shared([warps], "float32")
    with T.If(thread % WARP == 0), T.Then():
        T.buffer_store(parts, total[0], [thread // WARP])
    T.evaluate(T.cuda.cta_sync())
    sums = T.alloc_local([warps], "float32")
    each = min(warps, 4)
    for i in range(0, warps, each):
        address = parts.ptr_to([i])
        T.evaluate(T.ptx[f"ld.shared.v{each}.f32"](*(sums[i + j] for j in range(each)), address))
    while warps > 1:
        warps //= 2
        for i in range(warps):
            T.buffer_store(sums, sums[i] + sums[i + warps], [i])
    T.buffer_store(total, sums[0], [0])


def _widened(half: Any, dtype: str) -> Any:
    if dtype == "float16":
        return T.Cast("float32", T.reinterpret("float16", half))
    # A bfloat16 is the upper half of a float32.
    return T.reinterpret("float32", T.shift_left(T.Cast("uint32", half), T.uint32(16)))


def _narrowed(value: Any, dtype: str) -> Any:
    return T.reinterpret("uint16", T.Cast(dtype, value))
