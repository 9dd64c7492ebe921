"""Calls out of answers, whole and in pieces of any size."""

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tilewright.runtime.tool_parser import Argued, Called, CallParser, Piece, Said
from tilewright.runtime.tools import ToolForm, tool_form

HERMES = tool_form(None)
LLAMA = tool_form('{% if tools %}"parameters" <|python_tag|>')
MISTRAL = tool_form("{% if tools %}[TOOL_CALLS]")
NAMES = ("get", "put")

GET = '{"name": "get", "arguments": {"a": "}\\"{", "b": [1, {}]}}'
PUT = '{"name": "put", "arguments": {}}'
ARGUED = {"a": '}"{', "b": [1, {}]}


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def read(form: ToolForm, pieces: list[str], **options: bool) -> tuple[str, list[tuple[str, str]]]:
    """-> (text, calls: name and arguments)."""
    parser = CallParser(form, NAMES, **options)
    found: list[Piece] = [p for piece in pieces for p in parser.push(piece)] + parser.finish()
    text, calls = "", []
    for piece in found:
        match piece:
            case Said(more):
                assert more
                text += more
            case Called(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case Argued(index, more):
                assert index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + more)
    return text, calls


NO_NUMBER = '{"x": 1, "name": "put", "parameters": {"a": NaN}}'
TOO_LARGE = '{"x": 1, "name": "put", "parameters": {"a": 1e999}}'
CASES = {
    "text": (HERMES, "a < b, <tool> and\n", ("a < b, <tool> and\n", [])),
    "one": (HERMES, tagged(GET), ("", [("get", ARGUED)])),
    "text_around": (HERMES, f"a \n{tagged(PUT, GET)}\n\nb \n", ("a\n\nb \n", [("put", {}), ("get", ARGUED)])),
    "a_list": (HERMES, f"<tool_call>[{PUT}, {GET}]</tool_call>", ("", [("put", {}), ("get", ARGUED)])),
    "no_end": (HERMES, f"<tool_call>{PUT}", ("", [("put", {})])),
    "other_order": (HERMES, tagged('{"arguments": {"x": 1}, "name": "put"}'), ("", [("put", {"x": 1})])),
    "more_keys": (HERMES, tagged('{"name": "put", "arguments": {}, "id": "}"}', PUT), ("", [("put", {}), ("put", {})])),
    "nested_json": (HERMES, tagged('{"name": "put", "arguments": "{\\"x\\": 1}"}'), ("", [("put", {"x": 1})])),
    "no_arguments": (HERMES, tagged('{"name": "put"}'), ("", [("put", {})])),
    "unknown": (HERMES, tagged('{"name": "rm", "arguments": {}}'), (tagged('{"name": "rm", "arguments": {}}'), [])),
    "no_json": (HERMES, "<tool_call>\nget()\n</tool_call>", ("<tool_call>\nget()\n</tool_call>", [])),
    "cut_before_name": (HERMES, 'so <tool_call>\n{"name": "ge', ('so <tool_call>\n{"name": "ge', [])),
    "cut_at_marker": (HERMES, "so <tool_c", ("so <tool_c", [])),
    "unknown_then_known": (
        HERMES,
        tagged('{"name": "rm", "arguments": {}}', PUT),
        (tagged('{"name": "rm", "arguments": {}}'), [("put", {})]),
    ),
    "name_is_no_text": (LLAMA, '{"name": {"a": 1}}', ('{"name": {"a": 1}}', [])),
    "half_a_pair": (LLAMA, '{"x": 1, "name": "put", "parameters": {"a": "\\ud83d"}}', ("", [("put", {"a": "\ud83d"})])),
    "no_number": (LLAMA, NO_NUMBER, (NO_NUMBER, [])),
    "too_large": (LLAMA, TOO_LARGE, (TOO_LARGE, [])),
    "llama": (LLAMA, ' {"name": "put", "parameters": {"x": 1}}', ("", [("put", {"x": 1})])),
    "llama_two": (LLAMA, PUT + "; " + PUT, ("", [("put", {}), ("put", {})])),
    "llama_text": (LLAMA, f"see {PUT}", (f"see {PUT}", [])),
    "llama_json": (LLAMA, '{"x": 1} is JSON', ('{"x": 1} is JSON', [])),
    "mistral": (MISTRAL, f"[TOOL_CALLS] [{PUT}, {GET}]", ("", [("put", {}), ("get", ARGUED)])),
    "mistral_bare": (MISTRAL, f"[{PUT}]", ("", [("put", {})])),
    "mistral_list": (MISTRAL, "[1, 2]", ("[1, 2]", [])),
    "mistral_text": (MISTRAL, "[TOOL", ("[TOOL", [])),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@example(cuts=[])
@given(cuts=st.lists(st.integers(0, 90), max_size=12))
def test_calls_in_pieces_of_any_size(name: str, cuts: list[int]) -> None:
    form, answer, (text, calls) = CASES[name]
    ends = sorted({min(c, len(answer)) for c in cuts} | {0, len(answer)})
    said, found = read(form, [answer[i:j] for i, j in itertools.pairwise(ends)])
    assert (said, [(n, json.loads(a)) for n, a in found]) == (text, calls)
    assert (said, found) == read(form, list(answer)) == read(form, [answer])
    "".join([said, *(a for _, a in found)]).encode()


def test_arguments_come_before_the_call_has_ended() -> None:
    parser = CallParser(HERMES, NAMES)
    assert parser.push('<tool_call>{"name": "get", "arguments": {"a": 1') == [Called(0, "get"), Argued(0, '{"a": 1')]
    assert parser.finish() == []


def test_one_call_where_no_more_are_wanted() -> None:
    assert read(HERMES, [tagged(PUT, GET) + " and so on"], several=False) == ("", [("put", "{}")])
    assert read(MISTRAL, [f"[{PUT}, {GET}]"], several=False) == ("", [("put", "{}")])
