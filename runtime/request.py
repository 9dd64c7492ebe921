"""A request and its samples: all that serving one prompt keeps in mind on the host.

Nothing here depends on the schedule: tokens, draw counters and penalty counts stay while a preempted sample's cache is
given up, so computing it again leads to the same state.

A step may be launched before the tokens of the last one are known. Such a token counts as drawn; its value is filled in
when the device tells it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewright.compiler.errors import DeadlineError
from tilewright.runtime.grammar import Constraint
from tilewright.runtime.kv_cache import PageTable
from tilewright.runtime.output import Output
from tilewright.runtime.types import SamplingParams, StreamEvent, TokenStream

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index`: the request's own for the first, SplitMix64's sequence after it for the others, so
    that the first of n samples is the one that n = 1 gives. In 0..2**63-1. Steele, Lea and Flood 2014."""
    if index == 0:
        return seed
    z = (seed + index * _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (z ^ (z >> 31)) >> 1


class TokenCounts:
    """The distinct tokens of prompt and answer, sorted, and how often each stands in the answer. int32[c] both."""

    def __init__(self, prompt: np.ndarray) -> None:
        self.tokens = np.unique(prompt)
        self.counts = np.zeros(len(self.tokens), np.int32)

    def add(self, token: int) -> None:
        at = int(np.searchsorted(self.tokens, token))
        if at == len(self.tokens) or self.tokens[at] != token:
            self.tokens = np.insert(self.tokens, at, token)
            self.counts = np.insert(self.counts, at, 0)
        self.counts[at] += 1


@dataclass(frozen=True)
class Biases:
    """What is added to logits, sorted by token id: int32[e], float32[e]."""

    tokens: np.ndarray
    values: np.ndarray

    @staticmethod
    def of(bias: dict[int, float]) -> "Biases":
        tokens = sorted(bias)
        return Biases(np.array(tokens, np.int32), np.array([bias[t] for t in tokens], np.float32))

    def within(self, allowed: np.ndarray) -> "Biases":
        """These, and a ban on every token but the allowed ones, bool[vocab]."""
        values = np.where(allowed, np.float32(0), np.float32(-np.inf))
        values[self.tokens] += self.values
        tokens = np.flatnonzero(values).astype(np.int32)
        return Biases(tokens, values[tokens])


def _ignore(request: "Request", event: StreamEvent) -> None:
    """For a request that nobody listens to."""


@dataclass(eq=False)
class Request:
    """One submitted prompt. Times in seconds of the engine's clock.

    prompt: int32[prompt_tokens]. stop_ids: tokens that end a sample. max_tokens: resolved, never None.
    arrival: unique, in order of submission. tenant: on whose behalf, for fairness.
    cached_tokens: of the prompt, taken from the cache when it started.
    embeds: the hidden states of the prompt are wanted, pooled, and no answer (max_tokens 0).
    refusal: why it ended before it was queued, if it did. decided: called once it is queued, or was refused; on the
    engine's thread, must not raise.
    left: whether its reader wants nothing more of it.
    events: called on the engine's thread, must not raise. release: called once, when the request leaves the queue.
    """

    prompt: np.ndarray
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_tokens: int
    arrival: int
    tenant: str = ""
    load_s: float = 0.0
    submitted_s: float = 0.0
    started_s: float | None = None
    cached_tokens: int = 0
    embeds: bool = False
    refusal: DeadlineError | None = None
    decided: Callable[[], None] | None = None
    events: Callable[["Request", StreamEvent], None] = _ignore
    release: Callable[[], None] | None = None
    left: bool = False
    samples: list["Sample"] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def deadline_s(self) -> float:
        limit = self.params.deadline_s
        return math.inf if limit is None else self.submitted_s + limit

    @property
    def finished(self) -> bool:
        return all(sample.output.completion for sample in self.samples)

    @property
    def biases(self) -> Biases:
        return Biases.of(dict(self.params.logit_bias))

    @property
    def early_biases(self) -> Biases:
        """The biases of a draw that must not end the sample."""
        return Biases.of({**self.params.logit_bias, **dict.fromkeys(self.stop_ids, -math.inf)})

    def start(self, now_s: float) -> None:
        """Notes the first step, and leaves the queue."""
        if self.started_s is None:
            self.started_s = now_s
            self.leave_queue()

    def leave(self) -> None:
        """Called by its reader, from any thread: nothing of it is wanted any more."""
        self.left = True
        self.part()

    def part(self) -> None:
        """Where it has ended and its reader has left: cuts the circles that it is part of, so that its memory is free
        at once, and not when the garbage collector holds up everything to find it."""
        if self.left and self.finished:
            self.samples.clear()
            self.events = _ignore

    def decide(self) -> None:
        decided, self.decided = self.decided, None
        if decided is not None:
            decided()

    def leave_queue(self) -> None:
        release, self.release = self.release, None
        if release is not None:
            release()


class Sample:
    """One of a request's n samples, and the unit of scheduling: its tokens, its pages, its part of the sampler's state.

    Until the first draw, sample 0 computes the prompt for all (width n) and the others hold nothing.
    """

    __slots__ = (
        "biases",
        "computed",
        "constraint",
        "counts",
        "drawn",
        "early_biases",
        "known",
        "output",
        "rank",
        "replays",
        "request",
        "seed",
        "swapped",
        "table",
        "tokens",
        "width",
    )

    def __init__(self, request: Request, index: int, stream: TokenStream | None) -> None:
        params = request.params
        self.request = request
        self.rank = (-params.priority, request.arrival, index)
        self.width = params.n if index == 0 else 0
        self.seed = sample_seed(request.seed, index)
        self.tokens = np.empty(request.prompt_tokens + request.max_tokens, np.int32)
        self.tokens[: request.prompt_tokens] = request.prompt
        self.known = request.prompt_tokens  # tokens of prompt and answer so far
        self.computed = 0
        self.drawn = 0
        self.replays = False  # computes its answer again one token a step, as it was computed first
        self.swapped: Any = None  # the handle of pages that were moved out
        self.table = PageTable()
        self.counts = TokenCounts(request.prompt) if params.penalised else None
        self.constraint: Constraint | None = None
        self.biases = request.biases
        self.early_biases = request.early_biases if params.min_tokens else self.biases
        self.output = Output(request, index, stream)

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def begun(self) -> bool:
        return self.request.started_s is not None

    @property
    def length(self) -> int:
        """How far the next steps may compute."""
        if not self.replays:
            return self.known
        prompt = self.request.prompt_tokens
        return prompt if self.computed < prompt else min(self.known, self.computed + 1)

    @property
    def generating(self) -> bool:
        """Whether the next tokens to compute are generated ones, and not the prompt's."""
        return self.computed >= self.request.prompt_tokens

    @property
    def bias(self) -> Biases:
        """Of the next draw. With a constraint, all tokens before it must be known."""
        if self.constraint is not None:
            return self.biases.within(self.constraint.allowed())
        return self.early_biases if self.drawn < self.request.params.min_tokens else self.biases

    @property
    def cut_off(self) -> bool:
        """Whether the answer ends since its grammar can't be followed any further, and not since it is complete."""
        return self.constraint is not None and self.constraint.error is not None

    @property
    def reads_tokens(self) -> bool:
        """Whether the next draw depends on the values of the tokens before it by more than the cache."""
        return self.counts is not None or self.constraint is not None

    def draw(self, row: int) -> int:
        """Notes that a row of the step just launched draws the next token. Returns the token's place."""
        place = self.known
        self.tokens[place] = -1 - row
        self.known += 1
        self.drawn += 1
        return place

    def fill(self, place: int, token: int) -> None:
        """Notes which token was drawn."""
        self.tokens[place] = token
        if self.counts is not None:
            self.counts.add(token)
        if self.constraint is not None:
            self.constraint.accept(token)
