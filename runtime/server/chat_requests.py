"""A conversation as /v1/chat/completions and /tokenize take it."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from tilewright.runtime.grammar import Grammar
from tilewright.runtime.server.conversation import Conversation
from tilewright.runtime.server.limits import MAX_CALLS, MAX_MESSAGES, MAX_PARTS
from tilewright.runtime.server.requests import Body, Count, Integral, Label, ModelBody, SampledBody
from tilewright.runtime.server.tool_requests import CallId, Calling, NamedTool, ToolCall, ToolMode, Tools


class TextPart(Body):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]


def text_of(content: str | list[TextPart] | None) -> str:
    return content or "" if not isinstance(content, list) else "\n".join(part.text for part in content)


class SystemMessage(Body):
    """developer is another word for system."""

    role: Literal["system", "developer"]
    content: Content
    name: Label | None = None

    def for_template(self) -> dict[str, Any]:
        return _named({"role": "system", "content": text_of(self.content)}, self.name)


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: Label | None = None

    def for_template(self) -> dict[str, Any]:
        return _named({"role": "user", "content": text_of(self.content)}, self.name)


class EarlierAnswer(Body):
    """What the model said: text, calls, or both. refusal: as answers have it."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Label | None = None
    refusal: None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "EarlierAnswer":
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError(
                "combination", "an assistant's message has neither content nor tool_calls; add one"
            )
        return self

    def for_template(self) -> dict[str, Any]:
        message = _named({"role": "assistant", "content": text_of(self.content)}, self.name)
        calls = [call.for_template() for call in self.tool_calls or ()]
        return message | {"tool_calls": calls} if calls else message


class ToolMessage(Body):
    """What a call gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: CallId

    def for_template(self) -> dict[str, Any]:
        return {"role": "tool", "content": text_of(self.content), "tool_call_id": self.tool_call_id}


ChatMessage = Annotated[SystemMessage | UserMessage | EarlierAnswer | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


def _named(message: dict[str, Any], name: str | None) -> dict[str, Any]:
    return message if name is None else message | {"name": name}


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    """name, description, strict: ignored; the answer keeps to the schema in any case."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


ANY_OBJECT = '{"type": "object"}'


class ChatRequest(SampledBody):
    messages: Messages
    max_completion_tokens: Count | None = Field(None, description="By default what the context leaves.")
    max_tokens: Count | None = Field(None, description="The older name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), Integral] | None = Field(
        None, description="Beside logprobs: true only."
    )
    response_format: ResponseFormat | None = None
    tools: Tools | None = Field(None, description="Functions that the model may call.")
    tool_choice: ToolMode | NamedTool | None = Field(
        None, description="auto, the default: as the model likes. required: one or more. none: tools are not even told."
    )
    parallel_tool_calls: bool | None = Field(None, description="Whether there may be more than one call; default true.")
    _calling: Calling = PrivateAttr()

    @model_validator(mode="after")
    def _one_of_each(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("combination", "top_logprobs goes with logprobs: true only; add it")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError("combination", "max_tokens is the older name of max_completion_tokens; drop one")
        if self.response_format is not None and self.structured_outputs is not None:
            raise PydanticCustomError("combination", "response_format and structured_outputs say the same; drop one")
        chosen = self.tool_choice
        named = chosen.function.name if isinstance(chosen, NamedTool) else None
        mode = None if isinstance(chosen, NamedTool) else chosen
        self._calling = Calling.of(self.tools, mode, named, self.parallel_tool_calls)
        self._calling.check_room(self.structured_outputs)
        return self

    @property
    def calling(self) -> Calling:
        return self._calling

    @property
    def conversation(self) -> Conversation:
        return Conversation([message.for_template() for message in self.messages], self._calling.told)

    @property
    def form(self) -> Grammar | None:
        if isinstance(self.response_format, JsonSchemaFormat):
            return Grammar("json_schema", json.dumps(self.response_format.json_schema.json_schema))
        return (
            Grammar("json_schema", ANY_OBJECT) if isinstance(self.response_format, JsonObjectFormat) else super().form
        )

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


# -- tokens ------------------------------------------------------------------------------------------------------------


class TokenizeRequest(ModelBody):
    """One of the two: a text, or a conversation as the chat template spells it, with tools where there are some."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("combination", "give one of prompt and messages")
        if self.tools and self.messages is None:
            raise PydanticCustomError("combination", "tools go with messages only; drop them")
        return self

    @property
    def conversation(self) -> Conversation:
        messages = [message.for_template() for message in self.messages or ()]
        return Conversation(messages, [tool.for_template() for tool in self.tools or ()])
