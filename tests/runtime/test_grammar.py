"""Answers that keep to a grammar, drawn by a device that takes any token it is allowed: whatever it draws, the form is
right, and it is the same in a batch, preempted, and on a device that runs ahead."""

import json
import re

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fake import LIMITS, Bench, completions
from tests.runtime.tokenizers_made import EOS, byte_fallback, byte_level
from tilewright.compiler.errors import GrammarError, RequestError
from tilewright.runtime.grammar import Grammar
from tilewright.runtime.tokenizer import Tokenizer
from tilewright.runtime.types import Completion, DeviceLimits, SamplingParams

MADE = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}
TOKENIZERS = {n: Tokenizer(j, {"stop_token_ids": Tokenizer(j).encode(EOS)[-1:]}) for n, j in MADE.items()}
TOKENIZER = TOKENIZERS["byte_level"]


def bench_of(tokenizer: Tokenizer = TOKENIZER, **changes: object) -> Bench:
    # A vocabulary larger than the tokenizer's: models pad theirs.
    sizes = {"max_context": 400, "num_pages": 800, "vocab_size": tokenizer.vocab_size + 3} | changes
    ahead = bool(sizes.pop("runs_ahead", False))
    return Bench(DeviceLimits(**{**LIMITS.__dict__, **sizes}), tokenizer=tokenizer, runs_ahead=ahead)


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def say(grammar: Grammar, bench: Bench | None = None, **fields: object) -> Completion:
    params = SamplingParams(**{"seed": 1, "grammar": grammar} | fields)  # type: ignore[arg-type]
    [completion] = (bench or bench_of()).complete("the dog", params)
    return completion


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(4))
def test_a_schema(name: str, seed: int) -> None:
    done = say(schema(PERSON), bench_of(TOKENIZERS[name]), seed=seed)
    assert done.finish_reason == "stop" and jsonschema_rs.is_valid(PERSON, json.loads(done.text))


@pytest.mark.parametrize("seed", range(4))
def test_a_regular_expression_and_a_choice(seed: int) -> None:
    dates = r"(19|20)\d\d-[01]\d-[0-3]\d"
    assert re.fullmatch(dates, say(Grammar("regex", dates), seed=seed).text)
    texts = ['yes "indeed"', "no\n", "中", "-" * 9]
    assert say(Grammar.choice(texts), seed=seed).text in texts
    assert say(Grammar("lark", 'start: "a" (" and " "b")*'), seed=seed, max_tokens=40).text.startswith("a")


SCALARS = st.one_of(
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
    st.builds(
        lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n}, st.integers(-99, 99), st.integers(0, 99)
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "中\n"}, {"enum": [1, "x", None]}]),
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(lambda i, n: {"type": "array", "items": i, "maxItems": n}, inner, st.integers(0, 2)),
        st.builds(
            lambda p, n: {"type": "object", "properties": p, "required": list(p)[:n], "additionalProperties": False},
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.integers(0, 3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(SCHEMAS, st.integers(0, 2**31))
def test_any_schema(value: dict, seed: int) -> None:
    done = say(schema(value), seed=seed)
    assert done.finish_reason == "stop" and jsonschema_rs.is_valid(value, json.loads(done.text)), done.text


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["in_step", "ahead"])
def test_neither_batches_nor_preemption_nor_running_ahead_change_an_answer(runs_ahead: bool) -> None:
    asked = [
        (f"the dog {i}", SamplingParams(seed=i, n=1 + i % 2, grammar=schema(PERSON) if i % 3 else None, max_tokens=60))
        for i in range(9)
    ]
    alone = [[c.text for c in bench_of().complete(*each)] for each in asked]
    bench = bench_of(num_pages=60, runs_ahead=runs_ahead, max_context=120)
    requests = [bench.submit(*each) for each in asked]
    bench.run()
    assert bench.core.stats.preemptions > 0
    assert [[c.text for c in completions(request)] for request in requests] == alone


def test_biases_and_penalties_hold_among_the_allowed_tokens() -> None:
    one, two = TOKENIZER.encode("1")[0], TOKENIZER.encode("2")[0]
    digits = Grammar("regex", "[12]{8}")
    assert say(digits, logit_bias={one: -float("inf")}).text == "2" * 8
    assert set(say(digits, temperature=0, presence_penalty=1.0, logit_bias={two: 1.5}).text) <= set("12")


def test_an_answer_whose_grammar_has_no_end_there_is_cut_off() -> None:
    """A client must not take what there is for complete."""
    endless = {"type": "array", "items": {"$ref": "#/$defs/endless"}, "minItems": 1}
    either = schema({"anyOf": [{"const": "a"}, {"$ref": "#/$defs/endless"}], "$defs": {"endless": endless}})
    [quote], [bracket] = TOKENIZER.encode('"'), TOKENIZER.encode("[")
    done = say(either, logit_bias={quote: -float("inf")})
    assert done.finish_reason == "length" and set(done.text) == {"["}
    done = say(either, logit_bias={bracket: -float("inf")})
    assert (done.finish_reason, done.text) == ("stop", '"a"')


@pytest.mark.parametrize("options", ["", '%llguidance {"no_forcing": false}\n'])
def test_a_pattern_that_swallows_what_follows_goes_on_and_on(options: str) -> None:
    done = say(Grammar("lark", options + 'start: "b" /a+/ "a"'), max_tokens=20)
    assert done.finish_reason == "length" and done.text.startswith("ba") and set(done.text) == {"a", "b"}


def test_an_answer_that_is_cut_off_is_a_beginning() -> None:
    done = say(Grammar("regex", "(abc){30}"), max_tokens=5)
    assert done.finish_reason == "length" and ("abc" * 30).startswith(done.text)


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (schema({"type": "nope"}), r"json_schema is not supported \(Invalid type: nope\)"),
        (schema({"type": "array", "uniqueItems": True}), 'Unimplemented keys: \\["uniqueItems"\\]'),
        (schema({"$ref": "http://example.org/x"}), "does not fetch"),
        (schema({"type": "string", "pattern": "(?=x)"}), "look-around"),
        (Grammar("json_schema", "{"), "json_schema is not supported"),
        (Grammar("json_schema", "[]"), "json_schema is not supported"),
        (Grammar("regex", "[a"), "unclosed character class"),
        (Grammar("lark", "start: foo"), "unknown name"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(grammar: Grammar, words: str) -> None:
    with pytest.raises(GrammarError, match=words):
        say(grammar)


def test_what_does_not_go_with_a_grammar() -> None:
    for fields in ({"ignore_eos": True}, {"min_tokens": 3}):
        with pytest.raises(RequestError, match=next(iter(fields))):
            say(schema(PERSON), **fields)
    with pytest.raises(GrammarError, match="no token that ends an answer"):
        say(schema(PERSON), bench_of(Tokenizer(byte_level())))
    with pytest.raises(GrammarError, match="needs a tokenizer"):
        Bench().submit([1], SamplingParams(grammar=schema(PERSON)))
