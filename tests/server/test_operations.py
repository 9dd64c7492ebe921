"""What operators see: health, readiness, metrics, logs; and a server that drains or dies in order."""

import json
import logging
import threading
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.serving import MESSAGES, Running, receive_until, running, wait_until
from tilewright.compiler.errors import RequestError, UserError
from tilewright.runtime.server.lifecycle import Tls, bind
from tilewright.runtime.server.limits import ServerLimits
from tilewright.runtime.server.logs import log, logging_to
from tilewright.runtime.server.served import Models

pytestmark = pytest.mark.timeout(60)


def metrics(server: Running) -> dict[str, float]:
    """The values of all samples, by name and labels but the model's."""
    found = {}
    for family in text_string_to_metric_families(server.ask("GET", "/metrics")[2]):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k not in ("model_name", "le"))
            found[sample.name.removeprefix("tilewright:") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_metrics_count_what_happened(server: Running) -> None:
    before = metrics(server)
    assert before["num_requests_running"] == 0 and before["kv_cache_usage_perc"] == 0
    server.chat(max_tokens=7, ignore_eos=True, n=2)
    server.chat(max_tokens=7, n=0)
    after = metrics(server)
    gained = {name: value - before.get(name, 0) for name, value in after.items()}
    assert gained["prompt_tokens_total"] == 6 and gained["generation_tokens_total"] == 14
    assert gained["request_success_total{finished_reason=length}"] == 2
    assert gained["time_to_first_token_seconds_count"] == 2 and gained["inter_token_latency_seconds_count"] == 12
    assert gained["e2e_request_latency_seconds_count"] == gained["request_generation_tokens_count"] == 2
    assert gained["request_generation_tokens_sum"] == 14 and gained["request_queue_time_seconds_count"] == 2
    assert gained["step_seconds_count"] == 7 and gained["step_seconds_sum"] > 0
    assert gained["http_requests_total{path=/v1/chat/completions,status=400}"] == 1


def test_a_prompt_that_begins_like_another_is_counted(server: Running) -> None:
    before = metrics(server)
    asked = [{"role": "user", "content": "the lazy dog sleeps " * 6 + end} for end in ("a", "b")]
    first, second = (server.chat(messages=[message], max_tokens=2)[2]["usage"] for message in asked)
    prompt, cached = second["prompt_tokens"], second["prompt_tokens_details"]["cached_tokens"]
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert prompt - 8 < cached < prompt and cached % 4 == 0
    after = metrics(server)
    assert after["prefix_cache_queries_total"] - before["prefix_cache_queries_total"] == 2 * prompt
    assert after["prefix_cache_hits_total"] - before["prefix_cache_hits_total"] == cached


def test_metrics_show_what_runs(server: Running) -> None:
    server.model.gate.clear()
    threads = [threading.Thread(target=server.chat) for _ in range(10)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(server.service.active) == 10)
    wait_until(lambda: server.engine.load.running)
    now = metrics(server)
    assert now["num_requests_running"] + now["num_requests_waiting"] == 10 and now["kv_cache_usage_perc"] > 0
    server.model.gate.set()
    for thread in threads:
        thread.join()


def test_several_models_behind_one_port() -> None:
    with running(names=("fake", "other/one")) as server:
        assert [card["id"] for card in server.ask("GET", "/v1/models")[2]["data"]] == ["fake", "other/one"]
        assert server.ask("GET", "/v1/models/other/one")[2]["id"] == "other/one"
        assert server.chat(model="other/one")[2]["model"] == "other/one"
        assert len(server.models["other/one"].steps) and not server.model.steps
        with pytest.raises(RequestError, match="two models are named 'fake'"):
            Models([*server.service.models, *server.service.models])


def test_health_follows_the_engines_progress() -> None:
    with running(ServerLimits(stall_s=0.2)) as server:
        assert server.ask("GET", "/health")[0] == 200
        server.model.gate.clear()
        thread = threading.Thread(target=server.chat)
        thread.start()
        wait_until(lambda: server.ask("GET", "/health")[0] == 503)
        assert server.ask("GET", "/health")[2] == server.ask("GET", "/ready")[2] == {"status": "stalled"}
        server.model.gate.set()
        thread.join()
        assert server.ask("GET", "/health")[0] == 200
        time.sleep(0.3)
        assert server.ask("GET", "/health")[0] == 200, "an idle engine is well"


def test_a_drain_lets_requests_finish() -> None:
    with running() as server:
        server.model.gate.clear()
        stream = server.open_stream(max_tokens=20)
        server.end()
        wait_until(lambda: server.service.draining)
        status, headers, body = server.chat()
        assert status == 503 and headers["retry-after"] and body["error"]["code"] == "draining"
        assert server.ask("GET", "/ready")[2] == {"status": "draining"} and server.ask("GET", "/health")[0] == 200
        server.model.gate.set()
        said = receive_until(stream, None)
        assert b'"finish_reason":"length"' in said and b"shutdown" not in said and b"data: [DONE]" in said
        wait_until(lambda: server.exit_code == 0)


def test_what_outlasts_the_grace_is_cut_with_a_reason() -> None:
    with running(ServerLimits(drain_s=0.1)) as server:
        server.model.step_s = 0.02
        stream = server.open_stream()
        answer: list = []
        thread = threading.Thread(target=lambda: answer.append(server.chat(max_tokens=400, ignore_eos=True)))
        thread.start()
        wait_until(lambda: len(server.service.active) == 2)
        server.end()
        said = receive_until(stream, None)
        assert b'"finish_reason":"length","stop_reason":"shutdown"' in said and b"data: [DONE]" in said
        thread.join()
        [choice] = answer[0][2]["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "shutdown")
        wait_until(lambda: server.exit_code == 0)


def test_a_dead_engine_ends_everything_within_seconds() -> None:
    with running() as server:
        server.model.step_s = 0.01
        stream = server.open_stream()
        answer: list = []
        thread = threading.Thread(target=lambda: answer.append(server.chat(max_tokens=400, ignore_eos=True)))
        thread.start()
        wait_until(lambda: len(server.service.active) == 2)
        begun = time.monotonic()
        server.model.broken = True
        said = receive_until(stream, None)
        assert said.endswith(b'"code":"engine_dead"}}\n\n\r\n0\r\n\r\n') and b"[DONE]" not in said
        assert b"the device is gone" not in said, "an engine's inner words are for the log"
        thread.join()
        assert answer[0][0] == 503 and answer[0][2]["error"]["code"] == "engine_dead"
        wait_until(lambda: server.exit_code == 1)
        assert time.monotonic() - begun < 5


def test_health_is_red_at_once_when_an_engine_dies() -> None:
    with running() as server:
        server.model.broken = True
        server.engine._core.failure = MemoryError("gone")  # before anybody has looked
        assert server.service.health == "dead"
        wait_until(lambda: server.exit_code == 1)


def test_logs_are_lines_of_json_without_what_was_said(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with running() as server, logging_to(path):
        server.chat(messages=[{"role": "user", "content": "a secret"}], max_tokens=5, ignore_eos=True)
        server.chat(n=0)
        server.ask("GET", "/health")
        wait_until(lambda: path.read_text().count("\n") == 2)
        good, bad = [json.loads(line) for line in path.read_text().splitlines()]
    assert "secret" not in path.read_text()
    assert good["event"] == "request" and good["status"] == 200 and good["path"] == "/v1/chat/completions"
    assert good["completion_tokens"] == 5 and good["model"] == "fake" and good["key"] == "anonymous"
    assert 0 < good["first_token_s"] <= good["s"] and good["id"].startswith("req-")
    assert bad["status"] == 400 and "model" not in bad
    with running(log_prompts=True) as server, logging_to(path):
        server.chat(messages=MESSAGES)
        wait_until(lambda: "the dog?" in path.read_text())


def test_a_full_disk_loses_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with running() as server, logging_to(Path("/dev/full")):
        for _ in range(3):
            assert server.chat()[0] == 200
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_a_log_that_does_not_keep_up_drops_lines_and_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr("tilewright.runtime.server.logs._MOST_WAITING", 2)
    emit = logging.StreamHandler.emit
    monkeypatch.setattr(logging.StreamHandler, "emit", lambda self, record: (gate.wait(10), emit(self, record))[1])
    path = tmp_path / "log"
    with logging_to(path):
        for i in range(20):
            log("line", i=i)
        gate.set()
        wait_until(lambda: path.read_text().count("\n") >= 2)
        log("last")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) < 20 and lines[-1]["dropped_lines"] == 21 - len(lines)


def test_addresses_and_certificates_that_are_of_no_use(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match=rf"127.0.0.1 port {taken.getsockname()[1]} can't be listened at"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match=r"nowhere\.invalid"):
        bind("nowhere.invalid", 80)
    with pytest.raises(UserError, match="log file"), logging_to(tmp_path):
        pass
    (tmp_path / "cert").write_text("x")
    with pytest.raises(UserError, match="TLS can't use"):
        Tls(tmp_path / "cert", tmp_path / "cert").check()
    with pytest.raises(UserError, match="No such file"):
        Tls(tmp_path / "no", tmp_path / "no").check()
