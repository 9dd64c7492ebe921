"""The schedules in order of preference, and the choice among them: the first that matches wins."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from tilewright.compiler.composites import LinearSpec, load_spec
from tilewright.compiler.errors import CompileError
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import ByRows, Call, Floor, KernelCall, Lowering, Part, Reject, Schedule
from tilewright.schedules.cpu.embedding import Embedding
from tilewright.schedules.cpu.gated import Gated
from tilewright.schedules.cpu.kv_append import KVAppend
from tilewright.schedules.cpu.linear_block_amx import LinearBlockAmx
from tilewright.schedules.cpu.linear_block_gemm import LinearBlockGemm
from tilewright.schedules.cpu.linear_block_gemv import LinearBlockGemv
from tilewright.schedules.cpu.linear_dense import LinearDense
from tilewright.schedules.cpu.paged_attention import PagedAttention
from tilewright.schedules.cpu.qkv_append import QKVAppend
from tilewright.schedules.cpu.rms_norm import RMSNorm
from tilewright.schedules.cpu.rope import Rope
from tilewright.schedules.cpu.sample import Sample
from tilewright.schedules.cuda.angles import Angles as CudaAngles
from tilewright.schedules.cuda.embedding import Embedding as CudaEmbedding
from tilewright.schedules.cuda.gated import Gated as CudaGated
from tilewright.schedules.cuda.linear import Linear as CudaLinear
from tilewright.schedules.cuda.linear import takes_norm as linear_takes_norm
from tilewright.schedules.cuda.linear_mma import LinearMma as CudaLinearMma
from tilewright.schedules.cuda.paged_attention import PagedAttention as CudaPagedAttention
from tilewright.schedules.cuda.paged_attention_mma import PagedAttentionMma as CudaPagedAttentionMma
from tilewright.schedules.cuda.qkv_append import QKVAppend as CudaQKVAppend
from tilewright.schedules.cuda.rms_norm import RMSNorm as CudaRMSNorm
from tilewright.schedules.cuda.sample import Sample as CudaSample
from tilewright.schedules.records import NOTHING_KNOWN, Known, Record

logger = logging.getLogger(__name__)

# The most special first. A new schedule is a file and a line here.
ORDER: tuple[Schedule, ...] = (
    LinearBlockGemv(),
    LinearBlockAmx(),
    LinearBlockGemm(),
    LinearDense(),
    Embedding(),
    RMSNorm(),
    Gated(),
    Rope(),
    KVAppend(),
    QKVAppend(),
    PagedAttention(),
    Sample(),
    # NVIDIA GPUs.
    CudaLinear(),
    CudaLinearMma(),
    CudaAngles(),
    CudaEmbedding(),
    CudaRMSNorm(),
    CudaGated(),
    CudaQKVAppend(),
    CudaPagedAttention(),
    CudaPagedAttentionMma(),
    CudaSample(),
)


@dataclass(frozen=True)
class Choice:
    """What runs a composite call: schedule, facts, tile, its floor, and the kernels. Where the number of rows decides
    between several, facts and tile are those for the most rows. record: that the tile was taken from; None where it is
    the default."""

    schedule: Schedule
    facts: Any
    tile: Any
    floor: Floor
    lowering: Lowering
    record: Record | None = None


@dataclass(frozen=True)
class Chooser:
    """Picks the schedule and tile for a call on one target.

    On a GPU a call that no schedule takes has none: it runs by its reference body, which TVM lowers as it does plain
    operators. The compile's summary warns of every one.

    The tile is the fastest of those that `known` has records of, and without any the first of the schedule's space.
    """

    target: Target
    known: Known = NOTHING_KNOWN
    order: tuple[Schedule, ...] = field(default=ORDER, repr=False)

    def __call__(self, call: Call) -> Choice | None:
        """The choice for a call. None where the reference body is to run. Raises CompileError with every reason where
        it can't."""
        reasons = []
        for schedule in self.order:
            if schedule.composite != call.composite or schedule.kind != self.target.kind:
                continue
            facts = schedule.match(call, self.target)
            if not isinstance(facts, Reject):
                return self._choice(schedule, call)
            reasons.append(f"{schedule.name}: {facts.reason}")
        why = "; ".join(reasons) or f"no schedule for {self.target.kind} knows it"
        if self.target.kind == "cuda":
            logger.warning("%s runs by its reference body on %s: %s", call.composite, self.target.name, why)
            return None
        raise CompileError(f"{call.composite} has no kernel on {self.target.name} for {call.spec}: {why}")

    def written(self, func: Any) -> Any:
        """A kernel of a scheduled module, written down if it was deferred."""
        call = (func.attrs or {}).get("tw.call")
        if call is None:
            return func
        name, index, composite, spec, *fields = json.loads(str(call))
        schedule = next(s for s in self.order if s.name == name and s.kind == self.target.kind)
        asked = _call(composite, load_spec(composite, spec), *fields)
        kernel = self._part(schedule, asked).lowering.kernels[index]
        return kernel.written().with_attr("global_symbol", func.attrs["global_symbol"])

    def _choice(self, schedule: Schedule, call: Call) -> Choice:
        """The parts for every number of rows that the schedule tells apart, as one choice."""
        asked = parts_of(schedule, call, self.target)
        parts = [self._part(schedule, part) for part in asked]
        for part in parts:
            for record in self.known.stale(schedule.name, part.facts, schedule.space(part.facts, self.target)):
                _tell_stale(record)
        return replace(parts[-1], lowering=_joined([part.rows for part in asked], parts))

    def _part(self, schedule: Schedule, call: Call) -> Choice:
        """The choice for as many rows as the call says."""
        facts = schedule.match(call, self.target)
        space = schedule.space(facts, self.target)
        tile, record = self.known.best(schedule.name, facts, call.rows, space) or (space[0], None)
        floor = schedule.floor(facts, self.target)
        return Choice(schedule, facts, tile, floor, schedule.apply(facts, tile, self.target), record)


def takes_norm(target: Target, spec: LinearSpec) -> bool:
    """Whether a linear with a norm before it, as the spec has it, is worth one call."""
    return target.kind == "cpu" or (target.has("wgmma") and linear_takes_norm(spec))


def parts_of(schedule: Schedule, call: Call, target: Target) -> list[Call]:
    """The call, once for each number of rows up to which the schedule has a tile of its own."""
    bounds = [] if call.m is not None else [b for b in schedule.bounds(call, target) if b < call.m_max]
    return [replace(call, rows=rows) for rows in (*bounds, call.m_max)]


@cache
def _tell_stale(record: Record) -> None:
    """Once a process."""
    logger.warning(
        "tuning record %s is of another space of tiles than today's: not used; tilewright tune measures anew",
        record.place,
    )


def _call(composite: str, spec: Any, m: int | None, m_max: int, inner: Sequence[int], decode: bool, rows: int) -> Call:
    return Call(composite, spec, m, m_max, tuple(inner), decode, rows)


def _joined(bounds: Sequence[int], choices: Sequence[Choice]) -> Lowering:
    """One lowering of those for at most so many rows each. Raises ValueError where they differ in more than kernels."""
    first = choices[0].lowering
    for other in choices[1:]:
        if [replace(k, func=None) for k in other.lowering.kernels] != [replace(k, func=None) for k in first.kernels]:
            raise ValueError(f"{choices[0].schedule.name}: what is launched depends on the number of rows")
    kernels = []
    for index, kernel in enumerate(first.kernels):
        parts: list[Part] = []
        for rows, choice in zip(bounds, choices, strict=True):
            func = choice.lowering.kernels[index].func
            if parts and parts[-1].func == func:
                parts.pop()
            parts.append(Part(rows, func, choice.tile, choice.record.place if choice.record else ""))
        kernels.append(_with_parts(kernel, parts))
    return Lowering(tuple(kernels), first.results)


def _with_parts(kernel: KernelCall, parts: Sequence[Part]) -> KernelCall:
    return replace(kernel, func=parts[0].func if len(parts) == 1 else ByRows(tuple(parts)))
