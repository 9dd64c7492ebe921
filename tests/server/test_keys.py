"""API keys and their limits: who may ask, how often, how much, and what the others see."""

import json
import threading
from pathlib import Path

import pytest

from tests.server.serving import MODEL, Running, running, wait_until
from tilewright.compiler.errors import UserError
from tilewright.runtime.server.app import ENDPOINTS
from tilewright.runtime.server.buckets import Bucket
from tilewright.runtime.server.errors import ApiError
from tilewright.runtime.server.keys import Key, KeyRecord, KeyRing, digest, plain_keys, read_keys
from tilewright.runtime.types import EngineLimits

pytestmark = pytest.mark.timeout(60)

SECRET = "a-long-and-random-text"


def key(name: str = "alice", secret: str = SECRET, **limits: int) -> Key:
    return Key(KeyRecord(name=name, sha256=digest(secret), **limits), clock=lambda: 0.0)


def bearer(secret: str = SECRET) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_every_path_but_health_and_ready_wants_a_key() -> None:
    with running(keys=[key()]) as server:
        paths = [(e.method, e.path.replace("{model:path}", MODEL)) for e in ENDPOINTS]
        paths += [
            ("GET", "/openapi.json"),
            ("GET", "/nothing"),
            ("OPTIONS", "/v1/models"),
            ("GET", "/"),
            ("GET", "/page.js"),
        ]
        for method, path in paths:
            status, headers, body = server.ask(method, path)
            if path in ("/health", "/ready"):
                assert status == 200
                continue
            assert status == 401 and headers["www-authenticate"] == "Bearer", path
            assert body["error"]["code"] == "invalid_api_key" and "Authorization: Bearer" in body["error"]["message"]
        for wrong in ("Bearer", f"Basic {SECRET}", "Bearer x", f"Bearer {SECRET}x", f"{SECRET}", "Bearer \xe9\xff"):
            assert server.chat(headers={"Authorization": wrong})[0] == 401
        for right in (f"Bearer {SECRET}", f"bearer  {SECRET}"):
            assert server.chat(headers={"Authorization": right})[0] == 200
        assert server.ask("GET", "/openapi.json", headers=bearer())[2]["components"]["securitySchemes"]
        assert server.ask("GET", "/nothing", headers=bearer())[0] == 404


def test_requests_a_minute() -> None:
    with running(keys=[key(requests_per_minute=2), key("bob", "another-long-and-random-text")]) as server:
        assert [server.ask("GET", "/version", headers=bearer())[0] for _ in range(2)] == [200, 200]
        status, headers, body = server.chat(headers=bearer())
        assert status == 429 and headers["retry-after"] == "30" and body["error"]["type"] == "rate_limit_error"
        assert body["error"]["code"] == "rate_limit_exceeded" and "2 requests a minute" in body["error"]["message"]
        assert server.chat(headers=bearer("another-long-and-random-text"))[0] == 200, "one key's limit is no other's"


def test_tokens_a_minute_count_prompts_and_answers() -> None:
    with running(keys=[key(tokens_per_minute=30)]) as server:
        ask = {"max_tokens": 30, "ignore_eos": True, "headers": bearer()}
        assert server.chat(**ask)[2]["usage"]["total_tokens"] == 36
        status, headers, _ = server.chat(**ask)
        assert status == 429 and headers["retry-after"] == "24", "36 of 30 are used, and 6 more are wanted"
        status, _, body = server.chat(**ask, messages=[{"role": "user", "content": "dog " * 30}])
        assert status == 400 and "above the 30 a minute" in body["error"]["message"]


def test_requests_at_a_time_and_priorities() -> None:
    with running(keys=[key(concurrent=1, max_priority=2)]) as server:
        server.model.gate.clear()
        first = threading.Thread(target=server.chat, kwargs={"headers": bearer()})
        first.start()
        wait_until(lambda: server.service.active)
        status, headers, body = server.chat(headers=bearer())
        assert status == 429 and headers["retry-after"] == "1" and body["error"]["code"] == "too_many_at_once"
        server.model.gate.set()
        first.join()
        server.rest()
        assert server.chat(headers=bearer(), priority=2)[0] == 200
        status, _, body = server.chat(headers=bearer(), priority=3)
        assert status == 403 and body["error"]["param"] == "priority"


def test_a_full_queue() -> None:
    with running(engine_limits=EngineLimits(max_batch=1, max_queue=2)) as server:
        server.model.gate.clear()
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(server.chat()[0])) for _ in range(3)]
        for place, thread in enumerate(threads):
            thread.start()
            wait_until(lambda place=place: len(server.service.active) == place + 1)
            wait_until(lambda place=place: place or server.engine.load.running == 1)
        refused(server)
        # Several prompts are queued all or none.
        refused(server, "/v1/completions", {"model": MODEL, "prompt": ["a", "b"]})
        server.model.gate.set()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 3
        server.rest()


def refused(server: Running, path: str = "", body: object = None) -> None:
    status, headers, answer = server.ask("POST", path, body) if path else server.chat()
    assert status == 429 and headers["retry-after"] == "1" and answer["error"]["code"] == "queue_full"
    assert "2 requests are waiting" in answer["error"]["message"]


def test_limits_of_prompts_and_answers() -> None:
    with running(engine_limits=EngineLimits(max_prompt=10, max_answer=5)) as server:
        assert server.chat(max_tokens=5)[0] == 200
        assert server.chat(max_tokens=None, ignore_eos=True)[2]["usage"]["completion_tokens"] == 5
        for fields, words in (
            ({"max_tokens": 6}, "an answer of 6 tokens is above 5"),
            ({"messages": [{"role": "user", "content": "dog " * 20}]}, "is above 10, the most that is allowed"),
        ):
            status, _, body = server.chat(**fields)
            assert status == 400 and words in body["error"]["message"]
            assert body["error"]["code"] == "context_length_exceeded"


def test_a_bucket_fills_and_owes() -> None:
    now_s = [0.0]
    bucket = Bucket(60, clock=lambda: now_s[0])
    assert bucket.wait_s(60) == 0 and bucket.wait_s(61) == float("inf")
    bucket.take(90)
    assert bucket.level == -30 and bucket.wait_s(1) == 31
    now_s[0] = 31.0
    assert bucket.wait_s(1) == 0
    now_s[0] = 1e6
    assert bucket.level == 60, "it does not run over"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is wrong at its beginning"),
        ("[]", "holds no key"),
        ('[{"name": "a"}]', "0.sha256: Field required"),
        (json.dumps([{"name": "a b", "sha256": "0" * 64}]), "0.name"),
        (json.dumps([{"name": "a", "sha256": "0" * 63}]), "0.sha256"),
        (json.dumps([{"name": "a", "sha256": "0" * 64, "tokens": 4}]), "0.tokens"),
        (json.dumps([{"name": "a", "sha256": "0" * 64, "to\nkens": 4}]), "0.to kens"),
        (json.dumps([{"name": "a", "sha256": "0" * 64, "requests_per_minute": 0}]), "0.requests_per_minute"),
        (json.dumps([{"name": n, "sha256": "0" * 64} for n in "ab"]), "has sha256"),
        (json.dumps([{"name": "a", "sha256": d * 64} for d in "01"]), "has name a twice"),
    ],
)
def test_key_files_that_are_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)) as error:
        read_keys(path)
    assert words in str(error.value)


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{"name": "alice", "sha256": digest(SECRET), "concurrent": 3}]))
    ring = KeyRing([*read_keys(path), *plain_keys(["0123456789abcdef", "0123456789abcdef"])])
    assert ring.find(f"Bearer {SECRET}").record.concurrent == 3
    assert ring.find("Bearer 0123456789abcdef").name == "environment-1"
    with pytest.raises(ApiError):
        ring.find("Bearer nobody")
    with pytest.raises(UserError, match="can't be read"):
        read_keys(tmp_path / "none.json")
    with pytest.raises(UserError, match="key 1 of the environment has 5 characters") as error:
        plain_keys(["short"])
    assert "short" not in str(error.value).replace("shorter", "")


def test_cors_is_off_unless_asked_for() -> None:
    page = {"Origin": "https://example.org"}
    with running() as server:
        assert "access-control-allow-origin" not in server.chat(headers=page)[1]
    with running(cors_origins=("https://example.org",), keys=[key()]) as server:
        assert server.chat(headers=page | bearer())[1]["access-control-allow-origin"] == "https://example.org"
        preflight = page | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert server.ask("OPTIONS", "/v1/chat/completions", headers=preflight)[0] == 200
        other = server.chat(headers={"Origin": "https://evil.example"} | bearer())[1]
        assert "access-control-allow-origin" not in other
