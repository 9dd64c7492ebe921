"""The sampler on a GPU: a cluster of thread blocks a row on Hopper, one block a row elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.compiler.composites import SAMPLING_INPUTS, SampleSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cuda.sample_candidates import MOST
from tilewright.schedules.cuda.sample_kernel import sample_kernel
from tilewright.schedules.cuda.sample_row import RowLayout

OTHER_BYTES = 10 << 10  # of shared memory, besides the scores
_THREADS = 256  # of each of a cluster's blocks
_MOST_TOKENS = 1 << 24  # counts are float32 where thresholds are searched


@dataclass(frozen=True)
class SampleTile:
    """cluster: thread blocks of a row. threads: of a block. resident: whether scores stay in shared memory.
    blocks_per_sm: that are to fit side by side."""

    cluster: int
    threads: int
    resident: bool
    blocks_per_sm: int = 1

    def __post_init__(self) -> None:
        if self.cluster not in (1, 2, 4, 8):
            raise ValueError(f"a cluster of {self.cluster} blocks is none of 1, 2, 4, 8")
        if self.threads not in (256, 512, 1024):
            raise ValueError(f"{self.threads} threads are none of 256, 512, 1024")
        if self.threads * self.blocks_per_sm > 2048:
            raise ValueError(f"{self.blocks_per_sm} blocks of {self.threads} threads do not fit side by side")


@dataclass(frozen=True)
class SampleFacts:
    spec: SampleSpec


class Sample(Schedule):
    name = "sample"
    composite = "sample"
    kind = "cuda"

    def match(self, call: Call, target: Target) -> SampleFacts | Reject:
        spec = call.spec
        if not 1 <= spec.top_logprobs <= spec.vocab:
            return Reject(f"top_logprobs {spec.top_logprobs} is not within 1..{spec.vocab}, the vocabulary")
        if spec.top_logprobs > MOST:
            return Reject(f"top_logprobs {spec.top_logprobs} is above {MOST}")
        if spec.vocab > _MOST_TOKENS:
            return Reject(f"a vocabulary of {spec.vocab} is above {_MOST_TOKENS}")
        return SampleFacts(spec)

    def space(self, facts: SampleFacts, target: Target) -> Sequence[SampleTile]:
        """One tile: the sums of a row are made of one a thread, so another number of threads gives other bits."""
        if not (target.has("tma") and target.has("wgmma")):
            return [SampleTile(1, 512, False)]
        return [_clustered(facts.spec.vocab, target)]

    def floor(self, facts: SampleFacts, target: Target) -> Floor:
        """A greedy row: its logits once, an exponential each."""
        vocab = facts.spec.vocab
        return Floor(bytes_fixed=0, bytes_per_row=4 * vocab + 8 + 8 * facts.spec.top_logprobs, flops_per_row=6 * vocab)

    def apply(self, facts: SampleFacts, tile: SampleTile, target: Target) -> Lowering:
        spec = facts.spec
        layout = RowLayout(spec.vocab, tile.cluster, tile.threads)
        func = sample_kernel(spec, layout, tile.resident, tile.blocks_per_sm, target)
        results = (
            Output("ids", ("m",), "int32"),
            Output("logprobs", ("m",), "float32"),
            Output("top_ids", ("m", spec.top_logprobs), "int32"),
            Output("top_logprobs", ("m", spec.top_logprobs), "float32"),
        )
        # A kernel's parameters are fixed: without a use for it, it is given one float.
        scores = Output("scores", (1,) if tile.resident else ("m", tile.cluster * layout.slice), "float32")
        call = KernelCall(func, tuple(range(1 + len(SAMPLING_INPUTS))), (*results, scores))
        return Lowering((call,), tuple(o.name for o in results))


def _clustered(vocab: int, target: Target) -> SampleTile:
    """Eight blocks a row, as many side by side as fit."""
    scores_bytes = 4 * RowLayout(vocab, 8, _THREADS).slice
    for blocks in range(768 // _THREADS, 0, -1):
        if blocks * (scores_bytes + OTHER_BYTES + 1024) <= target.shared_memory_bytes + 1024:
            return SampleTile(8, _THREADS, True, blocks)
    return SampleTile(8, _THREADS, False, 1024 // _THREADS)
