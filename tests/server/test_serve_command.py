"""`tilewright serve` as a process: addresses, signals, exit codes and TLS."""

import json
import signal
import socket
import time
from pathlib import Path

import openai
import pytest

from tests.cli_runner import make_runner
from tests.server.processes import client, serving
from tests.server.serving import MESSAGES, receive_until
from tilewright.compiler import env

pytestmark = pytest.mark.timeout(120)

FOLDER = Path(__file__).parent


def test_sigterm_lets_a_stream_finish_and_ends_with_zero() -> None:
    with serving("fake=any.tw", TEST_STEP_S="0.02") as process, client(process) as ask:
        stream = ask.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True, max_tokens=30, seed=1, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        *_, last = chunks
        assert last.choices[0].finish_reason == "length" and not hasattr(last.choices[0], "stop_reason")
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()


def test_two_signals_cut_what_runs() -> None:
    with serving("fake=any.tw", TEST_STEP_S="0.02") as process, client(process) as ask:
        chunks = iter(ask.chat.completions.create(model="fake", messages=MESSAGES, stream=True, seed=1))
        next(chunks)
        process.send_signal(signal.SIGINT)
        time.sleep(0.15)
        process.send_signal(signal.SIGINT)
        *_, last = chunks
        assert (last.choices[0].finish_reason, last.choices[0].stop_reason) == ("length", "shutdown")
        assert process.wait(10) == 0


def test_a_device_that_fails_ends_the_process_with_one() -> None:
    with serving("fake=any.tw", TEST_STEP_S="0.01", TEST_BREAK_AFTER="12") as process, client(process) as ask:
        begun = time.monotonic()
        with pytest.raises(openai.APIError, match="engine has failed"):
            list(
                ask.chat.completions.create(
                    model="fake", messages=MESSAGES, stream=True, extra_body={"ignore_eos": True}
                )
            )
        assert process.wait(10) == 1
        assert time.monotonic() - begun < 5
        said = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]
        [died] = [line for line in said if line["event"] == "engine failed"]
        assert died["reason"] == "the device is gone" and died["model"] == "fake"


def test_tls_and_keys_of_the_environment() -> None:
    key = "0123456789abcdef"
    files = ("--tls-cert", str(FOLDER / "cert.pem"), "--tls-key", str(FOLDER / "key.pem"))
    with serving("fake=any.tw", *files, **{env.API_KEYS: key}) as process:
        assert process.url.startswith("https://127.0.0.1:")
        import httpx2  # what the client itself speaks through

        with openai.OpenAI(
            base_url=f"{process.url}/v1",
            api_key=key,
            max_retries=0,
            http_client=httpx2.Client(verify=str(FOLDER / "cert.pem")),
        ) as ask:
            assert ask.models.list().data[0].id == "fake"
            with pytest.raises(openai.AuthenticationError):
                ask.with_options(api_key="another").models.list()
        port = int(process.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert not receive_until(plain, None).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--port", "70000"), "'--port': Input should be less than or equal to 65535"),
        (("--host", "nowhere.invalid"), "nowhere.invalid port 8000 can't be listened at"),
        (("--tls-cert", "cert.pem"), "--tls-cert and --tls-key go together"),
        (("--tls-cert", "a.pem", "--tls-key", "b.pem"), "TLS can't use a.pem with b.pem"),
        (("--api-keys", "no.json"), "the key file no.json can't be read"),
        (("--log-file", "no/log"), "the log file no/log can't be written"),
        (("--max-queue", "0"), "max_queue 0 is below 1"),
        (("--max-prompt-tokens", "0"), "max_prompt 0 is below 1"),
        (("--request-seconds", "0"), "'--request-seconds': Input should be greater than"),
        (("another=any.tw", "another=other.tw"), "two models are named 'another'"),
    ],
)
def test_bad_options_are_one_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.server import process
    from tilewright.runtime import model

    monkeypatch.setattr(model, "load", process.load)
    code, out, err = make_runner(capsys, monkeypatch)("serve", "fake=any.tw", *arguments)
    assert code == 2 and out == ""
    assert words in err and err.count("\n") == 1


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = make_runner(capsys, monkeypatch)("serve", "any.tw", "--port", str(port))
    assert code == 2 and f"port {port} can't be listened at (Address already in use)" in err
