"""Forms of calls: found by the template, told to the model, and kept to by grammars."""

import json

import pytest

from tests.runtime.tokenizers_made import EOS, SPECIAL, byte_level
from tilewright.runtime.grammar import Grammar
from tilewright.runtime.tokenizer import Tokenizer
from tilewright.runtime.tools import Function, calls_grammar, free_grammar, spelt_out, tool_form

TEMPLATES = {
    "hermes": "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "<tool_call>{{ m.content }}{% endfor %}",
    "llama": '{% if tools %}{"name": N, "parameters": P}<|python_tag|>{% endif %}',
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]",
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"]}
FUNCTIONS = [
    Function("get", {**SCHEMA, "additionalProperties": False}, strict=True),
    Function("put", {"type": "object"}),
]
TOOL = {"type": "function", "function": {"name": "get", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    plain = Tokenizer(byte_level())
    return Tokenizer(byte_level(), {"stop_token_ids": plain.encode(EOS), "chat_template": TEMPLATES["hermes"]})


def fits(tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    """Whether a whole answer keeps to a grammar."""
    constraint = tokenizer.constraint(grammar, tokenizer.vocab_size)
    for token in tokenizer.encode(text):
        if not constraint.allowed()[token]:
            return False
        constraint.accept(token)
    return bool(constraint.allowed()[tokenizer.stop_token_ids[0]])


def test_the_template_tells_the_form() -> None:
    for name, template in TEMPLATES.items():
        form = tool_form(template)
        assert (form.name, form.native) == (name, True)
    strange = (
        "{{ messages }}",
        None,
        "{% if tools %}<function=f>{% endif %}<tool_call>",
        "{{ tools }}[TOOL_CALLS]f[ARGS]",
    )
    for template in strange:
        assert (tool_form(template).name, tool_form(template).native) == ("hermes", False)


def test_functions_told_where_the_template_knows_of_none() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": {"a": 1}}}
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "well", "tool_calls": [call, call]},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
        {"role": "tool", "content": "8", "tool_call_id": "1"},
    ]
    system, user, assistant, results = spelt_out(talk, [TOOL])
    assert (
        system["content"].startswith("be brief\n\nYou may call") and json.dumps(TOOL["function"]) in system["content"]
    )
    said = '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>'
    assert user == talk[1] and assistant == {"role": "assistant", "content": f"well\n{said}\n{said}"}
    told = [f"<tool_response>\n{result}\n</tool_response>" for result in "78"]
    assert (results["role"], results["content"]) == ("user", "\n".join(told))
    assert spelt_out(talk[1:2], []) == talk[1:2]


def test_a_template_that_knows_of_functions_gets_them(tokenizer: Tokenizer) -> None:
    spelt = tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "x"}], [TOOL]))
    assert spelt == json.dumps([TOOL]) + "<tool_call>x"
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "x"}])) == "<tool_call>x"


ONE = {
    "hermes": '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>',
    "llama": '{"name": "get", "parameters": {"a": 1}}',
    "mistral": '[{"name": "get", "arguments": {"a": 1}}]',
}
TWO = {
    "hermes": f"{ONE['hermes']}\n{ONE['hermes']}",
    "llama": f"{ONE['llama']}; {ONE['llama']}",
    "mistral": '[{"name": "get", "arguments": {"a": 1}}, {"name": "put", "arguments": {"x": []}}]',
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_must_be_calls(tokenizer: Tokenizer, name: str) -> None:
    form = tool_form(TEMPLATES[name])
    one, several = (calls_grammar(form, FUNCTIONS, many, None) for many in (False, True))
    assert fits(tokenizer, one, ONE[name]) and fits(tokenizer, several, ONE[name])
    assert not fits(tokenizer, one, TWO[name]) and fits(tokenizer, several, TWO[name]) == (name != "llama")
    wrong = (ONE[name].replace("1", "10"), ONE[name].replace("get", "got"), "text", "text " + ONE[name])
    assert not any(fits(tokenizer, several, text) for text in wrong)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_may_be_calls(tokenizer: Tokenizer, name: str) -> None:
    """Arguments of the strict function keep to its schema, those of the other need only be an object."""
    form = tool_form(TEMPLATES[name])
    free = free_grammar(form, FUNCTIONS, True, None, None)
    loose = ONE[name].replace("get", "put").replace('"a": 1', '"b": []')
    assert all(fits(tokenizer, free, text) for text in (ONE[name], loose, "text", "a {b} <c>\n[d]"))
    assert not fits(tokenizer, free, ONE[name].replace("1", "10"))
    assert fits(tokenizer, free, f"so: {ONE[name]} done")
    formed = free_grammar(form, FUNCTIONS, True, None, json.dumps({"type": "integer"}))
    assert fits(tokenizer, formed, "7") and fits(tokenizer, formed, ONE[name]) and not fits(tokenizer, formed, "seven")


def test_a_marker_that_is_no_text_stands_before_the_calls(tokenizer: Tokenizer) -> None:
    grammar = calls_grammar(tool_form(TEMPLATES["mistral"]), FUNCTIONS, False, tokenizer.encode(SPECIAL)[0])
    assert fits(tokenizer, grammar, SPECIAL + ONE["mistral"]) and not fits(tokenizer, grammar, ONE["mistral"])
