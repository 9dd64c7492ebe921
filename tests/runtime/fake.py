"""A device that can be reasoned about: its "model" hashes the tokens that it finds through the page table.

It really keeps every token and position in page slots and reads them back through page_indices, so a wrong page table,
slot, length or copy changes tokens or trips a check. Draws depend on all that the sampler's arrays say. `expected`
computes the same answer for one sample straight from its tokens, without engine, pages or batches.

With `runs_ahead` it takes steps whose tokens the last one drew; with `host_pages` it has a swap of so many pages, and
insists that a prompt's tokens are computed as a prompt's and generated ones one by one, also when computed again.
"""

import hashlib
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS
from tilewright.runtime.core import EngineCore
from tilewright.runtime.intake import Intake, Prompt, resolve_limits
from tilewright.runtime.request import Request, sample_seed
from tilewright.runtime.scheduler.fair import FairShare
from tilewright.runtime.scheduler.policy import Policy
from tilewright.runtime.types import (
    Completion,
    DeviceLimits,
    EngineLimits,
    Executor,
    SamplingParams,
    StepBatch,
    StepResult,
    StreamEvent,
    TextCodec,
    Work,
)

HIDDEN = 6
LIMITS = DeviceLimits(
    max_batch=8, max_tokens=64, max_context=96, page_size=4, num_pages=64, vocab_size=50, top_logprobs=3,
    pooling="mean", hidden=HIDDEN,
)  # fmt: skip


@dataclass
class VirtualClock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(frozen=True)
class LinearCosts:
    """A step that costs something in itself and something for each token, and each key that it attends to."""

    def step_s(self, work: Work) -> float:
        return 1e-3 + 1e-4 * (work.decodes + work.prompt_tokens) + 1e-6 * (work.keys + work.pairs)

    def least_s(self, work: Work) -> float:
        return self.step_s(work)

    def observe(self, work: Work, seconds: float) -> None:
        assert seconds >= 0


@dataclass
class FakeModel:
    """An executor in numpy. The clock moves on by what `costs` predict for each step."""

    limits: DeviceLimits = LIMITS
    tokenizer: TextCodec | None = None
    clock: VirtualClock = field(default_factory=VirtualClock)
    costs: LinearCosts = field(default_factory=LinearCosts)
    load_s: float = 0.5
    steps: list[tuple[int, int]] = field(default_factory=list)  # tokens, sequences
    runs_ahead: bool = False
    host_pages: int | None = None

    def __post_init__(self) -> None:
        slots = self.limits.num_pages * self.limits.page_size
        self._tokens = np.full(slots, -1, np.int64)
        self._positions = np.full(slots, -1, np.int64)
        self._phases = np.full(slots, -1, np.int64)
        self._pending: deque[StepResult] = deque()
        self._last = np.empty(0, np.int32)
        self.swap = None if self.host_pages is None else FakeSwap(self, self.host_pages)

    def launch(self, batch: StepBatch) -> StepResult:
        assert len(self._pending) <= self.runs_ahead, "too many steps are in flight"
        unknown = batch.tokens < 0
        assert self._pending or not unknown.any(), "a token of no step in flight is asked for"
        tokens = batch.tokens.copy()
        tokens[unknown] = self._last[-1 - tokens[unknown]]
        result = self.step(replace(batch, tokens=tokens))
        self._last = result.token_ids.copy()
        self._pending.append(result)
        return result

    def collect(self, pending: StepResult) -> StepResult:
        assert self._pending.popleft() is pending, "steps are collected out of order"
        return pending

    def hidden(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """A state of each wanted row that depends on all tokens up to it, as the pages hold them."""
        batch = SimpleNamespace(**inputs)
        assert set(inputs) == set(STEP_INPUTS) and all(a.dtype == "int32" for a in inputs.values())
        assert 1 <= len(batch.tokens) <= self.limits.max_tokens and len(batch.kv_len) <= self.limits.max_batch
        assert not batch.phases.any(), "a prompt's token is computed as a generated one"
        self._tokens[batch.slots], self._positions[batch.slots], self._phases[batch.slots] = (
            batch.tokens, batch.positions, 0,
        )  # fmt: skip
        owner = np.searchsorted(batch.indptr, batch.rows, side="right") - 1
        contexts = [self._read(batch, i) for i in range(len(batch.kv_len))]
        self.steps.append((len(batch.tokens), len(batch.kv_len)))
        self.clock.now_s += self.costs.step_s(Work.of(batch))
        states = [state(contexts[i][: batch.positions[row] + 1]) for i, row in zip(owner, batch.rows, strict=True)]
        return np.array(states, np.float32).reshape(len(states), HIDDEN)

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        sources, targets = {s for s, _ in pairs}, [t for _, t in pairs]
        assert not sources & set(targets) and len(set(targets)) == len(targets), "copies depend on their order"
        for source, target in pairs:
            for store in self.stores:
                store[self._slots(target)] = store[self._slots(source)]

    @property
    def stores(self) -> tuple[np.ndarray, ...]:
        return self._tokens, self._positions, self._phases

    def step(self, batch: StepBatch) -> StepResult:
        check_batch(batch, self.limits)
        self._tokens[batch.slots] = batch.tokens
        self._positions[batch.slots] = batch.positions
        self._phases[batch.slots] = np.repeat(batch.phases, np.diff(batch.indptr))
        contexts = [self._read(batch, i) for i in range(len(batch.kv_len))]
        owner = np.searchsorted(batch.indptr, batch.rows, side="right") - 1
        drawn = [draw_row(contexts[i][: batch.positions[row] + 1], batch, r, self.limits.vocab_size)
                 for r, (i, row) in enumerate(zip(owner, batch.rows, strict=True))]  # fmt: skip
        for r, i in enumerate(owner if self.swap else ()):
            self._check_phases(batch, i, int(batch.draws[r]))
        self.steps.append((len(batch.tokens), len(batch.kv_len)))
        self.clock.now_s += self.costs.step_s(Work.of(batch))
        return result_of(drawn, batch.alternatives, self.limits)

    def _check_phases(self, batch: StepBatch, i: int, draws: int) -> None:
        pages = batch.page_indices[batch.page_indptr[i] : batch.page_indptr[i + 1]]
        phases = np.concatenate([self._phases[self._slots(page)] for page in pages])[: batch.kv_len[i]]
        prompt = len(phases) - draws
        assert not phases[:prompt].any() and phases[prompt:].all(), "a token was computed as what it is not"

    def _slots(self, page: int) -> slice:
        return slice(page * self.limits.page_size, (page + 1) * self.limits.page_size)

    def _read(self, batch: Any, i: int) -> np.ndarray:
        """All tokens of sequence i, read back through its pages."""
        pages = batch.page_indices[batch.page_indptr[i] : batch.page_indptr[i + 1]]
        slots = (pages[:, None] * self.limits.page_size + np.arange(self.limits.page_size)).ravel()
        length = batch.kv_len[i]
        assert len(slots) - self.limits.page_size < length <= len(slots), "kv_len does not fit the page table"
        assert (self._positions[slots[:length]] == np.arange(length)).all(), "a page holds other positions"
        tokens = self._tokens[slots[:length]]
        new = slice(batch.indptr[i], batch.indptr[i + 1])
        assert (tokens[length - (new.stop - new.start) :] == batch.tokens[new]).all(), "new tokens are not in the cache"
        return tokens


class FakeSwap:
    def __init__(self, model: FakeModel, room: int) -> None:
        self._model, self.room = model, room
        self._handles = count()
        self.held: dict[int, list[list[np.ndarray]]] = {}

    def out(self, pages: Sequence[int]) -> int | None:
        if len(pages) > self.room:
            return None
        self.room -= len(pages)
        handle = next(self._handles)
        self.held[handle] = [[s[self._model._slots(p)].copy() for s in self._model.stores] for p in pages]
        return handle

    def back(self, handle: int, pages: Sequence[int]) -> None:
        for page, saved in zip(pages, self.held[handle], strict=True):
            for store, values in zip(self._model.stores, saved, strict=True):
                store[self._model._slots(page)] = values
        self.drop(handle)

    def drop(self, handle: int) -> None:
        self.room += len(self.held.pop(handle))


def check_batch(batch: StepBatch, limits: DeviceLimits) -> None:
    """Shapes and dtypes as the two tables say, indptrs consistent, within the limits."""
    extents: dict[str, int] = {}
    for name, (shape, dtype) in (STEP_INPUTS | SAMPLING_INPUTS).items():
        array = getattr(batch, name)
        assert array.ndim == 1 and array.dtype == dtype, f"{name} is {array.dtype}{array.shape}"
        size = len(array) - shape.endswith("+1")
        symbol = shape.removesuffix("+1")
        assert extents.setdefault(symbol, size) == size, f"{name} has {symbol} = {size}, not {extents[symbol]}"
    assert 1 <= extents["t"] <= limits.max_tokens and extents["b"] <= limits.max_batch
    assert extents["r"] <= limits.max_batch
    ends = {"indptr": "t", "page_indptr": "p", "penalty_indptr": "c", "bias_indptr": "e"}
    for name, total in ends.items():
        indptr = getattr(batch, name)
        assert indptr[0] == 0 and indptr[-1] == extents[total] and (np.diff(indptr) >= 0).all(), name
    assert (np.diff(batch.indptr) > 0).all(), "a sequence has no tokens"
    for i, (begin, end) in enumerate(pairwise(batch.indptr)):
        new = np.arange(batch.kv_len[i] - (end - begin), batch.kv_len[i])
        assert (batch.positions[begin:end] == new).all(), "positions do not end at kv_len"
    assert (batch.tokens >= 0).all() and (batch.tokens < limits.vocab_size).all(), "a token is outside the vocabulary"
    assert np.isin(batch.phases, (0, 1)).all()
    assert len(set(batch.slots.tolist())) == len(batch.slots), "two tokens are written to one slot"
    assert (batch.slots >= 0).all() and (batch.slots < limits.num_pages * limits.page_size).all()


def draw_row(context: np.ndarray, batch: StepBatch, row: int, vocab: int) -> int:
    listed = slice(batch.penalty_indptr[row], batch.penalty_indptr[row + 1])
    biased = slice(batch.bias_indptr[row], batch.bias_indptr[row + 1])
    tokens, counts = batch.penalty_tokens[listed], batch.penalty_counts[listed]
    bias_tokens = batch.bias_tokens[biased]
    assert (np.diff(bias_tokens) > 0).all(), "biases are not sorted"
    penalties = [float(getattr(batch, f"{n}_penalty")[row]) for n in ("repetition", "presence", "frequency")]
    if penalties != [1, 0, 0]:
        output = context[len(context) - batch.draws[row] :]
        assert (tokens == np.unique(context)).all(), "the penalty list is not the distinct tokens"
        assert (counts == [(output == t).sum() for t in tokens]).all(), "the penalty counts are wrong"
    else:
        assert not len(tokens)
    settings = [float(getattr(batch, n)[row]) for n in ("temperature", "top_p", "min_p")] + [int(batch.top_k[row])]
    return draw(
        context.tolist(),
        [*settings, *penalties],
        int(batch.seeds[row]),
        int(batch.draws[row]),
        dict(zip(bias_tokens.tolist(), batch.bias_values[biased].tolist(), strict=True)),
        vocab,
    )


def draw(context: list[int], settings: list[float], seed: int, draws: int, bias: dict[int, float], vocab: int) -> int:
    """The next token: a hash of all that it may depend on, moved on past banned tokens. Greedy ignores the seed."""
    stream = [seed, draws] if settings[0] else []
    plain = sorted((t, v) for t, v in bias.items() if v != -math.inf)
    text = repr((context, settings, stream, plain))
    token = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % vocab
    while bias.get(token) == -math.inf:
        token = (token + 1) % vocab
    return token


def result_of(tokens: list[int], alternatives: np.ndarray, limits: DeviceLimits) -> StepResult:
    ids = np.array(tokens, np.int32)
    top = (ids[:, None] + np.arange(limits.top_logprobs, dtype=np.int32)) % limits.vocab_size
    top_logprobs = -top.astype(np.float32)
    unwanted = np.arange(limits.top_logprobs) >= alternatives[:, None]
    top[unwanted], top_logprobs[unwanted] = -1, np.nan
    return StepResult(ids, -ids.astype(np.float32), top.astype(np.int32), top_logprobs)


def state(context: np.ndarray) -> list[int]:
    """The hidden state after these tokens."""
    return list(hashlib.blake2b(repr(context.tolist()).encode(), digest_size=HIDDEN).digest())


def expected_embedding(prompt: list[int], pooling: str) -> np.ndarray:
    states = np.array([state(np.array(prompt[: i + 1])) for i in range(len(prompt))], np.float64)
    vector = states.mean(axis=0) if pooling == "mean" else states[-1]
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def expected(
    prompt: list[int],
    params: SamplingParams,
    index: int = 0,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
    limits: DeviceLimits = LIMITS,
) -> list[int]:
    """The tokens of one sample, computed straight from its definition."""
    own = sample_seed(seed if params.seed is None else params.seed, index)
    names = ("temperature", "top_p", "min_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty")
    settings = [float(np.float32(getattr(params, n))) if n != "top_k" else params.top_k for n in names]
    stops = {*stop_ids, *params.stop_token_ids}
    room = min(limits.max_context, limits.num_pages * limits.page_size) - len(prompt)
    answer: list[int] = []
    while len(answer) < (params.max_tokens or room) and not (answer and answer[-1] in stops):
        bias = {t: float(np.float32(v)) for t, v in params.logit_bias.items()}
        if len(answer) < params.min_tokens:
            bias |= dict.fromkeys(stops, -math.inf)
        answer.append(draw([*prompt, *answer], settings, own, len(answer), bias, limits.vocab_size))
    return answer


class Bench:
    """A core on the fake device, turned by hand."""

    def __init__(
        self, device: DeviceLimits = LIMITS, limits: EngineLimits | None = None, policy: Policy | None = None,
        tokenizer: TextCodec | None = None, runs_ahead: bool = False, host_pages: int | None = None,
        executor: Executor | None = None,
    ) -> None:  # fmt: skip
        self.model = FakeModel(device, tokenizer, runs_ahead=runs_ahead, host_pages=host_pages)
        budget, capacity = resolve_limits(limits or EngineLimits(), device)
        keep = limits is not None and limits.keep_prefixes
        self.core = EngineCore(
            executor or self.model, budget, policy or FairShare(), self.model.costs, self.model.clock, keep
        )
        self.intake = Intake(device, budget, capacity, tokenizer, self.model.load_s, entropy=lambda: 0)
        self.events: list[tuple[Request, StreamEvent]] = []

    def submit(self, prompt: Prompt, params: SamplingParams, tenant: str = "") -> Request:
        request = self.intake.request(prompt, params, tenant)
        request.events = lambda *event: self.events.append(event)
        self.core.submit(request)
        return request

    def embed(self, prompt: Prompt, params: SamplingParams) -> Request:
        request = self.intake.embedding(prompt, params)
        request.events = lambda *event: self.events.append(event)
        self.core.submit(request)
        return request

    def run(self, most: int = 100_000) -> None:
        """Turns until idle; fails where that takes more than `most` turns."""
        for _ in range(most):
            if not self.core.busy:
                break
            self.core.turn()
        assert not self.core.busy, "the engine does not come to rest"
        self.core.check_invariants()
        assert self.core.pool.free == self.model.limits.num_pages, "pages are leaked"
        assert not self.model.swap or self.model.swap.room == self.model.host_pages, "pages are leaked on the host"

    def complete(self, prompt: Prompt, params: SamplingParams) -> list[Completion]:
        request = self.submit(prompt, params)
        self.run()
        return completions(request)


def completions(request: Request) -> list[Completion]:
    assert request.finished
    return [sample.output.completion for sample in request.samples if sample.output.completion]
