"""/v1/responses through the official client: items, events, forms, functions, and what is refused."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema_rs
import openai
import pytest

from tests.server.serving import EOS_ID, LIMITS, MODEL, TOKENIZER, Running, answer_to, chat_prompt, running
from tests.server.test_structured import SCHEMA
from tilewright.runtime.types import SamplingParams

pytestmark = pytest.mark.timeout(60)

TOOL = {"type": "function", "name": "look", "description": "Looks.", "parameters": SCHEMA, "strict": False}
CALL = '<tool_call>\n{"name": "look", "arguments": {"a": 7, "b": "x"}}\n</tool_call>'
ASKED = {"model": MODEL, "input": "the dog?", "max_output_tokens": 12, "extra_body": {"seed": 3}}
SAID = answer_to(chat_prompt([{"role": "user", "content": "the dog?"}]), SamplingParams(seed=3, max_tokens=12))


@pytest.fixture(scope="module")
def _shared() -> Iterator[Running]:
    """Functions take many tokens of an alphabet's tokenizer."""
    with running(device=replace(LIMITS, max_context=2048, num_pages=4096)) as it:
        yield it


def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def say(server: Running, text: str) -> None:
    server.model.script = [*TOKENIZER.encode(text), EOS_ID]


def test_a_text(server: Running) -> None:
    with client(server) as it:
        whole = it.responses.create(**ASKED, metadata={"a": "b"}, store=False)
        assert whole.output_text == SAID and whole.metadata == {"a": "b"}
        assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert whole.usage.output_tokens == 12 and whole.usage.total_tokens == 12 + whole.usage.input_tokens
        params = {"temperature": 0.5, "top_p": 0.7}
        drawn = it.responses.create(**ASKED, **params)
        prompt = chat_prompt([{"role": "user", "content": "the dog?"}])
        assert drawn.output_text == answer_to(prompt, SamplingParams(seed=3, max_tokens=12, **params))
        assert (drawn.temperature, drawn.top_p) == (0.5, 0.7)


def test_the_events_of_a_text(server: Running) -> None:
    with client(server) as it, it.responses.create(**ASKED, stream=True) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == SAID and len(deltas) > 1
    others = [event.type.removeprefix("response.") for event in events if event.type != "response.output_text.delta"]
    assert others == [
        "created", "in_progress", "output_item.added", "content_part.added",
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert events[-1].response.output_text == SAID and events[-1].response.usage.output_tokens == 12


def test_a_conversation(server: Running) -> None:
    """Instructions, parts, and the client's own items: the same prompt as a chat's."""
    said = [
        {"role": "user", "content": [{"type": "input_text", "text": "the"}, {"type": "input_text", "text": "dog"}]},
        {"type": "message", "role": "assistant", "content": "yes"},
        {"role": "developer", "content": "go on"},
    ]
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the\ndog"},
        {"role": "assistant", "content": "yes"},
        {"role": "system", "content": "go on"},
    ]
    with client(server) as it:
        answer = it.responses.create(model=MODEL, instructions="be brief", input=said, max_output_tokens=5)
        assert answer.instructions == "be brief" and answer.usage.input_tokens == len(chat_prompt(chat))
        again = it.responses.create(model=MODEL, input=[*said, *answer.output], max_output_tokens=5)
        chat = [*chat[1:], {"role": "assistant", "content": answer.output_text}]
        assert again.usage.input_tokens == len(chat_prompt(chat))


def test_functions(server: Running) -> None:
    say(server, f"I look. {CALL}")
    asked = {"model": MODEL, "input": "x", "tools": [TOOL]}
    with client(server) as it:
        answer = it.responses.create(**asked)
        message, call = answer.output
        assert answer.status == "completed" and answer.output_text == "I look." and message.status == "completed"
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "look", {"a": 7, "b": "x"})
        with it.responses.create(**asked, stream=True) as stream:
            events = list(stream)
        deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        [done] = [e for e in events if e.type == "response.function_call_arguments.done"]
        assert "".join(deltas) == done.arguments == call.arguments and len(deltas) > 1
        places = [e.output_index for e in events if e.type == "response.output_item.added"]
        assert places == [0, 1] and events[-1].type == "response.completed"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "fine"}
        say(server, "fine.")
        items = [{"role": "user", "content": "x"}, *answer.output, result]
        last = it.responses.create(model=MODEL, input=items, tools=[TOOL])
        assert last.output_text == "fine."
        server.model.script = []
        choice = {"type": "function", "name": "look"}
        forced = it.responses.create(**asked, tool_choice=choice)
        assert forced.tool_choice.name == "look" and forced.tools[0].name == "look"
        [call] = forced.output
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(call.arguments))


def test_forms(server: Running) -> None:
    form = {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}
    with client(server) as it:
        answer = it.responses.create(model=MODEL, input="x", text={"format": form})
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(answer.output_text)) and answer.status == "completed"
        assert answer.text.format.name == "thing"
        plain = it.responses.create(
            model=MODEL, input="x", text={"format": {"type": "json_object"}}, max_output_tokens=20
        )
        assert plain.output_text.startswith("{")


def test_the_async_client(server: Running) -> None:
    async def ask() -> tuple[str, list[Any]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as it:
            whole = await it.responses.create(**ASKED)
            stream = await it.responses.create(**ASKED, stream=True)
            return whole.output_text, [event async for event in stream]

    text, events = asyncio.run(ask())
    assert text == events[-1].response.output_text == SAID


def test_an_answer_of_nothing_is_a_message_without_text(server: Running) -> None:
    server.model.script = [EOS_ID]
    with client(server) as it:
        answer = it.responses.create(model=MODEL, input="x")
    assert [item.type for item in answer.output] == ["message"] and answer.output_text == ""


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"store": True}, "unsupported_value", "responses are not kept here"),
        ({"previous_response_id": "resp_1"}, "unsupported_value", "the whole conversation as input"),
        ({"background": True}, "unsupported_value", "background"),
        ({"truncation": "auto"}, "invalid_value", "truncation"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [{"type": "image"}]}, "invalid_value", "no input item"),
        ({"input": [{"role": "king", "content": "x"}]}, "invalid_value", "input.0.role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "text": "x"}]}]},
            "invalid_value",
            "input.0.content.0.type",
        ),
        ({"tools": [{"type": "web_search", "name": "x"}]}, "invalid_value", "tools.0.type"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "invalid_combination", "there are no tools"),
        ({"reasoning": {"effort": "low"}}, "unknown_parameter", "reasoning"),
        ({"max_output_tokens": 10_000}, "context_length_exceeded", "2048 tokens"),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "invalid_combination",
            "drop one",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "missing_required_parameter", "schema"),
    ],
)
def test_what_is_refused(server: Running, fields: dict, code: str, words: str) -> None:
    status, _, body = server.ask("POST", "/v1/responses", {"model": MODEL, "input": "x"} | fields)
    assert status == 400 and body["error"]["code"] == code and words in body["error"]["message"], body


def test_events_carry_their_names(server: Running) -> None:
    status, headers, text = server.ask("POST", "/v1/responses", {"model": MODEL, "input": "x", "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert text.startswith("event: response.created\ndata: {") and "[DONE]" not in text
