"""What /v1/responses answers: a response with its items, and the named events that a stream of it is made of."""

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]


class OutputMessage(TypedDict):
    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class OutputCall(TypedDict):
    """arguments: JSON, cut off where status is incomplete."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = OutputMessage | OutputCall


class InputDetails(TypedDict):
    """cached_tokens: of the input, computed for an earlier request."""

    cached_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: Literal[0]


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    """stop_reason: which limit, where it was not max_output_tokens or the context."""

    reason: Literal["max_output_tokens"]
    stop_reason: NotRequired[Literal["deadline", "shutdown", "grammar"]]


class Response(TypedDict):
    """Beside the answer, what was asked: instructions to truncation."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: ResponseStatus
    error: None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    store: Literal[False]
    background: Literal[False]
    previous_response_id: None


# -- events ------------------------------------------------------------------------------------------------------------


class ResponseEvent(TypedDict):
    """The response as it stands: without output when it begins, whole at the end."""

    type: Literal["response.created", "response.in_progress", "response.completed", "response.incomplete"]
    sequence_number: int
    response: Response


class ItemEvent(TypedDict):
    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class PartEvent(TypedDict):
    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: Literal[0]
    part: OutputText


class TextDelta(TypedDict):
    type: Literal["response.output_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: Literal[0]
    delta: str
    logprobs: list[Any]


class TextDone(TypedDict):
    type: Literal["response.output_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: Literal[0]
    text: str
    logprobs: list[Any]


class ArgumentsDelta(TypedDict):
    type: Literal["response.function_call_arguments.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(TypedDict):
    type: Literal["response.function_call_arguments.done"]
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str


StreamedEvent = ResponseEvent | ItemEvent | PartEvent | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone
