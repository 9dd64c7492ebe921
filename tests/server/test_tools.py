"""Functions in chats through the official client: told, chosen, called, streamed, answered."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema_rs
import openai
import pytest

from tests.server.serving import EOS_ID, LIMITS, MESSAGES, MODEL, TOKENIZER, Running, chat_prompt, running
from tilewright.runtime.server.chat_requests import ChatRequest
from tilewright.runtime.types import SamplingParams

pytestmark = pytest.mark.timeout(60)

SCHEMA = {
    "type": "object",
    "properties": {"day": {"type": "integer", "minimum": 0, "maximum": 31}, "unit": {"enum": ["C", "F"]}},
    "required": ["day", "unit"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def _shared() -> Iterator[Running]:
    """Functions take many tokens of an alphabet's tokenizer."""
    with running(device=replace(LIMITS, max_context=2048, num_pages=4096)) as it:
        yield it


def function(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


TOOLS = [function("weather", description="The weather of a day.", parameters=SCHEMA), function("now")]
WRONG = [function("f", parameters={"type": "nope"})]
UNKNOWN = {"type": "function", "function": {"name": "x"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
CALLS = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"day": 7, "unit": "C"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def say(server: Running, text: str) -> None:
    server.model.script = [*TOKENIZER.encode(text), EOS_ID]


def gathered(stream: Any, index: int = 0) -> tuple[str, list[tuple[str, str, str]], str]:
    """-> (text, calls: id, name, arguments; finish_reason) of one choice."""
    text, calls, reason = "", [], ""
    for chunk in stream:
        for choice in (c for c in chunk.choices if c.index == index):
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or ():
                if call.index == len(calls):
                    assert call.type == "function"
                    calls.append((call.id, call.function.name, ""))
                identity, name, arguments = calls[call.index]
                calls[call.index] = (identity, name, arguments + call.function.arguments)
    return text, calls, reason


def test_calls_that_the_model_likes_to_make(server: Running) -> None:
    say(server, CALLS)
    asked = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "logprobs": True, "seed": 1}
    with client(server) as it:
        [choice] = it.chat.completions.create(**asked).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
        first, second = choice.message.tool_calls
        assert (first.function.name, second.function.name) == ("weather", "now") and first.id != second.id
        assert json.loads(first.function.arguments) == {"day": 7, "unit": "C"} and second.function.arguments == "{}"
        with it.chat.completions.create(**asked, stream=True) as stream:
            chunks = list(stream)
        text, calls, reason = gathered(chunks)
        assert text == "I look." and reason == "tool_calls"
        assert [(name, json.loads(a)) for _, name, a in calls] == [("weather", {"day": 7, "unit": "C"}), ("now", {})]
        streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        assert streamed == choice.logprobs.content
        [choice] = it.chat.completions.create(**asked, parallel_tool_calls=False).choices
        assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
        [choice] = it.chat.completions.create(**asked, max_tokens=20).choices
        assert choice.finish_reason == "length"
        say(server, "no <tool_call> of {any} kind")
        [choice] = it.chat.completions.create(**asked).choices
        assert choice.message.tool_calls is None and choice.finish_reason == "stop"
        assert choice.message.content == "no <tool_call> of {any} kind"


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_calls_that_are_asked_for(server: Running, choice: Any) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    with client(server) as it:
        answer = it.chat.completions.create(**asked, n=4, seed=5)
        with it.chat.completions.create(**asked, n=4, seed=5, stream=True) as stream:
            chunks = list(stream)
    for each in answer.choices:
        assert each.finish_reason == "tool_calls" and each.message.content is None
        [call] = each.message.tool_calls
        if call.function.name == "weather":
            assert jsonschema_rs.is_valid(SCHEMA, json.loads(call.function.arguments))
        else:
            assert choice == "required" and json.loads(call.function.arguments) == {}
        text, calls, reason = gathered(chunks, each.index)
        assert (text, reason) == ("", "tool_calls")
        assert [(name, arguments) for _, name, arguments in calls] == [(call.function.name, call.function.arguments)]


def test_strict_functions_keep_to_their_schemas_where_the_model_is_free(server: Running) -> None:
    strict = [function("weather", parameters=SCHEMA, strict=True)]
    with client(server) as it:
        answer = it.chat.completions.create(model=MODEL, messages=MESSAGES, tools=strict, seed=1, max_tokens=30)
        assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content
    calling = ChatRequest.model_validate({"model": MODEL, "messages": MESSAGES, "tools": strict}).calling
    request = server.engine.request(chat_prompt(MESSAGES), calling.params(TOKENIZER, SamplingParams(max_tokens=8)))
    constraint = request.samples[0].constraint
    one = CALLS.split('\n<tool_call>\n{"name": "now"')[0]
    for text, allowed in ((one, True), ("plain {", True), (one.replace("7", "77"), False), ("<tool_call>{", False)):
        own = constraint.copy()
        fits = all(own.allowed()[token] and own.accept(token) is None for token in TOKENIZER.encode(text))  # in turn
        assert fits == allowed, text


def test_a_conversation_with_calls_goes_on(server: Running) -> None:
    """The client's own message goes back in, and the template gets calls and results as text."""
    say(server, CALLS)
    with client(server) as it:
        said = it.chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in said.tool_calls]
        say(server, "It is fine.")
        messages = [*MESSAGES, said, *results]
        answer = it.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
        assert answer.choices[0].message.content == "It is fine."
    body = {"model": MODEL, "messages": [*MESSAGES, said.model_dump(exclude_unset=True), *results], "tools": TOOLS}
    spelt = TOKENIZER.decode(server.ask("POST", "/tokenize", body)[2]["tokens"])
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode(spelt))
    assert spelt.startswith("s:You may call functions") and '"description": "The weather of a day."' in spelt
    assert spelt.endswith(
        "u:the dog?\na:"
        + CALLS
        + "\nu:<tool_response>\nfine\n</tool_response>\n<tool_response>\nfine\n</tool_response>\n"
    )


def test_no_calls_where_none_are_wanted(server: Running) -> None:
    say(server, CALLS)
    with client(server) as it:
        [choice] = it.chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="none").choices
    assert choice.message.content == CALLS and choice.message.tool_calls is None and choice.finish_reason == "stop"


def test_calls_or_an_answer_of_a_given_form(server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    with client(server) as it:
        for seed in range(4):
            [choice] = it.chat.completions.create(
                model=MODEL, messages=MESSAGES, tools=TOOLS[1:], response_format=form, seed=seed,
                parallel_tool_calls=False,
            ).choices  # fmt: skip
            calls = choice.message.tool_calls
            assert calls or jsonschema_rs.is_valid(SCHEMA, json.loads(choice.message.content))


def test_the_async_client_calls(server: Running) -> None:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as it:
            stream = await it.chat.completions.create(
                model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice=NAMED, stream=True
            )
            return [chunk async for chunk in stream]

    _, calls, reason = gathered(asyncio.run(ask()))
    assert reason == "tool_calls" and calls[0][1] == "weather"


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"tool_choice": "required"}, "invalid_combination", "there are no tools"),
        ({"tools": TOOLS, "tool_choice": UNKNOWN}, "invalid_combination", "names x"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "invalid_combination", "two functions named weather"),
        ({"tools": TOOLS, "tool_choice": "always"}, "invalid_value", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "missing_required_parameter", "tool_choice.function:"),
        ({"tools": [function("a b")]}, "invalid_value", "tools.0.function.name"),
        ({"tools": [{"type": "custom"}]}, "invalid_value", "tools.0.type"),
        ({"tools": [function(f"f{i}") for i in range(129)]}, "invalid_value", "tools"),
        ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "invalid_combination", "no room for calls"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "model_limit", "ignore_eos"),
        ({"tools": WRONG, "tool_choice": "required"}, "unsupported_grammar", "nope"),
        ({"messages": [{"role": "assistant"}]}, "invalid_combination", "neither content nor tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "missing_required_parameter", "messages.0.tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "unknown_parameter", "0.tool_calls"),
    ],
)  # fmt: skip
def test_tools_that_are_refused(server: Running, fields: dict, code: str, words: str) -> None:
    status, _, body = server.chat(**fields)
    assert status == 400 and body["error"]["code"] == code and words in body["error"]["message"], body
    tokens = server.ask("POST", "/tokenize", {"model": MODEL, "prompt": "x", "tools": TOOLS})
    assert tokens[0] == 400 and "messages only" in tokens[2]["error"]["message"]
