"""What the server is asked: bodies as pydantic models, which check them and describe them in the OpenAPI document.

Fields have OpenAI's names and ranges. Types are strict ("1" is no number), and a field that is not listed is refused,
as OpenAI does: a misspelt option would be ignored otherwise. What the fields' ranges can't say (that the prompt fits
the context, that a token is in the vocabulary) the engine checks.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tilewright.runtime.grammar import Grammar
from tilewright.runtime.server.limits import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_INPUTS,
    MAX_PROMPTS,
    MAX_SAMPLES,
    MAX_STOPS,
)
from tilewright.runtime.types import SamplingParams

_INT31 = 2**31 - 1
_INT63 = 2**63 - 1


def _whole(value: Any) -> Any:
    """2.0 is the same number as 2 in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _wholes(values: Any) -> Any:
    """As `_whole`, for lists that may be long."""
    return [_whole(v) for v in values] if isinstance(values, list) and float in set(map(type, values)) else values


# After a Field, whose limits would not reach the document otherwise.
Integral, Integrals = BeforeValidator(_whole), BeforeValidator(_wholes)

Count = Annotated[int, Field(ge=1, le=_INT31), Integral]
TokenId = Annotated[int, Field(ge=0, le=_INT31)]
TokenIds = Annotated[list[TokenId], Integrals]
Share = Annotated[float, Field(gt=0, le=1)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
# The sampler's scores would overflow between the two.
Temperature = Annotated[
    float, Field(ge=0, le=2, json_schema_extra={"not": {"exclusiveMinimum": 0, "exclusiveMaximum": 0.001}})
]
Priority = Annotated[int, Field(ge=-1000, le=1000), Integral]
Deadline = Annotated[float, Field(gt=0, le=1e6)]
Label = Annotated[str, Field(max_length=512)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ModelBody(Body):
    model: str = Field(min_length=1, max_length=256, description="A name that /v1/models lists.")


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="A last chunk without choices counts the tokens.")


class StructuredOutputs(Body):
    """The form of an answer: one of these."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    json_schema: dict[str, Any] | None = Field(None, alias="json", description="A JSON schema.")
    regex: Annotated[str, Field(min_length=1)] | None = Field(None, description="Of the whole answer.")
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)] | None = (
        None
    )
    grammar: Annotated[str, Field(min_length=1)] | None = Field(None, description="In Lark's notation.")

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        if sum(value is not None for value in (self.json_schema, self.regex, self.choice, self.grammar)) != 1:
            raise PydanticCustomError("combination", "structured_outputs has one of json, regex, choice and grammar")
        return self

    @property
    def form(self) -> Grammar:
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar.choice(self.choice)
        if self.grammar is not None:
            return Grammar("lark", self.grammar)
        return Grammar("json_schema", json.dumps(self.json_schema))


class DrawnBody(ModelBody):
    """What all requests for an answer share. null stands for the default everywhere."""

    temperature: Temperature | None = Field(None, description="0 takes the likeliest token each time; default 1.")
    top_p: Share | None = Field(None, description="Draw from the likeliest tokens of this total probability.")
    seed: Annotated[int, Field(ge=0, le=_INT63), Integral] | None = Field(
        None, description="The same seed and request give the same tokens, whatever else the server does."
    )
    stream: bool | None = None
    user: Label | None = Field(None, description="Ignored.")
    metadata: dict[str, Label] | None = Field(None, description="Ignored.")
    # Extensions to OpenAI's API; its Python client sends them as `extra_body`.
    top_k: Annotated[int, Field(ge=0, le=_INT31), Integral] | None = Field(None, description="Extension: 0 is off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Extension: leaves out tokens less likely than this share of the likeliest."
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        None, description="Extension: 1 is off."
    )
    min_tokens: Annotated[int, Field(ge=0, le=_INT31), Integral] | None = Field(
        None, description="Extension: no end before so many tokens."
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS), Integrals] | None = Field(
        None, description="Extension: tokens that end an answer, beside the model's own."
    )
    ignore_eos: bool | None = Field(None, description="Extension: the model's own end tokens do not end an answer.")
    priority: Priority | None = Field(
        None, description="Extension: higher goes first; default 0. A key may have an upper limit."
    )
    deadline_s: Deadline | None = Field(
        None,
        description="Extension: seconds after which what is there is the answer, with finish_reason length and "
        "stop_reason deadline.",
    )

    structured_outputs: StructuredOutputs | None = Field(
        None, description="Extension: the form that the answer has, unless it is cut off."
    )

    @model_validator(mode="after")
    def _not_too_cold(self) -> "DrawnBody":
        if self.temperature is not None and 0 < self.temperature < 1e-3:
            raise PydanticCustomError("range", "temperature is below 0.001; give 0 for greedy, or at least 0.001")
        return self

    @property
    def form(self) -> Grammar | None:
        """The form of the answer, if it has one."""
        return None if self.structured_outputs is None else self.structured_outputs.form

    def sampling(self, max_tokens: int | None, logprobs: int | None, most_s: float) -> SamplingParams:
        """For the engine. most_s: how long a request may take at all. Raises RequestError."""
        chosen = {name: value for name, value in self.chosen().items() if value is not None}
        deadline_s = most_s if self.deadline_s is None else min(self.deadline_s, most_s)
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, deadline_s=deadline_s, **chosen)

    def chosen(self) -> dict[str, Any]:
        """Fields of SamplingParams; None where nothing was asked for."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop_token_ids": self.stop_token_ids,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "priority": self.priority,
            "grammar": self.form,
        }


class SampledBody(DrawnBody):
    """What /v1/chat/completions and /v1/completions share beyond that."""

    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES), Integral] | None = Field(
        None, description="Answers to one prompt, computed together: at most the sequences of a step."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="The text ends before the first of these."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[TokenName, Bias], Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False})
        ]
        | None
    ) = Field(None, description="Token id, as text: what is added to its logit.")
    stream_options: StreamOptions | None = Field(None, description="Beside stream: true only.")

    @model_validator(mode="after")
    def _options_of_streams(self) -> "SampledBody":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("combination", "stream_options goes with stream: true only; drop it")
        return self

    def chosen(self) -> dict[str, Any]:
        return super().chosen() | {
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": None if self.logit_bias is None else {int(t): b for t, b in self.logit_bias.items()},
            "n": self.n,
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
        }

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


# -- completions -------------------------------------------------------------------------------------------------------

Tokens = Annotated[list[TokenId], Field(min_length=1), Integrals]


class CompletionRequest(SampledBody):
    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Count | None = Field(None, description="Default 16, as OpenAI has it.")
    logprobs: Annotated[int, Field(ge=0, le=20), Integral] | None = None
    echo: bool | None = Field(None, description="The prompt's text before the answer's; not beside logprobs.")

    @model_validator(mode="after")
    def _echo_alone(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError("combination", "logprobs of a prompt's tokens are not computed; drop echo")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each of them, a text or token ids."""
        return listed(self.prompt)


def listed(given: Any) -> list[str] | list[list[int]]:
    """A text or a list of token ids becomes a list of one."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


# -- embeddings --------------------------------------------------------------------------------------------------------

Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)]


class EmbeddingRequest(ModelBody):
    input: (
        Annotated[str, Field(min_length=1)]
        | Texts
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of float32 numbers, little-endian. Default float."
    )
    dimensions: Count | None = Field(None, description="Only as many as the model has: nothing is cut off.")
    user: Label | None = Field(None, description="Ignored.")
    priority: Priority | None = Field(None, description="Extension: as for answers.")
    deadline_s: Deadline | None = Field(None, description="Extension: seconds after which there is an error instead.")

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """Each of them, a text or token ids."""
        return listed(self.input)


# -- tokens ------------------------------------------------------------------------------------------------------------


class DetokenizeRequest(ModelBody):
    tokens: TokenIds
