"""A server in this process, on a port of its own, over a device that can be reasoned about (tests/runtime/fake.py)."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.runtime.fake import HIDDEN, FakeModel, expected
from tests.runtime.tokenizers_made import EOS, byte_level
from tilewright.runtime.engine import Engine
from tilewright.runtime.server.app import create_app
from tilewright.runtime.server.keys import Key, KeyRing
from tilewright.runtime.server.lifecycle import Server, bind
from tilewright.runtime.server.limits import ServerLimits
from tilewright.runtime.server.served import Served
from tilewright.runtime.server.service import Service
from tilewright.runtime.tokenizer import Tokenizer
from tilewright.runtime.types import DeviceLimits, EngineLimits, SamplingParams

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "the dog?"}]
MODEL = "fake"


def make_tokenizer() -> Tokenizer:
    stop = Tokenizer(byte_level()).encode(EOS)
    return Tokenizer(byte_level(), {"chat_template": TEMPLATE, "stop_token_ids": stop, "eos_token": EOS})


TOKENIZER = make_tokenizer()
[EOS_ID] = TOKENIZER.stop_token_ids
LIMITS = DeviceLimits(
    max_batch=8, max_tokens=64, max_context=512, page_size=4, num_pages=512,
    vocab_size=TOKENIZER.vocab_size, top_logprobs=20, pooling="mean", hidden=HIDDEN,
)  # fmt: skip


class PacedModel(FakeModel):
    """Waits at a gate before each step, takes `step_s` for it, says what it is told to, and fails when told to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gate = threading.Event()
        self.gate.set()
        self.step_s = 0.0
        self.broken = False
        self.script: list[int] = []  # what it says instead of its own, to whatever prompt

    def step(self, batch):
        assert self.gate.wait(20)
        if self.broken:
            raise MemoryError("the device is gone")
        time.sleep(self.step_s)
        result = super().step(batch)
        if self.script:
            result.token_ids[:] = [self.script[draw] for draw in batch.draws]
        return result

    def hidden(self, inputs):
        assert self.gate.wait(20)
        if self.broken:
            raise MemoryError("the device is gone")
        time.sleep(self.step_s)
        return super().hidden(inputs)


class Running:
    """A server that runs: where it is, and what is inside."""

    def __init__(self, port: int, service: Service, models: dict[str, PacedModel], end: Callable[[], None]) -> None:
        self.port, self.service, self.models, self.end = port, service, models, end
        self.url = f"http://127.0.0.1:{port}"
        self.model = models[MODEL]
        self.engine = service.models.find(MODEL).engine
        self.exit_code: int | None = None

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """-> (status, headers in lower case, body: parsed where it is JSON). raw: sent as it is instead of `body`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = raw if raw is not None else None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if sent is not None else {}
        try:
            connection.request(method, path, sent, kind | (headers or {}))
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        given = {name.lower(): value for name, value in response.getheaders()}
        return response.status, given, json.loads(text) if "json" in given.get("content-type", "") else text.decode()

    def chat(self, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, dict[str, str], Any]:
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "seed": 1} | fields
        return self.ask("POST", "/v1/chat/completions", body, headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def open_stream(self, **fields: Any) -> socket.socket:
        """A connection on which a long stream has begun."""
        body = json.dumps({"model": MODEL, "messages": MESSAGES, "stream": True, "ignore_eos": True} | fields)
        connection = self.connect()
        connection.sendall(post("/v1/chat/completions", body.encode()))
        assert b"data: " in receive_until(connection, b"data: ")
        return connection

    def rest(self) -> None:
        """Waits until nothing runs, and checks that nothing is left of what did."""
        wait_until(lambda: not self.service.active and not self.engine.busy)
        self.engine.check_invariants()
        assert self.engine.load.used_pages == 0, "pages are leaked"


def post(path: str, body: bytes, extra: str = "") -> bytes:
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: test\r\n{kind}{extra}\r\n".encode() + body


def receive_until(connection: socket.socket, mark: bytes | None) -> bytes:
    """What comes until `mark` is in it, or until the end (mark None, or a closed connection)."""
    received = b""
    while mark is None or mark not in received:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            break
        if not piece:
            break
        received += piece
    return received


def wait_until(true: Callable[[], Any], most_s: float = 10.0) -> None:
    end = time.monotonic() + most_s
    while not true():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.002)


@contextmanager
def running(
    limits: ServerLimits | None = None,
    engine_limits: EngineLimits = EngineLimits(keep_prefixes=True),  # noqa: B008  frozen
    keys: list[Key] | None = None,
    names: tuple[str, ...] = (MODEL,),
    cors_origins: tuple[str, ...] = (),
    log_prompts: bool = False,
    device: DeviceLimits = LIMITS,
    tracer: Any = None,
    reopen: Callable[[], Engine] | None = None,
) -> Iterator[Running]:
    models = {name: PacedModel(device, TOKENIZER) for name in names}
    served = [Served(name, Engine(model, engine_limits), TOKENIZER, reopen) for name, model in models.items()]
    service = Service.of(served, limits, KeyRing(keys or []), log_prompts=log_prompts, tracer=tracer)
    bound = bind("127.0.0.1", 0)
    server = Server(create_app(service, cors_origins), service, bound)
    it = Running(bound.getsockname()[1], service, models, server.end)

    def serve() -> None:
        it.exit_code = server.run()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield it
    finally:
        for model in models.values():
            model.gate.set()
        server.end()
        server.end()
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"


def answer_to(prompt: list[int] | str, params: SamplingParams, index: int = 0) -> str:
    """The text that the device says, computed without engine and server."""
    tokens = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    ends = () if params.ignore_eos else TOKENIZER.stop_token_ids
    said = expected(tokens, params, index, stop_ids=ends, limits=LIMITS)
    ended = said[-1] in (*ends, *params.stop_token_ids)
    return TOKENIZER.decode(said[:-1] if ended else said)


def chat_prompt(messages: list[dict[str, Any]]) -> list[int]:
    return TOKENIZER.encode_chat(messages)
