"""One streamed chat with a server that speaks OpenAI's API, and the times at which its text came."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tilewright.compiler.errors import UserError
from tilewright.traffic.arrivals import Arrival

# Common words, which most vocabularies hold as one token each, the space before it included.
_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "time",
    "that",
    "water",
    "it",
    "new",
    "was",
    "with",
    "people",
    "by",
    "on",
    "not",
]


@dataclass(frozen=True)
class Target:
    """What is asked. url: up to and without /v1. extra: fields of every request's body."""

    url: str
    model: str
    key: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}


@dataclass
class Outcome:
    """What became of a request. Times are in seconds after the start of the run.

    text_s: when each piece of text came. output_tokens: the server's count, else the pieces. error: why it failed.
    """

    arrival: Arrival
    sent_s: float = 0.0
    end_s: float = 0.0
    text_s: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int = 0
    error: str | None = None


async def find_model(session: aiohttp.ClientSession, url: str, key: str | None, wanted: str | None) -> Target:
    """The model to ask: the one that is wanted, else the only one served. Raises UserError."""
    target = Target(url, wanted or "", key)
    try:
        async with session.get(f"{url}/v1/models", headers=target.headers) as response:
            said = await response.text()
            if response.status != 200:
                raise UserError(f"{url}/v1/models answers {response.status} ({_reason(said)}); check URL and key")
            names = [str(each["id"]) for each in json.loads(said)["data"]]
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        raise UserError(f"{url} can't be reached ({_words(error)}); start the server, or check the URL") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{url}/v1/models does not list models as OpenAI's API does; check the URL") from None
    if wanted is None and len(names) != 1:
        raise UserError(f"{url} serves {len(names)} models ({', '.join(names[:8])}); choose one with --model")
    if wanted is not None and wanted not in names:
        raise UserError(f"{url} serves no model {wanted!r} but {', '.join(names[:8])}; choose one with --model")
    return Target(url, wanted or names[0], key)


async def ask(session: aiohttp.ClientSession, target: Target, arrival: Arrival, prompt: str, start_s: float) -> Outcome:
    """Sends one request and reads its answer to the end. Never raises for what a server does: see Outcome.error."""
    outcome = Outcome(arrival)
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": arrival.output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
    }
    outcome.sent_s = time.perf_counter() - start_s
    try:
        async with session.post(f"{target.url}/v1/chat/completions", json=body, headers=target.headers) as response:
            if response.status == 200:
                await _read(response, outcome, start_s)
            else:
                outcome.error = f"{response.status} {_reason(await response.text())}"
    except asyncio.TimeoutError:
        outcome.error = "timed out"
    except (aiohttp.ClientError, OSError) as error:
        outcome.error = _words(error)
    except (ValueError, TypeError, KeyError, AttributeError):
        outcome.error = "the stream is none of OpenAI's API"
    outcome.end_s = time.perf_counter() - start_s
    return outcome


def prompt_of(tokens: int, seed: int) -> str:
    """A text of about so many tokens that begins unlike those of other seeds, so that no cache helps."""
    rng = random.Random(seed)
    return " ".join(rng.choices(_WORDS, k=tokens))


async def _read(response: aiohttp.ClientResponse, outcome: Outcome, start_s: float) -> None:
    ended = False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            break
        event = json.loads(data)
        if "error" in event:
            outcome.error = _reason(data.decode())
            return
        for choice in event.get("choices") or ():
            if choice.get("delta", {}).get("content"):
                outcome.text_s.append(time.perf_counter() - start_s)
            ended = ended or choice.get("finish_reason") is not None
        if usage := event.get("usage"):
            outcome.prompt_tokens, outcome.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    outcome.output_tokens = outcome.output_tokens or len(outcome.text_s)
    if not ended:
        outcome.error = "the stream broke off"
    elif not outcome.text_s:
        outcome.error = "the answer was empty"


def _reason(body: str) -> str:
    """The message of an error's body, in one line."""
    try:
        error = json.loads(body)["error"]
        body = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, TypeError, KeyError):
        pass
    return " ".join(str(body).split())[:200] or "no reason given"


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
