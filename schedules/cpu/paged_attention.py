"""Ragged causal attention over pages, for any CPU: float32 arithmetic, online softmax, one kernel for every batch.

A row is one query of one head. Rows of the tokens and heads that read the same keys form a piece; a piece walks over
its keys in blocks aligned at key 0. Each block is three steps, all on vectors of 16:

    scores   rows x 32 keys in registers, one fma chain over the head dimension for each score
    softmax  per row: new maximum, exp, rescaled sum
    values   rows x 32 dimensions in registers, one fma chain over the keys for each output

A row's arithmetic depends on its own position alone, so it has the same bits in any batch, chunk or piece. Keys past a
row's position get weight zero; those past every position of the piece are not touched, since memory there may hold NaN.

Work is dealt by cost: tiles of tokens are laid end to end, each as long as keys x heads, and every thread takes one
equal stretch. A stretch may begin at any head, which balances a single decoding sequence and a causal triangle alike.

Decoding waits for memory, and so do short chunks of prompts: the pages of a step exceed every cache. While a thread
works on a block it therefore asks for the block it reads next, be that of the same piece, the next head or the next
sequence; the requests lie between the multiplications, as a burst of them would hold up the loads behind it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cpu.attention_tiles import Tiles, deal_tiles
from tilewright.schedules.cpu.isa import (
    LANES,
    Buffer,
    Expr,
    Isa,
    argument,
    exp,
    fma,
    kernel,
    lane_index,
    load,
    max_lanes,
    maximum,
    prefetch,
    registers,
    rows_symbol,
    settled,
    splat,
    store,
    sum_lanes,
)

MASKED = -1e30  # below every real score, and finite
NO_KEY_YET = -5e29  # the maximum of a row that has seen no key: far above MASKED, so that masked keys weigh zero
PAIR = 2 * LANES
BLOCK_KEYS = 64  # between two rescalings: the bits depend on it, so that no tile chooses it
LINE_BYTES = 64
MAX_ROWS = 12  # 12 rows x 2 vectors of accumulators leave 8 of 32 registers for operands


@dataclass(frozen=True)
class Tile:
    """rows: register block. tokens: queries of a sequence that go together."""

    rows: int
    tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS:
            raise ValueError(f"rows {self.rows} is not within 1..{MAX_ROWS}, the accumulators that fit in registers")
        if self.tokens < 1:
            raise ValueError(f"tokens {self.tokens} is below 1")


@dataclass(frozen=True)
class Facts:
    spec: PagedAttentionSpec


class PagedAttention(Schedule):
    name = "paged_attention"
    composite = "paged_attention"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> Facts | Reject:
        attention, kv = call.spec.attention, call.spec.kv
        if kv.page_size % LANES:
            return Reject(f"page size {kv.page_size} is not a multiple of {LANES}; compile with --page-size {LANES}")
        if attention.head_dim % 8:
            return Reject(f"head size {attention.head_dim} is not a multiple of 8, the narrowest vector of this kernel")
        if not kv.k_transposed:
            return Reject("keys are stored [slot, dim]; the CPU kernel reads [dim, slot] (KVFormat.k_transposed)")
        if not attention.causal or attention.sinks:
            return Reject("only causal attention without sinks has a CPU kernel")
        if kv.dtype not in ("float32", "float16"):
            return Reject(f"pages of {kv.dtype} have no CPU kernel; use float32 or float16")
        return Facts(call.spec)

    def space(self, facts: Facts, target: Target) -> Sequence[Tile]:
        group = facts.spec.attention.heads // facts.spec.attention.kv_heads
        rows = _register_rows(group)
        return [Tile(rows, max(1, factor * rows // group)) for factor in (2, 4)]

    def floor(self, facts: Facts, target: Target) -> Floor:
        """A row's queries and outputs; its keys depend on the position, which no shape tells."""
        attention = facts.spec.attention
        return Floor(bytes_fixed=0, bytes_per_row=8 * attention.heads * attention.head_dim)

    def apply(self, facts: Facts, tile: Tile, target: Target) -> Lowering:
        attention = facts.spec.attention
        func = _Builder(facts.spec, tile, Isa.of(target)).build(self.name)
        out = Output("out", ("m", attention.heads, attention.head_dim), "float32")
        return Lowering((KernelCall(func, tuple(range(9)), (out,)),), ("out",))


def _register_rows(group: int) -> int:
    """As many rows as registers hold, whole tokens where a group fits, even parts of one where it doesn't."""
    if group <= MAX_ROWS:
        return MAX_ROWS // group * group
    return max(r for r in range(1, MAX_ROWS + 1) if group % r == 0)


@dataclass(frozen=True)
class _Span:
    """A stretch of keys of one sequence and KV head. first_page: the sequence's first index into page_indices."""

    first_page: Expr
    kv_head: Expr
    first_key: Expr
    last_key: Expr


@dataclass(frozen=True)
class _Piece:
    """What one thread works on at a time: rows of a tile that share a KV head. Row = token * heads + head."""

    token: Expr
    tokens: Expr
    head: Expr
    heads: Expr
    rows: Expr
    span: _Span
    following: _Span  # of the thread's next piece; without one, the end of this piece again


class _Builder:
    """Emits the kernel of one spec and tile. Buffers made by `_arguments` and `_scratch` are its attributes."""

    def __init__(self, spec: PagedAttentionSpec, tile: Tile, isa: Isa) -> None:
        self.attention, self.kv, self.tile, self.isa = spec.attention, spec.kv, tile, isa
        self.dim = spec.attention.head_dim
        self.group = spec.attention.heads // spec.attention.kv_heads
        self.max_rows = tile.tokens * self.group
        self.vectors = BLOCK_KEYS // LANES
        self.block_rows = sorted({tile.rows, min(self.group, tile.rows), 1}, reverse=True)
        # Elements of a cache line, and dimensions whose runs of 16 keys share one (head sizes are multiples of 8).
        self.line = LINE_BYTES // np.dtype(spec.kv.dtype).itemsize
        self.line_dims = max(1, self.line // spec.kv.page_size)

    def build(self, name: str) -> tirx.PrimFunc:
        with kernel(name) as built:
            self._arguments()
            window = self.attention.window
            tiles = deal_tiles(self.positions, self.indptr, self.b, self.m, window, self.tile.tokens, BLOCK_KEYS)
            self._zero_from(T.cast(self.indptr[self.b], "int64"))
            threads = T.bind(T.call_packed("runtime.NumThreads"))
            with T.parallel(0, threads) as thread:
                self._scratch()
                self._stretch(tiles, thread, threads)
        return built.get()

    # --- arguments and scratch ----------------------------------------------------------------------------------------

    def _arguments(self) -> None:
        kv, heads = self.kv, self.attention.heads
        self.m, self.b = rows_symbol("m"), rows_symbol("b")
        num_pages, entries = rows_symbol("num_pages"), rows_symbol("p")
        head_size = kv.page_size * kv.head_dim
        self.q = argument("q", (self.m, heads, self.dim), "float32")
        pages = argument("pages", (kv.layers, num_pages, 2, kv.kv_heads, head_size), kv.dtype)
        self.positions = argument("positions", (self.m,), "int32")
        self.indptr = argument("indptr", (self.b + 1,), "int32")
        self.page_indptr = argument("page_indptr", (self.b + 1,), "int32")
        self.page_indices = argument("page_indices", (entries,), "int32")
        # positions say all that this kernel needs, and it treats prompts and generated tokens alike
        argument("kv_len", (self.b,), "int32")
        argument("phases", (self.b,), "int32")
        layer = T.arg("layer", tirx.Var("layer", "int64"))
        self.out = argument("out", (self.m, heads, self.dim), "float32")
        self.page_stride = 2 * kv.kv_heads * head_size
        self.layer_start = T.bind(layer * num_pages * self.page_stride)
        extent = num_pages * (kv.layers * self.page_stride)
        self.pages = T.decl_buffer((extent,), kv.dtype, data=pages.data)

    def _scratch(self) -> None:
        """Per thread, sized by the tile alone: no context grows it."""
        rows, padded = self.max_rows, -(-self.dim // LANES) * LANES
        self.queries = T.alloc_buffer((rows, self.dim), "float32")
        self.scores = T.alloc_buffer((rows, BLOCK_KEYS), "float32")
        self.values = T.alloc_buffer((rows, padded), "float32")
        self.sums = T.alloc_buffer((rows, LANES), "float32")
        self.maxima = T.alloc_buffer((rows,), "float32")
        self.rescale = T.alloc_buffer((rows,), "float32")
        self.row_position = T.alloc_buffer((rows,), "int32")
        # Where runs of 16 keys begin in pages: those of this block, then those of the next.
        self.key_start = T.alloc_buffer((2 * self.vectors,), "int64")
        self.value_start = T.alloc_buffer((2 * self.vectors,), "int64")

    # --- dealing out the work -----------------------------------------------------------------------------------------

    def _zero_from(self, token: Expr) -> None:
        """Rows that pad the step belong to no sequence: they get zeros, never what memory held."""
        with T.serial(0, self.m - token) as i, T.serial(0, self.attention.heads) as h, T.serial(0, self.dim // 8) as j:
            store(self.out, splat(0.0, 8), token + i, h, j * 8, lanes=8)

    def _stretch(self, tiles: Tiles, thread: Expr, threads: Expr) -> None:
        """All (tile, head) whose start, measured in cost, lies in this thread's part of the whole."""
        heads = T.int64(self.attention.heads)
        total = T.bind(tiles.cost[tiles.count] * heads)
        thread, threads = T.cast(thread, "int64"), T.cast(threads, "int64")
        low, high = T.bind(total * thread // threads), T.bind(total * (thread + 1) // threads)
        with T.serial(0, tiles.count) as j:
            start = T.bind(tiles.cost[j] * heads)
            each = T.bind(tiles.cost[j + 1] - tiles.cost[j])

            def head_at(mark: Expr, start: Expr = start, each: Expr = each) -> Expr:
                ahead = T.max(mark - start, T.int64(0))
                return settled(T.cast(T.min((ahead + each - 1) // each, heads), "int32"))

            first, end = head_at(low), head_at(high)
            with T.If(first < end), T.Then():
                kv_first = settled(first // self.group)
                kv_end = settled((end - 1) // self.group + 1)
                more = T.And(j + 1 < tiles.count, tiles.cost[j + 1] * heads < high)
                later = settled(T.Select(more, j + 1, j))
                with T.serial(0, kv_end - kv_first) as g:
                    kv_head = settled(kv_first + g)
                    following = self._following(tiles, j, later, kv_head, kv_end)
                    self._piece(self._make_piece(tiles, j, kv_head, first, end, following))

    def _make_piece(self, tiles: Tiles, j: Expr, kv_head: Expr, first: Expr, end: Expr, following: _Span) -> _Piece:
        head = settled(T.max(first, kv_head * self.group))
        heads = settled(T.min(end, (kv_head + 1) * self.group) - head)
        tokens = T.bind(tiles.tokens[j])
        span = self._span(tiles, j, kv_head)
        return _Piece(T.bind(tiles.token[j]), tokens, head, heads, settled(tokens * heads), span, following)

    def _span(self, tiles: Tiles, j: Expr, kv_head: Expr) -> _Span:
        first_page = T.bind(self.page_indptr[tiles.sequence[j]])
        return _Span(first_page, kv_head, T.bind(tiles.first_key[j]), T.bind(tiles.last_key[j]))

    def _following(self, tiles: Tiles, j: Expr, later: Expr, kv_head: Expr, kv_end: Expr) -> _Span:
        """What the thread reads after a KV head of tile j: the next head, else the first head of tile `later`."""
        inside, none = T.bind(kv_head + 1 < kv_end), T.bind(later == j)
        span = self._span(tiles, settled(T.Select(inside, j, later)), kv_head)
        head = T.Select(inside, kv_head + 1, T.Select(none, kv_head, 0))
        size = BLOCK_KEYS
        first = T.Select(T.Or(inside, T.Not(none)), span.first_key, span.last_key // size * size)
        return _Span(span.first_page, settled(head), settled(first), span.last_key)

    # --- one piece ----------------------------------------------------------------------------------------------------

    def _piece(self, piece: _Piece) -> None:
        self._start(piece)
        size, span = BLOCK_KEYS, piece.span
        with T.serial(0, (span.last_key - span.first_key) // size + 1) as i:
            key = settled(span.first_key + i * size)
            keys = settled(T.min(T.int32(size), span.last_key - key + 1))
            self._locate(span, key, 0)
            ahead = self._ahead(piece.span, piece.following, key)
            self._locate(ahead, ahead.first_key, self.vectors)
            keys_ahead = settled(T.min(T.int32(size), ahead.last_key - ahead.first_key + 1))
            with T.serial(0, _pairs(keys)) as pair:
                self._row_blocks(piece.rows, partial(self._scores, pair=pair))
            self._fetch_keys(_pairs(keys), _pairs(keys_ahead), self.vectors)
            self._softmax(piece, key)
            self._row_blocks(piece.rows, partial(self._values, keys=keys))
            self._fetch_values(keys, keys_ahead, self.vectors)
        self._finish(piece)

    def _ahead(self, span: _Span, following: _Span, key: Expr) -> _Span:
        """From where the block after the one at `key` is read."""
        later = key + BLOCK_KEYS
        inside = T.bind(later <= span.last_key)

        def choose(here: Expr, there: Expr) -> Expr:
            return settled(T.Select(inside, here, there))

        return _Span(
            choose(span.first_page, following.first_page),
            choose(span.kv_head, following.kv_head),
            choose(later, following.first_key),
            choose(span.last_key, following.last_key),
        )

    def _fetch_keys(self, begin: Expr, end: Expr, at: int) -> None:
        """Ask for the keys of the pairs begin .. end of the runs located `at` and on."""
        with T.serial(0, T.max(end - begin, T.int32(0)) * 2) as i:
            start = T.bind(self.key_start[begin * 2 + i + at])
            with T.serial(0, self.dim // self.line_dims) as d:
                prefetch(self.pages, start + d * (self.line_dims * self.kv.page_size))

    def _fetch_values(self, begin: Expr, end: Expr, at: int) -> None:
        """Ask for the values of the keys begin .. end of the runs located `at` and on."""
        with T.serial(0, T.max(end - begin, T.int32(0))) as i:
            key = T.bind(begin + i)
            start = T.bind(self.value_start[key // LANES + at] + key % LANES * self.dim)
            with T.serial(0, -(-self.dim // self.line)) as j:
                prefetch(self.pages, start + j * self.line)

    def _start(self, piece: _Piece) -> None:
        """Scaled queries side by side, and the state of the online softmax."""
        with T.serial(0, piece.tokens) as t, T.serial(0, piece.heads) as h:
            row = T.bind(t * piece.heads + h)
            T.buffer_store(self.row_position, self.positions[piece.token + t], [row])
            T.buffer_store(self.maxima, T.float32(NO_KEY_YET), [row])
            store(self.sums, splat(0.0), row, 0)
            with T.serial(0, self.dim // 8) as j:
                x = load(self.q, piece.token + t, piece.head + h, j * 8, lanes=8)
                store(self.queries, x * splat(self.attention.scale, 8), row, j * 8, lanes=8)
            with T.serial(0, self.values.shape[1] // LANES) as j:
                store(self.values, splat(0.0), row, j * LANES)

    def _locate(self, span: _Span, key: Expr, at: int) -> None:
        """Where each run of 16 keys lies. Runs past the last key repeat the last run: their scores are never used."""
        size = self.kv.page_size
        head_size = size * self.dim
        with T.serial(0, self.vectors) as i:
            first = T.bind(T.min(key + i * LANES, span.last_key // LANES * LANES))
            page = T.bind(T.cast(self.page_indices[span.first_page + first // size], "int64"))
            slot = T.bind(T.cast(first % size, "int64"))
            keys = T.bind(self.layer_start + page * self.page_stride + T.cast(span.kv_head, "int64") * head_size)
            T.buffer_store(self.key_start, keys + slot, [i + at])
            T.buffer_store(self.value_start, keys + self.kv.kv_heads * head_size + slot * self.dim, [i + at])

    def _row_blocks(self, rows: Expr, emit: Callable[[Expr, int], None]) -> None:
        """Cover the rows with register blocks: as many of the largest as fit, then of the next size."""
        done: Expr = T.int32(0)
        for size in self.block_rows:
            blocks = T.bind((rows - done) // size)
            with T.serial(0, blocks) as i:
                emit(settled(done + i * size), size)
            done = settled(done + blocks * size)

    def _page_vector(self, at: Expr, lanes: int = LANES) -> Expr:
        if self.kv.dtype == "float32":
            return load(self.pages, at, lanes=lanes)
        return T.bind(T.cast(load(self.pages, at, lanes=lanes), f"float32x{lanes}"))

    def _scores(self, row: Expr, count: int, pair: Expr) -> None:
        """scores[row.., 32 keys] = queries . keys: for each score one chain over the head dimension."""
        acc = [[_zeros() for _ in range(2)] for _ in range(count)]
        starts = [T.bind(self.key_start[pair * 2 + u]) for u in range(2)]
        ahead = [T.bind(self.key_start[self.vectors + pair * 2 + u]) for u in range(2)]
        with T.serial(0, self.dim // self.line_dims) as step:
            for start in ahead:
                prefetch(self.pages, start + step * (self.line_dims * self.kv.page_size))
            for i in range(self.line_dims):
                d = step * self.line_dims + i
                keys = [self._page_vector(start + d * self.kv.page_size) for start in starts]
                for r in range(count):
                    query = T.bind(splat(self.queries[row + r, d]))
                    for u in range(2):
                        store(acc[r][u], fma(keys[u], query, load(acc[r][u], 0)), 0)
        for r in range(count):
            for u in range(2):
                store(self.scores, load(acc[r][u], 0), row + r, pair * PAIR + u * LANES)

    # --- softmax ------------------------------------------------------------------------------------------------------

    def _softmax(self, piece: _Piece, key: Expr) -> None:
        """Scores become weights. Masks cost a quarter of it, so blocks that every row sees whole go without."""
        with T.serial(0, piece.rows) as row:
            position = T.bind(self.row_position[row])
            whole = key + (BLOCK_KEYS - 1) <= position
            if self.attention.window is not None:
                whole = T.And(whole, key > position - self.attention.window)
            with T.If(whole):
                with T.Then():
                    self._softmax_row(row, [None] * self.vectors)
                with T.Else():
                    self._softmax_row(row, [self._visible(key + i * LANES, position) for i in range(self.vectors)])

    def _visible(self, key: Expr, position: Expr) -> Expr:
        keys = T.bind(lane_index(key))
        visible = keys <= splat(position)
        if self.attention.window is not None:
            visible = T.And(visible, keys > splat(position - self.attention.window))
        return visible  # not bound: TVM's analyzer takes no vector of booleans

    def _softmax_row(self, row: Expr, visible: Sequence[Expr | None]) -> None:
        scores = [self._capped(load(self.scores, row, i * LANES)) for i in range(self.vectors)]
        scores = [_masked(v, s) for v, s in zip(visible, scores, strict=True)]
        before = T.bind(self.maxima[row])
        now = T.bind(T.max(before, max_lanes(_tree(maximum, scores))))
        # exp(MASKED - now) is exactly zero. Masking the weights as well would be wrong, not just idle: LLVM 22 then
        # takes the inner mask for implied, in all lanes, and drops it from the maximum.
        weights = [exp(s - splat(now)) for s in scores]
        rescale = exp(splat(before - now))
        for i, weight in enumerate(weights):
            store(self.scores, weight, row, i * LANES)
        total = _tree(lambda a, b: T.bind(a + b), weights)
        store(self.sums, fma(load(self.sums, row, 0), rescale, total), row, 0)
        T.buffer_store(self.maxima, now, [row])
        T.buffer_store(self.rescale, tirx.Shuffle([rescale], [tirx.const(0, "int32")]), [row])

    def _capped(self, score: Expr) -> Expr:
        """cap * tanh(score / cap) = cap - 2 cap / (1 + e^(2 score / cap)), where a soft cap is set."""
        cap = self.attention.soft_cap
        if cap is None:
            return score
        grown = exp(score * splat(2.0 / cap))
        return fma(splat(-2.0 * cap), T.bind(splat(1.0) / (grown + splat(1.0))), splat(cap))

    # --- values -------------------------------------------------------------------------------------------------------

    def _values(self, row: Expr, count: int, keys: Expr) -> None:
        """values[row.., :] = values * rescale + weights . V, 32 dimensions at a time."""
        whole = self.dim // PAIR
        with T.serial(0, whole) as i:
            self._values_part(row, count, keys, i * PAIR, (LANES, LANES))
        rest = self.dim - whole * PAIR
        widths = [LANES] * (rest // LANES) + [rest % LANES] * (rest % LANES > 0)
        if widths:
            self._values_part(row, count, keys, T.int32(whole * PAIR), widths)

    def _values_part(self, row: Expr, count: int, keys: Expr, dim: Expr, widths: Sequence[int]) -> None:
        offsets = [LANES * u for u in range(len(widths))]
        parts = list(zip(offsets, widths, strict=True))
        acc = [[registers() for _ in parts] for _ in range(count)]
        for r in range(count):
            for a, (offset, lanes) in zip(acc[r], parts, strict=True):
                old = load(self.values, row + r, dim + offset, lanes=lanes)
                store(a, old * splat(self.rescale[row + r], lanes), 0, lanes=lanes)
        with T.serial(0, (keys + (LANES - 1)) // LANES) as run:
            start = T.bind(self.value_start[run] + dim)
            ahead = T.bind(self.value_start[self.vectors + run] + dim)
            with T.serial(0, T.min(keys - run * LANES, T.int32(LANES))) as j:
                for offset in offsets[:: self.line // LANES]:
                    prefetch(self.pages, ahead + j * self.dim + offset)
                values = [self._page_vector(start + j * self.dim + offset, lanes) for offset, lanes in parts]
                for r in range(count):
                    weight = self.scores[row + r, run * LANES + j]
                    for a, v, lanes in zip(acc[r], values, widths, strict=True):
                        store(a, fma(v, splat(weight, lanes), load(a, 0, lanes=lanes), lanes), 0, lanes=lanes)
        for r in range(count):
            for a, (offset, lanes) in zip(acc[r], parts, strict=True):
                store(self.values, load(a, 0, lanes=lanes), row + r, dim + offset, lanes=lanes)

    def _finish(self, piece: _Piece) -> None:
        with T.serial(0, piece.tokens) as t, T.serial(0, piece.heads) as h:
            row = T.bind(t * piece.heads + h)
            inverse = T.bind(T.float32(1.0) / sum_lanes(load(self.sums, row, 0)))
            with T.serial(0, self.dim // 8) as j:
                value = load(self.values, row, j * 8, lanes=8) * splat(inverse, 8)
                store(self.out, value, piece.token + t, piece.head + h, j * 8, lanes=8)


def _pairs(keys: Expr) -> Expr:
    """Pairs of runs that hold so many keys."""
    return (keys + (PAIR - 1)) // PAIR


def _zeros() -> Buffer:
    buffer = registers()
    store(buffer, splat(0.0), 0)
    return buffer


def _masked(visible: Expr | None, score: Expr) -> Expr:
    return score if visible is None else T.bind(T.Select(visible, score, splat(MASKED)))


def _tree(combine: Callable[[Expr, Expr], Expr], values: Sequence[Expr]) -> Expr:
    """Pairs of neighbours, again and again: a short chain, and an order that the number of values fixes."""
    while len(values) > 1:
        pairs = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + list(values[len(pairs) * 2 :])
    return values[0]
