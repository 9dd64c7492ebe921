"""The values that cross the runtime's borders: what a caller asks, what the device takes and gives, what comes back."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS
from tilewright.compiler.errors import RequestError
from tilewright.runtime.grammar import Constraint, Grammar
from tilewright.runtime.tools import ToolForm

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
Pooling = Literal["mean", "last"]

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


class EngineError(RuntimeError):
    """The engine is dead or was closed: its device or one of its own parts failed."""


class DeviceError(EngineError):
    """The GPU, or CUDA, failed."""


# -- what a caller asks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are drawn and when they end. Out-of-range values raise RequestError.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off. repetition_penalty: 1 is off.
    logit_bias: token id -> what is added to its logit; -inf bans it. seed: None draws one from the system's entropy.
    n: samples of one prompt, which is prefilled once. stop: text ends before the first of these strings.
    max_tokens: None is as many as context and page pool hold. min_tokens: no stop before that many.
    logprobs: None is off, else how many alternatives come with each token's own. deadline_s: seconds from submission.
    priority: higher goes first; a stream of higher ones can hold a lower one back for ever.
    grammar: the answer keeps to it, and ends where it ends.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    deadline_s: float | None = None
    priority: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self._normalise()
        _real("temperature", self.temperature, 0, 100)
        if 0 < self.temperature < 1e-3:
            raise RequestError(f"temperature {self.temperature} is below 0.001; give 0 for greedy, or at least 0.001")
        _whole("top_k", self.top_k, 0, _INT32_MAX)
        _real("top_p", self.top_p, 0, 1, above=True)
        _real("min_p", self.min_p, 0, 1)
        _real("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        for token, value in self.logit_bias.items():
            _whole("logit_bias token", token, 0, _INT32_MAX)
            if value != -math.inf:
                _real(f"logit_bias of token {token}", value, -100, 100)
        _whole("n", self.n, 1, _INT32_MAX)
        for token in self.stop_token_ids:
            _whole("stop_token_ids entry", token, 0, _INT32_MAX)
        _whole("min_tokens", self.min_tokens, 0, _INT32_MAX)
        if self.seed is not None:
            _whole("seed", self.seed, 0, _INT64_MAX)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, _INT32_MAX)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}; lower it or raise max_tokens"
                )
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, _INT32_MAX)
        if self.deadline_s is not None:
            _real("deadline_s", self.deadline_s, 0, 1e9, above=True)
        _whole("priority", self.priority, -_INT32_MAX, _INT32_MAX)
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            name = "min_tokens" if self.min_tokens else "ignore_eos"
            raise RequestError(f"{name} keeps an answer from ending where its grammar ends; drop one of the two")

    def _normalise(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop string {text!r} is not a text of at least one character; remove it")
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias {self.logit_bias!r} is not a mapping; give token id -> number")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def penalised(self) -> bool:
        """Whether drawing looks at the tokens so far. The sampler reads float32, where tiny penalties are none."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return np.array(penalties, np.float32).tolist() != [1, 0, 0]


def _real(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    """Refuses what is no finite number in [low, high], or in (low, high] where `above`."""
    span = f"{'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RequestError(f"{name} {value!r} is not a number; give one {span}") from None
    if not low <= number <= high or (above and number == low):  # also refuses NaN
        raise RequestError(f"{name} {value} is out of range; give a number {span}")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    try:
        number = operator.index(value)
    except TypeError:
        raise RequestError(f"{name} {value!r} is not a whole number; give one from {low} to {high}") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise RequestError(f"{name} {value} is out of range; give a whole number from {low} to {high}")


@dataclass(frozen=True)
class EngineLimits:
    """What the engine uses of the device, and how much it queues. None: all that the device has.

    max_batch: sequences a step. max_tokens: tokens a step. max_context: tokens of prompt and answer together.
    max_chunk: prompt tokens of one sequence a step. max_queue: requests that wait for their first step. max_prompt,
    max_answer: tokens of one prompt, of one sample's answer. keep_prefixes: requests that begin alike share what is
    computed of it, as long as there are pages; results are the same. Off unless asked for, so that what is timed or
    compared is computed. max_stretch: beside sequences that decode, so much of prompts is computed in a step that it
    takes at most so many times what it would without; None lets prompts have whole steps. max_queue: where several
    tenants wait, one that has less than its part of the queue may still enter a full one.
    """

    max_batch: int | None = None
    max_tokens: int | None = None
    max_context: int | None = None
    max_chunk: int | None = None
    max_queue: int = 1024
    max_prompt: int | None = None
    max_answer: int | None = None
    keep_prefixes: bool = False
    max_stretch: float | None = None


# -- what the device takes and gives -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceLimits:
    """What a compiled model was sized for. max_batch bounds both sequences and wanted rows of a step. pooling, hidden:
    what an embedding is of the hidden states, and how long; None where the artifact gives none."""

    max_batch: int
    max_tokens: int
    max_context: int
    page_size: int
    num_pages: int
    vocab_size: int
    top_logprobs: int
    pooling: Pooling | None = None
    hidden: int | None = None


@dataclass(frozen=True)
class StepBatch:
    """One step's arrays, named, typed and shaped as STEP_INPUTS and SAMPLING_INPUTS say. The executor only reads.

    A token below 0 is not known on the host yet: -1 - r stands for the token of row r of the step launched before.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    indptr: np.ndarray
    page_indptr: np.ndarray
    page_indices: np.ndarray
    kv_len: np.ndarray
    phases: np.ndarray
    rows: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition_penalty: np.ndarray
    presence_penalty: np.ndarray
    frequency_penalty: np.ndarray
    seeds: np.ndarray
    draws: np.ndarray
    penalty_indptr: np.ndarray
    penalty_tokens: np.ndarray
    penalty_counts: np.ndarray
    bias_indptr: np.ndarray
    bias_tokens: np.ndarray
    bias_values: np.ndarray
    alternatives: np.ndarray

    @property
    def one_each(self) -> bool:
        """Whether every sequence has one token, and row i is that of sequence i: what steps for decode batches take."""
        count = len(self.tokens)
        return count == len(self.kv_len) == len(self.rows) and bool((self.rows == np.arange(count)).all())

    def step_inputs(self) -> tuple[np.ndarray, ...]:
        """In the order of STEP_INPUTS."""
        return tuple(getattr(self, name) for name in STEP_INPUTS)

    def sampling_inputs(self) -> tuple[np.ndarray, ...]:
        """In the order of SAMPLING_INPUTS."""
        return tuple(getattr(self, name) for name in SAMPLING_INPUTS)


@dataclass(frozen=True)
class StepResult:
    """token_ids: int32[r]; logprobs: float32[r]; top_ids: int32[r, L]; top_logprobs: float32[r, L], best first.

    A row's alternatives hold as many as the batch asked for; what follows them is unspecified. The arrays may be reused
    once the second step after this one is launched.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class Executor(Protocol):
    """The compiled step on its device, which does what it is told in order. All calls come from one thread.

    A step may want no rows (rows int32[0]) where every sequence is within its prompt.
    """

    @property
    def limits(self) -> DeviceLimits: ...

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the result of the last one is collected, and name its tokens."""

    @property
    def swap(self) -> "Swap | None":
        """Where pages of preempted sequences go. None: their tokens are computed again, in chunks of any kind."""

    def launch(self, batch: StepBatch) -> Any:
        """Starts the step. Returns what `collect` takes; at most one step is launched and not collected before it."""

    def collect(self, pending: Any) -> StepResult:
        """Waits for the step. In the order of launches."""

    def hidden(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32[r, hidden]: the states of the wanted rows after the last norm, of prompts whose tokens it appends to
        their pages. inputs: STEP_INPUTS by name, any number of rows. Waits for them, and for all steps before."""

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copies page `src` to page `dst`, in every layer, before the next step. No page is both src and dst."""


class Swap(Protocol):
    """Memory beside the device's for the pages of preempted sequences. In order with the executor's steps."""

    def out(self, pages: Sequence[int]) -> Any:
        """Moves pages out. Returns a handle; None where there is no room for them."""

    def back(self, handle: Any, pages: Sequence[int]) -> None:
        """Moves them back, into as many other pages, and forgets the handle."""

    def drop(self, handle: Any) -> None:
        """Forgets what was moved out."""


@dataclass(frozen=True)
class Work:
    """What a step computes, as far as its time depends on it. decodes: generated tokens, and keys that they attend to.
    prompt_tokens, pairs of such a token and a key that it attends to, and prompt_keys, each once for all tokens of its
    prompt in the step. As if no layer had a window."""

    decodes: int
    keys: int = 0
    prompt_tokens: int = 0
    pairs: int = 0
    prompt_keys: int = 0

    @staticmethod
    def of(batch: StepBatch) -> "Work":
        tokens, kv_len, prompts = np.diff(batch.indptr).astype(np.int64), batch.kv_len, batch.phases == 0
        generated = int(tokens[~prompts].sum()), int(kv_len[~prompts].sum())
        if not prompts.any():
            return Work(*generated)
        pairs = tokens * kv_len - tokens * (tokens - 1) // 2
        return Work(*generated, *(int(of[prompts].sum()) for of in (tokens, pairs, kv_len)))

    def with_prompt(self, stored: int, tokens: int) -> "Work":
        """This, and `tokens` more of a prompt of which `stored` tokens are in the cache."""
        pairs = tokens * stored + tokens * (tokens + 1) // 2
        keys = self.prompt_keys + stored + tokens
        return Work(self.decodes, self.keys, self.prompt_tokens + tokens, self.pairs + pairs, keys)


class Costs(Protocol):
    """Times of steps: to plan by, and for clocks that only pretend. Seconds."""

    def step_s(self, work: Work) -> float | None:
        """What a step is expected to take; None while nothing is known."""

    def least_s(self, work: Work) -> float:
        """What no step of such work is likely to stay below; 0 while nothing is known."""

    def observe(self, work: Work, seconds: float) -> None:
        """Notes what a step took."""


class ServedModel(Executor, Protocol):
    """What an engine serves: an executor, its tokenizer (None: token ids only), and how long loading took."""

    @property
    def tokenizer(self) -> "TextCodec | None": ...

    @property
    def load_s(self) -> float: ...


class TokenStream(Protocol):
    """Incremental decoding of one sample (runtime/detokenizer.py)."""

    def push(self, token: int) -> str: ...

    def tail(self) -> str: ...

    def finish(self) -> str: ...


class TextCodec(Protocol):
    """What the engine needs of a tokenizer (runtime/tokenizer.py)."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]: ...

    @property
    def tool_form(self) -> ToolForm: ...

    @property
    def tool_marker(self) -> int | None: ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def spelling(self, token: int) -> bytes: ...

    def constraint(self, grammar: Grammar, vocab_size: int) -> Constraint: ...

    def detokenizer(self) -> TokenStream: ...


# -- what comes back ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenLogprob:
    """log-softmax of the model's plain logits for a drawn token, and for the most likely ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Timings:
    """load_s: loading the model. queue_ms: submission to first step. ttft_ms: submission to first token.
    itl_ms: mean time between tokens. None where there was no such moment."""

    load_s: float = 0.0
    queue_ms: float | None = None
    ttft_ms: float | None = None
    itl_ms: float | None = None


@dataclass(frozen=True)
class Completion:
    """One finished sample. index: which of the request's n. token_ids: all that were drawn, a stop token included;
    text: what they say up to the stop token or string. prompt_tokens: how many. embedding: float32[hidden] of length 1,
    where that was wanted instead of an answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    timings: Timings = Timings()
    embedding: np.ndarray | None = None


@dataclass(frozen=True)
class StreamEvent:
    """A sample's progress: text that became certain, and the token just drawn (none where it was ended from outside).
    The last event of a sample carries its completion."""

    index: int
    text: str = ""
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    completion: Completion | None = None
