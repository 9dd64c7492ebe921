"""The schedules in order of preference, and the choice among them: the first that matches wins."""

import json
import logging
from dataclasses import dataclass, field
from typing import Any

from tilewright.compiler.composites import load_spec
from tilewright.compiler.errors import CompileError
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, Lowering, Reject, Schedule
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
from tilewright.schedules.cuda.embedding import Embedding as CudaEmbedding
from tilewright.schedules.cuda.gated import Gated as CudaGated
from tilewright.schedules.cuda.linear import Linear as CudaLinear
from tilewright.schedules.cuda.paged_attention import PagedAttention as CudaPagedAttention
from tilewright.schedules.cuda.qkv_append import QKVAppend as CudaQKVAppend
from tilewright.schedules.cuda.rms_norm import RMSNorm as CudaRMSNorm
from tilewright.schedules.cuda.sample import Sample as CudaSample

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
    CudaEmbedding(),
    CudaRMSNorm(),
    CudaGated(),
    CudaQKVAppend(),
    CudaPagedAttention(),
    CudaSample(),
)


@dataclass(frozen=True)
class Choice:
    """What runs a composite call: schedule, facts, tile, its floor, and the kernels."""

    schedule: Schedule
    facts: Any
    tile: Any
    floor: Floor
    lowering: Lowering


@dataclass(frozen=True)
class Chooser:
    """Picks the schedule and tile for a call on one target.

    On a GPU a call that no schedule takes has none: it runs by its reference body, which TVM lowers as it does plain
    operators. The compile's summary warns of every one.

    `tiles` holds the best known tiles by (schedule name, facts as text); without one the first of the space is taken.
    """

    target: Target
    tiles: tuple[tuple[tuple[str, str], Any], ...] = ()
    order: tuple[Schedule, ...] = field(default=ORDER, repr=False)

    def __call__(
        self, composite: str, spec: Any, m: int | None, m_max: int, inner: tuple[int, ...] = ()
    ) -> Choice | None:
        """The choice for a call with m rows (None: dynamic, at most m_max), each of dimensions `inner` and a last one.

        None where the reference body is to run. Raises CompileError with every reason where it can't.
        """
        call = Call(composite, spec, m, m_max, inner)
        reasons = []
        for schedule in self.order:
            if schedule.composite != composite or schedule.kind != self.target.kind:
                continue
            facts = schedule.match(call, self.target)
            if not isinstance(facts, Reject):
                return self._choice(schedule, facts)
            reasons.append(f"{schedule.name}: {facts.reason}")
        why = "; ".join(reasons) or f"no schedule for {self.target.kind} knows it"
        if self.target.kind == "cuda":
            logger.warning("%s runs by its reference body on %s: %s", composite, self.target.name, why)
            return None
        raise CompileError(f"{composite} has no kernel on {self.target.name} for {spec}: {why}")

    def written(self, func: Any) -> Any:
        """A kernel of a scheduled module, written down if it was deferred."""
        call = (func.attrs or {}).get("tw.call")
        if call is None:
            return func
        composite, spec, m, m_max, inner, index = json.loads(str(call))
        choice = self(composite, load_spec(composite, spec), m, m_max, tuple(inner))
        assert choice is not None, "it was chosen before"
        return choice.lowering.kernels[index].written().with_attr("global_symbol", func.attrs["global_symbol"])

    def _choice(self, schedule: Schedule, facts: Any) -> Choice:
        known = dict(self.tiles).get((schedule.name, repr(facts)))
        tile = known if known is not None else schedule.space(facts, self.target)[0]
        floor = schedule.floor(facts, self.target)
        return Choice(schedule, facts, tile, floor, schedule.apply(facts, tile, self.target))
