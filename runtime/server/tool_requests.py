"""Functions in a request: which there are, which of them may or must be called, and calls that were made before."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import PydanticCustomError

from tilewright.runtime.grammar import Grammar
from tilewright.runtime.server.limits import MAX_TOOLS
from tilewright.runtime.server.requests import Body
from tilewright.runtime.tool_parser import CallParser
from tilewright.runtime.tools import Function, calls_grammar, free_grammar
from tilewright.runtime.types import SamplingParams, TextCodec

FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
ToolMode = Literal["none", "auto", "required"]
CallId = Annotated[str, Field(max_length=128)]

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class FunctionBody(Body):
    """parameters: JSON schema of the arguments; left out, there are none."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="The arguments keep to the schema, also with tool_choice auto.")


class ToolBody(Body):
    type: Literal["function"]
    function: FunctionBody

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


Tools = Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)]


class FunctionChoice(Body):
    name: FunctionName


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionChoice


class CalledFunction(Body):
    """arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(Body):
    id: CallId
    type: Literal["function"]
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        return template_call(self.id, self.function.name, self.function.arguments)


def template_call(identity: str, name: str, arguments: str) -> dict[str, Any]:
    """A call as chat templates take it: with the arguments' value, where they are JSON."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):  # cut off when it was written, or nested beyond reason
        value = arguments
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": value}}


@dataclass(frozen=True)
class Calling:
    """What a request lets the model call. choice: none, auto, required, or the name of the function that must be.
    several: more than one call."""

    tools: Sequence[ToolBody]
    choice: str
    named: bool = False
    several: bool = True

    @staticmethod
    def of(tools: Sequence[ToolBody] | None, choice: str | None, name: str | None, several: bool | None) -> "Calling":
        """Raises PydanticCustomError for what does not fit together."""
        tools = tools or []
        names = [tool.function.name for tool in tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PydanticCustomError("combination", f"tools has two functions named {twice}; rename one")
        if not tools and (name is not None or choice == "required"):
            raise PydanticCustomError("combination", "tool_choice asks for a call and there are no tools; add some")
        if name is not None and name not in names:
            raise PydanticCustomError("combination", f"tool_choice names {name}, which tools does not have; add it")
        return Calling(tools, name or choice or "auto", name is not None, several is not False)

    def check_room(self, structured: Any) -> None:
        """structured: a form of answers that has no place for calls, if there is one. Raises PydanticCustomError."""
        if self.possible and structured is not None:
            raise PydanticCustomError(
                "combination", "structured_outputs leaves no room for calls; drop it, or the tools"
            )

    @property
    def possible(self) -> bool:
        return bool(self.tools) and (self.named or self.choice != "none")

    @property
    def forced(self) -> bool:
        return bool(self.tools) and (self.named or self.choice == "required")

    @property
    def told(self) -> list[dict[str, Any]]:
        """The functions as the chat template gets them: none of them, where none may be called."""
        return [tool.for_template() for tool in self.tools] if self.possible else []

    def parser(self, tokenizer: TextCodec) -> CallParser | None:
        """Of one answer; None where it is all text."""
        if not self.possible:
            return None
        return CallParser(tokenizer.tool_form, [f.name for f in self._functions], self._several)

    def params(self, tokenizer: TextCodec, params: SamplingParams) -> SamplingParams:
        """With what calls ask for: the form of the answer, and where it ends. Raises RequestError."""
        if not self.possible:
            return params
        grammar, end = self._grammar(tokenizer, params.grammar), tokenizer.tool_form.end
        over = (end,) if end and not self._several and not self.forced else ()  # nothing counts after the first call
        return replace(params, grammar=grammar, stop=(*params.stop, *over))

    def _grammar(self, tokenizer: TextCodec, form: Grammar | None) -> Grammar | None:
        """What the answer keeps to. form: of an answer without calls, a JSON schema at most."""
        how = (tokenizer.tool_form, self._functions, self._several, tokenizer.tool_marker)
        if self.forced:
            return calls_grammar(*how)
        if form is not None or any(f.strict for f in self._functions):
            return free_grammar(*how, None if form is None else form.text)
        return None

    @property
    def _several(self) -> bool:
        return self.several and not self.named

    @property
    def _functions(self) -> list[Function]:
        wanted = [t.function for t in self.tools if not self.named or t.function.name == self.choice]
        return [Function(f.name, _schema(f.parameters), bool(f.strict)) for f in wanted]


def _schema(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return _NO_PARAMETERS if parameters is None else parameters
