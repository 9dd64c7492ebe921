"""What all requests share: the models, the limits, the keys, the metrics, and what runs right now."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from tilewright.runtime.server.errors import unavailable
from tilewright.runtime.server.keys import KeyRing
from tilewright.runtime.server.limits import ServerLimits
from tilewright.runtime.server.metrics import ServerMetrics
from tilewright.runtime.server.progress import Progress
from tilewright.runtime.server.served import Models, Served
from tilewright.runtime.server.tracing import Tracer

if TYPE_CHECKING:
    from tilewright.runtime.server.generation import Generation

T = TypeVar("T")


@dataclass
class Service:
    """The state of one server. All of it belongs to the event loop's thread.

    active: generations between submission and end. draining: no new request is taken. encoders: threads that turn long
    texts into tokens. tracer: where spans of requests go, if anywhere.
    """

    models: Models
    limits: ServerLimits
    keys: KeyRing
    metrics: ServerMetrics
    log_prompts: bool = False
    tracer: Tracer | None = None
    draining: bool = False
    active: "set[Generation]" = field(default_factory=set)
    encoders: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "tilewright-encode"))

    def __post_init__(self) -> None:
        self.progress = [Progress(served, self.limits.stall_s) for served in self.models]

    @classmethod
    def of(
        cls,
        served: Sequence[Served],
        limits: ServerLimits | None = None,
        keys: KeyRing | None = None,
        *,
        log_prompts: bool = False,
        metrics_prefix: str = "tilewright",
        tracer: Tracer | None = None,
    ) -> "Service":
        models = Models(served)
        metrics = ServerMetrics(models, metrics_prefix)
        return cls(models, limits or ServerLimits(), keys or KeyRing([]), metrics, log_prompts, tracer)

    @property
    def health(self) -> Literal["ok", "dead", "stalled"]:
        """By what the engines do: dead where one has failed, stalled where one has work and finishes no step."""
        if any(served.engine.failure is not None for served in self.models):
            return "dead"
        return "stalled" if any(progress.stalled for progress in self.progress) else "ok"

    def check_open(self) -> None:
        """Raises ApiError 503 where no new request is taken."""
        if self.draining:
            raise unavailable("the server is about to end; send the request to another one", "draining")

    async def encode(self, long: bool, work: Callable[[], T]) -> T:
        """Runs `work`, which makes tokens of text: at once where that is quick, else in a thread."""
        if not long:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.encoders, work)

    def close(self) -> None:
        self.encoders.shutdown(wait=False, cancel_futures=True)
        if self.tracer is not None:
            self.tracer.close()
