"""How a dense linear is cut into tiles on a Hopper GPU, and which cut is likely the fastest.

The model is a roofline of one wave after another. Tuning records replace its choice where there are any.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tilewright.compiler.targets.base import Target
from tilewright.schedules.cuda.tma import ATOM_BYTES, ROW, ROW_BYTES

BARRIER_BYTES = 1024  # barriers and the alignment of what precedes them
STAGING_TOKENS = 16  # that a warp stores at a time
STAGING_PITCH = 24  # values between them in its staging area: stmatrix and 16-byte reads meet no bank twice
REGISTERS = 65536
_TOKENS = (8, 16, 32, 48, 64, 96, 128, 160, 192, 256)
_NARROW = 2048  # outputs

# What one multiprocessor does in a steady state, fitted to measured times of these kernels on an H100.
_LEAST_OPERATION_S = 1.92e-13  # an operation of a large tile
_PER_TOKENS_S, _PER_ROWS_S, _EACH_S = 1.6e-11, 6.8e-12, 1.2e-14  # of a small one: what loads cost, over its extents
_WEIGHT_BYTES = 45e9  # a second, of weights from memory
_TURN_S = 1.0e-6  # between a tile and the next
_HALF_TURN = 0.55  # one of halves of tiles
_LONE_BAND = 1.04, 1.12  # how much longer a lone warpgroup takes for one turn, and for several


@dataclass(frozen=True)
class LinearTile:
    """rows, tokens: a tile's outputs and tokens. depth: of K, a stage. stages: of the ring. cluster: blocks that share
    a tile of tokens. blocks: of the grid, which are persistent. blocks_per_sm: that fit side by side. group: blocks of
    tokens that follow one another on the same weights. weights_once: weights are read by one block each, so that the
    cache need not keep them. halves: tiles that are too few to give every block one more are cut in two, of half the
    tokens each, where that gives no block more than one of them."""

    rows: int
    tokens: int
    depth: int
    stages: int
    blocks: int
    cluster: int = 1
    blocks_per_sm: int = 1
    group: int = 8
    weights_once: bool = True
    halves: bool = False

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
        if self.halves and (self.cluster > 1 or self.tokens % 32):
            raise ValueError(f"{self.tokens} tokens for a cluster of {self.cluster} are not cut in halves")
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
    def holds_parts(self) -> bool:
        """Whether registers hold a part of a sum beside the sum of the parts before."""
        registers = self.tokens + 64
        return not self.wide and self.tokens <= 128 and self.blocks_per_sm * self.threads * registers <= REGISTERS

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
        return ring + self.overread_bytes + 4 * self.bands * STAGING_TOKENS * STAGING_PITCH * 2 + BARRIER_BYTES


@cache
def tiles(rows: int, depth: int, m_max: int, target: Target, parts: int = 1) -> tuple[LinearTile, ...]:
    """Valid tiles for a weight [rows, depth] and up to m_max tokens, the likely best first. parts: of a sum over K."""
    found = [t for t in dict.fromkeys(_candidates(rows, depth, m_max, target)) if parts == 1 or t.holds_parts]
    found.sort(key=lambda t: (_seconds(t, rows, depth, m_max, target), *_preference(t, rows, m_max)))
    return tuple(found)


def _preference(tile: LinearTile, rows: int, m_max: int) -> tuple[int, int, int]:
    """Of tiles that should take equally long: a block alone, with the deeper ring; fewer warpgroups; and tokens shared
    where few of them or many tiles make loads dear, but not where blocks of one turn would wait for one another."""
    several = -(-rows // tile.rows) * -(-m_max // tile.tokens) > tile.blocks
    return tile.blocks_per_sm, tile.bands, -tile.cluster if several or tile.tokens <= 64 else tile.cluster


def _candidates(rows: int, depth: int, m_max: int, target: Target) -> Iterator[LinearTile]:
    if m_max <= 64:
        tokens = next(t for t in _TOKENS if t >= m_max)
        # A narrow weight is not read faster than one chain of steps is multiplied, and for 16 tokens a step takes less
        # time than for 8 (29 ns against 33).
        extents = (8, 16) if tokens == 8 and rows <= _NARROW else (tokens,)
        shapes = [(height, t, 1) for t in extents for height in (*range(16, 129, 16), 160, 192, 224, 256)]
    else:
        shapes = [(h, t, p) for t in _TOKENS if t >= 64 for h in (32, 48, 64, 96, 128, 192) for p in (1, 2)]
    for height, tokens, per_sm in shapes:
        for cluster in (1, 2) if tokens >= 32 else (1,):
            tile = _tile(height, tokens, rows, depth, m_max, per_sm, cluster, target)
            if tile is not None:
                yield tile


def _tile(
    height: int, tokens: int, rows: int, depth: int, m_max: int, per_sm: int, cluster: int, target: Target
) -> LinearTile | None:
    """The tile with the deepest ring that fits, or None where there is none."""
    step = 2 * ROW if depth % (2 * ROW) == 0 and tokens <= 64 and per_sm == 1 else ROW
    row_blocks = -(-rows // (height * cluster)) * cluster
    slots = target.sms * per_sm // cluster * cluster
    blocks = min(row_blocks * -(-m_max // tokens), slots)
    room = target.shared_memory_bytes // per_sm - (1024 if per_sm > 1 else 0)
    halves = cluster == 1 and tokens % 32 == 0 and m_max > 64
    for stages in range(min(12, max(2, -(-depth // step))), 1, -1):
        try:
            tile = LinearTile(
                height, tokens, step, stages, blocks, cluster, per_sm, weights_once=m_max <= tokens, halves=halves
            )
        except ValueError:
            return None
        registers = tokens // 2 + 56
        if per_sm * tile.threads * registers > REGISTERS and not (tile.wide and per_sm == 1):
            return None
        if tile.shared_bytes <= room:
            return tile
    return None


def _seconds(tile: LinearTile, rows: int, depth: int, m_max: int, target: Target) -> float:
    """Predicted time with m_max tokens."""
    whole_turns, rest = divmod(-(-rows // tile.rows) * -(-m_max // tile.tokens), tile.blocks)
    turns = float(whole_turns)
    if rest:
        turns += _HALF_TURN if tile.halves and 2 * rest <= tile.blocks else 1
    beside = min(tile.blocks_per_sm, -(-tile.blocks // target.sms))  # blocks on the busiest multiprocessor
    operations = 2 * 64 * tile.bands * tile.tokens * depth
    small_s = _PER_TOKENS_S / tile.tokens + _PER_ROWS_S / (64 * tile.bands) + _EACH_S
    each = operations * max(_LEAST_OPERATION_S, small_s)
    if m_max <= tile.tokens:
        fetch = tile.rows * depth * 2 / _WEIGHT_BYTES
        each = fetch if m_max <= 64 else max(each, fetch)
    bandwidth = (target.bandwidth_gbs or 3000.0) * 1e9
    stalls = {2: 1.6, 3: 1.08}.get(tile.stages, 1.0)  # a shallow ring runs dry
    if tile.bands == 1 and m_max > 64:
        stalls *= _LONE_BAND[turns > 1]  # it stores what it has before it multiplies again
    whole = stalls * max(turns * beside * each, rows * depth * 2 / bandwidth)
    return whole + (turns + max(0, tile.bands - 2)) * _TURN_S
