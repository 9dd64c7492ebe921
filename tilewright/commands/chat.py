"""`tilewright chat`: a conversation in the terminal."""

import sys
from typing import TYPE_CHECKING, Annotated

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
    from tilewright.runtime.types import SamplingParams
    from tilewright.session import Session

_HELP = "Ctrl-D or /exit leaves, /clear starts over, Ctrl-C stops an answer or drops a line."


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="A model, compiled on first use, or what compile made.")
    ],
    system: System = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    threads: Threads = None,
) -> None:
    """Hold a conversation. Ctrl-D or /exit leaves, /clear starts over, Ctrl-C stops an answer or drops a line."""
    from tilewright import console
    from tilewright.runtime.types import EngineLimits, SamplingParams
    from tilewright.session import open_session

    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
    )
    # A conversation is read again with every turn: what was computed of it stays.
    with open_session(model, threads, EngineLimits(keep_prefixes=True)) as session:
        conversation = Conversation(session, params, system)
        if _at_terminal():
            _edit_lines()
            console.note(_HELP)
        while (line := _read_line()) is not None:
            if line == "/exit":
                break
            if line == "/clear":
                conversation.clear()
            elif line.startswith("/"):
                console.note(f"there is no {line.split()[0]}: {_HELP}")
            elif line:
                conversation.say(line)


class Conversation:
    """The messages so far. An answer that was stopped stays as far as it came; a refused one leaves no trace."""

    def __init__(self, session: "Session", params: "SamplingParams", system: str | None) -> None:
        self._session = session
        self._params = params
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.clear()

    def clear(self) -> None:
        self.messages = list(self._first)

    def say(self, text: str) -> None:
        """Answers `text` on stdout."""
        from tilewright import console
        from tilewright.commands.generate import check_text
        from tilewright.compiler.errors import RequestError

        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            check_text(text, "message")
            answer = self._stream(asked)
        except RequestError as error:
            console.error(f"{error} (/clear starts over)")
            return
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _stream(self, messages: list[dict[str, str]]) -> str:
        said = []
        try:
            for event in self._session.engine.stream_sync(messages, self._params):
                said.append(event.text)
                sys.stdout.write(event.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pass  # leaving the loop has cancelled the request
        print(flush=True)
        return "".join(said)


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _edit_lines() -> None:
    """Line editing and history, where Python has them."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def _read_line() -> str | None:
    """What is typed, or the next line of a pipe; None at the end."""
    if _at_terminal():
        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:  # meant for an answer that has just ended, or for the line: neither ends the talk
            print()
            return ""
    line = sys.stdin.readline()
    return line.strip() if line else None
