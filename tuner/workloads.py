"""Workloads that tuning is for: which steps an engine runs, and how often each.

A file holds the same as JSON: [{"decode": 16, "share": 3}, {"prefill": 512, "share": 1}], a step of 16 sequences that
decode a token each, three times as often as one of a prompt of 512 tokens. `context` is how many tokens a decoding
sequence has behind it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tilewright.compiler.errors import UserError

CONTEXT = 1024  # tokens behind a decoding sequence
_BATCHES = (1, 4, 16, 64, 256)
_PROMPTS = (128, 512, 2048)
# What a busy engine's steps are like: batches of all sizes, as requests come and go, and steps of which every other
# token is a prompt's.
_BUSY_BATCHES = (*(1, 4, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256), *(320, 384, 448, 512, 640, 768, 896, 1024))
_BUSY_STEPS = (320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536)
_SHARES = {"decode": 16, "prefill": 1, "both": 4}  # in mixed
NAMES = ("decode", "prefill", "mixed")


@dataclass(frozen=True)
class Step:
    """tokens: in the step; sequences: that they belong to, one result row each. share: how often it runs, beside others
    of its workload."""

    tokens: int
    sequences: int
    decode: bool
    share: float


def named(name: str, max_batch: int, max_tokens: int) -> tuple[Step, ...]:
    """decode: batches of 1, 4, 16 ... equally often. prefill: prompts of 128, 512, 2048. mixed: batches of more sizes,
    the prompts, and steps of both, in shares of 16, 1 and 4. All up to what a step may hold, which is a step of its
    own. Raises UserError for another name that is no file either."""
    if name not in NAMES:
        return _read(Path(name), max_batch, max_tokens)
    decodes = [Step(n, n, True, 1.0) for n in _up_to(max_batch, _BUSY_BATCHES if name == "mixed" else _BATCHES)]
    prompts = [Step(n, 1, False, 1.0) for n in _up_to(max_tokens, _PROMPTS)]
    both = [Step(n, min(n // 2, max_batch), False, 1.0) for n in _BUSY_STEPS if n <= max_tokens]
    if name != "mixed":
        return _shared(decodes if name == "decode" else prompts, 1)
    return (
        *_shared(decodes, _SHARES["decode"]),
        *_shared(prompts, _SHARES["prefill"]),
        *_shared(both, _SHARES["both"]),
    )


def _shared(steps: Sequence[Step], share: float) -> tuple[Step, ...]:
    """The steps equally often, `share` in all."""
    return tuple(replace(step, share=share / len(steps)) for step in steps)


def _up_to(most: int, sizes: Sequence[int]) -> list[int]:
    return [n for n in sizes if n < most] + [most]


def _read(file: Path, max_batch: int, max_tokens: int) -> tuple[Step, ...]:
    if not file.is_file():
        raise UserError(f"--workload is {str(file)!r}; use {', '.join(NAMES)}, or a file of steps")
    example = '[{"decode": 16, "share": 3}, {"prefill": 512, "share": 1}]'
    try:
        steps = [_step(entry, max_batch, max_tokens) for entry in json.loads(file.read_text())]
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        steps = []
    if not steps:
        limits = f"up to {max_batch} sequences and {max_tokens} tokens"
        raise UserError(f"{file} is no workload of steps of {limits}; write them as {example}")
    return tuple(steps)


def _step(entry: dict[str, float], max_batch: int, max_tokens: int) -> Step:
    share = float(entry.pop("share", 1))
    [(kind, size)] = entry.items()
    most = {"decode": max_batch, "prefill": max_tokens}[kind]
    if type(size) is not int or not 1 <= size <= most or not 0 < share < 1e9:
        raise ValueError(kind)
    return Step(size, size if kind == "decode" else 1, kind == "decode", share)
