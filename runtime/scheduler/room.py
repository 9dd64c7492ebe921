"""What a step has left for prompts: tokens, and time where streams would have to wait for it.

A step that decodes may be stretched by prompts: its predicted time may grow to max_stretch times what it would take
without them. That bounds what a long prompt adds between two tokens of a running stream, whatever the machine's speed,
at the price of the prompt's own speed. Cutting a step's tokens by its predicted time instead of by a number is the idea
of Sarathi-Serve's token budget (Agrawal et al. 2024), applied anew in each step.
"""

import math

from tilewright.runtime.scheduler.policy import C, View
from tilewright.runtime.types import Costs, Work

# The most senior prompt moves on by as much even where the prediction leaves no room. While no step with prompts was
# measured, none has more.
LEAST_TOKENS = 1


class PromptRoom:
    """Room for prompts beside `decoding`, the sequences that compute one token. Shrinks as it is taken."""

    def __init__(self, view: View[C], decoding: list[C]) -> None:
        self.tokens = view.budget.max_tokens - len(decoding)
        self._chunk = view.budget.max_chunk
        self._costs: Costs | None = None
        self._limit_s = math.inf
        self._work = Work(len(decoding), sum(c.length for c in decoding))
        if decoding and view.costs is not None and view.budget.max_stretch is not None:
            self._costs = view.costs
            alone_s = view.costs.step_s(self._work)
            self._limit_s = 0.0 if alone_s is None else alone_s * view.budget.max_stretch

    def offer(self, stored: int, wanted: int) -> int:
        """How many of a prompt's next `wanted` tokens fit, after `stored` ones in the cache."""
        most = min(wanted, self._chunk, self.tokens)
        if self._costs is None or self._fits(stored, most):
            return most
        least = 0 if self._work.prompt_tokens else min(LEAST_TOKENS, most)
        fits, too_many = least, most
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if self._fits(stored, middle) else (fits, middle)
        return fits

    def take(self, stored: int, tokens: int) -> None:
        self.tokens -= tokens
        self._work = self._work.with_prompt(stored, tokens)

    def _fits(self, stored: int, tokens: int) -> bool:
        if tokens == 0 or self._costs is None:
            return True
        predicted_s = self._costs.step_s(self._work.with_prompt(stored, tokens))
        return predicted_s is not None and predicted_s <= self._limit_s
