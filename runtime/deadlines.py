"""Deadlines that can't be met: told at once, before anything is computed in vain.

A deadline asks for what is there after so many seconds, so it can't be met where not even the first token can be there.
How soon that could be is what the steps of its prompt take at the least, one after the other with nothing else in them,
after the prompts that run before it. Places and streams before it may end at any moment, so they count for nothing.
"""

from collections.abc import Iterable

from tilewright.compiler.errors import DeadlineError
from tilewright.runtime.request import Request
from tilewright.runtime.scheduler.policy import Budget
from tilewright.runtime.types import Costs, Work

Part = tuple[int, int]  # tokens of a prompt that are computed, all of them


def refusal(request: Request, cached: int, ahead: Iterable[Part], costs: Costs, budget: Budget) -> DeadlineError | None:
    """Why a request's deadline can't be met; None where it may be. cached: tokens of its prompt that are in the cache.
    ahead: of the prompts that are being computed."""
    given_s = request.params.deadline_s
    if given_s is None:
        return None
    chunk = min(budget.max_chunk, budget.max_tokens)
    alone_s = _prompt_s((cached, request.prompt_tokens), costs, chunk)
    if alone_s > given_s:
        return DeadlineError(
            f"deadline_s {given_s:g} is over before the first token: a prompt of {request.prompt_tokens} tokens takes "
            f"{alone_s:.3g} s here at best; shorten it, or allow more time"
        )
    queue_s = sum(_prompt_s(part, costs, chunk) for part in ahead)
    if alone_s + queue_s > given_s:
        return DeadlineError(
            f"deadline_s {given_s:g} is over before the first token: prompts before it take {queue_s:.3g} s and its "
            f"own {alone_s:.3g} s at best; try again later, or allow more time",
            retry_s=alone_s + queue_s - given_s,
        )
    return None


def _prompt_s(part: Part, costs: Costs, chunk: int) -> float:
    """The least seconds of the steps that compute the rest of a prompt."""
    computed, tokens = part
    steps = range(computed, tokens, chunk)
    return sum(costs.least_s(Work(0).with_prompt(at, min(chunk, tokens - at))) for at in steps)
