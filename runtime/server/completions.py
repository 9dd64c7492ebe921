"""/v1/completions: text or tokens continued, several prompts at a time."""

import secrets
import time
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from tilewright.runtime.server.answers import TextChoice, TextCompletion, TextLogprobs
from tilewright.runtime.server.body import read
from tilewright.runtime.server.generation import Generation, start
from tilewright.runtime.server.logprobs import spoken, text_logprobs
from tilewright.runtime.server.requests import CompletionRequest
from tilewright.runtime.server.service import Service
from tilewright.runtime.server.sse import Chunk, EventStreamResponse, Frame
from tilewright.runtime.types import Completion, StreamEvent, TokenLogprob

_DEFAULT_TOKENS = 16  # OpenAI's


async def completions(http: Request) -> Any:
    service: Service = http.app.state.service
    body = await read(http, CompletionRequest, service.limits)
    served = service.models.find(body.model)
    params = body.sampling(body.max_tokens or _DEFAULT_TOKENS, body.logprobs, service.limits.request_s)
    generation = await start(service, http, served, body.prompts, params)
    answer = _Answer(generation, body)
    if body.stream:
        return EventStreamResponse(generation, answer)
    async with generation:
        return JSONResponse(await answer.whole())


class _Answer:
    """What a generation says, in the form of continued texts."""

    def __init__(self, generation: Generation, body: CompletionRequest) -> None:
        self._generation, self._body = generation, body
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._held: dict[int, list[TokenLogprob | None]] = {}  # of tokens whose text is not certain yet
        self._said: dict[int, int] = {}  # characters
        self._frames: dict[int, Frame] = {}  # of a choice's text

    async def whole(self) -> TextCompletion:
        completions = await self._generation.completions()
        choices = [
            self._choice(i, self._echo(i) + done.text, self._logprobs(i, done.logprobs or (), 0), done)
            for i, done in enumerate(completions)
        ]
        return self._frame(choices) | {"usage": self._generation.usage}

    def begin(self) -> Iterator[Chunk]:
        if self._body.echo:
            for index in range(self._generation.choices):
                yield self._frame([self._choice(index, self._echo(index), None)])

    def grow(self, index: int, event: StreamEvent) -> Iterator[Chunk]:
        if self._body.logprobs is not None:
            self._held.setdefault(index, []).append(event.logprob)
        if event.completion or (event.text and self._body.logprobs is not None):
            offset = self._said.get(index, 0)
            self._said[index] = offset + len(event.text)
            logprobs = self._logprobs(index, self._held.pop(index, ()), offset)
            yield self._frame([self._choice(index, event.text, logprobs, event.completion)])
        elif event.text:
            yield self._text(index, event.text)

    def end(self) -> Iterator[Chunk]:
        if self._body.wants_usage:
            yield self._frame([]) | {"usage": self._generation.usage}

    def _text(self, index: int, text: str) -> bytes:
        frame = self._frames.get(index)
        if frame is None:
            frame = self._frames[index] = Frame(self._frame([self._choice(index, Frame.HOLE, None)]))
        return frame.around(text)

    def _echo(self, index: int) -> str:
        """The text of a choice's prompt, where it is wanted."""
        if not self._body.echo:
            return ""
        prompt = self._body.prompts[index * len(self._body.prompts) // self._generation.choices]
        return prompt if isinstance(prompt, str) else self._generation.served.tokenizer.decode(prompt)

    def _choice(
        self, index: int, text: str, logprobs: TextLogprobs | None, end: Completion | None = None
    ) -> TextChoice:
        reason, more = (None, None) if end is None else self._generation.reasons(index, end)
        choice: TextChoice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return choice if more is None else {**choice, "stop_reason": more}

    def _frame(self, choices: list[TextChoice]) -> TextCompletion:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._generation.served.name,
            "choices": choices,
        }

    def _logprobs(self, index: int, logprobs: Any, offset: int) -> TextLogprobs | None:
        if self._body.logprobs is None:
            return None
        request = self._generation.requests[0]
        return text_logprobs(self._generation.served.tokenizer, spoken(logprobs, request), offset)
