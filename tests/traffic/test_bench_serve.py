"""`tilewright bench serve` against a server of our own: its report, and what it says of bad input and bad servers."""

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli_runner import Result, make_runner
from tests.server.serving import MODEL, Running, running
from tilewright.runtime.server.keys import plain_keys

pytestmark = pytest.mark.timeout(120)

KEY = "0123456789abcdef"
SMALL = ("--requests", "12", "--prompt-tokens", "3", "--output-tokens", "8", "--ignore-eos")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(keys=plain_keys([KEY])) as it:
        it.model.step_s = 0.002
        yield it


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Running
) -> Callable[..., Result]:
    (tmp_path / "key").write_text(KEY + "\n")
    monkeypatch.chdir(tmp_path)
    runner = make_runner(capsys, monkeypatch)
    return lambda *arguments: runner("bench", "serve", *arguments, "--api-key-file", "key")


def test_rates_are_driven_and_reported(run: Callable[..., Result], server: Running, tmp_path: Path) -> None:
    code, out, err = run(f"{server.url}/v1/", "--rate", "50", "--rate", "200", "--gamma-shape", "0.5", *SMALL)
    assert code == 0, err
    assert "goodput" in out and "ttft" in out and "50 a second: 12 of 12 sent, 12 answered after" in err
    results = json.loads((tmp_path / "bench-serve" / "results.json").read_text())
    assert (results["model"], results["gamma_shape"], results["objective"]["ttft_ms"]) == (MODEL, 0.5, 1000)
    slow, fast = results["rates"]
    assert (slow["rate"], fast["rate"]) == (50, 200) and slow["duration_s"] > fast["duration_s"]
    for each in (slow, fast):
        assert each["requests"] == 12 and each["failed"] == {} and each["within_objective"] == 1
        assert {one["output_tokens"] for one in each["each"]} == {8}
        assert 0 < each["ttft_ms"]["p50"] <= each["ttft_ms"]["p99"] <= each["e2e_ms"]["max"]
        assert each["e2e_ms"]["p50"] > 14, "eight steps of 2 ms each"
    assert (tmp_path / "bench-serve" / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "bench-serve" / "report.html").read_text()
    assert "<svg" in page and "50 requests a second" in page and "http" not in page.split("</svg>")[1]


def test_a_trace_is_driven_at_its_own_rate(run: Callable[..., Result], server: Running, tmp_path: Path) -> None:
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = ["10.0,ChatGPT,2,5,7,API log", "10.1,ChatGPT,3,6,9,API log", "10.2,ChatGPT,3,0,3,API log"]
    (tmp_path / "trace.csv").write_text(head + "\n".join(rows) + "\n")
    code, _, err = run(server.url, "--trace", "trace.csv", "--ignore-eos", "--output", "deep/er")
    assert code == 0 and "1 rows of trace.csv have no response tokens" in err
    [only] = json.loads((tmp_path / "deep" / "er" / "results.json").read_text())["rates"]
    assert only["rate"] == 10 and [one["output_tokens"] for one in only["each"]] == [5, 6]
    assert only["each"][1]["due_s"] == 0.1


def test_an_objective_that_is_missed(run: Callable[..., Result], server: Running, tmp_path: Path) -> None:
    code, _, _ = run(server.url, "--rate", "100", *SMALL, "--slo-ttft-ms", "0.01")
    [only] = json.loads((tmp_path / "bench-serve" / "results.json").read_text())["rates"]
    assert code == 0 and only["goodput_per_s"] == 0 and only["requests_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("localhost:8000",), "'localhost:8000' is no address of a server"),
        (("http://[::1",), "is no address of a server"),
        (("URL", "--rate", "0"), "--rate is 0; give requests a second, above 0"),
        (("URL", "--rate", "nan"), "--rate is nan"),
        (("URL", "--requests", "0"), "'--requests'"),
        (("URL", "--gamma-shape", "0"), "'--gamma-shape'"),
        (("URL", "--trace", "absent.csv"), "the trace absent.csv can't be read (No such file or directory)"),
        (("URL", "--model", "other"), f"serves no model 'other' but {MODEL}; choose one with --model"),
        (("URL", "--output", "key/deep"), "key/deep can't be made (Not a directory)"),
        (("URL", "--rate", "100", "--requests", "3", "--prompt-tokens", "3000"), "no request was answered (400 "),
    ],
)
def test_bad_input_is_one_sentence(
    run: Callable[..., Result], server: Running, arguments: tuple[str, ...], words: str
) -> None:
    code, _, err = run(*(server.url if each == "URL" else each for each in arguments))
    assert code == 2 and words in err.splitlines()[-1] and "Traceback" not in err


def test_keys_that_are_wrong_or_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Running
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = make_runner(capsys, monkeypatch)
    assert "answers 401 (there is no API key" in runner("bench", "serve", server.url)[2]
    (tmp_path / "empty").write_text("\n")
    for name, words in (("empty", "holds no key"), ("absent", "can't be read (No such file or directory)")):
        code, _, err = runner("bench", "serve", server.url, "--api-key-file", name)
        assert code == 2 and words in err


def test_a_server_that_is_not_there(run: Callable[..., Result]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        code, _, err = run(f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert code == 2 and "can't be reached" in err and err.count("\n") == 1


ODD = [
    ("no models", b"<html>", b"", "does not list models"),
    ("breaks off", None, b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "the stream broke off"),
    ("says nothing", None, b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n', "the answer was empty"),
    ("an error", None, b'data: {"error": {"message": "it is dead"}}\n\n', "it is dead"),
    ("no JSON", None, b"data: {oh\n\n", "none of OpenAI's API"),
    ("another form", None, b"data: [1]\n\n", "none of OpenAI's API"),
]


@pytest.mark.parametrize(("models", "stream", "words"), [each[1:] for each in ODD], ids=[each[0] for each in ODD])
def test_servers_that_answer_oddly(run: Callable[..., Result], models: bytes | None, stream: bytes, words: str) -> None:
    class Odd(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(models or b'{"data": [{"id": "m"}]}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.reply(stream)

        def reply(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as odd:
        threading.Thread(target=odd.serve_forever, daemon=True).start()
        code, _, err = run(f"http://127.0.0.1:{odd.server_address[1]}", "--rate", "100", "--requests", "2")
        odd.shutdown()
    assert code == 2 and words in err.splitlines()[-1]
