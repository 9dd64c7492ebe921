"""The work of one attention step as a list: tiles of consecutive tokens of a sequence, and what each costs."""

from dataclasses import dataclass

from tilewright.schedules.cpu.isa import Buffer, Expr, T


@dataclass(frozen=True)
class Tiles:
    """The tiles of a step, one entry each: first token, tokens, sequence, first and last key, cost of all before."""

    count: Expr
    token: Buffer
    tokens: Buffer
    sequence: Buffer
    first_key: Buffer
    last_key: Buffer
    cost: Buffer


def deal_tiles(
    positions: Buffer, indptr: Buffer, sequences: Expr, rows: Expr, window: int | None, tokens: int, block_keys: int
) -> Tiles:
    """One serial pass over the sequences. A tile holds up to `tokens`; its cost is counted in tokens x key blocks.

    positions int32[rows], indptr int32[sequences + 1]. Keys are numbered by position; first keys begin a block.
    """
    names = ("token", "tokens", "sequence", "first_key", "last_key")
    arrays = {n: T.alloc_buffer((rows + 1,), "int32") for n in names}
    cost = T.alloc_buffer((rows + 1,), "int64")
    made = T.alloc_buffer((1,), "int32")
    T.buffer_store(made, T.int32(0), [0])
    T.buffer_store(cost, T.int64(0), [0])
    with T.serial(0, T.cast(sequences, "int32")) as s:
        start, end = T.bind(indptr[s]), T.bind(indptr[s + 1])
        with T.serial(0, (end - start + (tokens - 1)) // tokens) as j:
            token = T.bind(start + j * tokens)
            count = T.bind(T.min(end - token, T.int32(tokens)))
            low, last = _extremes(positions, token, count)
            first = T.int32(0) if window is None else _block_start(low - (window - 1), block_keys)
            blocks = T.bind(last // block_keys - first // block_keys + 1)
            entry = {"token": token, "tokens": count, "sequence": s, "first_key": first, "last_key": last}
            i = T.bind(made[0])
            for name, value in entry.items():
                T.buffer_store(arrays[name], value, [i])
            T.buffer_store(cost, cost[i] + T.cast(blocks * count, "int64"), [i + 1])
            T.buffer_store(made, i + 1, [0])
    return Tiles(T.bind(made[0]), **arrays, cost=cost)


def _extremes(positions: Buffer, token: Expr, count: Expr) -> tuple[Expr, Expr]:
    """The least and the greatest position of the tokens."""
    low, high = T.alloc_buffer((1,), "int32"), T.alloc_buffer((1,), "int32")
    T.buffer_store(low, positions[token], [0])
    T.buffer_store(high, positions[token], [0])
    with T.serial(1, count) as i:
        T.buffer_store(low, T.min(low[0], positions[token + i]), [0])
        T.buffer_store(high, T.max(high[0], positions[token + i]), [0])
    return T.bind(low[0]), T.bind(high[0])


def _block_start(key: Expr, block_keys: int) -> Expr:
    """The first key of the block that holds `key`, or holds key 0 where that is negative."""
    return T.bind(T.max(key, T.int32(0)) // block_keys * block_keys)
