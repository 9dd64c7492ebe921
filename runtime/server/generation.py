"""One HTTP request's part in the engine: from checked prompts to the last event, cut off where nobody reads."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from tilewright.runtime.event_stream import EventStream
from tilewright.runtime.intake import Prompt
from tilewright.runtime.request import Request
from tilewright.runtime.server.answers import FinishReason, StopReason, Usage
from tilewright.runtime.server.conversation import Conversation
from tilewright.runtime.server.envelope import Call
from tilewright.runtime.server.errors import ApiError
from tilewright.runtime.server.served import Served
from tilewright.runtime.server.service import Service
from tilewright.runtime.types import Completion, EngineError, SamplingParams, StreamEvent

# Prompts of so many characters are encoded beside the event loop: about a millisecond's work.
_LONG = 4096


class Generation:
    """Submitted requests and their events. An async context: leaving it cancels what has not ended.

    A sample's place among the choices is its request's place times n, plus its index.
    """

    def __init__(self, service: Service, call: Call, served: Served, events: EventStream, http: HttpRequest) -> None:
        self._service, self._call, self._events, self._http = service, call, events, http
        self.served = served
        self.requests = events.requests
        self.drawn = 0
        self._cut: StopReason | None = None
        self._submitted_s = time.perf_counter()
        self._last_s: dict[int, float] = {}
        # Looked up once: a token has no time for it.
        self._first_token = service.metrics.first_token.labels(served.name)
        self._between_tokens = service.metrics.between_tokens.labels(served.name)
        service.active.add(self)
        call.key.active += 1

    @property
    def choices(self) -> int:
        return sum(len(request.samples) for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def usage(self) -> Usage:
        prompt = self.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.drawn,
            "total_tokens": prompt + self.drawn,
            "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in self.requests)},
        }

    def cut(self, why: StopReason) -> None:
        """Ends it here: what is there by now is the answer."""
        self._cut = why
        self._events.cancel()

    async def listen(self, listener: Callable[[int, StreamEvent], None]) -> None:
        """Calls `listener` with (place among the choices, event) where an event arrives; returns after the last one.
        Raises EngineError."""
        width = len(self.requests[0].samples)

        def note(place: int, event: StreamEvent) -> None:
            choice = place * width + event.index
            self._note(choice, event)
            listener(choice, event)

        await self._events.listen(note)

    async def completions(self) -> list[Completion]:
        """All of them, in the order of the choices. Raises EngineError."""
        found: dict[int, Completion] = {}

        def keep(choice: int, event: StreamEvent) -> None:
            if event.completion is not None:
                found[choice] = event.completion

        await self.listen(keep)
        return [found[choice] for choice in range(self.choices)]

    def note_failure(self, failure: ApiError) -> None:
        """For an answer whose status said before that all is well."""
        self._call.notes["failed"] = failure.code

    def reasons(self, choice: int, completion: Completion) -> tuple[FinishReason, StopReason | None]:
        """OpenAI's reason for the end of a choice, and ours where it has no word for it."""
        place, index = divmod(choice, len(self.requests[0].samples))
        constraint = self.requests[place].samples[index].constraint
        if constraint is not None and constraint.error is not None:
            return "length", "grammar"
        if completion.finish_reason == "deadline":
            return "length", "deadline"
        if completion.finish_reason == "cancelled":
            return "length", self._cut
        return ("stop" if completion.finish_reason == "stop" else "length"), None

    async def __aenter__(self) -> "Generation":
        self._watch = asyncio.create_task(self._cancel_when_unread())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watch.cancel()
        del self._watch  # it ends by an exception whose traceback holds this generation: a circle otherwise
        self._events.leave()
        self._service.active.discard(self)
        key = self._call.key
        key.active -= 1
        key.charge(self.drawn)
        notes = self._call.notes
        notes["model"] = self.served.name
        for name, tokens in (("prompt_tokens", self.prompt_tokens), ("completion_tokens", self.drawn)):
            notes[name] = notes.get(name, 0) + tokens  # a call may have several, one after the other

    async def _cancel_when_unread(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass
        self._call.notes["disconnected"] = True
        self._events.cancel()

    def _note(self, choice: int, event: StreamEvent) -> None:
        now_s = time.perf_counter()
        if event.token_id is not None:
            self.drawn += 1
            last_s = self._last_s.get(choice)
            if last_s is None:
                self._first_token.observe(now_s - self._submitted_s)
                self._call.notes.setdefault("first_token_s", round(now_s - self._submitted_s, 4))
            else:
                self._between_tokens.observe(now_s - last_s)
            self._last_s[choice] = now_s
        if (completion := event.completion) is not None:
            reason, more = self.reasons(choice, completion)
            ended = more or ("cancelled" if completion.finish_reason == "cancelled" else reason)
            self._call.notes.setdefault("finish_reasons", []).append(ended)
            metrics, name = self._service.metrics, self.served.name
            metrics.whole.labels(name).observe(now_s - self._submitted_s)
            if completion.embedding is None:
                metrics.answer.labels(name).observe(len(completion.token_ids))
            metrics.ended.labels(name, ended).inc()
            if completion.timings.queue_ms is not None:
                metrics.queue.labels(name).observe(completion.timings.queue_ms / 1e3)


async def start(
    service: Service,
    http: HttpRequest,
    served: Served,
    prompts: Sequence[Prompt | Conversation],
    params: SamplingParams,
) -> Generation:
    """Checks and submits a request for each prompt. Raises ApiError, RequestError, EngineError."""
    requests = await admit(service, http, served, prompts, params, served.engine.request)
    return await submit(service, http, served, requests)


async def admit(
    service: Service,
    http: HttpRequest,
    served: Served,
    prompts: Sequence[Prompt | Conversation],
    params: SamplingParams,
    make: Callable[[Prompt, SamplingParams, str], Request],
) -> list[Request]:
    """A request for each prompt, as the engine makes them, counted against the key. Raises ApiError, RequestError."""
    call: Call = http.state.call
    service.check_open()
    call.key.check_priority(params.priority)
    if service.log_prompts:
        call.notes["prompts"] = [_noted(prompt) for prompt in prompts]

    def encode() -> list[Request]:
        tokens = (p.tokens(served.tokenizer) if isinstance(p, Conversation) else p for p in prompts)
        return [make(prompt, params, call.key.name) for prompt in tokens]

    requests = await service.encode(params.grammar is not None or _length(prompts) > _LONG, encode)
    service.check_open()  # it may have been told to end meanwhile
    if served.engine.failure is not None:
        raise EngineError("it has failed")
    call.key.admit_tokens(sum(request.prompt_tokens for request in requests))
    return requests


async def submit(service: Service, http: HttpRequest, served: Served, requests: Sequence[Request]) -> Generation:
    """Raises QueueFullError, DeadlineError, EngineError."""
    events = served.engine.open(requests)
    if requests[0].params.deadline_s is not None and requests[0].params.deadline_s < service.limits.request_s:
        await _decided(events)  # the client's own deadline may be refused
    generation = Generation(service, http.state.call, served, events, http)
    for request in requests:
        service.metrics.prompt.labels(served.name).observe(request.prompt_tokens)
    service.metrics.prompt_tokens.labels(served.name).inc(generation.prompt_tokens)
    return generation


async def _decided(events: EventStream) -> None:
    try:
        await events.decided()
    except BaseException:
        events.leave()
        raise


def _length(prompts: Sequence[Prompt | Conversation]) -> int:
    """Characters of text in all prompts."""
    return sum(p.length if isinstance(p, Conversation) else len(p) if isinstance(p, str) else 0 for p in prompts)


def _noted(prompt: Prompt | Conversation) -> Any:
    """For the log."""
    if isinstance(prompt, Conversation):
        return list(prompt.messages)
    return prompt if isinstance(prompt, str) else list(prompt)
