"""How a dense linear for few tokens on a Hopper GPU is dealt out, where its weight is small."""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.compiler.composites import LinearSpec
from tilewright.schedules.cuda.linear_parts import is_narrow, is_small, parts_of

STEP = 16  # of K, in one product of the matrix units

_MOST_WARPS = 8
_MOST_STEPS = 16  # of a warp at a time: four registers each
_EASY_STEPS = 12
_LEAST_STEPS = 4  # of a turn, which has to be worth handing on the sums

TOKENS = 8  # of a block; at 16, TMA is as fast


@dataclass(frozen=True)
class LinearFewTile:
    """warps: of a block, between which K is dealt out in equal parts. turns: that each warp takes, one part in each."""

    warps: int
    turns: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.warps <= _MOST_WARPS:
            raise ValueError(f"{self.warps} warps are not 1 to {_MOST_WARPS}")
        if self.turns < 1 or self.warps == 1 < self.turns:
            raise ValueError(f"{self.warps} warps do not take {self.turns} turns")

    def steps(self, spec: LinearSpec) -> int:
        """Of K, that a warp multiplies in a turn."""
        return spec.in_features // (STEP * self.warps * self.turns)


def few_tiles(spec: LinearSpec, tokens: int) -> Sequence[LinearFewTile]:
    """Valid tiles for up to so many tokens, the likely best first: few warps, since they wait for one another, and few
    turns. None where a tile of `linear_tile` is faster."""
    if tokens > TOKENS or spec.in_features % STEP or not (is_small(spec) or is_narrow(spec)):
        return ()
    parts = parts_of(spec)
    once = [LinearFewTile(warps) for warps in range(parts, _MOST_WARPS + 1, parts) if _fits(spec, warps, 1)]
    easy = [tile for tile in once if tile.steps(spec) <= _EASY_STEPS]
    if once:
        return (*easy, *(tile for tile in reversed(once) if tile not in easy))
    # So many warps that the chain is never without one whose weights are there.
    turns = range(2, spec.in_features // STEP + 1)
    several = [LinearFewTile(_MOST_WARPS, n) for n in turns if _fits(spec, _MOST_WARPS, n)]
    several = [tile for tile in several if tile.steps(spec) >= _LEAST_STEPS]
    return tuple(several[:2]) if _MOST_WARPS % parts == 0 and parts < _MOST_WARPS else ()


def _fits(spec: LinearSpec, warps: int, turns: int) -> bool:
    """Whether K is dealt out evenly, and a warp's share of it in a turn fits into registers."""
    steps = spec.in_features // STEP
    return steps % (warps * turns) == 0 and steps // (warps * turns) <= _MOST_STEPS
