"""Answers of a given form through the official client."""

import json
import re

import jsonschema_rs
import openai
import pytest

from tests.server.serving import MESSAGES, MODEL, Running

pytestmark = pytest.mark.timeout(60)

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def named(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": schema}}


def test_response_formats(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        ask = {"model": MODEL, "messages": MESSAGES, "n": 4, "response_format": named(SCHEMA)}
        for choice in client.chat.completions.create(**ask).choices:
            assert choice.finish_reason == "stop"
            assert jsonschema_rs.is_valid(SCHEMA, json.loads(choice.message.content))
        said = dict.fromkeys(range(4), "")
        with client.chat.completions.create(**ask, stream=True) as stream:
            for chunk in stream:
                said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert all(jsonschema_rs.is_valid(SCHEMA, json.loads(text)) for text in said.values())
        plain = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, seed=3, max_tokens=40
        )
        assert plain.choices[0].message.content.startswith("{")
        regex = client.completions.create(
            model=MODEL, prompt="the", max_tokens=20, extra_body={"structured_outputs": {"regex": "[ab]{3,5}!"}}
        )
        assert re.fullmatch("[ab]{3,5}!", regex.choices[0].text)
        choice = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body={"structured_outputs": {"choice": ["left", "right"]}}
        )
        assert choice.choices[0].message.content in ("left", "right")


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"response_format": named({"type": "nope"})}, "unsupported_grammar", "Invalid type: nope"),
        ({"response_format": named({"type": "string", "const": 1})}, "unsupported_grammar", "Unsatisfiable schema"),
        ({"response_format": named({"$ref": "#"})}, "unsupported_grammar", "the json_schema is not supported"),
        ({"response_format": named({"type": "object", "minProperties": 3})}, "unsupported_grammar", "minProperties 3"),
        ({"structured_outputs": {"regex": "("}}, "unsupported_grammar", "unclosed group"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "invalid_combination", "has one of"),
        ({"structured_outputs": {}}, "invalid_combination", "has one of"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "invalid_combination",
            "drop one",
        ),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "model_limit", "ignore_eos keeps"),
        ({"structured_outputs": {"choice": []}}, "invalid_value", "structured_outputs.choice"),
        ({"response_format": {"type": "json_schema"}}, "missing_required_parameter", "json_schema"),
    ],
)
def test_forms_that_are_refused(server: Running, fields: dict, code: str, words: str) -> None:
    status, _, body = server.chat(**fields)
    assert status == 400 and body["error"]["code"] == code and words in body["error"]["message"]
