"""Activations as the block kernels read them: integers, a scale and a correction for each block of 32.

A block is a record of 32-bit words that lie side by side: 8 words for each plane of bytes (the lowest plane first, 4
inputs a word), where there is an offset that in each byte of a word, the scale as float32, and the correction (see
BlockFormat) as float32 or int32. Records stand in groups
of `tokens` rows (the last group may be smaller): group g holds [block][row] from row g * tokens on, so that a step of
the product reads them in order.
"""

from dataclasses import dataclass

from tilewright.models.quant.base import BLOCK
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.block_dot import GROUPS, BlockFormat
from tilewright.schedules.cpu.isa import LANES, Buffer, Expr, T
from tilewright.schedules.cpu.linear_common import LinearFacts

# So many elements take 3 to 8 us on one thread (Zen 4, Emerald Rapids), and waking the others costs 2 to 6 us.
SERIAL_ELEMENTS = 2**13


@dataclass(frozen=True)
class QuantizedRows:
    """Scratch for m rows of a kernel, one allocation with three views."""

    facts: LinearFacts
    form: BlockFormat
    m: Expr
    tokens: int  # rows a group
    words: Buffer  # int32
    floats: Buffer
    bytes: Buffer  # int8

    @staticmethod
    def allocate(facts: LinearFacts, form: BlockFormat, m: Expr, tokens: int) -> "QuantizedRows":
        size = m * (facts.k // BLOCK * record_words(form))
        words = T.alloc_buffer((size,), "int32")
        floats = T.decl_buffer((size,), "float32", data=words.data)
        return QuantizedRows(facts, form, m, tokens, words, floats, T.decl_buffer((size * 4,), "int8", data=words.data))

    @property
    def blocks(self) -> int:
        return self.facts.k // BLOCK

    @property
    def record_words(self) -> int:
        return record_words(self.form)

    def fill(self, x: Buffer, norm: Buffer | None) -> None:
        """Transform and quantise all rows, few of them on the calling thread alone."""
        with T.If(self.m <= SERIAL_ELEMENTS // self.facts.k):
            with T.Then(), T.serial(0, self.m) as row:
                self.fill_row(x, norm, row)
            with T.Else(), T.parallel(0, self.m) as row:
                self.fill_row(x, norm, row)

    def fill_row(self, x: Buffer, norm: Buffer | None, row: Expr) -> None:
        prologue, form = self.facts.prologue, self.form
        first = T.bind(row // self.tokens * self.tokens)
        rows = T.bind(T.min(self.m - first, T.int64(self.tokens)))
        state = prologue.begin_row(x, row)
        with T.serial(0, self.blocks) as b:
            values = [prologue.values(x, norm, state, row, b * BLOCK + LANES * h) for h in range(2)]
            block = form.quantize(values)
            at = self.record(first, rows, b, row - first)
            for h, half in enumerate(block.values):
                for plane, part in enumerate(form.split(half)):
                    isa.store(self.bytes, part, at * 4 + plane * BLOCK + LANES * h)
            if block.offset is not None:
                isa.store(self.bytes, T.broadcast(T.cast(block.offset, "int8"), 4), at * 4 + BLOCK, lanes=4)
            T.buffer_store(self.floats, block.scale, [at + self.record_words - 2])
            correction = form.correction(block.scale, block.total)
            T.buffer_store(self.floats if form.has_minimum else self.words, correction, [at + self.record_words - 1])

    def record(self, first: Expr, rows: Expr, block: Expr, skip: Expr) -> Expr:
        """Where the block's record of row `skip` lies in the group of `rows` rows from row `first` on, in words."""
        return isa.settled((first * self.blocks + block * rows + skip) * self.record_words, "int64")

    def vectors(self, at: Expr) -> list[list[Expr]]:
        """By plane, the words of the record at `at`, each in all lanes."""
        planes, groups = range(self.form.planes), range(self.form.groups)
        return [[isa.splat(self.words[at + plane * GROUPS + j]) for j in groups] for plane in planes]

    def scale(self, at: Expr) -> Expr:
        return self.floats[at + self.record_words - 2]

    def correction(self, at: Expr) -> Expr:
        return (self.floats if self.form.has_minimum else self.words)[at + self.record_words - 1]


def record_words(form: BlockFormat) -> int:
    return form.planes * GROUPS + form.offset + 2
