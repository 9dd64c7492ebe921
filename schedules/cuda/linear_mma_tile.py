"""How a dense linear is cut into tiles on a GPU without wgmma, and which cut is likely the fastest."""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.compiler.targets.base import Target

CHUNK = 8  # values of 16 bits in the 16 bytes that a matrix load takes of a row

_RESERVED_BYTES = 1024  # of shared memory, by each block
_MOST_STAGES = 8
# tokens, rows, warps along each, depth, blocks side by side.
_SHAPES = (
    (16, 32, 1, 2, 64, 2),
    (16, 64, 1, 4, 64, 2),
    (32, 64, 1, 4, 64, 2),
    (64, 64, 2, 2, 64, 2),
    (128, 128, 2, 2, 32, 2),
)


@dataclass(frozen=True)
class LinearMmaTile:
    """tokens, rows: a tile's tokens and outputs. token_warps, row_warps: warps side by side along each. depth: of K, a
    stage. stages: of the ring. blocks_per_sm: that fit side by side. group: blocks of tokens that follow one another on
    the same weights."""

    tokens: int
    rows: int
    token_warps: int
    row_warps: int
    depth: int
    stages: int
    blocks_per_sm: int = 1
    group: int = 8

    def __post_init__(self) -> None:
        if self.tokens % (16 * self.token_warps):
            raise ValueError(f"{self.tokens} tokens are no multiple of 16 for each of {self.token_warps} warps")
        if self.rows % (16 * self.row_warps):
            raise ValueError(f"{self.rows} rows are no multiple of 16 for each of {self.row_warps} warps")
        if self.depth not in (32, 64, 128):
            raise ValueError(f"a stage of depth {self.depth} is none of 32, 64, 128")
        if self.stages < 2:
            raise ValueError(f"a ring of {self.stages} stages can't load while it is read")
        if self.accumulators > 128:
            raise ValueError(f"{self.accumulators} sums do not fit in a thread's registers")

    @property
    def threads(self) -> int:
        return 32 * self.token_warps * self.row_warps

    @property
    def accumulators(self) -> int:
        """Sums of a thread."""
        return self.tokens * self.rows // self.threads

    @property
    def swizzle(self) -> tuple[int, int]:
        """(rows, chunks): the chunks of a row are exchanged by its number over `rows`, modulo `chunks`, so that eight
        rows that are read at once lie in all the banks."""
        chunks = min(8, self.depth // CHUNK)
        return 8 // chunks, chunks

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.tokens + self.rows) * self.depth * 2


def tiles(rows: int, depth: int, most: int, target: Target) -> Sequence[LinearMmaTile]:
    """Valid tiles for a weight [rows, depth] and up to so many tokens, the likely best first."""
    fitting = [tile for shape in _SHAPES if (tile := _tile(*shape, depth, target)) is not None]
    return sorted(fitting, key=lambda tile: _work(tile, rows, most, target))


def _tile(
    tokens: int, rows: int, token_warps: int, row_warps: int, step: int, per_sm: int, depth: int, target: Target
) -> LinearMmaTile | None:
    """The tile with the deepest ring that fits and is of use, or None where there is none."""
    room = (target.shared_memory_bytes + _RESERVED_BYTES) // per_sm - _RESERVED_BYTES
    for stages in range(min(_MOST_STAGES, max(2, -(-depth // step))), 1, -1):
        tile = LinearMmaTile(tokens, rows, token_warps, row_warps, step, stages, per_sm)
        if tile.shared_bytes <= room:
            return tile
    return None


def _work(tile: LinearMmaTile, rows: int, most: int, target: Target) -> float:
    """Predicted time for a step of K on the busiest multiprocessor, in steps of the matrix units: multiplying, and
    fetching a row or a token as long as it takes to multiply it by 64 others."""
    count = -(-rows // tile.rows) * -(-most // tile.tokens)
    turns = -(-count // target.sms)
    return turns * (tile.tokens * tile.rows + 64 * (tile.tokens + tile.rows))
