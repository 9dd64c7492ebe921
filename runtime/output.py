"""What a sample has said so far: tokens, certain text, log probabilities, and whether it is over."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tilewright.runtime.types import Completion, FinishReason, StreamEvent, Timings, TokenLogprob, TokenStream

if TYPE_CHECKING:
    from tilewright.runtime.request import Request


class StopMatcher:
    """Finds the first stop string to be completed in text that arrives in pieces, and holds back what may become one.

    "First" means the match that ends earliest, so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """-> (text that is certain to come before any stop string, whether one was completed)."""
        text = self._held + piece
        cut = self._find(text)
        if cut is not None:
            self._held = ""
            return text[:cut], True
        keep = self._possible(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def completes(self, tail: str) -> bool:
        """Whether `tail`, which is not certain yet, would complete a stop string."""
        return self._find(self._held + tail) is not None

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        """Where the earliest-ending match begins; of those that end together, the longest."""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _possible(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest


class Output:
    """One sample's answer as it grows: `push` takes drawn tokens, `end` closes it from outside. Times in seconds."""

    def __init__(self, request: "Request", index: int, stream: TokenStream | None) -> None:
        self.index = index
        self.completion: Completion | None = None
        self._request = request
        self._stream = stream
        self._stops = StopMatcher(request.params.stop) if request.params.stop else None
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._text: list[str] = []
        self._first_s = self._last_s = 0.0

    def push(self, token: int, logprob: TokenLogprob | None, now_s: float, cut_off: bool = False) -> StreamEvent:
        """The event of one drawn token, with the completion if it ended the sample. cut_off: a token that ends it does
        so before its time."""
        if not self._token_ids:
            self._first_s = now_s
        self._last_s = now_s
        self._token_ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        text, reason = self._read(token)
        if reason == "stop" and cut_off:
            reason = "length"
        if text:
            self._text.append(text)
        return StreamEvent(self.index, text, token, logprob, self._close(reason) if reason else None)

    def end(self, reason: FinishReason) -> StreamEvent:
        """The event of a sample that is ended before its time: what was held back, and the completion. After an error
        nothing more is decoded, as decoding may have been the error."""
        text = "" if reason == "error" else self._flush()
        self._text.append(text)
        return StreamEvent(self.index, text, completion=self._close(reason))

    def embed(self, vector: np.ndarray) -> StreamEvent:
        """The event of a sample whose prompt's pooled hidden states are there, float32[hidden]."""
        self.completion = replace(self._close("stop"), embedding=vector)
        return StreamEvent(self.index, completion=self.completion)

    def _read(self, token: int) -> tuple[str, FinishReason | None]:
        if token in self._request.stop_ids:
            return self._flush(), "stop"
        text, stopped = self._decode(token)
        if stopped:
            return text, "stop"
        if len(self._token_ids) == self._request.max_tokens:
            return text + self._flush(), "length"
        return text, None

    def _decode(self, token: int) -> tuple[str, bool]:
        """-> (text that is certain by now, whether a stop string was completed)."""
        if self._stream is None:
            return "", False
        piece = self._stream.push(token)
        if self._stops is None or len(self._token_ids) < self._request.params.min_tokens:
            return piece, False
        text, stopped = self._stops.push(piece)
        tail = "" if stopped else self._stream.tail()
        if tail and self._stops.completes(tail):
            return text + self._stops.push(tail)[0], True
        return text, stopped

    def _flush(self) -> str:
        """All text that was held back."""
        rest = self._stream.finish() if self._stream else ""
        return self._stops.push(rest)[0] + self._stops.finish() if self._stops else rest

    def _close(self, reason: FinishReason) -> Completion:
        self.completion = Completion(
            index=self.index,
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            prompt_tokens=self._request.prompt_tokens,
            finish_reason=reason,
            logprobs=None if self._request.params.logprobs is None else tuple(self._logprobs),
            timings=self._timings(),
        )
        return self.completion

    def _timings(self) -> Timings:
        request, drawn = self._request, len(self._token_ids)
        queue_s = None if request.started_s is None else request.started_s - request.submitted_s
        return Timings(
            load_s=request.load_s,
            queue_ms=None if queue_s is None else 1e3 * queue_s,
            ttft_ms=1e3 * (self._first_s - request.submitted_s) if drawn else None,
            itl_ms=1e3 * (self._last_s - self._first_s) / (drawn - 1) if drawn > 1 else None,
        )
