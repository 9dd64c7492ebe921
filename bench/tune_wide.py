"""A CPU schedule with as many tiles as its kernels can be made with, for comparing searches where spaces are small."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.schedules.cpu.linear_block_gemm import GemmTile, LinearBlockGemm


@dataclass(frozen=True)
class WideGemm(LinearBlockGemm):
    """All tiles of up to 16 tokens and two panels, after the usual ones."""

    def space(self, facts: Any, target: Any) -> Sequence[GemmTile]:
        usual = list(super().space(facts, target))
        more = [GemmTile(tokens, panels) for panels in (1, 2) for tokens in range(2, 17)]
        return [*usual, *(tile for tile in more if tile not in usual)]
