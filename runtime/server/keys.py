"""API keys: who may ask, and how much. Only digests of keys are kept.

A key is a long random text, so that a plain SHA-256 of it can't be turned back; a digest is looked up, which tells
nobody by its time how much of a guess was right.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from tilewright.compiler.errors import UserError
from tilewright.runtime.server.buckets import Bucket
from tilewright.runtime.server.errors import ApiError, one_line, too_many
from tilewright.runtime.server.requests import Body, Count

LEAST_KEY_LENGTH = 16


class KeyRecord(Body):
    """A line of the key file. name: for logs and metrics. Limits that are left out do not limit.

    concurrent: requests at a time. max_priority: higher ones are refused.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent: Count | None = None
    max_priority: Annotated[int, Field(ge=-1000, le=1000)] = 0


class Key:
    """A key in use: its limits, and how much of them is left."""

    def __init__(self, record: KeyRecord, clock: Callable[[], float] = time.monotonic) -> None:
        self.record = record
        self.name = record.name
        self.active = 0
        self._requests = _bucket(record.requests_per_minute, clock)
        self._tokens = _bucket(record.tokens_per_minute, clock)

    def admit_request(self) -> None:
        """Counts one request. Raises ApiError 429 where there were too many."""
        if self._requests is not None:
            if wait_s := self._requests.wait_s(1):
                limit = self.record.requests_per_minute
                raise too_many(f"this key may send {limit} requests a minute; wait", wait_s, "rate_limit_exceeded")
            self._requests.take(1)

    def admit_tokens(self, prompt_tokens: int) -> None:
        """Counts a prompt. Raises ApiError 429 where it is too much now, 400 where it always will be."""
        limit = self.record.concurrent
        if limit is not None and self.active >= limit:
            raise too_many(f"this key may have {limit} requests at a time; wait for one to end", 1, "too_many_at_once")
        if self._tokens is not None:
            wait_s = self._tokens.wait_s(prompt_tokens)
            limit = self.record.tokens_per_minute
            if math.isinf(wait_s):
                message = f"a prompt of {prompt_tokens} tokens is above the {limit} a minute that this key may use"
                raise ApiError(400, f"{message}; shorten it", code="model_limit")
            if wait_s:
                raise too_many(f"this key may use {limit} tokens a minute; wait", wait_s, "rate_limit_exceeded")
            self._tokens.take(prompt_tokens)

    def charge(self, tokens: int) -> None:
        """Counts tokens that were generated."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    def check_priority(self, priority: int) -> None:
        most = self.record.max_priority
        if priority > most:
            message = f"priority {priority} is above {most}, the highest of this key; lower it"
            raise ApiError(403, message, code="priority_not_allowed", param="priority")


class Nobody(Key):
    """Stands for every client of a server without keys, and of paths that need none: no limit, any priority."""

    def __init__(self) -> None:
        super().__init__(KeyRecord(name="anonymous", sha256="0" * 64, max_priority=1000))


class KeyRing:
    """All keys. Without any, everybody may ask."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._by_digest = {key.record.sha256: key for key in keys}
        self.nobody = Nobody()

    @property
    def open(self) -> bool:
        return not self._by_digest

    def find(self, authorization: str) -> Key:
        """The key that an Authorization header names. Raises ApiError 401."""
        if self.open:
            return self.nobody
        scheme, _, presented = authorization.partition(" ")
        key = self._by_digest.get(digest(presented.strip())) if scheme.lower() == "bearer" else None
        if key is None:
            what = "this API key is not known" if authorization else "there is no API key"
            raise ApiError(
                401,
                f"{what}; send one as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return key


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """The keys of a file: a JSON list of KeyRecord. Raises UserError."""
    try:
        records = TypeAdapter(list[KeyRecord]).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"the key file {path} can't be read ({error.strerror}); check --api-keys") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = one_line(".".join(str(part) for part in first["loc"]))
        raise UserError(
            f"the key file {path} is wrong at {place or 'its beginning'}: {first['msg']}; mend it"
        ) from None
    if not records:
        raise UserError(f"the key file {path} holds no key, so that nobody could ask; add one or leave --api-keys out")
    for field in ("name", "sha256"):
        values = [getattr(record, field) for record in records]
        if len(set(values)) < len(values):
            twice = next(v for v in values if values.count(v) > 1)
            raise UserError(f"the key file {path} has {field} {twice} twice; remove one")
    return [Key(record) for record in records]


def plain_keys(keys: Sequence[str]) -> list[Key]:
    """Keys without limits, as an environment variable gives them. Raises UserError, which shows no key."""
    for place, key in enumerate(keys, 1):
        if len(key) < LEAST_KEY_LENGTH:
            raise UserError(
                f"API key {place} of the environment has {len(key)} characters; give it {LEAST_KEY_LENGTH} or more"
            )
    return [
        Key(KeyRecord(name=f"environment-{place}", sha256=digest(key), max_priority=1000))
        for place, key in enumerate(dict.fromkeys(keys), 1)
    ]


def _bucket(per_minute: int | None, clock: Callable[[], float]) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, clock)
