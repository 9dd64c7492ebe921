"""What a request may get wrong: the right status, an error in OpenAI's form that says what to do, nothing left."""

import json
from typing import Any

import pytest

from tests.server.serving import MESSAGES, MODEL, Running

pytestmark = pytest.mark.timeout(60)

CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}
TEXT = {"model": MODEL, "prompt": "the dog", "max_tokens": 4}
DEEP = b'{"model":"fake","messages":' + b"[" * 100_000
SURROGATE = b'{"model":"fake","messages":[{"role":"user","content":"\\ud800"}]}'


def check_refusal(status: int, headers: dict[str, str], body: Any, expected: int, code: str | None) -> dict[str, Any]:
    assert status == expected, body
    assert headers["content-type"] == "application/json" and headers["x-request-id"]
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert error["code"] == code and error["type"].endswith("_error")
    assert error["message"] and "Traceback" not in error["message"] and "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        pytest.param(b"", "invalid_json", id="empty"),
        pytest.param(b"{", "invalid_json", id="cut_off"),
        pytest.param(b"\xff\xfe{}", "invalid_json", id="no_utf8"),
        pytest.param(b'{"model":"\xc3\x28"}', "invalid_json", id="no_utf8_inside"),
        pytest.param(SURROGATE, "invalid_json", id="lone_surrogate"),
        pytest.param(DEEP, "invalid_json", id="deep"),
        pytest.param(b"[]", "invalid_value", id="a_list"),
        pytest.param(b"null", "invalid_value", id="null"),
        pytest.param(b"\x00", "invalid_json", id="a_nul_byte"),
        pytest.param(b'{"model":"fake"}', "missing_required_parameter", id="no_messages"),
    ],
)
def test_bodies_that_are_no_requests(server: Running, raw: bytes, code: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/detokenize"):
        check_refusal(*server.ask("POST", path, raw=raw), 400, code)


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {  # fields, code, what the message names
    "n_text": ({"n": "1"}, "invalid_value", "n:"),
    "n_zero": ({"n": 0}, "invalid_value", "n:"),
    "n_huge": ({"n": 10**400}, "invalid_value", "n:"),
    "n_true": ({"n": True}, "invalid_value", "n:"),
    "n_of_the_batch": ({"n": 9}, "model_limit", "n 9 is above 8"),
    "temperature": ({"temperature": 2.5}, "invalid_value", "temperature:"),
    "temperature_tiny": ({"temperature": 1e-9}, "invalid_value", "temperature is below 0.001"),
    "temperature_nan": ({"temperature": float("nan")}, "invalid_value", "temperature:"),
    "temperature_infinite": ({"temperature": float("inf")}, "invalid_value", "temperature:"),
    "top_p": ({"top_p": 0}, "invalid_value", "top_p:"),
    "seed": ({"seed": -1}, "invalid_value", "seed:"),
    "seed_huge": ({"seed": 2**63}, "invalid_value", "seed:"),
    "max_tokens_zero": ({"max_tokens": 0}, "invalid_value", "max_tokens:"),
    "max_tokens_huge": ({"max_tokens": 2**31}, "invalid_value", "max_tokens:"),
    "max_tokens_too_many": ({"max_tokens": 5000}, "context_length_exceeded", "max_tokens 5000"),
    "stop_empty": ({"stop": ""}, "invalid_value", "stop:"),
    "stop_many": ({"stop": ["a"] * 17}, "invalid_value", "stop:"),
    "bias_no_number": ({"logit_bias": {"a": 1}}, "invalid_value", "logit_bias"),
    "bias_too_large": ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
    "bias_unknown_token": ({"logit_bias": {"999999": 1}}, "model_limit", "logit_bias token 999999"),
    "bias_many": ({"logit_bias": {str(i): 1 for i in range(1025)}}, "invalid_value", "logit_bias"),
    "stop_token_unknown": ({"stop_token_ids": [9999]}, "model_limit", "stop_token_ids token 9999"),
    "min_above_max": ({"min_tokens": 5}, "model_limit", "min_tokens 5"),
    "unknown_field": ({"best_off": 2}, "unknown_parameter", "best_off:"),
    "usage_without_stream": ({"stream_options": {"include_usage": True}}, "invalid_combination", "stream_options"),
    "stream_options_field": ({"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
    "deadline_zero": ({"deadline_s": 0}, "invalid_value", "deadline_s:"),
    "priority": ({"priority": 1001}, "invalid_value", "priority:"),
    "model_number": ({"model": 3}, "invalid_value", "model:"),
}


@pytest.mark.parametrize("name", WRONG)
def test_fields_of_every_sampled_request(server: Running, name: str) -> None:
    fields, code, words = WRONG[name]
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        for stream in ({}, {"stream": True}):
            error = check_refusal(*server.ask("POST", path, body | stream | fields), 400, code) if not (
                stream and name == "usage_without_stream"
            ) else {"message": words}  # fmt: skip
            assert words in error["message"]


CHAT_WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no_messages": ({"messages": []}, "invalid_value", "messages:"),
    "role": ({"messages": [{"role": "king", "content": "x"}]}, "invalid_value", "messages.0.role:"),
    "content_number": ({"messages": [{"role": "user", "content": 1}]}, "invalid_value", "messages.0.content:"),
    "content_missing": ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages.0.content:"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
        "invalid_value",
        "messages.0.content.0.type:",
    ),
    "both_limits": ({"max_completion_tokens": 4}, "invalid_combination", "older name"),
    "alternatives_alone": ({"top_logprobs": 2}, "invalid_combination", "top_logprobs goes with"),
    "alternatives_many": ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs:"),
    "long_prompt": (
        {"messages": [{"role": "user", "content": "x" * 20_000}]},
        "context_length_exceeded",
        "the prompt of 20",
    ),
    "json_wanted": (
        {"response_format": {"type": "xml"}},
        "invalid_value",
        "'text', 'json_object', 'json_schema'",
    ),
}


@pytest.mark.parametrize("name", CHAT_WRONG)
def test_fields_of_chats(server: Running, name: str) -> None:
    fields, code, words = CHAT_WRONG[name]
    error = check_refusal(*server.ask("POST", "/v1/chat/completions", CHAT | fields), 400, code)
    assert words in error["message"]


TEXT_WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "empty": ({"prompt": ""}, "invalid_value", "prompt:"),
    "none": ({"prompt": []}, "invalid_value", "prompt:"),
    "mixed": ({"prompt": ["a", 1]}, "invalid_value", "prompt."),
    "negative_token": ({"prompt": [-1]}, "invalid_value", "prompt.0:"),
    "unknown_token": ({"prompt": [400]}, "model_limit", "token 400 is not in the vocabulary of 334"),
    "many": ({"prompt": ["a"] * 129}, "invalid_value", "prompt:"),
    "echo": ({"echo": True, "logprobs": 1}, "invalid_combination", "drop echo"),
    "suffix": ({"suffix": "x"}, "unknown_parameter", "suffix:"),
}


@pytest.mark.parametrize("name", TEXT_WRONG)
def test_fields_of_completions(server: Running, name: str) -> None:
    fields, code, words = TEXT_WRONG[name]
    error = check_refusal(*server.ask("POST", "/v1/completions", TEXT | fields), 400, code)
    assert words in error["message"]


def test_tokens(server: Running) -> None:
    status, _, body = server.ask("POST", "/tokenize", {"model": MODEL, "prompt": "the dog"})
    assert status == 200 and body["count"] == len(body["tokens"]) and body["max_model_len"] == 512
    assert server.ask("POST", "/detokenize", {"model": MODEL, "tokens": body["tokens"]})[2] == {"prompt": "the dog"}
    chat = server.ask("POST", "/tokenize", {"model": MODEL, "messages": MESSAGES})[2]
    assert server.ask("POST", "/detokenize", {"model": MODEL, "tokens": chat["tokens"]})[2] == {
        "prompt": "u:the dog?\n"
    }
    both = server.ask("POST", "/tokenize", {"model": MODEL, "prompt": "x", "messages": MESSAGES})
    assert "one of prompt and messages" in check_refusal(*both, 400, "invalid_combination")["message"]
    unknown = server.ask("POST", "/detokenize", {"model": MODEL, "tokens": [334]})
    assert "vocabulary of 334" in check_refusal(*unknown, 400, "model_limit")["message"]


def test_a_field_given_as_null_has_its_default(server: Running) -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stop", "logit_bias", "stream", "logprobs", "response_format"))
    assert server.chat(seed=1)[2]["choices"] == server.chat(seed=1, **nulls)[2]["choices"]


def test_paths_methods_and_models(server: Running) -> None:
    check_refusal(*server.ask("GET", "/v1/chats"), 404, "unknown_url")
    check_refusal(*server.ask("GET", "/health/"), 404, "unknown_url")
    refused = server.ask("GET", "/v1/chat/completions")
    check_refusal(*refused, 405, "method_not_allowed")
    assert refused[1]["allow"] == "POST"
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT), ("/tokenize", TEXT)):
        body = {**body, "model": "nobody/" + "x" * 200}
        body.pop("max_tokens", None) if path == "/tokenize" else None
        assert "use fake" in check_refusal(*server.ask("POST", path, body), 404, "model_not_found")["message"]


@pytest.mark.parametrize("name", CHAT_WRONG)
def test_a_stream_that_is_refused_is_none(server: Running, name: str) -> None:
    """The refusal comes whole, as it would without a stream, and the connection can be used again."""
    fields, code, _ = CHAT_WRONG[name]
    check_refusal(*server.ask("POST", "/v1/chat/completions", CHAT | fields | {"stream": True}), 400, code)
    impossible = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string", "const": 1}}}
    refused = server.ask("POST", "/v1/chat/completions", CHAT | {"stream": True, "response_format": impossible})
    assert "Unsatisfiable schema" in check_refusal(*refused, 400, "unsupported_grammar")["message"]


def test_arguments_of_earlier_calls_that_are_nested_beyond_any_reader(server: Running) -> None:
    """They are the client's text: here one too long for the context, and never a bug."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "[" * 5000}}
    earlier = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ]
    body = CHAT | {"messages": [*MESSAGES, *earlier]}
    check_refusal(*server.ask("POST", "/v1/chat/completions", body), 400, "context_length_exceeded")


def test_names_of_fields_are_told_in_one_line_of_bounded_length(server: Running) -> None:
    for name in ("a\nb", "\x00", "\u2028", "x" * 19_000, "é" * 2000):
        error = check_refusal(*server.ask("POST", "/v1/completions", TEXT | {name: 1}), 400, "unknown_parameter")
        assert len(error["message"]) < 1100 and error["message"].isprintable() and error["param"].isprintable()


def test_content_types(server: Running) -> None:
    body = json.dumps(CHAT).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"):
        refused = server.ask("POST", "/v1/chat/completions", raw=body, headers={"Content-Type": kind})
        check_refusal(*refused, 415, "unsupported_media_type")
    kind = "Application/JSON; charset=utf-8"
    assert server.ask("POST", "/v1/chat/completions", raw=body, headers={"Content-Type": kind})[0] == 200


def test_a_request_has_an_id_of_its_own_or_the_clients(server: Running) -> None:
    assert server.chat(headers={"X-Request-ID": "mine-1"})[1]["x-request-id"] == "mine-1"
    strange = server.chat(headers={"X-Request-ID": "a b;c"})[1]["x-request-id"]
    assert strange.startswith("req-") and strange != server.chat()[1]["x-request-id"]
