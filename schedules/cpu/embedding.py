"""Rows of a packed table, widened to float32: table[tokens] * scale.

The table may be the one that the output projection multiplies by, so it lies in panels of 16 rows: a row is one lane of
its panel. The values are exactly those of the format.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from tilewright.compiler.composites import EmbeddingSpec
from tilewright.compiler.targets.base import Target
from tilewright.models.quant import FORMATS
from tilewright.models.quant.base import BLOCK, PANEL
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cpu import isa
from tilewright.schedules.cpu.isa import LANES, Buffer, Expr, Isa, T

TABLE, TOKENS = 0, 1  # indices of the composite's arguments


@dataclass(frozen=True)
class EmbeddingFacts:
    spec: EmbeddingSpec


@dataclass(frozen=True)
class EmbeddingTile:
    """Nothing to choose: a token is a task."""


class Embedding(Schedule):
    name = "embedding"
    composite = "embedding"
    kind = "cpu"

    def match(self, call: Call, target: Target) -> EmbeddingFacts | Reject:
        spec = call.spec
        if target.kind != "cpu":
            return Reject(f"needs a cpu target, not {target.kind}")
        if spec.weight_format not in FORMATS:
            return Reject(f"weight format {spec.weight_format!r} is none of {', '.join(FORMATS)}")
        if spec.features % FORMATS[spec.weight_format].block:
            return Reject(f"{spec.features} features are no multiple of {spec.weight_format}'s block of {BLOCK}")
        return EmbeddingFacts(spec)

    def space(self, facts: EmbeddingFacts, target: Target) -> Sequence[EmbeddingTile]:
        return [EmbeddingTile()]

    def floor(self, facts: EmbeddingFacts, target: Target) -> Floor:
        spec = facts.spec
        row_bytes = FORMATS[spec.weight_format].packed_bytes(PANEL, spec.features) // PANEL
        return Floor(bytes_fixed=0, bytes_per_row=4 + row_bytes + 4 * spec.features, flops_per_row=2 * spec.features)

    def apply(self, facts: EmbeddingFacts, tile: EmbeddingTile, target: Target) -> Lowering:
        output = Output("y", ("m", facts.spec.features), "float32")
        return Lowering((KernelCall(_kernel(facts.spec, Isa.of(target)), (TABLE, TOKENS), (output,)),), ("y",))


def _kernel(spec: EmbeddingSpec, machine: Isa) -> tirx.PrimFunc:
    form = FORMATS[spec.weight_format]
    shape = form.packed_shape(spec.vocab, spec.features)
    m = isa.rows_symbol()
    with isa.kernel(f"embedding_{form.name}_v{spec.vocab}_k{spec.features}") as built:
        table = isa.argument("table", shape, form.packed_dtype)
        tokens = isa.argument("tokens", (m,), "int32")
        y = isa.argument("y", (m, spec.features), "float32")
        row_values = _dense_row if form.block == 1 else _block_row
        with T.parallel(0, m) as i:
            token = T.bind(T.cast(tokens[i], "int64"))

            def write(value: Expr, k: Expr, count: int = LANES) -> None:
                if spec.scale != 1.0:
                    value = T.bind(value * isa.splat(float(spec.scale)))
                if count == LANES:
                    isa.store(y, value, i, k)
                else:
                    isa.store_part(y, value, count, i, k)

            row_values(machine, spec, table, T.bind(token // PANEL), T.bind(token % PANEL), write)
    return built.get()


def _dense_row(machine: Isa, spec: EmbeddingSpec, table: Buffer, panel: Expr, row: Expr, write) -> None:
    def vector(k: Expr, count: int = LANES) -> Expr:
        elements = [table[panel, k + i, row] if i < count else tirx.const(0, table.dtype) for i in range(LANES)]
        raw = T.bind(isa.join(elements))
        if spec.weight_format == "f16":
            return machine.half_to_float(raw)
        return machine.brain_to_float(raw) if spec.weight_format == "bf16" else raw

    with T.serial(0, spec.features // LANES) as step:
        write(vector(step * LANES), step * LANES)
    if rest := spec.features % LANES:
        write(vector(spec.features - rest, rest), spec.features - rest, rest)


def _block_row(machine: Isa, spec: EmbeddingSpec, table: Buffer, panel: Expr, row: Expr, write) -> None:
    """A row has 4 bytes in each 64-byte vector of a block, and one float16 in each group of 16."""
    block_bytes = int(table.shape[-1])
    blocks = spec.features // BLOCK
    size = table.shape[0] * blocks * block_bytes
    words = T.decl_buffer((size // 4,), "int32", data=table.data)
    halves = T.decl_buffer((size // 2,), "uint16", data=table.data)
    nibbles = spec.weight_format != "q8_0"
    with T.serial(0, blocks) as b:
        at = T.bind((panel * blocks + b) * block_bytes)  # bytes
        scales_at = at // 2 + (128 if nibbles else 256) + row

        def half(offset: int) -> Expr:
            return machine.half_to_float(T.bind(isa.splat(halves[scales_at + offset])))

        def four_words(first: int, dtype: str) -> Expr:
            loaded = [words[at // 4 + (first + j) * LANES + row] for j in range(4)]
            return T.bind(T.reinterpret(dtype, isa.join(loaded)))

        d = half(0)
        if nibbles:
            packed = four_words(0, "uint8x16")
            q = [
                T.bitwise_and(packed, T.broadcast(T.uint8(15), 16)),
                T.shift_right(packed, T.broadcast(T.uint8(4), 16)),
            ]
        else:
            q = [four_words(0, "int8x16"), four_words(4, "int8x16")]
        for h in range(2):
            value = T.cast(T.cast(q[h], isa.I32) - isa.splat(8 if spec.weight_format == "q4_0" else 0), isa.F32)
            exact = isa.fma(value, d, half(LANES)) if spec.weight_format == "q4_1" else T.bind(value * d)
            write(exact, b * BLOCK + LANES * h)
