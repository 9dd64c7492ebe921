"""What the server answers: plain dictionaries, typed, so that the OpenAPI document is made from them."""

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

FinishReason = Literal["stop", "length", "tool_calls"]
StopReason = Literal["deadline", "shutdown", "grammar"]


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    error: ErrorDetail


class PromptDetails(TypedDict):
    """cached_tokens: of the prompt, computed for an earlier request."""

    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


# -- chat --------------------------------------------------------------------------------------------------------------


class ChatTopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]


class AnsweredFunction(TypedDict):
    """arguments: JSON, cut off where finish_reason is length."""

    name: str
    arguments: str


class AnsweredCall(TypedDict):
    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[AnsweredCall]]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: NotRequired[StopReason]


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class CallDelta(TypedDict):
    """A call's beginning, with id, type and name, or more of its arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[CallDelta]]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[StopReason]


class ChatCompletionChunk(TypedDict):
    """usage: in the last chunk, where it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


# -- completions -------------------------------------------------------------------------------------------------------


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[StopReason]


class TextCompletion(TypedDict):
    """Streamed, each chunk has this form, and a choice's finish_reason is null until its end."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


# -- embeddings --------------------------------------------------------------------------------------------------------


class Embedding(TypedDict):
    """embedding: of length 1 as a vector; a text where encoding_format is base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


# -- the rest ----------------------------------------------------------------------------------------------------------


class ModelCard(TypedDict):
    """max_model_len: tokens of prompt and answer together. pooling: what embeddings are of the last hidden states; null
    where there are none."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    pooling: Literal["mean", "last"] | None


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class TokenList(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(TypedDict):
    prompt: str


class Version(TypedDict):
    version: str


class ModelFigures(TypedDict):
    """running, waiting: sequences. pages: of the KV pool, used_pages hold running sequences, and kept_pages, of the
    others, what later prompts may begin with. The rest counts from the start: tokens drawn, tokens of prompts that were
    looked for in the cache, and those found."""

    model: str
    running: int
    waiting: int
    pages: int
    used_pages: int
    kept_pages: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int


class Figures(TypedDict):
    """time_s: by the server's clock, from any beginning, so that rates are differences over its differences."""

    time_s: float
    models: list[ModelFigures]


class Health(TypedDict):
    status: Literal["ok", "dead", "stalled", "draining"]


Json = dict[str, Any]
