"""What is fuzzed: everything that reads what a stranger wrote. A target takes bytes; a refusal in one sentence is fine,
any other exception is a find, and so is a broken promise (an assertion)."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from tests.runtime.tokenizers_made import EOS, byte_fallback, byte_level
from tilewright.compiler import artifact as sealed
from tilewright.compiler.errors import UserError
from tilewright.compiler.frontends.gguf import load_gguf
from tilewright.compiler.frontends.huggingface_config import read_config
from tilewright.compiler.frontends.safetensors_file import read_safetensors_file
from tilewright.runtime.grammar import Grammar
from tilewright.runtime.server.chat_requests import ChatRequest, TokenizeRequest
from tilewright.runtime.server.errors import ApiError, as_api_error
from tilewright.runtime.server.keys import read_keys
from tilewright.runtime.server.requests import Body, CompletionRequest, EmbeddingRequest
from tilewright.runtime.server.response_requests import ResponseRequest
from tilewright.runtime.tokenizer import Tokenizer
from tilewright.runtime.tool_parser import Argued, Called, CallParser, Piece, Said
from tilewright.runtime.tools import tool_form
from tilewright.schedules.records import UnreadableRecord, parse
from tilewright.traffic.arrivals import read_trace

Target = Callable[[bytes], None]
CORPUS = Path(__file__).with_name("corpus")
MOST_BYTES = 4096  # of an input: what is found is found with little


# ---- requests --------------------------------------------------------------------------------------------------------


def _request(model: type[Body], data: bytes) -> None:
    """As the server does it: a body that is taken can be told to the engine, one that is not is a client's error."""
    try:
        _told(model.model_validate_json(data))
    except (ValidationError, ApiError, UserError) as error:
        answer = as_api_error(error)
        assert 400 <= answer.status < 500 and answer.message and "\n" not in answer.message, answer.message
        json.dumps(answer.body).encode()


def _told(body: Body) -> None:
    if isinstance(body, ChatRequest | ResponseRequest):
        calling = body.calling
        calling.params(tokenizers()[0], body.sampling(None, None, 60.0))
        body.conversation.tokens(tokenizers()[0])
    elif isinstance(body, TokenizeRequest):
        assert body.prompt is not None or body.conversation.tokens(tokenizers()[0]) is not None
    elif isinstance(body, EmbeddingRequest):
        assert body.inputs
    elif isinstance(body, CompletionRequest):
        body.sampling(None, None, 60.0)
        assert body.prompts


@functools.cache
def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    made = []
    for text in (byte_level(), byte_fallback()):
        stop = Tokenizer(text).encode(EOS)[-1:]
        made.append(Tokenizer(text, {"chat_template": template, "stop_token_ids": stop, "eos_token": EOS}))
    return made[0], made[1]


def _keys(data: bytes) -> None:
    _from_file(read_keys, data)


# ---- answers ---------------------------------------------------------------------------------------------------------

_FORMS = ("x", "tools [TOOL_CALLS]", "tools <tool_call>", 'tools "parameters" <|python_tag|>')


def _tool_calls(data: bytes) -> None:
    """Calls read out of pieces of any length are those of the whole text, and all of their arguments are JSON."""
    if len(data) < 2:
        return
    form, size, text = tool_form(_FORMS[data[0] % 4]), data[1] % 16 + 1, data[2:].decode(errors="replace")
    whole = _read(CallParser(form, ["f", "get_weather"]), [text])
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert _read(CallParser(form, ["f", "get_weather"]), pieces) == whole


def _read(parser: CallParser, pieces: list[str]) -> tuple[str, dict[int, str]]:
    """-> (the text, the arguments of each call)."""
    said: list[Piece] = [piece for text in pieces for piece in parser.push(text)]
    said += parser.finish()
    arguments: dict[int, str] = {}
    for piece in said:
        if isinstance(piece, Argued):
            arguments[piece.index] = arguments.get(piece.index, "") + piece.text
        (piece.name if isinstance(piece, Called) else piece.text).encode()
    return "".join(piece.text for piece in said if isinstance(piece, Said)), arguments


def _detokenizer(data: bytes) -> None:
    """A stream says what decoding all at once does, and its text never shrinks."""
    for tokenizer in tokenizers():
        tokens = [int(t) % (tokenizer.vocab_size + 2) for t in np.frombuffer(data[: len(data) // 2 * 2], "<u2")]
        stream = tokenizer.detokenizer()
        text = "".join(stream.push(token) for token in tokens) + stream.finish()
        assert text == tokenizer.decode([t for t in tokens if t < tokenizer.vocab_size])


def _grammar(data: bytes) -> None:
    """What is taken can be followed: there is always a token to draw, and the answer stays text."""
    if not data:
        return
    kind = ("json_schema", "regex", "lark")[data[0] % 3]
    tokenizer = tokenizers()[0]
    try:
        way = tokenizer.constraint(Grammar(kind, data[1:].decode(errors="replace")), tokenizer.vocab_size + 3)  # type: ignore[arg-type]
    except UserError as error:
        assert "\n" not in str(error)
        return
    rng = np.random.default_rng(len(data))
    for _ in range(12):
        allowed = np.flatnonzero(way.allowed())
        assert len(allowed)
        way.accept(int(rng.choice(allowed)))


# ---- files -----------------------------------------------------------------------------------------------------------


def _from_file(read: Callable[[Path], object], data: bytes, name: str = "file") -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(data)
        try:
            read(file)
        except UserError as error:
            assert str(error) and "\n" not in str(error), str(error)


def _gguf(data: bytes) -> None:
    _from_file(load_gguf, data, "m.gguf")


def _config(data: bytes) -> None:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(raw, dict):
        try:
            read_config(raw, "config.json")
        except UserError as error:
            assert "\n" not in str(error)


def _safetensors(data: bytes) -> None:
    _from_file(read_safetensors_file, data, "m.safetensors")


def _manifest(data: bytes) -> None:
    """Sealed, where it is an object at all: else no input would get beyond the seal."""
    try:
        fields = json.loads(data)
        seal = {"seal": sealed._seal(sealed._canonical(fields))} if isinstance(fields, dict) else {}
        data = json.dumps({**fields, **seal}).encode() if seal else data
    except (ValueError, RecursionError):
        pass
    _from_file(sealed.Manifest.read, data, "manifest.json")


def _weights(data: bytes) -> None:
    _from_file(sealed.read_tensors, data, "model.safetensors")


def _record(data: bytes) -> None:
    try:
        record = parse(data.decode(errors="replace"))
    except UnreadableRecord as problem:
        assert "\n" not in str(problem)
        return
    assert parse(record.line()) == record


def _trace(data: bytes) -> None:
    _from_file(read_trace, data, "trace.csv")


TARGETS: dict[str, Target] = {
    "chat": functools.partial(_request, ChatRequest),
    "completions": functools.partial(_request, CompletionRequest),
    "responses": functools.partial(_request, ResponseRequest),
    "embeddings": functools.partial(_request, EmbeddingRequest),
    "tokenize": functools.partial(_request, TokenizeRequest),
    "keys": _keys,
    "tool_calls": _tool_calls,
    "detokenizer": _detokenizer,
    "grammar": _grammar,
    "gguf": _gguf,
    "config": _config,
    "safetensors": _safetensors,
    "manifest": _manifest,
    "weights": _weights,
    "record": _record,
    "trace": _trace,
}
