"""Functions that a model may call: how its chat template writes calls, and the grammar that keeps an answer to them.

    hermes    <tool_call>
              {"name": NAME, "arguments": {...}}
              </tool_call>                                      anywhere in an answer; Hermes and Qwen write them so
    llama     {"name": NAME, "parameters": {...}}               is the answer; Llama 3
    mistral   [TOOL_CALLS][{"name": NAME, "arguments": {...}}]   is the answer; Mistral

A template that knows of no tools, or writes calls in none of these ways, gets the functions told in a system message,
and calls and their results as text, in the hermes form.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tilewright.runtime.grammar import SPACING, Grammar
from tilewright.runtime.json_schemas import narrowed_schema

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Function:
    """A function as a request describes it. parameters: JSON schema of its arguments, an object. strict: the arguments
    keep to it, also where the model is free to call or not."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class ToolForm:
    """How calls are written. begin, end: the texts around one call or, where `listed`, before the list of all; a call
    without them is the whole answer. arguments: the key they stand under. native: the chat template takes `tools`."""

    name: Literal["hermes", "llama", "mistral"]
    begin: str
    end: str
    arguments: str
    listed: bool
    native: bool

    @property
    def alone(self) -> bool:
        """Whether an answer is either text or calls, and never both."""
        return not self.end


def tool_form(template: str | None) -> ToolForm:
    """The form of a model with this chat template."""
    if template is not None and re.search(r"\btools\b", template):
        if "[TOOL_CALLS]" in template and "[ARGS]" not in template:
            return ToolForm("mistral", "[TOOL_CALLS]", "", "arguments", listed=True, native=True)
        if "<tool_call>" in template and "<function=" not in template:
            return ToolForm("hermes", "<tool_call>", "</tool_call>", "arguments", listed=False, native=True)
        if '"parameters"' in template and ("<|python_tag|>" in template or "ipython" in template):
            return ToolForm("llama", "", "", "parameters", listed=False, native=True)
    return ToolForm("hermes", "<tool_call>", "</tool_call>", "arguments", listed=False, native=False)


# -- what the model reads ----------------------------------------------------------------------------------------------


def spelt_out(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation for a template that knows of no tools: functions in the system message, calls and results as
    text. tools: as OpenAI's API has them."""
    spelt: list[Message] = []
    for message in messages:
        more = _spelt(message)
        if message["role"] == "tool" and spelt and spelt[-1].get("results"):
            more = {**more, "content": f"{spelt.pop()['content']}\n{more['content']}"}  # roles have to alternate
        spelt.append(more)
    if not tools:
        return spelt
    system = spelt.pop(0)["content"] if spelt and spelt[0]["role"] == "system" else ""
    lines = [
        "You may call functions. These are known, with the JSON schemas of their arguments:",
        *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools),
        "To call one, write its name and arguments as JSON between tags, and nothing after it:",
        '<tool_call>\n{"name": "NAME", "arguments": {}}\n</tool_call>',
    ]
    told = "\n".join([*([f"{system}\n"] if system else []), *lines])
    return [{"role": "system", "content": told}, *spelt]


def _spelt(message: Message) -> Message:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content, "results": True}
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls") or ()
    ]
    if not calls:
        return message
    said = [message["content"]] if message["content"] else []
    return {"role": message["role"], "content": "\n".join([*said, *calls])}


# -- what it may write -------------------------------------------------------------------------------------------------


def calls_grammar(form: ToolForm, functions: Sequence[Function], several: bool, marker: int | None) -> Grammar:
    """Calls and nothing else. several: more than one where the form has room for it. marker: the token that stands for
    `begin`, where it is one that is no text."""
    return Grammar("lark", "\n".join(["start: calls", *_calls(form, functions, several, marker)]))


def free_grammar(
    form: ToolForm, functions: Sequence[Function], several: bool, marker: int | None, answer: str | None
) -> Grammar:
    """Text or calls, as the model likes; the arguments of strict functions keep to their schemas. answer: the JSON
    schema of what is no call."""
    strict = [f if f.strict else Function(f.name, {"type": "object"}) for f in functions]
    calls = _calls(form, strict, several, marker)
    if answer is not None:
        return Grammar("lark", "\n".join(["start: calls | answer", f"answer: {_json(json.loads(answer))}", *calls]))
    if form.alone:  # what begins as a call is one
        first = r"[^{\[\s]" if form.listed else r"[^{\s]"
        return Grammar("lark", "\n".join(["start: calls | TEXT", rf"TEXT: /{first}(.|\n)*/", *calls]))
    lines = [
        "start: (opening tagged)* CLOSING",
        rf"opening[lazy]: /(.|\n)*{form.begin}/",
        rf"CLOSING: /(.|\n)*/ & ~/(.|\n)*{form.begin}(.|\n)*/",
        f"tagged: {_text(chr(10))} call {_text(chr(10) + form.end)}",
    ]
    return Grammar("lark", "\n".join([*lines, *(line for line in calls if not line.startswith("calls:"))]))


def _calls(form: ToolForm, functions: Sequence[Function], several: bool, marker: int | None) -> list[str]:
    """Lark's rules `calls` and `call`."""
    one, between = "call", ""
    if form.end:
        one, between = f"{_text(form.begin + chr(10))} call {_text(chr(10) + form.end)}", _text("\n")
    elif form.listed:
        between = _text(", ")
    calls = f"{one} ({between} {one})*" if several and between else one
    if form.listed:
        begin = f"<[{marker}]> " if marker is not None else ""
        calls = f'{begin}"[" {calls} "]"'
    lines = [f"calls: {calls}", "call: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function.name)}, "{form.arguments}": '
        lines.append(f'call_{i}: {_text(head)} {_json(function.parameters)} "}}"')
    return lines


def _text(text: str) -> str:
    return json.dumps(text)


def _json(schema: Mapping[str, Any]) -> str:
    """A JSON schema within Lark's notation."""
    return "%json " + json.dumps({**narrowed_schema(schema), "x-guidance": SPACING})
