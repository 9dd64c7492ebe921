"""JSON schemas as llguidance may have them: what it takes more freely than the standard does is narrowed or refused.

It spells the names of listed properties in one way, but lets an unlisted name be spelt with any escape, and so a listed
one under which anything may stand then: {"a": 1, "\\u0061": "no number"}. Here the unlisted names of an object become
a pattern, which matches no listed name and no escape. Where schemas are combined, by allOf for instance, all their
objects list the same names, since the patterns of two objects have to be the same to be combined.

Narrower than the standard: beside patternProperties, no other unlisted names are written.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tilewright.compiler.errors import GrammarError
from tilewright.runtime.json_patterns import DATES, rust_pattern

MAX_DEPTH = 100
MAX_LISTED = 50_000  # names times objects, where schemas are combined

_DATA = frozenset({"const", "enum", "default", "examples", "example", "required"})  # hold values and no schemas
_COMBINING = ("allOf", "anyOf", "oneOf", "$ref")
_OF_OBJECTS = ("properties", "patternProperties", "additionalProperties", "required")
_COMPARED = (32, 16, 8, 4, 2, 1)  # characters of a name; a pattern nests as deeply, and Rust's not beyond sixty
_MOST_COMPARED = 1500  # characters of all names of an object: llguidance takes a second for more
_LONGER = "..."  # the mark of a name that goes on
_CHARACTER = r'[^"\\\x00-\x1f\x7f]'  # one that JSON writes as it is


def narrowed(text: str) -> str:
    """The JSON schema that llguidance gets for this one. GrammarError says what it would not keep to."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(f"it is no JSON: {error}") from None
    return json.dumps(narrowed_schema(schema))


def narrowed_schema(schema: Any) -> Any:
    """The same of a schema that is read already."""
    objects = [s for s in _schemas(schema) if _names(s)]
    shared: list[str] = []
    if any(_combines(s) for s in _schemas(schema)):
        shared = list(dict.fromkeys(name for s in objects for name in _names(s)))
        if len(shared) * len(objects) > MAX_LISTED:
            raise _refused(f"{len(objects)} objects with {len(shared)} names are too many to be combined")
    if any("oneOf" in s for s in _schemas(schema)):
        _check_options(_narrowed(schema, None))
    return _narrowed(schema, shared)


def _check_options(schema: Any) -> None:
    """Options that are narrowed may exclude each other where the schema's do not, so llguidance has to find those of a
    oneOf exclusive with the names of objects left open too."""
    import llguidance

    matcher = llguidance.LLMatcher
    wrong = matcher.validate_grammar(matcher.grammar_from_json_schema(json.dumps(schema)))
    if wrong:
        raise _refused(" ".join(wrong.split())[:500])


def _narrowed(schema: Any, shared: Sequence[str] | None) -> Any:
    """shared: names that all objects list; None leaves the names of objects open."""
    if isinstance(schema, list):
        return [_narrowed(item, shared) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: value if key in _DATA else _inner(key, value, shared) for key, value in schema.items()}
    inner.pop("x-guidance", None)  # an extension of llguidance's, by which it takes more than the schema says
    if isinstance(inner.get("pattern"), str):
        inner["pattern"] = rust_pattern(inner["pattern"])
    if inner.get("format") in DATES:
        inner["allOf"] = [*inner.get("allOf", ()), {"pattern": DATES[inner["format"]]}]
    _check_least_properties(inner)
    if "$ref" in inner and "$id" in inner:
        raise _refused("$id beside $ref, which drafts of the standard read differently")
    return inner if shared is None else _with_pattern(inner, shared)


def _inner(key: str, value: Any, shared: Sequence[str] | None) -> Any:
    """What stands under a keyword. Names of properties are no keywords."""
    if key in ("properties", "$defs", "definitions") and isinstance(value, dict):
        return {name: _narrowed(each, shared) for name, each in value.items()}
    if key == "patternProperties" and isinstance(value, dict):
        return {rust_pattern(pattern): _narrowed(each, shared) for pattern, each in value.items()}
    return _narrowed(value, shared)


def _with_pattern(schema: dict[str, Any], shared: Sequence[str]) -> dict[str, Any]:
    """The object's unlisted names as a pattern."""
    others = schema.get("additionalProperties", True)
    patterns = schema.get("patternProperties") or {}
    names = _names(schema)
    if others is False or not isinstance(patterns, dict) or not (names or patterns):
        return schema
    listed = dict(schema.get("properties") or {})
    listed |= {name: others for name in (*names, *(() if patterns else shared)) if name not in listed}
    patterns = patterns or {_all_but(listed): others}
    return {**schema, "properties": listed, "patternProperties": patterns, "additionalProperties": False}


def _check_least_properties(schema: Mapping[str, Any]) -> None:
    """A name may be written twice, so that of those that are not listed one at most is sure."""
    least = schema.get("minProperties")
    if isinstance(least, int | float) and least > len(set(_required(schema))) + 1:
        raise _refused(f"minProperties {least} is above the number of required properties and one")


def _names(schema: Mapping[str, Any]) -> list[str]:
    """The names that an object's schema lists."""
    properties = schema.get("properties")
    listed = properties if isinstance(properties, dict) else {}
    return list(dict.fromkeys((*listed, *_required(schema))))


def _required(schema: Mapping[str, Any]) -> list[str]:
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []


def _combines(schema: Mapping[str, Any]) -> bool:
    """Whether an object has to keep to several schemas at once."""
    parts = sum(key in schema for key in _COMBINING)
    several = isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1
    return several or parts > 1 or (parts == 1 and any(key in schema for key in _OF_OBJECTS))


def _schemas(schema: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """All that is, or may be referred to as, a schema."""
    if depth > MAX_DEPTH:
        raise _refused(f"it is nested deeper than {MAX_DEPTH}")
    if isinstance(schema, dict):
        yield schema
    inner: Iterable[Any] = schema if isinstance(schema, list) else ()
    if isinstance(schema, dict):
        inner = (value for key, value in schema.items() if key not in _DATA)
    for value in inner:
        yield from _schemas(value, depth + 1)


def _all_but(names: Collection[str]) -> str:
    """A pattern of all names but these, without escapes. Regular expressions can't be subtracted, so it says by which
    character a name first differs from all of them, or that it ends before. It has no name that begins like a listed
    one that is longer than what is compared."""
    compared = next((n for n in _COMPARED if sum(len(name[:n]) for name in names) <= _MOST_COMPARED), 1)
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for character in name[:compared]:
            node = node.setdefault(character, {})
        node["" if len(name) <= compared else _LONGER] = {}
    return f"^{_differing(tree)}$"


def _differing(node: Mapping[str, Any]) -> str:
    characters = sorted(key for key in node if len(key) == 1)
    out = "".join(_escaped(c) for c in characters)
    options = [f"{_CHARACTER[:-1]}{out}]{_CHARACTER}*"]
    plain = (c for c in characters if re.fullmatch(_CHARACTER, c) and _LONGER not in node[c])
    options += [f"{_escaped(c)}{_differing(node[c])}" for c in plain]
    return f"({'|'.join(options)}){'' if '' in node else '?'}"


def _escaped(character: str) -> str:
    return rf"\x{{{ord(character):x}}}"


def _refused(reason: str) -> GrammarError:
    return GrammarError(f"the json_schema is not supported ({reason}); write it otherwise")
