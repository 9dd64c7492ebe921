"""`tilewright generate`: one prompt, one answer, streamed as text or given as one JSON object."""

import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.commands.sampling import (
    MaxTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Stop,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from tilewright.runtime.types import Completion, StreamEvent, TokenLogprob


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="A model, compiled on first use, or what compile made.")
    ],
    prompt: Annotated[str, typer.Option(metavar="TEXT|-", help="What to answer; - reads it from standard input.")],
    system: System = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(metavar="N", help="With --json: log probabilities, with N alternatives a token.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Answer a prompt."""
    from tilewright.compiler.errors import RequestError
    from tilewright.runtime.types import SamplingParams
    from tilewright.session import open_session

    if raw and system is not None:
        raise RequestError("--system goes into the chat template, which --raw leaves out; drop one of them")
    if logprobs is not None and not as_json:
        raise RequestError("--logprobs is a part of the JSON object; add --json")
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        logprobs=logprobs,
    )
    text = read_prompt(prompt)
    with open_session(model, threads) as session:
        events = session.engine.stream_sync(text if raw else conversation(system, text), params)
        completion = _collect(events) if as_json else stream_text(events)
    if as_json:
        print(json.dumps(_as_dict(completion), ensure_ascii=False))
    else:
        _note_figures(completion)


def read_prompt(given: str) -> str:
    """The prompt's text. Raises RequestError where it is empty or no text."""
    from tilewright.compiler.errors import RequestError

    if given == "-":
        try:
            given = sys.stdin.buffer.read().decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is no UTF-8 text (byte {error.start}); convert it") from None
    check_text(given, "prompt")
    if not given:
        raise RequestError("the prompt is empty; give --prompt TEXT, or --prompt - and text on standard input")
    return given


def check_text(text: str, name: str) -> None:
    """Raises RequestError for bytes of the command line that are no text in the terminal's encoding."""
    from tilewright.compiler.errors import RequestError

    if any("\ud800" <= c <= "\udfff" for c in text):
        raise RequestError(f"the {name} holds bytes that are no UTF-8 text; convert it")


def conversation(system: str | None, text: str) -> list[dict[str, str]]:
    """The messages of a first turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def stream_text(events: "Iterator[StreamEvent]") -> "Completion":
    """Writes the answer to stdout as it comes, and a line end whatever ends it."""
    completion = None
    try:
        for event in events:
            if event.text:
                sys.stdout.write(event.text)
                sys.stdout.flush()
            completion = event.completion or completion
    except KeyboardInterrupt:
        print(flush=True)
        raise
    print(flush=True)
    assert completion is not None, "the stream ended without its completion"
    return completion


def _collect(events: "Iterator[StreamEvent]") -> "Completion":
    *_, last = events
    assert last.completion is not None, "the stream ended without its completion"
    return last.completion


def _note_figures(completion: "Completion") -> None:
    from tilewright import console

    timings = completion.timings
    parts = [f"{completion.prompt_tokens} tokens in, {len(completion.token_ids)} out ({completion.finish_reason})"]
    if timings.ttft_ms is not None:
        parts.append(f"first after {timings.ttft_ms:.0f} ms")
    if timings.itl_ms is not None:
        parts.append(f"then {timings.itl_ms:.1f} ms each")
    console.note(", ".join([*parts, f"loaded in {timings.load_s:.1f} s"]))


def _as_dict(completion: "Completion") -> dict[str, Any]:
    timings = completion.timings
    result: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "timings": {"load_s": timings.load_s, "ttft_ms": timings.ttft_ms, "itl_ms": timings.itl_ms},
    }
    if completion.logprobs is not None:
        result["logprobs"] = [_logprob(each) for each in completion.logprobs]
    return result


def _logprob(each: "TokenLogprob") -> dict[str, Any]:
    top = [{"token_id": token, "logprob": _finite(value)} for token, value in each.top]
    return {"token_id": each.token_id, "logprob": _finite(each.logprob), "top": top}


def _finite(value: float) -> float | None:
    """JSON has no infinity: a token that can't be drawn gets null."""
    return value if math.isfinite(value) else None
