"""A conversation as /v1/responses takes it."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PrivateAttr, Tag, model_validator
from pydantic_core import PydanticCustomError

from tilewright.runtime.grammar import Grammar
from tilewright.runtime.server.chat_requests import ANY_OBJECT, JsonObjectFormat, TextFormat
from tilewright.runtime.server.conversation import Conversation
from tilewright.runtime.server.limits import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS
from tilewright.runtime.server.requests import Body, Count, DrawnBody
from tilewright.runtime.server.tool_requests import (
    CallId,
    Calling,
    FunctionBody,
    FunctionName,
    ToolBody,
    ToolMode,
    template_call,
)

ItemId = Annotated[str, Field(max_length=128)]
Off = Annotated[bool, Field(json_schema_extra={"enum": [False]})]
Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Body):
    """A part of a message. annotations, logprobs: as answers have them, ignored."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


InputContent = str | Annotated[list[InputText], Field(min_length=1, max_length=MAX_PARTS)]


class InputMessage(Body):
    """id, status: as answers have them, ignored."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent
    id: ItemId | None = None
    status: Status | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class InputCall(Body):
    """An earlier answer's call."""

    type: Literal["function_call"]
    call_id: CallId
    name: str
    arguments: str
    id: ItemId | None = None
    status: Status | None = None


class InputCallOutput(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: str
    id: ItemId | None = None
    status: Status | None = None


def _kind(item: Any) -> str:
    given = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if given is None else str(given)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="this is no input item; give a message, a function_call or a function_call_output",
    ),
]


class SchemaFormat(Body):
    """name, description, strict: ignored; the answer keeps to the schema in any case."""

    type: Literal["json_schema"]
    name: FunctionName
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseText(Body):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponseTool(FunctionBody):
    type: Literal["function"]


class ResponseToolChoice(Body):
    type: Literal["function"]
    name: FunctionName


def _refused(words: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value is None or value is False:
            return value
        raise PydanticCustomError("unsupported", words)

    return BeforeValidator(check)


_NOT_KEPT = _refused("responses are not kept here; leave it out, or give false")
_NOT_KNOWN = _refused("responses are not kept here; give the whole conversation as input")
_NOT_BEHIND = _refused("an answer comes with its request or its stream; leave it out, or give false")


class ResponseRequest(DrawnBody):
    input: (
        Annotated[str, Field(min_length=1)] | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    )
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: Count | None = Field(None, description="By default what the context leaves.")
    text: ResponseText | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolMode | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    store: Annotated[Off | None, _NOT_KEPT] = Field(None, description="Responses are not kept.")
    previous_response_id: Annotated[None, _NOT_KNOWN] = Field(None, description="Responses are not kept.")
    background: Annotated[Off | None, _NOT_BEHIND] = None
    _calling: Calling = PrivateAttr()

    @model_validator(mode="after")
    def _fits_together(self) -> "ResponseRequest":
        if self.text is not None and self.text.format is not None and self.structured_outputs is not None:
            raise PydanticCustomError("combination", "text.format and structured_outputs say the same; drop one")
        tools = [
            ToolBody(type="function", function=FunctionBody(**tool.model_dump(exclude={"type"})))
            for tool in self.tools or ()
        ]
        chosen = self.tool_choice
        name = chosen.name if isinstance(chosen, ResponseToolChoice) else None
        mode = None if isinstance(chosen, ResponseToolChoice) else chosen
        self._calling = Calling.of(tools, mode, name, self.parallel_tool_calls)
        self._calling.check_room(self.structured_outputs)
        return self

    @property
    def calling(self) -> Calling:
        return self._calling

    @property
    def form(self) -> Grammar | None:
        form = None if self.text is None else self.text.format
        if isinstance(form, SchemaFormat):
            return Grammar("json_schema", json.dumps(form.json_schema))
        return Grammar("json_schema", ANY_OBJECT) if isinstance(form, JsonObjectFormat) else super().form

    @property
    def conversation(self) -> Conversation:
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            _append(messages, item)
        return Conversation(messages, self._calling.told)


def _append(messages: list[dict[str, Any]], item: InputMessage | InputCall | InputCallOutput) -> None:
    """An item as chat templates take it: calls are a part of the assistant's message before them."""
    if isinstance(item, InputMessage):
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": item.text})
    elif isinstance(item, InputCallOutput):
        messages.append({"role": "tool", "content": item.output, "tool_call_id": item.call_id})
    else:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        call = template_call(item.call_id, item.name, item.arguments)
        messages[-1].setdefault("tool_calls", []).append(call)
