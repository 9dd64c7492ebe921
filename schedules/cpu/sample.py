"""The sampler on CPU, a row of logits a task. What it computes is written in passes/lower_sampling.py.

Nothing is sorted. The alternatives are popped from a copy of the row that remembers the maximum of each chunk of 256
tokens. The thresholds of top-k and top-p are found two bits at a time in the integer that orders floats: the largest
threshold that still keeps k tokens, or the mass p. All sums are float32 in a fixed order, so equal inputs give equal
bits, and a row's result does not depend on the other rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tilewright.compiler.composites import SAMPLING_INPUTS, SampleSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cpu.isa import (
    LANES,
    Buffer,
    Expr,
    argument,
    exp,
    fma_scalar,
    kernel,
    lane_index,
    load,
    max_lanes,
    maximum,
    registers,
    rows_symbol,
    settled,
    splat,
    store,
    sum_lanes,
    sum_lanes_i32,
)

CHUNK = 256  # tokens whose maximum, or sum, is kept together
CHUNK_VECTORS = CHUNK // LANES
INFINITY = float("inf")
LOWEST = -3.4028234663852886e38  # stands for -inf among the alternatives, where -inf means "taken"
NO_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class Tile:
    """bits: of a threshold, found in one pass over the row; a pass tries 2^bits - 1 thresholds at once."""

    bits: int = 2

    def __post_init__(self) -> None:
        if self.bits not in (1, 2):
            raise ValueError(f"bits {self.bits} is neither 1 nor 2; more thresholds at once do not fit in registers")


@dataclass(frozen=True)
class Facts:
    spec: SampleSpec


class Sample(Schedule):
    name = "sample"
    composite = "sample"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> Facts | Reject:
        spec = call.spec
        if not 1 <= spec.top_logprobs <= spec.vocab:
            return Reject(f"top_logprobs {spec.top_logprobs} is not within 1..{spec.vocab}, the vocabulary")
        return Facts(spec)

    def space(self, facts: Facts, target: Target) -> Sequence[Tile]:
        return [Tile(2), Tile(1)]

    def floor(self, facts: Facts, target: Target) -> Floor:
        """A greedy row: its logits once, an exponential each."""
        vocab = facts.spec.vocab
        return Floor(bytes_fixed=0, bytes_per_row=4 * vocab + 8 + 8 * facts.spec.top_logprobs, flops_per_row=20 * vocab)

    def apply(self, facts: Facts, tile: Tile, target: Target) -> Lowering:
        func = _Builder(facts.spec, tile).build(f"sample_v{facts.spec.vocab}")
        top = facts.spec.top_logprobs
        outputs = (
            Output("ids", ("m",), "int32"),
            Output("logprobs", ("m",), "float32"),
            Output("top_ids", ("m", top), "int32"),
            Output("top_logprobs", ("m", top), "float32"),
        )
        call = KernelCall(func, tuple(range(1 + len(SAMPLING_INPUTS))), outputs)
        return Lowering((call,), tuple(o.name for o in outputs))


class _Builder:
    """Emits the kernel. `row` is one thread's copy of a row: alternatives are popped from it, then weights are put
    there. Its end is padded to whole chunks."""

    def __init__(self, spec: SampleSpec, tile: Tile) -> None:
        self.vocab, self.top, self.bits = spec.vocab, spec.top_logprobs, tile.bits
        self.chunks = -(-spec.vocab // CHUNK)
        self.chunk_rows = -(-self.chunks // LANES)  # vectors of chunk maxima

    def build(self, name: str) -> tirx.PrimFunc:
        with kernel(name) as built:
            self._arguments()
            with T.parallel(0, self.m) as r:
                self.row = T.alloc_buffer((self.chunks * CHUNK,), "float32")
                self.chunk_max = T.alloc_buffer((self.chunk_rows * LANES,), "float32")
                self._sample_row(r)
        return built.get()

    def _arguments(self) -> None:
        self.m = rows_symbol("m")
        self.logits = argument("logits", (self.m, self.vocab), "float32")
        extents = {"r": self.m, "r+1": self.m + 1, "c": rows_symbol("c"), "e": rows_symbol("e")}
        self.inputs = {n: argument(n, (extents[e],), dtype) for n, (e, dtype) in SAMPLING_INPUTS.items()}
        self.ids = argument("ids", (self.m,), "int32")
        self.logprobs = argument("logprobs", (self.m,), "float32")
        self.top_ids = argument("top_ids", (self.m, self.top), "int32")
        self.top_logprobs = argument("top_logprobs", (self.m, self.top), "float32")

    def _sample_row(self, r: Expr) -> None:
        self._copy(r, lambda x: maximum(x, splat(LOWEST)))
        greatest = self._chunk_maxima()
        log_total = settled(greatest + self._log_sum(r, greatest), "float32")
        self._alternatives(r, log_total)
        token = T.alloc_buffer((1,), "int32")
        plain = T.And(self.inputs["temperature"][r] == T.float32(0.0), self._listed("penalty", r) == 0)
        with T.If(T.And(plain, self._listed("bias", r) == 0)):
            with T.Then():
                T.buffer_store(token, self.top_ids[r, 0], [0])
            with T.Else():
                self._copy(r, lambda x: x)
                self._penalise(r)
                with T.If(self.inputs["temperature"][r] == T.float32(0.0)):
                    with T.Then():
                        T.buffer_store(token, self._pop(self._chunk_maxima()), [0])
                    with T.Else():
                        self._filter(r)
                        T.buffer_store(token, self._draw(self._uniform(r)), [0])
        T.buffer_store(self.ids, token[0], [r])
        T.buffer_store(self.logprobs, self.logits[r, token[0]] - log_total, [r])

    # --- the row ------------------------------------------------------------------------------------------------------

    def _copy(self, r: Expr, change: Callable[[Expr], Expr]) -> None:
        """row = change(logits[r]), padded with -inf."""
        with T.serial(0, self.vocab // LANES) as i:
            store(self.row, change(load(self.logits, r, i * LANES)), i * LANES)
        padding = self.chunks * CHUNK - self.vocab
        if padding:
            with T.serial(0, padding) as i:
                T.buffer_store(self.row, T.float32(-INFINITY), [self.vocab + i])
        if rest := self.vocab % LANES:
            first = self.vocab - rest
            with T.serial(0, rest) as i:
                T.buffer_store(self.row, self.logits[r, first + i], [first + i])
            store(self.row, change(load(self.row, first)), first)
            with T.serial(0, LANES - rest) as i:
                T.buffer_store(self.row, T.float32(-INFINITY), [self.vocab + i])

    def _chunk_maxima(self) -> Expr:
        """chunk_max of every chunk, and the greatest of all."""
        with T.serial(0, self.chunk_rows) as i:
            store(self.chunk_max, splat(-INFINITY), i * LANES)
        with T.serial(0, self.chunks) as chunk:
            T.buffer_store(self.chunk_max, self._max_of(self.row, chunk * CHUNK, CHUNK_VECTORS), [chunk])
        return self._max_of(self.chunk_max, T.int32(0), self.chunk_rows)

    def _max_of(self, buffer: Buffer, first: Expr, vectors: int) -> Expr:
        best = registers()
        store(best, splat(-INFINITY), 0)
        with T.serial(0, vectors) as i:
            store(best, maximum(load(buffer, first + i * LANES), load(best, 0)), 0)
        return settled(max_lanes(load(best, 0)), "float32")

    def _first_equal(self, buffer: Buffer, first: Expr, vectors: int, value: Expr) -> Expr:
        """The lowest index at or after `first` that holds the value."""
        found = registers(dtype="int32")
        store(found, splat(NO_TOKEN), 0)
        with T.serial(0, vectors) as i:
            at = first + i * LANES
            index = T.Select(load(buffer, at) == splat(value), lane_index(at), splat(NO_TOKEN))
            store(found, T.min(load(found, 0), index), 0)
        return settled(T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smin.v16i32", load(found, 0)))

    def _log_sum(self, r: Expr, greatest: Expr) -> Expr:
        """log(sum(exp(logits[r] - greatest))), over the copy of it in `row`."""
        total = self._sum(lambda x: exp(x - splat(greatest)))
        return log(total)

    def _sum(self, term: Callable[[Expr], Expr]) -> Expr:
        return self._sums(lambda x: [term(x)], 1)[0]

    def _sums(self, terms: Callable[[Expr], Sequence[Expr]], count: int, at_least: Expr | None = None) -> list[Expr]:
        """Sums over the row of `count` terms of each vector: in a chunk, then over chunks, then over lanes.
        `at_least`: terms of smaller values are zero, so a chunk whose maximum is below it is passed over."""
        totals, parts = ([registers() for _ in range(count)] for _ in range(2))
        for total in totals:
            store(total, splat(0.0), 0)
        with self._chunks_with(at_least) as chunk:
            for part in parts:
                store(part, splat(0.0), 0)
            with T.serial(0, CHUNK_VECTORS) as i:
                for part, term in zip(parts, terms(load(self.row, chunk * CHUNK + i * LANES)), strict=True):
                    store(part, load(part, 0) + term, 0)
            for total, part in zip(totals, parts, strict=True):
                store(total, load(total, 0) + load(part, 0), 0)
        return [settled(sum_lanes(load(total, 0)), "float32") for total in totals]

    @contextmanager
    def _chunks_with(self, at_least: Expr | None) -> Iterator[Expr]:
        """A loop over the chunks that hold a value of at least that much, by `chunk_max`."""
        with T.serial(0, self.chunks) as chunk:
            if at_least is None:
                yield chunk
            else:
                with T.If(self.chunk_max[chunk] >= at_least), T.Then():
                    yield chunk

    # --- alternatives -------------------------------------------------------------------------------------------------

    def _alternatives(self, r: Expr, log_total: Expr) -> None:
        with T.serial(0, self.top) as i:
            token = self._pop(self._max_of(self.chunk_max, T.int32(0), self.chunk_rows))
            T.buffer_store(self.top_ids, token, [r, i])
            T.buffer_store(self.top_logprobs, self.logits[r, token] - log_total, [r, i])

    def _pop(self, greatest: Expr) -> Expr:
        """The lowest token with the greatest value, which is taken out of the row."""
        chunk = self._first_equal(self.chunk_max, T.int32(0), self.chunk_rows, greatest)
        token = self._first_equal(self.row, chunk * CHUNK, CHUNK_VECTORS, greatest)
        T.buffer_store(self.row, T.float32(-INFINITY), [token])
        T.buffer_store(self.chunk_max, self._max_of(self.row, chunk * CHUNK, CHUNK_VECTORS), [chunk])
        return token

    # --- penalties ----------------------------------------------------------------------------------------------------

    def _listed(self, kind: str, r: Expr) -> Expr:
        indptr = self.inputs[f"{kind}_indptr"]
        return indptr[r + 1] - indptr[r]

    def _penalise(self, r: Expr) -> None:
        inputs, row = self.inputs, self.row
        with T.serial(0, self._listed("bias", r)) as i:
            entry = T.bind(inputs["bias_indptr"][r] + i)
            token = T.bind(inputs["bias_tokens"][entry])
            T.buffer_store(row, row[token] + inputs["bias_values"][entry], [token])
        repetition, presence = T.bind(inputs["repetition_penalty"][r]), T.bind(inputs["presence_penalty"][r])
        frequency = T.bind(inputs["frequency_penalty"][r])
        with T.serial(0, self._listed("penalty", r)) as i:
            entry = T.bind(inputs["penalty_indptr"][r] + i)
            token, count = T.bind(inputs["penalty_tokens"][entry]), T.bind(inputs["penalty_counts"][entry])
            old = settled(row[token], "float32")
            repeated = T.Select(old > T.float32(0.0), old / repetition, old * repetition)
            T.buffer_store(row, repeated, [token])
            with T.If(count > 0), T.Then():
                T.buffer_store(row, row[token] - presence, [token])
                T.buffer_store(row, row[token] - _rounded(frequency * T.cast(count, "float32")), [token])

    # --- filters ------------------------------------------------------------------------------------------------------

    def _filter(self, r: Expr) -> None:
        """row becomes weights, exp(l / temperature - max), zero where top-k, top-p or min-p drops a token."""
        temperature = T.bind(self.inputs["temperature"][r])
        self._change(lambda x: x / splat(temperature))
        greatest = self._chunk_maxima()
        lowest = T.alloc_buffer((1,), "float32")
        T.buffer_store(lowest, T.float32(-INFINITY), [0])
        top_k = T.bind(self.inputs["top_k"][r])
        with T.If(T.And(top_k > 0, top_k < self.vocab)), T.Then():
            T.buffer_store(lowest, self._top_k_threshold(top_k), [0])
        least = settled(lowest[0], "float32")
        self._change(lambda x: T.Select(x < splat(least), splat(0.0), exp(x - splat(greatest))))

        T.buffer_store(lowest, self.inputs["min_p"][r], [0])  # the greatest weight is exp(0) = 1
        top_p = T.bind(self.inputs["top_p"][r])
        with T.If(top_p < T.float32(1.0)), T.Then():
            self._chunk_maxima()
            goal = settled(top_p * self._sum(lambda x: x), "float32")
            T.buffer_store(lowest, T.max(lowest[0], self._top_p_threshold(goal)), [0])
        kept = settled(lowest[0], "float32")
        self._change(lambda x: T.Select(x < splat(kept), splat(0.0), x))

    def _change(self, change: Callable[[Expr], Expr]) -> None:
        with T.serial(0, self.chunks * CHUNK_VECTORS) as i:
            store(self.row, change(load(self.row, i * LANES)), i * LANES)

    def _top_k_threshold(self, k: Expr) -> Expr:
        """The k-th largest value of the row."""

        def enough(thresholds: Sequence[Expr]) -> list[Expr]:  # the smallest first
            counts = [registers(dtype="int32") for _ in thresholds]
            for count in counts:
                store(count, splat(0), 0)
            with self._chunks_with(thresholds[0]) as chunk, T.serial(0, CHUNK_VECTORS) as i:
                x = load(self.row, chunk * CHUNK + i * LANES)
                for count, threshold in zip(counts, thresholds, strict=True):
                    store(count, load(count, 0) + T.Select(x >= splat(threshold), splat(1), splat(0)), 0)
            return [sum_lanes_i32(load(count, 0)) >= k for count in counts]

        order = self._largest(32, float_of_order, enough)
        return float_of_order(T.bind(T.max(order, ORDER_OF_MINUS_INFINITY)))

    def _top_p_threshold(self, goal: Expr) -> Expr:
        """The largest weight such that all weights from it on sum up to the goal. Bits order weights: none is < 0."""

        def float_of_bits(bits: Expr) -> Expr:
            return T.reinterpret("float32", bits)

        def enough(thresholds: Sequence[Expr]) -> list[Expr]:

            def kept(x: Expr) -> list[Expr]:
                return [T.Select(x >= splat(t), x, splat(0.0)) for t in thresholds]

            masses = self._sums(kept, len(thresholds), at_least=thresholds[0])
            return [mass >= goal for mass in masses]

        return float_of_bits(self._largest(32, float_of_bits, enough, done=2))

    def _largest(
        self,
        width: int,
        decode: Callable[[Expr], Expr],
        enough: Callable[[Sequence[Expr]], Sequence[Expr]],
        done: int = 0,
    ) -> Expr:
        """The largest integer of `width` bits, the first `done` of them zero, whose float keeps enough."""
        found = T.alloc_buffer((1,), "uint32")
        T.buffer_store(found, T.uint32(0), [0])
        passes = (width - done) // self.bits
        with T.serial(0, passes) as i:
            shift = T.cast(T.int32(self.bits) * (passes - 1 - i), "uint32")
            tried = [settled(found[0] + T.shift_left(T.uint32(c), shift), "uint32") for c in range(1, 2**self.bits)]
            verdicts = enough([settled(decode(t), "float32") for t in tried])
            for candidate, verdict in zip(tried, verdicts, strict=True):
                with T.If(verdict), T.Then():
                    T.buffer_store(found, candidate, [0])
        return settled(found[0], "uint32")

    # --- draw ---------------------------------------------------------------------------------------------------------

    def _uniform(self, r: Expr) -> Expr:
        """u in [0, 1) from Philox4x32-10 (Salmon et al. 2011)."""
        seed = T.bind(T.cast(self.inputs["seeds"][r], "uint64"))
        draw = T.cast(T.cast(self.inputs["draws"][r], "uint32"), "uint64")
        word = philox(draw, _low(seed), T.shift_right(seed, _u64(32)))
        return settled(
            T.cast(T.cast(T.shift_right(word, _u64(8)), "int32"), "float32") * T.float32(2.0**-24), "float32"
        )

    def _draw(self, u: Expr) -> Expr:
        """The first token whose cumulative weight exceeds u * total: the chunk first, then the token in it."""
        mass, token = T.alloc_buffer((1,), "float32"), T.alloc_buffer((1,), "int32")
        with T.serial(0, self.chunks) as chunk:
            part = registers()
            store(part, splat(0.0), 0)
            with T.serial(0, CHUNK_VECTORS) as i:
                store(part, load(part, 0) + load(self.row, chunk * CHUNK + i * LANES), 0)
            T.buffer_store(self.chunk_max, sum_lanes(load(part, 0)), [chunk])
        T.buffer_store(mass, T.float32(0.0), [0])
        with T.serial(0, self.chunks) as chunk:
            T.buffer_store(mass, mass[0] + self.chunk_max[chunk], [0])
        goal = settled(_rounded(u * mass[0]), "float32")
        first, before = T.alloc_buffer((1,), "int32"), T.alloc_buffer((1,), "float32")
        self._first_above(goal, T.float32(0.0), self.chunks, self.chunk_max, T.int32(0), first, before)
        start = settled(first[0] * CHUNK)
        self._first_above(goal, settled(before[0], "float32"), CHUNK, self.row, start, token, before)
        return settled(token[0])

    def _first_above(
        self, goal: Expr, mass: Expr, count: int, weights: Buffer, start: Expr, found: Buffer, before: Buffer
    ) -> None:
        """found[0]: the first index from `start` on where mass plus the weights up to it exceeds the goal, or the last
        with a weight, where rounding lets none; before[0]: the mass up to it."""
        running, done = T.alloc_buffer((1,), "float32"), T.alloc_buffer((1,), "int32")
        T.buffer_store(running, mass, [0])
        T.buffer_store(done, T.int32(0), [0])
        with T.serial(0, count) as i:
            weight = T.bind(weights[start + i])
            with T.If(T.And(done[0] == 0, weight > T.float32(0.0))), T.Then():
                T.buffer_store(found, start + i, [0])
                T.buffer_store(before, running[0], [0])
                T.buffer_store(running, running[0] + weight, [0])
                T.buffer_store(done, T.Select(running[0] > goal, T.int32(1), T.int32(0)), [0])


ORDER_OF_MINUS_INFINITY = T.uint32(0x007FFFFF)


def float_of_order(order: Expr) -> Expr:
    """The float at a place in the order of all floats: negative ones have all bits flipped, others the sign alone."""
    flipped = T.bitwise_xor(order, T.Select(order >= T.uint32(0x80000000), T.uint32(0x80000000), T.uint32(0xFFFFFFFF)))
    return T.reinterpret("float32", flipped)


def _rounded(product: Expr) -> Expr:
    """A product that LLVM may not fuse with a sum."""
    return T.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence.f32", product)


# log(1 + f) for 1 + f within [sqrt(1/2), sqrt(2)), highest power first (Cephes, logf).
_LOG_TERMS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def log(x: Expr) -> Expr:
    """Natural logarithm of a normal, positive scalar, relative error below 2e-7."""
    bits = T.bind(T.reinterpret("int32", x))
    shifted = T.bind(bits - T.int32(0x3F3504F3))  # the bits of sqrt(1/2)
    exponent = T.bind(T.cast(T.shift_right(shifted, T.int32(23)), "float32"))
    mantissa = T.bitwise_and(shifted, T.int32(0x007FFFFF)) + T.int32(0x3F3504F3)
    f = settled(T.reinterpret("float32", mantissa) - T.float32(1.0), "float32")
    p: Expr = T.float32(_LOG_TERMS[0])
    for term in _LOG_TERMS[1:]:
        p = fma_scalar(p, f, T.float32(term))
    square = settled(f * f, "float32")
    tail = fma_scalar(exponent, T.float32(-2.12194440e-4), _rounded(_rounded(square * f) * p))
    tail = fma_scalar(square, T.float32(-0.5), tail)
    return T.bind(fma_scalar(exponent, T.float32(0.693359375), f + tail))


def _u64(value: int) -> Expr:
    return tirx.const(value, "uint64")


def _low(word: Expr) -> Expr:
    return T.bitwise_and(word, _u64(0xFFFFFFFF))


def _xor(a: Expr, b: Expr, c: Expr) -> Expr:
    return T.bitwise_xor(T.bitwise_xor(a, b), c)


def philox(counter: Expr, key_low: Expr, key_high: Expr) -> Expr:
    """First word of Philox4x32-10 for the counter (counter, 0, 0, 0); words are uint64 expressions below 2^32."""
    words: list[Expr] = [counter, _u64(0), _u64(0), _u64(0)]
    keys = [settled(key_low, "uint64"), settled(key_high, "uint64")]
    for _ in range(10):
        even = settled(words[0] * _u64(0xD2511F53), "uint64")
        odd = settled(words[2] * _u64(0xCD9E8D57), "uint64")
        high_even, high_odd = (T.shift_right(p, _u64(32)) for p in (even, odd))
        words = [
            settled(_xor(high_odd, words[1], keys[0]), "uint64"),
            settled(_low(odd), "uint64"),
            settled(_xor(high_even, words[3], keys[1]), "uint64"),
            settled(_low(even), "uint64"),
        ]
        keys = [settled(_low(k + _u64(w)), "uint64") for k, w in zip(keys, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return words[0]
