"""/v1/responses: an answer as a list of items, text and calls, whole or as named events."""

import secrets
import time
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from tilewright.runtime.server.body import read
from tilewright.runtime.server.generation import Generation, start
from tilewright.runtime.server.response_answers import (
    IncompleteDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    Response,
)
from tilewright.runtime.server.response_requests import ResponseRequest
from tilewright.runtime.server.service import Service
from tilewright.runtime.server.speech import Speech
from tilewright.runtime.server.sse import EventStreamResponse
from tilewright.runtime.tool_parser import Called, Piece, Said
from tilewright.runtime.types import Completion, StreamEvent

Event = dict[str, Any]


async def responses(http: Request) -> Any:
    service: Service = http.app.state.service
    body = await read(http, ResponseRequest, service.limits)
    served = service.models.find(body.model)
    params = body.sampling(body.max_output_tokens, None, service.limits.request_s)
    params = body.calling.params(served.tokenizer, params)
    generation = await start(service, http, served, [body.conversation], params)
    answer = _Answer(generation, body)
    if body.stream:
        return EventStreamResponse(generation, answer, named=True)
    async with generation:
        return JSONResponse(await answer.whole())


class _Answer:
    """What a generation says, in the form of a response. Its items are made piece by piece, streamed or not."""

    def __init__(self, generation: Generation, body: ResponseRequest) -> None:
        self._generation, self._body = generation, body
        self._id, self._created = f"resp_{secrets.token_hex(12)}", int(time.time())
        self._said = Speech(generation.served.tokenizer, body.calling)
        self._output: list[OutputItem] = []
        self._open = False  # whether the last item may grow
        self._sent = 0

    async def whole(self) -> Response:
        [completion] = await self._generation.completions()
        for _ in self._grow(self._said.push(completion.text, True)):
            pass
        for _ in self._close(completion):
            pass
        return self._response(completion)

    def begin(self) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response(None))

    def grow(self, choice: int, event: StreamEvent) -> Iterator[Event]:
        yield from self._grow(self._said.push(event.text, event.completion is not None))
        if event.completion is not None:
            yield from self._close(event.completion)
            response = self._response(event.completion)
            yield self._event(f"response.{response['status']}", response=response)

    def end(self) -> Iterator[Event]:
        yield from ()

    def _grow(self, pieces: list[Piece]) -> Iterator[Event]:
        for piece in pieces:
            if isinstance(piece, Said):
                yield from self._say(piece.text)
            elif isinstance(piece, Called):
                yield from self._end_item("completed")
                yield from self._begin_call(piece.index)
            else:
                item = self._output[-1]
                assert item["type"] == "function_call"
                item["arguments"] += piece.text
                yield self._event("response.function_call_arguments.delta", **self._place(), delta=piece.text)

    def _say(self, text: str) -> Iterator[Event]:
        if not self._open or self._output[-1]["type"] != "message":
            yield from self._end_item("completed")
            yield from self._begin_message()
        item = self._output[-1]
        assert item["type"] == "message"
        item["content"][0]["text"] += text
        yield self._event("response.output_text.delta", **self._part(), delta=text, logprobs=[])

    def _begin_message(self) -> Iterator[Event]:
        message: OutputMessage = {
            "type": "message",
            "id": f"msg_{secrets.token_hex(12)}",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        yield self._begin(message)
        part: OutputText = {"type": "output_text", "text": "", "annotations": []}
        message["content"].append(part)
        yield self._event("response.content_part.added", **self._part(), part=dict(part))

    def _begin_call(self, index: int) -> Iterator[Event]:
        call = self._said.calls[index]
        yield self._begin(
            {
                "type": "function_call",
                "id": f"fc_{secrets.token_hex(12)}",
                "call_id": call.id,
                "name": call.name,
                "arguments": "",
                "status": "in_progress",
            }
        )

    def _begin(self, item: OutputItem) -> Event:
        self._output.append(item)
        self._open = True
        place = len(self._output) - 1
        return self._event("response.output_item.added", output_index=place, item=_copy(item))

    def _end_item(self, status: Any) -> Iterator[Event]:
        if not self._open:
            return
        item, self._open = self._output[-1], False
        item["status"] = status
        if item["type"] == "message":
            text = item["content"][0]["text"]
            yield self._event("response.output_text.done", **self._part(), text=text, logprobs=[])
            yield self._event("response.content_part.done", **self._part(), part=dict(item["content"][0]))
        else:
            said = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **self._place(), **said)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=_copy(item))

    def _close(self, completion: Completion) -> Iterator[Event]:
        if not self._output:  # an answer of nothing is a message without text
            yield from self._begin_message()
        cut = self._generation.reasons(0, completion)[0] == "length"
        yield from self._end_item("incomplete" if cut else "completed")

    def _place(self) -> Event:
        place = len(self._output) - 1
        return {"item_id": self._output[place]["id"], "output_index": place}

    def _part(self) -> Event:
        return self._place() | {"content_index": 0}

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sent, **fields}
        self._sent += 1
        return event

    def _response(self, completion: Completion | None) -> Response:
        """completion: None while it goes on."""
        body = self._body
        reason, more = (None, None) if completion is None else self._generation.reasons(0, completion)
        response: Response = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._generation.served.name,
            "status": "in_progress" if completion is None else "incomplete" if reason == "length" else "completed",
            "error": None,
            "incomplete_details": None,
            "output": [_copy(item) for item in self._output],
            "usage": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": _given(body.text) if body.text and body.text.format else {"format": {"type": "text"}},
            "tool_choice": _given(body.tool_choice) if body.tool_choice else "auto",
            "tools": [{"description": None, "parameters": None, "strict": None, **_given(t)} for t in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "store": False,
            "background": False,
            "previous_response_id": None,
        }
        if reason == "length":
            why: IncompleteDetails = {"reason": "max_output_tokens"}
            response["incomplete_details"] = why if more is None else {**why, "stop_reason": more}
        if completion is not None:
            usage = self._generation.usage
            response["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            }
        return response


def _given(value: Any) -> Any:
    """A part of the request as it was asked."""
    return value if isinstance(value, str) else value.model_dump(exclude_unset=True, by_alias=True)


def _copy(item: OutputItem) -> Any:
    """An item as it is now: the item itself goes on growing."""
    return {**item, "content": [dict(part) for part in item["content"]]} if item["type"] == "message" else dict(item)
