"""JSON schemas held to what they let through: texts taken by a grammar, texts drawn from it, the public test suite."""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.runtime.tokenizers_made import EOS, byte_level
from tilewright.runtime.grammar import Constraint, Grammar
from tilewright.runtime.tokenizer import Tokenizer

SUITE = Path(sys.prefix, "json-schema-test-suite")  # `make` puts it there: the public suite, from jsonschema's sdist
TOKENIZER = Tokenizer(byte_level(), {"stop_token_ids": Tokenizer(byte_level()).encode(EOS)[-1:]})
[END] = TOKENIZER.stop_token_ids
MOST_SPELLINGS = 48


def constraint(schema: Any) -> Constraint:
    """GrammarError where the schema is refused."""
    # A vocabulary larger than the tokenizer's: models pad theirs.
    return TOKENIZER.constraint(Grammar("json_schema", json.dumps(schema)), TOKENIZER.vocab_size + 3)


def takes(start: Constraint, text: str) -> bool:
    """Whether the grammar has this text as a whole answer."""
    way = start.copy()
    for token in TOKENIZER.encode(text):
        if not way.allowed()[token]:
            return False
        way.accept(token)
    return bool(way.allowed()[END]) and way.error is None


def draw(start: Constraint, rng: np.random.Generator, most: int = 300, ends_after: int = 60) -> str | None:
    """An answer at temperature 1 over equal logits, which ends where it may after so many tokens; None if it has not
    ended after `most`."""
    way, tokens = start.copy(), []
    for _ in range(most):
        allowed = way.allowed()
        token = END if len(tokens) > ends_after and allowed[END] else int(rng.choice(np.flatnonzero(allowed)))
        if token == END:
            assert way.error is None, way.error
            return TOKENIZER.decode(tokens)
        tokens.append(token)
        way.accept(token)
    return None


def read(text: str) -> Any:
    """The value of a JSON text. JSON's numbers have any size, and Python's floats are infinite above 1e308."""
    return json.loads(text, parse_float=lambda digits: max(-1e308, min(1e308, float(digits))))


def spellings(value: Any) -> set[str]:
    """The same value as JSON in the grammar's spacing: properties in any order, characters as they are or escaped."""
    orders = itertools.islice(_orders(value), MOST_SPELLINGS)
    return {json.dumps(order, ensure_ascii=ascii) for order in orders for ascii in (False, True)}


def _orders(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        yield from map(list, itertools.product(*(list(itertools.islice(_orders(v), 6)) for v in value)))
    elif isinstance(value, dict):
        for names in itertools.permutations(value):
            inner = (list(itertools.islice(_orders(value[name]), 6)) for name in names)
            yield from (dict(zip(names, values, strict=True)) for values in itertools.product(*inner))
    else:
        yield value


def suite_files() -> list[str]:
    """Files of the suite, by their names within a draft; all but those about formats come first."""
    drafts = [SUITE / "tests" / draft for draft in ("draft2020-12", "draft7")]
    return sorted(str(f.relative_to(SUITE / "tests")) for draft in drafts for f in draft.rglob("*.json"))


def suite_cases(name: str) -> list[dict[str, Any]]:
    return json.loads((SUITE / "tests" / name).read_text())
