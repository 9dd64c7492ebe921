"""/v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from tilewright.runtime.server.answers import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
)
from tilewright.runtime.server.body import read
from tilewright.runtime.server.generation import Generation, start
from tilewright.runtime.server.logprobs import chat_logprobs, spoken
from tilewright.runtime.server.requests import ChatRequest
from tilewright.runtime.server.service import Service
from tilewright.runtime.server.sse import EventStreamResponse
from tilewright.runtime.types import Completion, TokenLogprob


async def chat_completions(http: Request) -> Any:
    service: Service = http.app.state.service
    body = await read(http, ChatRequest, service.limits)
    served = service.models.find(body.model)
    params = body.sampling(body.output_limit, body.alternatives, service.limits.request_s)
    messages = [message.for_template() for message in body.messages]
    generation = await start(service, http, served, [messages], params)
    answer = _Answer(generation, body)
    if body.stream:
        return EventStreamResponse(generation, answer.chunks())
    async with generation:
        return JSONResponse(await answer.whole())


class _Answer:
    """What a generation says, in the form of a chat."""

    def __init__(self, generation: Generation, body: ChatRequest) -> None:
        self._generation, self._body = generation, body
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    async def whole(self) -> ChatCompletion:
        completions = await self._generation.completions()
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._generation.served.name,
            "choices": [self._choice(index, completion) for index, completion in enumerate(completions)],
            "usage": self._generation.usage,
        }

    async def chunks(self) -> AsyncIterator[ChatCompletionChunk]:
        for index in range(self._generation.choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        held: dict[int, list[TokenLogprob | None]] = {}  # of tokens whose text is not certain yet
        async for index, event in self._generation.events():
            held.setdefault(index, []).append(event.logprob)
            if event.text or event.completion:
                logprobs = self._logprobs(held.pop(index))
                if event.text or (logprobs and logprobs["content"]):
                    yield self._chunk(index, {"content": event.text}, logprobs)
            if event.completion:
                yield self._chunk(index, {}, None, event.completion)
        if self._body.wants_usage:
            yield self._frame([]) | {"usage": self._generation.usage}

    def _choice(self, index: int, completion: Completion) -> ChatChoice:
        reason, more = self._generation.reasons(index, completion)
        choice: ChatChoice = {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion.logprobs or ()),
            "finish_reason": reason,
        }
        return choice if more is None else {**choice, "stop_reason": more}

    def _chunk(
        self, index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, end: Completion | None = None
    ) -> ChatCompletionChunk:
        reason, more = (None, None) if end is None else self._generation.reasons(index, end)
        choice: ChatChunkChoice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._frame([choice if more is None else {**choice, "stop_reason": more}])

    def _frame(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._generation.served.name,
            "choices": choices,
        }

    def _logprobs(self, logprobs: Any) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._generation.served.tokenizer, spoken(logprobs, self._generation.requests[0]))
