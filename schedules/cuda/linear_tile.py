"""How a dense linear is cut into tiles on a Hopper GPU, and which cut is likely the fastest.

The model is a roofline of one wave after another. Tuning records replace its choice where there are any.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tilewright.compiler.targets.base import Target
from tilewright.schedules.cuda.tma import ATOM_BYTES, ROW, ROW_BYTES

BARRIER_BYTES = 1024  # barriers and the alignment of what precedes them
WARP_STAGING_BYTES = 16 * 24 * 2
REGISTERS = 65536
_TOKENS = (8, 16, 32, 48, 64, 96, 128, 192, 256)

# What a block does a second in a steady state; measured in kernels of this kind.
_MATRIX_OPS = 5.6e12
_FETCH_BYTES = 5.0e10
_LAUNCH_S = 2.0e-6


@dataclass(frozen=True)
class LinearTile:
    """rows, tokens: a tile's outputs and tokens. depth: of K, a stage. stages: of the ring. cluster: blocks that share
    a tile of tokens. blocks: of the grid, which are persistent. blocks_per_sm: that fit side by side. group: blocks of
    tokens that follow one another on the same weights. weights_once: weights are read by one block each, so that the
    cache need not keep them."""

    rows: int
    tokens: int
    depth: int
    stages: int
    blocks: int
    cluster: int = 1
    blocks_per_sm: int = 1
    group: int = 8
    weights_once: bool = True

    def __post_init__(self) -> None:
        if self.rows % 16 or not 16 <= self.rows <= 256:
            raise ValueError(f"{self.rows} rows are no multiple of 16 from 16 to 256")
        if self.tokens != 8 and (self.tokens % 16 or not 16 <= self.tokens <= 256):
            raise ValueError(f"{self.tokens} tokens are neither 8 nor a multiple of 16 up to 256")
        if self.depth not in (ROW, 2 * ROW):
            raise ValueError(f"a stage of depth {self.depth} is neither {ROW} nor {2 * ROW}")
        if self.cluster not in (1, 2, 4) or self.tokens % (8 * self.cluster) or self.blocks % self.cluster:
            raise ValueError(f"{self.tokens} tokens, {self.blocks} blocks: not divided by clusters of {self.cluster}")
        if self.bands > 4 or (self.wide and self.bands != 2):
            raise ValueError(f"tiles of {self.rows} by {self.tokens} do not fit in registers")
        if self.stages < 2:
            raise ValueError(f"a ring of {self.stages} stages can't load while it is read")

    @property
    def bands(self) -> int:
        """Consumer warpgroups: wgmma takes 64 rows."""
        return -(-self.rows // 64)

    @property
    def wide(self) -> bool:
        """Whether accumulators take more registers than an even share of them."""
        return self.bands * self.tokens > 384

    @property
    def threads(self) -> int:
        return 128 * self.bands + (128 if self.wide else 32)

    @property
    def overread_bytes(self) -> int:
        """What the last band reads behind the ring of weights, beyond the ring of tokens."""
        behind = self.stages * self.tokens * self.depth * 2
        return max(ATOM_BYTES, (64 * self.bands - self.rows) * ROW_BYTES - behind)

    @property
    def shared_bytes(self) -> int:
        ring = self.stages * (self.rows + self.tokens) * self.depth * 2
        return ring + self.overread_bytes + 4 * self.bands * WARP_STAGING_BYTES + BARRIER_BYTES


def tiles(rows: int, depth: int, m_max: int, gated: bool, target: Target) -> Iterator[LinearTile]:
    """Valid tiles for a weight [rows, depth] and up to m_max tokens, the likely best first."""
    found = dict.fromkeys(_candidates(rows, depth, m_max, gated, target))
    yield from sorted(found, key=lambda t: _seconds(t, rows, depth, m_max, target))


def _candidates(rows: int, depth: int, m_max: int, gated: bool, target: Target) -> Iterator[LinearTile]:
    whole = next((t for t in _TOKENS if t >= m_max), 256)
    many = m_max > 64
    for tokens in _TOKENS if many else (whole,):
        if tokens > whole or (many and tokens < 64):
            continue
        for height in (64, 128) if many else (*range(16, 129, 16), 160, 192, 224, 256):
            for per_sm in (1, 2):
                for cluster in (1, 2) if tokens >= 32 else (1,):
                    tile = _tile(height, tokens, rows, depth, m_max, per_sm, cluster, target)
                    if tile is not None:
                        yield tile


def _tile(
    height: int, tokens: int, rows: int, depth: int, m_max: int, per_sm: int, cluster: int, target: Target
) -> LinearTile | None:
    """The tile with the deepest ring that fits, or None where there is none."""
    step = 2 * ROW if depth % (2 * ROW) == 0 and tokens <= 128 else ROW
    row_blocks = -(-rows // (height * cluster)) * cluster
    slots = target.sms * per_sm // cluster * cluster
    blocks = min(row_blocks * -(-m_max // tokens), slots)
    room = target.shared_memory_bytes // per_sm - (1024 if per_sm > 1 else 0)
    for stages in range(min(12, max(2, -(-depth // step))), 1, -1):
        try:
            tile = LinearTile(height, tokens, step, stages, blocks, cluster, per_sm, weights_once=m_max <= tokens)
        except ValueError:
            return None
        registers = tokens // 2 + 56
        if not tile.wide and registers * tile.threads * per_sm > REGISTERS:
            return None
        if tile.wide and per_sm > 1:
            return None
        if tile.shared_bytes <= room:
            return tile
    return None


def _seconds(tile: LinearTile, rows: int, depth: int, m_max: int, target: Target) -> float:
    """Predicted time with m_max tokens."""
    count = -(-rows // tile.rows) * -(-m_max // tile.tokens)
    turns = -(-count // tile.blocks)
    shared = min(tile.blocks_per_sm, -(-tile.blocks // target.sms))  # blocks on the busiest multiprocessor
    operations = 2 * 64 * tile.bands * tile.tokens * depth
    fetched = (tile.rows + tile.tokens / tile.cluster) * depth * 2
    each = max(operations / _MATRIX_OPS, fetched / _FETCH_BYTES) * shared
    bandwidth = (target.bandwidth_gbs or 3000.0) * 1e9
    in_flight = tile.stages * (tile.rows + tile.tokens) * tile.depth * 2 * shared
    starved = 1.0 + max(0.0, 64e3 / in_flight - 1.0) * 0.25
    return max(turns * each, rows * depth * 2 / bandwidth) * starved + _LAUNCH_S
