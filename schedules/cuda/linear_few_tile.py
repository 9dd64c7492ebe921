"""How a dense linear for few tokens on a Hopper GPU is dealt out, where its weight is small."""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.compiler.composites import LinearSpec
from tilewright.schedules.cuda.linear_parts import is_small, parts_of

STEP = 16  # of K, in one product of the matrix units

_MOST_WARPS = 8
_MOST_STEPS = 16  # of a warp: four registers each
_EASY_STEPS = 12

TOKENS = 8  # of a block; at 16, TMA is as fast


@dataclass(frozen=True)
class LinearFewTile:
    """warps: of a block, between which K is dealt out in equal parts."""

    warps: int

    def __post_init__(self) -> None:
        if not 1 <= self.warps <= _MOST_WARPS:
            raise ValueError(f"{self.warps} warps are not 1 to {_MOST_WARPS}")


def few_tiles(spec: LinearSpec, tokens: int) -> Sequence[LinearFewTile]:
    """Valid tiles for up to so many tokens, the likely best first: few warps, since they wait for one another. None
    where a tile of `linear_tile` is faster."""
    k = spec.in_features
    if tokens > TOKENS or k % STEP or not is_small(spec):
        return ()
    steps, parts = k // STEP, parts_of(spec)
    fitting = [w for w in range(parts, _MOST_WARPS + 1, parts) if steps % w == 0 and steps // w <= _MOST_STEPS]
    easy = [w for w in fitting if steps // w <= _EASY_STEPS]
    ordered = easy + sorted(set(fitting) - set(easy), reverse=True)
    return tuple(LinearFewTile(warps) for warps in ordered)
