"""The form of an artifact's manifest: which fields there are, of which types and sizes.

A seal tells that a manifest is as it was written, and not by whom: one that is sealed and yet of another form is told
from a damaged one by the first field that is wrong.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tilewright.compiler.errors import ArtifactError

MAX_BYTES = 1 << 28  # of a manifest; a thousand kernels take less than a megabyte
MAX_DEPTH = 32
MAX_COUNT = 1 << 53  # what JSON's readers agree on

# A form takes a value and where it stands, and says what is wrong.
Form = Callable[[Any, str], str | None]


def read_json(file: Path, kind: str, most_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file. kind: what the file should be. ArtifactError where it is too large, no text, no JSON,
    nested too deeply, or holds NaN."""
    try:
        size = file.stat().st_size
        if size > most_bytes:
            raise ArtifactError(
                f"{file} is no {kind}: it has {size} bytes, {most_bytes} at most; compile the model again"
            )
        value = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} can't be read: {error}") from None
    except (ValueError, RecursionError):
        raise ArtifactError(f"{file} is no {kind} (not JSON, or cut short); compile it again") from None
    if (wrong := _bounded(value)) is not None:
        raise ArtifactError(f"{file} is no {kind} ({wrong}); compile the model again")
    return value


def check_manifest(fields: Mapping[str, Any], where: Path, dtypes: Collection[str]) -> None:
    """ArtifactError names the first field that has not the manifest's form. dtypes: that a weight may have."""
    wrong = _MANIFEST(fields, "") or _apart(fields, dtypes)
    if wrong is not None:
        raise ArtifactError(f"{where} is no artifact manifest: {wrong}; compile the model again")


def _apart(fields: Mapping[str, Any], dtypes: Collection[str]) -> str | None:
    """What of well-formed fields does not go together, or None."""
    size, most = fields["limits"]["page_size"], fields["limits"]["max_tokens"]
    if fields["kv"]["page_size"] != size:
        return f"kv.page_size is {fields['kv']['page_size']}, not limits.page_size {size}"
    if not any(not b["static"] and b["tokens"] >= most for b in fields["step"]["buckets"]):
        return f"step.buckets has none for any number of tokens up to limits.max_tokens {most}"
    unknown = next((p for p in fields["params"] if p["dtype"] not in dtypes), None)
    return None if unknown is None else f"the dtype of {_short(unknown['name'])} is {_short(unknown['dtype'])!r}"


def _no_number(name: str) -> Any:
    raise ValueError(name)


def _bounded(value: Any) -> str | None:
    """What no reader of JSON can be trusted with, or None."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if any(isinstance(each, float) and not math.isfinite(each) for each in level):
            return "a number is out of range"
        level = [inner for each in level for inner in _inner(each)]
        if not level:
            return None
    return f"nested deeper than {MAX_DEPTH}"


def _inner(value: Any) -> list[Any]:
    return value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []


# ---- forms -----------------------------------------------------------------------------------------------------------


def _is(kind: type | tuple[type, ...], words: str) -> Form:
    def form(value: Any, at: str) -> str | None:
        fits = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
        return None if fits else _wrong(at, value, words)

    return form


def _whole(least: int) -> Form:
    def form(value: Any, at: str) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_COUNT
        return None if fits else _wrong(at, value, f"a whole number of {least} to {MAX_COUNT}")

    return form


def _optional(inner: Form) -> Form:
    return lambda value, at: None if value is None else inner(value, at)


def _each(inner: Form, least: int = 0) -> Form:
    def form(value: Any, at: str) -> str | None:
        if not isinstance(value, list) or len(value) < least:
            return _wrong(at, value, f"a list of {least} or more")
        found = (inner(item, f"{at}.{i}") for i, item in enumerate(value))
        return next((wrong for wrong in found if wrong is not None), None)

    return form


def _by_name(inner: Form, name: Form | None = None) -> Form:
    def form(value: Any, at: str) -> str | None:
        if not isinstance(value, dict):
            return _wrong(at, value, "an object")
        found = ((name(key, at) if name else None) or inner(item, f"{at}.{_short(key)}") for key, item in value.items())
        return next((wrong for wrong in found if wrong is not None), None)

    return form


def _record(fields: Mapping[str, Form], optional: Mapping[str, Form] | None = None, closed: bool = True) -> Form:
    """closed: no other fields are known."""
    known = {**fields, **(optional or {})}

    def form(value: Any, at: str) -> str | None:
        if not isinstance(value, dict):
            return _wrong(at, value, "an object")
        inside = f"{at}." if at else ""
        for name in fields:
            if name not in value:
                return f"{inside}{name} is missing"
        for name in value:
            if closed and name not in known:
                return f"{inside}{_short(name)} is no field of it"
        found = (inner(value[name], f"{inside}{name}") for name, inner in known.items() if name in value)
        return next((wrong for wrong in found if wrong is not None), None)

    return form


def _file_name(value: str, at: str) -> str | None:
    """A file within the artifact, and not the manifest itself, which nothing can hold the checksum of."""
    path = PurePosixPath(value)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts and str(path) == value
    fits = inside and "\0" not in value and "\\" not in value and value != "manifest.json"
    return None if fits else f"{at} has the name {_short(value)!r}, which is no place within an artifact"


def _shape(value: Any, at: str) -> str | None:
    wrong = _each(_whole(1))(value, at)
    if wrong is None and math.prod(value) > MAX_COUNT:
        wrong = f"{at} has {math.prod(value):.3g} elements, {MAX_COUNT} at most"
    return wrong


def _digest(value: Any, at: str) -> str | None:
    fits = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return None if fits else _wrong(at, value, "a SHA-256 checksum")


def _wrong(at: str, value: Any, words: str) -> str:
    return f"{at or 'it'} is {_short(value)!r}, not {words}"


def _short(value: Any) -> Any:
    """What a sentence can show of a value."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > 40:
        return f"{text[:40]}..."
    return value


# ---- the manifest ----------------------------------------------------------------------------------------------------

_TEXT = _is(str, "a text")
_FLAG = _is(bool, "true or false")
_NUMBER = _is((int, float), "a number")
_OBJECT = _is(dict, "an object")
_COUNT, _SIZE = _whole(0), _whole(1)
_DTYPE = _is(str, "the name of a dtype")

_TARGET = _record(
    {"name": _TEXT, "kind": _TEXT, "arch": _TEXT, "features": _each(_TEXT)}, {"host": _TEXT}, closed=False
)
_KV = _record(
    {"layers": _SIZE, "kv_heads": _SIZE, "head_dim": _SIZE, "page_size": _SIZE, "dtype": _DTYPE}, closed=False
)
_BUCKET = _record({"function": _TEXT, "tokens": _SIZE, "static": _FLAG})
_STEP = _record({"inputs": _each(_TEXT), "top_logprobs": _COUNT, "buckets": _each(_BUCKET, least=1)}, closed=False)
_PARAM = _record(
    {
        "name": _TEXT,
        "shape": _shape,
        "dtype": _DTYPE,
        "sources": _each(_TEXT),
        "format": _TEXT,
        "rows": _SIZE,
        "columns": _optional(_SIZE),
    }
)
_KERNEL = _record(
    {
        "name": _TEXT,
        "schedule": _TEXT,
        "tile": _optional(_OBJECT),
        "floor": _optional(_by_name(_NUMBER)),
        "calls": _by_name(_COUNT),
    },
    closed=False,
)
_TOKENIZER = _record(
    {},
    {
        "chat_template": _optional(_TEXT),
        "bos_token": _optional(_TEXT),
        "eos_token": _optional(_TEXT),
        "stop_token_ids": _optional(_each(_COUNT)),
        "add_bos": _optional(_FLAG),
    },
    closed=False,
)
_EMBEDDING = _record({}, {"pooling": _optional(_TEXT), "dimensions": _optional(_SIZE), "normalized": _FLAG})

_MANIFEST = _record(
    {
        "schema": _COUNT,
        "name": _TEXT,
        "target": _TARGET,
        "model": _record({"vocab": _SIZE}, {"hidden": _SIZE, "layers": _SIZE}, closed=False),
        "limits": _record(dict.fromkeys(("max_batch", "max_tokens", "max_context", "page_size"), _SIZE)),
        "kv": _KV,
        "step": _STEP,
        "params": _each(_PARAM),
        "kernels": _each(_KERNEL),
        "memory": _record(dict.fromkeys(("weights_bytes", "workspace_bytes"), _COUNT) | {"page_bytes": _SIZE}),
        "tokenizer": _TOKENIZER,
        "provenance": _OBJECT,
        "warnings": _each(_TEXT),
        "files": _by_name(_record({"bytes": _COUNT, "sha256": _digest}), name=_file_name),
    },
    {"embedding": _EMBEDDING},
)
