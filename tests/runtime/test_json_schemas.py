"""JSON schemas: what a grammar lets through is valid, for random schemas and for the public test suite, and what can't
be kept to is refused."""

import json
from typing import Any

import jsonschema
import jsonschema_rs
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from schemathesis.core.errors import InvalidSchema
from schemathesis.generation.jsonschema.builder import build

from tests.breadth import quick
from tests.runtime.schema_cases import SUITE, constraint, draw, read, spellings, suite_cases, suite_files, takes
from tilewright.compiler.errors import GrammarError
from tilewright.runtime.json_patterns import rust_pattern
from tilewright.runtime.json_schemas import MAX_DEPTH, narrowed_schema
from tilewright.runtime.tools import Function, calls_grammar, tool_form

# ---- random pairs of a schema and an instance ------------------------------------------------------------------------


def instances(schema: dict[str, Any]) -> st.SearchStrategy:
    """Of a schema, by schemathesis's generator; nothing where that does not know the schema."""
    try:
        return build(schema, draft=jsonschema_rs.Draft202012, formats={})
    except InvalidSchema:
        return st.nothing()


NAMES = st.sampled_from(["a", "b", "ab", "", "a b", "ü", "🐲", 'q"', "n\n", "z\0"])
BOUNDS = st.integers(-20, 20) | st.sampled_from([-2.5, 0.1, 1e3])
SIZES = st.integers(0, 3)
TEXTS = st.dictionaries(st.sampled_from(["minLength", "maxLength"]), SIZES) | st.sampled_from(
    [{"pattern": p} for p in (r"^[a-c]{0,3}$", r"x\s", r"^\S.$", r"^\d+\.\w$")]
    + [{"format": f} for f in ("date", "time", "ipv4", "uuid")]
)
LIMITS = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]
NUMBERS = st.dictionaries(st.sampled_from(LIMITS), BOUNDS, max_size=2)
VALUES = st.sampled_from([None, True, 0, -7, 1.0, 2.5, "", "a", "é\n\0", [1], {"a": [2]}])
SCALARS = st.one_of(
    st.just({}),
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["integer", "null"]}, {"type": "array"}]),
    st.builds(lambda more: {"type": "string", **more}, TEXTS),
    st.builds(lambda kind, more: {"type": kind, **more}, st.sampled_from(["integer", "number"]), NUMBERS),
    st.builds(lambda n: {"type": "integer", "multipleOf": n}, st.integers(1, 9)),
    st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=3)),
    st.builds(lambda value: {"const": value}, VALUES),
)


def _arrays(inner: st.SearchStrategy) -> st.SearchStrategy:
    parts = {"minItems": SIZES, "maxItems": SIZES, "items": inner | st.just(False)}
    return st.fixed_dictionaries({"type": st.just("array")}, optional=parts)


def _objects(inner: st.SearchStrategy) -> st.SearchStrategy:
    parts = {
        "properties": st.dictionaries(NAMES, inner, max_size=3),
        "required": st.lists(NAMES, max_size=2, unique=True),
        "additionalProperties": st.booleans() | inner,
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "b$", "^x+$"]), inner, min_size=1, max_size=1),
        "minProperties": SIZES,
        "maxProperties": SIZES,
    }
    return st.fixed_dictionaries({"type": st.just("object")}, optional=parts)


def _combined(inner: st.SearchStrategy) -> st.SearchStrategy:
    several = st.lists(inner, min_size=1, max_size=2)
    kinds = [st.builds(lambda options, k=kind: {k: options}, several) for kind in ("anyOf", "oneOf", "allOf")]
    beside = st.builds(lambda one, options: {**one, "anyOf": options}, _objects(inner), several)
    return st.one_of(*kinds, beside)


def _with_definitions(schema: dict, definition: dict, beside: dict) -> dict:
    """The schema beside references to another one, by itself and combined."""
    wanted = {"$ref": "#/$defs/other"}
    parts = [{"allOf": [schema, wanted]}, {"anyOf": [wanted, schema]}, {**beside, **wanted}]
    return {**parts[len(json.dumps(schema)) % 3], "$defs": {"other": definition}}


SCHEMAS = st.recursive(
    SCALARS, lambda inner: st.one_of(_arrays(inner), _objects(inner), _objects(inner), _combined(inner)), max_leaves=5
)
SCHEMAS = SCHEMAS | st.builds(_with_definitions, SCHEMAS, SCHEMAS, _objects(SCALARS))


def check_pair(schema: dict[str, Any], data: st.DataObject, seed: int) -> None:
    """Draws from the schema's grammar are valid; the pair's instance, if it is taken, too."""
    try:
        start = constraint(schema)
    except GrammarError as error:
        assert "the json_schema is not supported (" in str(error)
        assume(False)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        text = draw(start, rng)
        if text is not None:
            jsonschema.validate(read(text), schema, jsonschema.Draft202012Validator)
    instance = data.draw(instances(schema) | VALUES)
    for other in (instance, data.draw(VALUES), {"a": instance}, [instance]):
        if not jsonschema.Draft202012Validator(schema).is_valid(other):
            assert not any(takes(start, text) for text in spellings(other))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(SCHEMAS, st.data(), st.integers(0, 2**31))
def test_random_pairs(schema: dict, data: st.DataObject, seed: int) -> None:
    check_pair(schema, data, seed)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.data(), st.integers(0, 2**31))
def test_300_random_pairs(schema: dict, data: st.DataObject, seed: int) -> None:
    check_pair(schema, data, seed)


PLAIN = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"type": "number", "minimum": 0, "maximum": 9},
        "tags": {"type": "array", "items": {"enum": ["a", None, 3]}, "maxItems": 2},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "next"],
    "additionalProperties": False,
}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_instance_of_a_plain_schema_is_taken(data: st.DataObject) -> None:
    """In the order of its properties, and where no number is written with an exponent."""
    leaf = instances({**PLAIN, "properties": {**PLAIN["properties"], "next": {"type": "null"}}})  # type: ignore[dict-item]
    outer, inner = data.draw(leaf), data.draw(leaf)
    ordered = _ordered({**outer, "next": inner})
    text = json.dumps(ordered, ensure_ascii=False)
    assume("e-" not in text and "\\u" not in text and "\x7f" not in text)
    assert takes(constraint(PLAIN), text), text


def _ordered(value: dict[str, Any]) -> dict[str, Any]:
    inner = {**value, "next": _ordered(value["next"]) if value["next"] else None}
    return {name: inner[name] for name in PLAIN["properties"] if name in inner}


def test_options_exclude_each_other_by_the_schema_and_not_by_its_narrowing() -> None:
    closed = {"type": "object", "patternProperties": {"^x+$": {}}, "additionalProperties": False}
    constraint({"oneOf": [{"const": {"a": [2]}}, closed]})
    with pytest.raises(GrammarError, match="oneOf"):
        constraint({"oneOf": [{"const": {"a": [2]}}, {**closed, "additionalProperties": True}]})
    kinds = [{"properties": {"kind": {"const": kind}}, "required": ["kind"], "type": "object"} for kind in "ab"]
    assert takes(constraint({"oneOf": kinds}), '{"kind": "b"}')
    with pytest.raises(GrammarError, match="oneOf"):  # as a function's parameters have it
        narrowed_schema(
            {"properties": {"x": {"oneOf": [{"const": {"a": [2]}}, {**closed, "additionalProperties": True}]}}}
        )


# ---- the public test suite -------------------------------------------------------------------------------------------

QUICK = [f"draft2020-12/{name}.json" for name in ("additionalProperties", "allOf", "patternProperties", "required")]

ANNOTATIONS = (
    "draft7/optional/content.json"  # an option of draft 7; later drafts say that these keywords keep nothing out
)


def test_the_public_suite_is_there() -> None:
    assert len(suite_files()) > 100, f"{SUITE} lacks the JSON schema test suite; run make .venv/.dev"


@pytest.mark.parametrize("name", quick(QUICK, [name for name in suite_files() if name != ANNOTATIONS]))
def test_the_public_suite(name: str) -> None:
    """Every schema is refused with a reason, or keeps out what is not valid, taken or drawn."""
    draft = jsonschema_rs.Draft202012Validator if "2020" in name else jsonschema_rs.Draft7Validator
    for case in suite_cases(name):
        try:
            start = constraint(case["schema"])
        except GrammarError as error:
            assert "the json_schema is not supported (" in str(error)
            continue
        invalid = [test["data"] for test in case["tests"] if not test["valid"]]
        assert not [text for data in invalid for text in spellings(data) if takes(start, text)], case["description"]
        rng = np.random.default_rng(0)
        for text in filter(None, (draw(start, rng) for _ in range(6))):
            assert draft(case["schema"]).is_valid(read(text)), (case["description"], text)


@pytest.mark.slow
def test_most_of_the_public_suite_is_supported() -> None:
    """A refusal is right, but only so useful: about half of the schemas are there, with most of what is valid."""
    supported, valid, taken, cases = 0, 0, 0, 0
    for name in (name for name in suite_files() if name.startswith("draft2020-12")):
        for case in suite_cases(name):
            cases += 1
            try:
                start = constraint(case["schema"])
            except GrammarError:
                continue
            supported += 1
            for test in (test for test in case["tests"] if test["valid"]):
                valid += 1
                taken += any(takes(start, text) for text in spellings(test["data"]))
    assert supported > 0.4 * cases and taken > 0.9 * valid, (supported, cases, taken, valid)


# ---- one by one ------------------------------------------------------------------------------------------------------

OPEN = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "ab": True},
    "additionalProperties": {"type": "null"},
}


def test_a_listed_name_has_one_spelling() -> None:
    start = constraint(OPEN)
    for text in ('{"a": 1}', '{"a": 1, "b": null}', '{"": null, "abc": null}', '{"aa": null}', '{"ab": "x"}'):
        assert takes(start, text), text
    for text in ('{"a": 1, "\\u0061": null}', '{"\\u0061": null}', '{"a": null}', '{"a": 1, "a": null}', '{"b": 1}'):
        assert not takes(start, text), text


@pytest.mark.parametrize("name", ["x" * 31, "x" * 32, "x" * 33, "x" * 300])
def test_a_long_name_has_one_spelling(name: str) -> None:
    """Of the names that begin like a very long one none is written."""
    start = constraint({"type": "object", "properties": {name: {"type": "null"}}})
    assert takes(start, json.dumps({name: None})) and not takes(start, json.dumps({name: 1}))
    assert takes(start, f'{{"{name[:30]}": 1}}') and takes(start, '{"y": 1}')
    assert takes(start, f'{{"{name}y": 1}}') == (len(name) <= 32)
    assert not takes(start, f'{{"\\u0078{name[1:]}": 1}}')


def test_many_names_are_compiled_soon() -> None:
    names = [f"{i * 7919 % 1000003:06}{'n' * (i % 17)}" for i in range(300)]
    start = constraint({"type": "object", "properties": {name: {"type": "null"} for name in names}})
    assert takes(start, json.dumps({names[7]: None, "other": 1})) and not takes(start, json.dumps({names[7]: 1}))


def test_combined_objects_take_each_others_names() -> None:
    start = constraint({"allOf": [OPEN, {"properties": {"b": {"type": "null"}, "c": True}, "required": ["b"]}]})
    for text in ('{"a": 1, "b": null}', '{"b": null, "c": null}', '{"a": 1, "b": null, "d": null}'):
        assert takes(start, text), text
    for text in ('{"a": 1}', '{"a": 1, "b": 1}', '{"b": null, "\\u0061": null}', '{"b": null, "c": 3}'):
        assert not takes(start, text), text


def test_patterns_take_no_unlisted_names_beside_them() -> None:
    start = constraint({"type": "object", "properties": {"n": True}, "patternProperties": {"^x": {"type": "integer"}}})
    assert takes(start, '{"n": "s", "x1": 1}')
    assert not takes(start, '{"x1": "s"}') and not takes(start, '{"\\u0078": "s"}') and not takes(start, '{"m": 1}')


@pytest.mark.parametrize(
    ("pattern", "matched", "not_matched"),
    [
        (r"^\s$", [" ", "\u3000"], ["\x85", "x"]),
        (r"^\S$", ["x", "é"], [" ", "\ufeff", "\x85"]),
        (r"^.$", ["x", "é"], ["\u2028"]),
        (r"^[[a]$", ["[", "a"], ["b"]),
        (r"^[a&&b]$", ["a", "&", "b"], ["c"]),
        (r"^[^\s.]$", ["x"], [" ", ".", "\u3000"]),
        (r"^\.[.]$", [".."], ["xx"]),
    ],
)
def test_patterns_match_what_they_match_elsewhere(pattern: str, matched: list[str], not_matched: list[str]) -> None:
    start = constraint({"type": "string", "pattern": pattern})
    assert [takes(start, json.dumps(t, ensure_ascii=False)) for t in matched] == [True] * len(matched)
    assert [takes(start, json.dumps(t, ensure_ascii=False)) for t in not_matched] == [False] * len(not_matched)


def test_plain_patterns_stay_as_they_are() -> None:
    for pattern in (r"^[a-z]+\d{2}$", r"a\[b", r"(x|y)*", r"[\]\\-]", "[a-"):
        assert rust_pattern(pattern) == pattern


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("date", ["2020-02-29", "2000-02-29", "2021-12-31"], ["2021-02-29", "1900-02-29", "2021-02-30"]),
        ("time", ["23:59:59Z"], ["23:59:60Z"]),
        ("date-time", ["2024-02-29T01:02:03.5Z"], ["2023-02-29T01:02:03Z", "1998-12-31T23:59:60Z"]),
    ],
)
def test_dates_are_in_the_calendar(kind: str, good: list[str], bad: list[str]) -> None:
    start = constraint({"type": "string", "format": kind})
    assert all(takes(start, f'"{text}"') for text in good) and not any(takes(start, f'"{text}"') for text in bad)


ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}


def nested(depth: int) -> dict:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "#"}, "NoExtensionBias"),
        (ENDLESS, "Too many items"),
        (nested(MAX_DEPTH), f"nested deeper than {MAX_DEPTH}"),
        ({"type": "object", "minProperties": 2}, "minProperties 2 is above the number of required"),
        ({"type": "string", "pattern": "^[]a]$"}, r"the class \[\]"),
        ({"type": "string", "pattern": "^[+--]$"}, r"the class \[\+--\] of a pattern"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, r"minLength \(3\) is greater"),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 3}, "Unsatisfiable"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable"),
        ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"$id": "http://x/y", "$ref": "#/$defs/a", "$defs": {"a": {}}}, r"\$id beside \$ref"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"type": "string", "format": "nope"}, "Unknown format"),
        ({"const": float("nan")}, "not supported"),
        ({"type": "integer", "minimum": 10**30}, "not supported"),
        (
            {"allOf": [{"properties": {f"{i}-{j}": {} for j in range(9)}} for i in range(80)]},
            "80 objects with 720 names",
        ),
    ],
)
def test_what_can_not_be_kept_to_is_refused(schema: dict, words: str) -> None:
    with pytest.raises(GrammarError, match=words):
        constraint(schema)


def test_an_extension_does_not_loosen_a_schema() -> None:
    loose = {"x-guidance": {"lenient": True, "whitespace_flexible": True}, "uniqueItems": True}
    with pytest.raises(GrammarError, match="uniqueItems"):
        constraint(loose)
    assert narrowed_schema({"items": {**loose}}) == {"items": {"uniqueItems": True}}


def test_names_of_properties_are_no_keywords() -> None:
    named = {"properties": {"pattern": {"const": r"\S"}, "x-guidance": {}, "enum": {"pattern": r"\S"}}}
    inner = narrowed_schema(named)["properties"]
    assert inner["pattern"] == {"const": r"\S"} and "x-guidance" in inner and inner["enum"]["pattern"] != r"\S"


def test_arguments_of_functions_are_narrowed_too() -> None:
    text = calls_grammar(tool_form(None), [Function("f", OPEN)], False, None).text
    schema = json.loads(text[text.index("%json ") + 6 : text.rindex(' "}"')])
    assert schema["additionalProperties"] is False and schema["patternProperties"]
