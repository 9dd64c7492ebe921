"""/v1/chat/completions."""

import secrets
import time
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from tilewright.runtime.server.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    FinishReason,
    FunctionDelta,
    StopReason,
)
from tilewright.runtime.server.body import read
from tilewright.runtime.server.chat_requests import ChatRequest
from tilewright.runtime.server.generation import Generation, start
from tilewright.runtime.server.logprobs import chat_logprobs, spoken
from tilewright.runtime.server.service import Service
from tilewright.runtime.server.speech import Speech
from tilewright.runtime.server.sse import Chunk, EventStreamResponse, Frame
from tilewright.runtime.tool_parser import Called, Piece, Said
from tilewright.runtime.types import Completion, StreamEvent, TokenLogprob


async def chat_completions(http: Request) -> Any:
    service: Service = http.app.state.service
    body = await read(http, ChatRequest, service.limits)
    served = service.models.find(body.model)
    calling = body.calling
    params = body.sampling(body.output_limit, body.alternatives, service.limits.request_s)
    params = calling.params(served.tokenizer, params)
    generation = await start(service, http, served, [body.conversation], params)
    answer = _Answer(generation, body)
    if body.stream:
        return EventStreamResponse(generation, answer)
    async with generation:
        return JSONResponse(await answer.whole())


class _Answer:
    """What a generation says, in the form of a chat."""

    def __init__(self, generation: Generation, body: ChatRequest) -> None:
        self._generation, self._body = generation, body
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._said = [Speech(generation.served.tokenizer, body.calling) for _ in range(generation.choices)]
        self._held: dict[int, list[TokenLogprob | None]] = {}  # of tokens whose text is not certain yet
        self._frames: dict[int, Frame] = {}  # of a choice's text

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

    def begin(self) -> Iterator[Chunk]:
        for index in range(self._generation.choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def grow(self, index: int, event: StreamEvent) -> Iterator[Chunk]:
        pieces = self._said[index].push(event.text, event.completion is not None)
        if self._body.logprobs:
            yield from self._with_logprobs(index, event, pieces)
        else:
            for piece in pieces:
                yield self._text(index, piece.text) if isinstance(piece, Said) else self._piece(index, piece)
        if event.completion:
            yield self._chunk(index, {}, None, event.completion)

    def end(self) -> Iterator[Chunk]:
        if self._body.wants_usage:
            yield self._frame([]) | {"usage": self._generation.usage}

    def _with_logprobs(self, index: int, event: StreamEvent, pieces: list[Piece]) -> Iterator[Chunk]:
        """Those of all tokens up to here go with the first piece."""
        self._held.setdefault(index, []).append(event.logprob)
        if pieces or event.completion:
            logprobs = self._logprobs(self._held.pop(index))
            if not pieces and logprobs and logprobs["content"]:
                pieces = [Said("")]
            for piece in pieces:
                yield self._piece(index, piece, logprobs)
                logprobs = None

    def _text(self, index: int, text: str) -> bytes:
        frame = self._frames.get(index)
        if frame is None:
            frame = self._frames[index] = Frame(self._chunk(index, {"content": Frame.HOLE}))
        return frame.around(text)

    def _piece(self, index: int, piece: Piece, logprobs: ChatLogprobs | None = None) -> ChatCompletionChunk:
        return self._chunk(index, self._delta(index, piece), logprobs)

    def _choice(self, index: int, completion: Completion) -> ChatChoice:
        speech = self._said[index]
        speech.push(completion.text, True)
        message: AssistantMessage = {"role": "assistant", "content": speech.text, "refusal": None}
        if speech.calls:
            message["content"] = speech.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in speech.calls
            ]
        reason, more = self._reasons(index, completion)
        choice: ChatChoice = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs or ()),
            "finish_reason": reason,
        }
        return choice if more is None else {**choice, "stop_reason": more}

    def _chunk(
        self, index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, end: Completion | None = None
    ) -> ChatCompletionChunk:
        reason, more = (None, None) if end is None else self._reasons(index, end)
        choice: ChatChunkChoice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._frame([choice if more is None else {**choice, "stop_reason": more}])

    def _reasons(self, index: int, completion: Completion) -> tuple[FinishReason, StopReason | None]:
        reason, more = self._generation.reasons(index, completion)
        return ("tool_calls" if reason == "stop" and self._said[index].calls else reason), more

    def _delta(self, index: int, piece: Piece) -> ChatDelta:
        if isinstance(piece, Said):
            return {"content": piece.text}
        if isinstance(piece, Called):
            call = self._said[index].calls[piece.index]
            function: FunctionDelta = {"name": call.name, "arguments": ""}
            return {"tool_calls": [{"index": piece.index, "id": call.id, "type": "function", "function": function}]}
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}

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
