"""Answers of a given form: which tokens may come next, by llguidance, which walks a grammar and the vocabulary at once.

A constraint follows one sample. Before a draw it bans every token that the grammar does not allow there, through the
sampler's biases; after it, it is told which token was drawn.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tilewright.compiler.errors import GrammarError
from tilewright.runtime.json_schemas import narrowed

if TYPE_CHECKING:
    from llguidance import LLMatcher

# One way to space JSON: where any number of blanks is allowed, a small model may write blanks to the end.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# llguidance would write down all bytes that have to come: without end where a pattern swallows what follows, /a+/ "a".
UNFORCED = '\n%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True)
class Grammar:
    """kind, text: a JSON schema as JSON; a regular expression of the whole answer; a grammar in Lark's notation."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    @staticmethod
    def choice(texts: Sequence[str]) -> "Grammar":
        """One of these texts, each of at least one character."""
        return Grammar("lark", "start: " + " | ".join(json.dumps(text) for text in texts))


class Grammars:
    """Makes constraints for one tokenizer.

    tokenizer_json: Hugging Face's file as text. vocab_size: of the model, which may have more tokens than the file.
    ends: tokens that end an answer. GrammarError where llguidance is not installed, or nothing could end an answer.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, ends: Sequence[int]) -> None:
        try:
            import llguidance
        except ModuleNotFoundError:
            raise GrammarError("a grammar needs llguidance, which is absent; pip install 'tilewright[serve]'") from None
        if not ends:
            raise GrammarError("this model has no token that ends an answer, which a grammar needs; ask without one")
        self._matcher = llguidance.LLMatcher
        self._ends = np.array(sorted(ends), np.int64)
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(ends))

    def constraint(self, grammar: Grammar) -> "Constraint":
        """GrammarError says why a grammar is not understood, or not supported."""
        try:
            matcher = self._matcher(self._tokenizer, self._compiled(grammar), log_level=0)
        except ValueError as error:
            raise _unsupported(grammar, str(error)) from None
        if matcher.is_error():
            raise _unsupported(grammar, matcher.get_error())
        constraint = Constraint(matcher, self._vocab_size, self._ends)
        self._try(constraint, grammar)
        return constraint

    def _try(self, constraint: "Constraint", grammar: Grammar) -> None:
        """Refuses what can't be followed: that a grammar is too large, or has no end, shows when its first tokens are
        looked for."""
        trial = constraint.copy()
        for _ in range(2):
            allowed = trial.allowed()
            if trial.error is not None:
                raise _unsupported(grammar, trial.error)
            trial.accept(int(np.argmax(allowed)))

    def _compiled(self, grammar: Grammar) -> str:
        if grammar.kind == "regex":
            return self._matcher.grammar_from_regex(grammar.text)
        if grammar.kind == "lark":
            return self._matcher.grammar_from_lark(grammar.text + UNFORCED)
        overrides: Any = SPACING
        return self._matcher.grammar_from_json_schema(narrowed(grammar.text), overrides=overrides)


def _unsupported(grammar: Grammar, reason: str) -> GrammarError:
    words = " ".join(reason.split())[:500]
    return GrammarError(f"the {grammar.kind} is not supported ({words}); write it otherwise")


class Constraint:
    """One sample's way through a grammar."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int, ends: np.ndarray) -> None:
        self._matcher, self._vocab_size, self._ends = matcher, vocab_size, ends

    def copy(self) -> "Constraint":
        return Constraint(self._matcher.deep_copy(), self._vocab_size, self._ends)

    @property
    def error(self) -> str | None:
        """Why the grammar can't be followed any further (it takes too much work, say); the answer is cut off there."""
        return self._matcher.get_error().split("\n<state>")[0] if self._matcher.is_error() else None

    def allowed(self) -> np.ndarray:
        """bool[vocab]: which tokens may be drawn next; at least one."""
        if not self._matcher.is_stopped():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
            if allowed.any() and not self._matcher.is_error():
                return allowed
        allowed = np.zeros(self._vocab_size, bool)
        allowed[self._ends] = True
        return allowed

    def accept(self, token: int) -> None:
        """Notes a drawn token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
