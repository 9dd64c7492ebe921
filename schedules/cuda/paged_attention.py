"""Attention of a step over KV pages on Hopper: kernels for generated tokens, and for prompts unless a step has none.

A planner before each makes its work list on the device, once a step: it reads what all layers share. The two kernels
share the result, each writing its sequences' rows. Which one a token gets depends on `phases`, not on the batch, so its
bits don't either. Where the spec is strict, the prompts' kernel takes all tokens: a token then has the same bits
whether it was generated or stands in a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cuda.attention_decode import DecodeTile, decode_kernel
from tilewright.schedules.cuda.attention_prefill import PrefillTile, prefill_calls, prefill_space, refuse_prefill
from tilewright.schedules.cuda.attention_spec import refuse_attention, sinks_argument
from tilewright.schedules.cuda.decode_plan import plan_kernel
from tilewright.schedules.cuda.decode_work import COUNTERS, PARTIALS, WORK, HeadBlocks, plan_outputs

_MAX_STAGES = 8


@dataclass(frozen=True)
class Tile:
    """decode: None where no token has that kernel. prefill: None where a step has no prompts."""

    decode: DecodeTile | None
    prefill: PrefillTile | None


@dataclass(frozen=True)
class Facts:
    """decode: every token is a generated one of a sequence of its own. scarce: so few of these that their keys are cut
    up to keep all multiprocessors busy. m_max: the most tokens."""

    spec: PagedAttentionSpec
    decode: bool
    scarce: bool
    m_max: int


class PagedAttention(Schedule):
    name = "paged_attention"
    composite = "paged_attention"
    kind = "cuda"

    def match(self, call: Call, target: Target) -> Facts | Reject:
        scarce = call.decode and call.rows <= _few(call.spec, target)
        facts = Facts(call.spec, call.decode, scarce, call.m_max)
        if not target.has("tma"):
            return Reject(f"{target.name} has no TMA, which gathers the pages")
        refusal = refuse_attention(call.spec)
        if refusal is None and (call.spec.strict or not call.decode):
            refusal = refuse_prefill(call.spec, target)
        if refusal is None and not self.space(facts, target):
            refusal = Reject(f"no tile fits into {target.shared_memory_bytes} bytes of shared memory")
        return facts if refusal is None else refusal

    def space(self, facts: Facts, target: Target) -> Sequence[Tile]:
        if facts.spec.strict:
            return [Tile(None, tile) for tile in prefill_space(facts.spec, target)]
        prefills = [None] if facts.decode else prefill_space(facts.spec, target)
        decodes = _decode_space(facts, target)
        return [Tile(decode, prefills[0]) for decode in decodes] + [Tile(decodes[0], tile) for tile in prefills[1:]]

    def bounds(self, call: Call, target: Target) -> Sequence[int]:
        return (_few(call.spec, target),) if call.decode and not call.spec.strict else ()

    def floor(self, facts: Facts, target: Target) -> Floor:
        """A row's queries and outputs; its keys depend on the position, which no shape tells."""
        attention = facts.spec.attention
        return Floor(bytes_fixed=0, bytes_per_row=4 * attention.heads * attention.head_dim)

    def apply(self, facts: Facts, tile: Tile, target: Target) -> Lowering:
        spec, decode, m_max = facts.spec, tile.decode, facts.m_max
        out = Output("out", ("m", spec.attention.heads, spec.attention.head_dim), spec.dtype)
        kernels: list[KernelCall] = []
        if decode is not None:
            plan = plan_kernel(spec, target, facts.decode, m_max, decode.mode, decode.share)
            attend = decode_kernel(spec, decode, target, m_max, facts.decode)
            kernels += [
                KernelCall(plan, (2, 3, 4, 6, 7), plan_outputs(spec, m_max), shared=True),
                KernelCall(attend, (0, 1, 5, WORK, PARTIALS, COUNTERS, 8, sinks_argument(spec)), (out,)),
            ]
        if tile.prefill is not None:
            kernels += prefill_calls(spec, tile.prefill, target, m_max, () if kernels else (out,))
        return Lowering(tuple(kernels), ("out",))


def _few(spec: PagedAttentionSpec, target: Target) -> int:
    """The most sequences that are few."""
    return max(1, 2 * target.sms // HeadBlocks.of(spec).units)


def _decode_space(facts: Facts, target: Target) -> list[DecodeTile]:
    """The most stages that fit beside one another. Two blocks a multiprocessor are best where each gets a part, and
    three stages; one of twice the stages has the shorter way to the end where work is scarce."""
    spec, tiles = facts.spec, {}
    for blocks in (1, 2):
        fitting = [t for s in range(2, _MAX_STAGES + 1) if (t := DecodeTile(s, blocks)).fits(spec, target)]
        if fitting:
            tiles[blocks] = fitting[-1]
    shared = 2 in tiles and tiles[2].stages >= 3 and not facts.scarce
    return sorted(tiles.values(), key=lambda tile: (tile.blocks_per_sm == 2) != shared)
