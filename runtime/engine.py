"""The engine: prompts in, completions or streams of events out, many at a time.

    engine = Engine(model)
    completions = engine.generate(["Hello"], SamplingParams(max_tokens=32))
    async for event in engine.stream("Hello"): ...
    events = engine.open([engine.request("Hello")])  # the two halves of stream, for servers

The work is done by a core (runtime/core.py) on a thread of the engine's own; callers only wait for events.
"""

import asyncio
import queue
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial

import numpy as np

from tilewright.compiler.errors import RequestError
from tilewright.runtime.core import Clock, EngineCore, Load, Stats
from tilewright.runtime.event_stream import EventStream
from tilewright.runtime.intake import Intake, Prompt, resolve_limits
from tilewright.runtime.queue_room import QueueRoom
from tilewright.runtime.request import Request
from tilewright.runtime.scheduler.fair import FairShare
from tilewright.runtime.scheduler.policy import Policy
from tilewright.runtime.serving_thread import Posts, ServingThread
from tilewright.runtime.step_costs import StepCosts
from tilewright.runtime.types import (
    Completion,
    Costs,
    EngineError,
    EngineLimits,
    SamplingParams,
    ServedModel,
    StreamEvent,
)


class Engine:
    """Serves one model. All methods may be called from any thread; close it, or use it as a context manager.

    Bad prompts and parameters raise RequestError before anything runs. If the device fails, every unfinished call
    raises EngineError, and so does every later one.
    """

    def __init__(
        self,
        model: ServedModel,
        limits: EngineLimits | None = None,
        *,
        policy: Policy | None = None,
        costs: Costs | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.limits = limits or EngineLimits()
        budget, capacity = resolve_limits(self.limits, model.limits)
        self.capacity = capacity  # tokens of prompt and answer together, at most
        self.vocab_size = model.limits.vocab_size
        self.pooling = model.limits.pooling  # of embeddings; None where the model gives none
        self.dimensions = model.limits.hidden  # of an embedding
        self._posts = Posts()
        self._core = EngineCore(
            model,
            budget,
            policy or FairShare(),
            costs or StepCosts(),
            clock,
            self.limits.keep_prefixes,
            self._posts.send,
        )
        self._intake = Intake(
            model.limits,
            budget,
            capacity,
            model.tokenizer,
            model.load_s,
            max_prompt=self.limits.max_prompt,
            max_answer=self.limits.max_answer,
        )
        self._thread = ServingThread(self._core)
        self._queue = QueueRoom(self.limits.max_queue)
        self._finalizer = weakref.finalize(self, self._thread.stop)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """The completions of all prompts in order, n for each. params: one for all, or one for each.

        A prompt is a text, token ids, or chat messages. All are checked before the first one runs.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        params = params or SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(each) != len(prompts):
            raise RequestError(f"{len(each)} sampling parameters for {len(prompts)} prompts; give one, or one each")
        requests = [self._intake.request(prompt, own) for prompt, own in zip(prompts, each, strict=True)]
        return self._complete(requests)

    def embed(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """float32[len(prompts), hidden]: for each prompt its hidden states after the last norm, pooled as `pooling`
        says, of length 1."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        completions = self._complete([self.embedding(prompt) for prompt in prompts])
        return np.stack([done.embedding for done in completions if done.embedding is not None])

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Submits requests and waits for all of their samples."""
        ends: queue.SimpleQueue[StreamEvent] = queue.SimpleQueue()

        def note_end(_: Request, event: StreamEvent) -> None:
            if event.completion:  # the caller sleeps through all other events
                ends.put(event)

        try:
            for request in requests:
                self._submit(request, note_end, wait=True)
            for _ in range(sum(len(request.samples) for request in requests)):
                self._checked(ends.get())
            return [c for request in requests for sample in request.samples if (c := sample.output.completion)]
        finally:
            self._leave(requests)

    def stream_sync(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """The request's events as they come. Closing the iterator cancels the request."""
        request = self._intake.request(prompt, params or SamplingParams())
        events: queue.SimpleQueue[StreamEvent] = queue.SimpleQueue()
        self._submit(request, lambda _, event: events.put(event))
        try:
            unfinished = len(request.samples)
            while unfinished:
                event = self._checked(events.get())
                unfinished -= event.completion is not None
                yield event
        finally:
            self._leave([request])

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[StreamEvent]:
        """The request's events as they come. Closing the iterator, or cancelling its task, cancels the request."""
        events = self.open([self.request(prompt, params)])
        try:
            async for _, event in events:
                yield event
        finally:
            events.leave()

    def request(self, prompt: Prompt, params: SamplingParams | None = None, tenant: str = "") -> Request:
        """A checked request that is not submitted yet. Encoding a long prompt takes a while: not on event loops.

        tenant: on whose behalf. While requests wait, places go to the tenant that was served least.
        """
        return self._intake.request(prompt, params or SamplingParams(), tenant)

    def embedding(self, prompt: Prompt, params: SamplingParams | None = None, tenant: str = "") -> Request:
        """A request for a prompt's pooled hidden states, not submitted yet. params: deadline_s and priority count."""
        return self._intake.embedding(prompt, params or SamplingParams(), tenant)

    def open(self, requests: Sequence[Request]) -> EventStream:
        """Submits requests, all or none, and brings their events to the running event loop.

        Raises QueueFullError, and EngineError where the engine is dead.
        """
        post = self._posts.of(asyncio.get_running_loop())
        events = EventStream(requests, post, self._cancel, self._checked)
        try:
            for place, request in enumerate(requests):
                request.decided = events.decision
                self._submit(request, events.sender(place))
        except BaseException:
            events.leave()
            raise
        return events

    def close(self) -> None:
        """Ends what is unfinished and stops the thread."""
        self._finalizer()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> Stats:
        return self._core.stats

    @property
    def load(self) -> Load:
        """What the engine holds at this moment."""
        return self._core.load

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return self._core.busy

    @property
    def failure(self) -> BaseException | None:
        """Why the engine is dead; None while it is not."""
        return self._core.failure

    def check_invariants(self) -> None:
        """Raises AssertionError unless the books are right. Call it when idle: every page must be free then."""
        self._core.check_invariants()

    def _submit(self, request: Request, events: Callable[[Request, StreamEvent], None], wait: bool = False) -> None:
        """Queues a request. Where the queue is full: waits, or raises QueueFullError."""
        self._queue.enter(request.tenant, wait)
        request.events, request.release = events, partial(self._queue.leave, request.tenant)
        try:
            self._core.submit(request)
        except EngineError:
            request.leave_queue()
            raise
        self._thread.wake()

    def _cancel(self, requests: Sequence[Request]) -> None:
        unfinished = [request for request in requests if not request.finished]
        for request in unfinished:
            self._core.cancel(request)
        if unfinished:
            self._thread.wake()

    def _leave(self, requests: Sequence[Request]) -> None:
        self._cancel(requests)
        for request in requests:
            request.leave()

    def _checked(self, event: StreamEvent) -> StreamEvent:
        if event.completion and event.completion.finish_reason == "error":
            raise EngineError(f"the engine is dead: {self._core.failure}") from self._core.failure
        return event
