"""From what a caller hands in to a request that is sure to run: prompts become tokens, limits become refusals."""

import itertools
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.compiler.errors import ContextLengthError, GrammarError, RequestError
from tilewright.runtime.request import Request, Sample
from tilewright.runtime.scheduler.policy import Budget
from tilewright.runtime.types import DeviceLimits, EngineLimits, SamplingParams, TextCodec

_MOST_STRETCH = 1e6

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | np.ndarray


def resolve_limits(limits: EngineLimits, device: DeviceLimits) -> tuple[Budget, int]:
    """-> (what a step may hold, tokens of one sequence at most). RequestError where the device has less than asked."""
    batch = _within("max_batch", limits.max_batch, device.max_batch)
    tokens = _within("max_tokens", limits.max_tokens, device.max_tokens)
    context = _within("max_context", limits.max_context, device.max_context)
    if tokens < batch:
        raise RequestError(
            f"max_tokens {tokens} is below max_batch {batch}; a step decodes one token a sequence, raise it"
        )
    if limits.max_queue < 1:
        raise RequestError(f"max_queue {limits.max_queue} is below 1; let at least one request wait")
    for name in ("max_prompt", "max_answer"):
        most = getattr(limits, name)
        if most is not None and most < 1:
            raise RequestError(f"{name} {most} is below 1; give 1 or more, or leave it out")
    if limits.max_stretch is not None and not 1 < limits.max_stretch <= _MOST_STRETCH:
        raise RequestError(
            f"max_stretch {limits.max_stretch:g} is not from above 1 to {_MOST_STRETCH:g}; change it or leave it out"
        )
    chunk = tokens if limits.max_chunk is None else min(limits.max_chunk, tokens)
    if chunk < 1:
        raise RequestError(f"max_chunk {limits.max_chunk} is below 1; give 1 or more, or leave it out")
    return Budget(batch, tokens, chunk, limits.max_stretch), min(context, device.num_pages * device.page_size)


def _within(name: str, asked: int | None, device: int) -> int:
    if asked is None:
        return device
    if not 1 <= asked <= device:
        raise RequestError(f"{name} {asked} is not from 1 to {device}, what the model was compiled for; change it")
    return asked


class Intake:
    """Turns prompts and parameters into requests. entropy: draws a seed for those that come without. max_prompt,
    max_answer: what the engine allows below what context and pages (`capacity`, in tokens) hold."""

    def __init__(
        self,
        device: DeviceLimits,
        budget: Budget,
        capacity: int,
        tokenizer: TextCodec | None,
        load_s: float,
        entropy: Callable[[], int] = lambda: secrets.randbits(63),
        max_prompt: int | None = None,
        max_answer: int | None = None,
    ) -> None:
        self._device, self._budget, self._capacity = device, budget, capacity
        self._tokenizer = tokenizer
        self._load_s = load_s
        self._entropy = entropy
        self._max_prompt, self._max_answer = max_prompt or capacity, max_answer or capacity
        self._arrivals = itertools.count()

    def request(self, prompt: Prompt, params: SamplingParams, tenant: str = "") -> Request:
        """A request that fits the device on its own. RequestError says what doesn't."""
        tokens = self._tokens(prompt)
        stop_ids = self._stop_ids(params)
        self._check_params(params, stop_ids)
        request = Request(
            prompt=tokens,
            params=params,
            seed=self._entropy() if params.seed is None else params.seed,
            stop_ids=stop_ids,
            max_tokens=self._max_tokens(len(tokens), params),
            arrival=next(self._arrivals),
            tenant=tenant,
            load_s=self._load_s,
        )
        streams = (self._tokenizer.detokenizer() if self._tokenizer else None for _ in range(params.n))
        request.samples = [Sample(request, index, stream) for index, stream in enumerate(streams)]
        self._constrain(request)
        return request

    def embedding(self, prompt: Prompt, params: SamplingParams, tenant: str = "") -> Request:
        """A request for the pooled hidden states of a prompt. params: of which deadline_s and priority count."""
        if self._device.pooling is None:
            raise RequestError("this artifact gives no embeddings; compile the model again with this version")
        tokens = self._tokens(prompt)
        most = min(self._capacity, self._max_prompt)
        if len(tokens) > most:
            raise ContextLengthError(f"the text of {len(tokens)} tokens is above {most}, the most at once; shorten it")
        arrival = next(self._arrivals)
        request = Request(tokens, params, 0, frozenset(), 0, arrival, tenant, self._load_s, embeds=True)
        request.samples = [Sample(request, 0, None)]
        return request

    def _constrain(self, request: Request) -> None:
        """Gives every sample its own way through the grammar, if there is one."""
        if request.params.grammar is None:
            return
        if self._tokenizer is None:
            raise GrammarError("a grammar needs a tokenizer, which this model lacks; remove it")
        constraint = self._tokenizer.constraint(request.params.grammar, self._device.vocab_size)
        for sample in request.samples:
            sample.constraint = constraint.copy()

    def _tokens(self, prompt: Prompt) -> np.ndarray:
        """int32[n], n >= 1, all within the vocabulary."""
        if not isinstance(prompt, Sequence | np.ndarray):
            kind = type(prompt).__name__
            raise RequestError(f"a prompt is text, token ids or messages, and not one {kind}; give a list of prompts")
        if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping)):
            if self._tokenizer is None:
                raise RequestError("this model has no tokenizer; give the prompt as token ids")
            encode: Callable[[Any], list[int]] = self._tokenizer.encode
            prompt = encode(prompt) if isinstance(prompt, str) else self._tokenizer.encode_chat(prompt)  # type: ignore[arg-type]
        if not len(prompt):
            raise RequestError("the prompt is empty; give at least one token")
        tokens = np.asarray(prompt)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise RequestError(
                f"a prompt of {type(prompt[0]).__name__} is not understood; give text, token ids or messages"
            )
        wrong = tokens[(tokens < 0) | (tokens >= self._device.vocab_size)]
        if len(wrong):
            raise RequestError(
                f"prompt token {wrong[0]} is not in the vocabulary of {self._device.vocab_size}; remove it"
            )
        return tokens.astype(np.int32)

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        ends = () if self._tokenizer is None or params.ignore_eos else self._tokenizer.stop_token_ids
        return frozenset(ends) | frozenset(params.stop_token_ids)

    def _max_tokens(self, prompt: int, params: SamplingParams) -> int:
        """How many tokens the answer may have; prompt and answer together fit context and pool."""
        left = self._capacity - prompt
        if left < 1:
            raise ContextLengthError(
                f"the prompt of {prompt} tokens is longer than {self._capacity - 1}, what context and KV pages hold "
                "beside one token of answer; shorten it, or compile the model for a longer context"
            )
        if prompt > self._max_prompt:
            raise ContextLengthError(
                f"the prompt of {prompt} tokens is above {self._max_prompt}, the most that is allowed; shorten it"
            )
        if params.max_tokens is not None and params.max_tokens > left:
            raise ContextLengthError(
                f"max_tokens {params.max_tokens} after a prompt of {prompt} is above {left}, what context and KV pages "
                f"({self._capacity} tokens) leave; lower it, or leave it out to use what there is"
            )
        most = min(left, self._max_answer)
        if params.min_tokens > left:
            raise ContextLengthError(
                f"min_tokens {params.min_tokens} is above {left}, what the context leaves; lower it"
            )
        asked = max(params.max_tokens or 0, params.min_tokens)
        if asked > most:
            raise ContextLengthError(f"an answer of {asked} tokens is above {most}, the most that is allowed; lower it")
        return most if params.max_tokens is None else params.max_tokens

    def _check_params(self, params: SamplingParams, stop_ids: frozenset[int]) -> None:
        device, vocab = self._device, self._device.vocab_size
        if params.n > self._budget.max_batch:
            raise RequestError(f"n {params.n} is above {self._budget.max_batch}, the sequences of a step; lower it")
        if params.logprobs is not None and params.logprobs > device.top_logprobs:
            raise RequestError(f"logprobs {params.logprobs} is above {device.top_logprobs}, the model's most; lower it")
        if params.stop and self._tokenizer is None:
            raise RequestError(f"stop string {params.stop[0]!r} needs a tokenizer, which this model lacks; remove it")
        for name, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in tokens:
                if token >= vocab:
                    raise RequestError(f"{name} token {token} is not in the vocabulary of {vocab}; remove it")
        banned = {token for token, value in params.logit_bias.items() if value == -math.inf}
        if len(banned | (stop_ids if params.min_tokens else set())) >= vocab:
            raise RequestError(f"logit_bias bans all {vocab} tokens; leave at least one")
