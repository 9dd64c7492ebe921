"""/v1/embeddings through the official client: which vectors, in which form, and beside running streams."""

import asyncio
import base64
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import openai
import pytest

from tests.runtime.fake import HIDDEN, expected_embedding
from tests.server.serving import LIMITS, MODEL, TOKENIZER, Running, receive_until, running, wait_until
from tilewright.runtime.server.limits import ServerLimits

pytestmark = pytest.mark.timeout(60)

TEXTS = ["the dog", "quick", "lazy " * 30]
FORMS: dict[str, Callable] = {
    "float": lambda found: np.array(found, "f4"),
    "base64": lambda found: np.frombuffer(base64.b64decode(found), "<f4"),
}
VECTORS = [expected_embedding(TOKENIZER.encode(text), LIMITS.pooling) for text in TEXTS]


def test_texts_and_tokens_one_or_many(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        for given in (TEXTS, [TOKENIZER.encode(text) for text in TEXTS]):
            for form in FORMS:
                answer = client.embeddings.create(model=MODEL, input=given, encoding_format=form)
                assert [each.index for each in answer.data] == [0, 1, 2] and answer.model == MODEL
                for each, expected in zip(answer.data, VECTORS, strict=True):
                    found = each.embedding
                    vector = (
                        np.frombuffer(base64.b64decode(found), "<f4") if form == "base64" else np.array(found, "f4")
                    )
                    np.testing.assert_array_equal(vector, expected)
                    assert abs(np.linalg.norm(vector) - 1) < 1e-6
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(TOKENIZER.encode(t)) for t in TEXTS)
        for given in (TEXTS[0], TOKENIZER.encode(TEXTS[0])):  # as the client asks by itself: base64 on the way
            [each] = client.embeddings.create(model=MODEL, input=given, dimensions=HIDDEN).data
            np.testing.assert_array_equal(np.array(each.embedding, "f4"), VECTORS[0])
        many = client.embeddings.create(model=MODEL, input=["a", "the dog"] * 40).data
        assert len(many) == 80 and np.allclose(many[79].embedding, VECTORS[0])
    assert server.ask("GET", f"/v1/models/{MODEL}")[2]["pooling"] == LIMITS.pooling


def test_the_async_client(server: Running) -> None:
    async def ask() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            answers = await asyncio.gather(*(client.embeddings.create(model=MODEL, input=text) for text in TEXTS))
            return [answer.data[0].embedding for answer in answers]

    for found, expected in zip(asyncio.run(ask()), VECTORS, strict=True):
        np.testing.assert_array_equal(np.array(found, "f4"), expected)


def test_a_stream_goes_on_beside_them(server: Running) -> None:
    """Between two chunks of prompts, which take no more tokens than a step, the stream's step runs."""
    server.model.step_s = 0.002
    start = len(server.model.steps)
    connection = server.open_stream(max_tokens=60)
    status, _, body = server.ask("POST", "/v1/embeddings", {"model": MODEL, "input": ["lazy " * 60] * 4})
    assert status == 200 and len(body["data"]) == 4
    during = server.model.steps[start:]
    receive_until(connection, b"[DONE]")
    connection.close()
    server.model.step_s = 0.0
    chunks = [i for i, (tokens, _) in enumerate(during) if tokens > 8]
    assert len(chunks) >= 6 and all(during[i][0] <= LIMITS.max_tokens for i in chunks)
    assert all(after == before + 2 for before, after in pairwise(chunks)), "a turn had no step of the stream"


def test_one_who_leaves_frees_its_place(server: Running) -> None:
    server.model.gate.clear()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=0.3)
    with client, pytest.raises(openai.APITimeoutError):
        client.embeddings.create(model=MODEL, input=TEXTS)
    server.model.gate.set()
    wait_until(lambda: not server.service.active)


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"input": ""}, "invalid_value", "input:"),
        ({"input": []}, "invalid_value", "input:"),
        ({"input": ["a", 1]}, "invalid_value", "input."),
        ({"input": [400]}, "model_limit", "token 400 is not in the vocabulary"),
        ({"input": ["a"] * 2049}, "invalid_value", "input:"),
        ({"input": "x" * 20_000}, "context_length_exceeded", "is above 512"),
        ({"dimensions": 3}, "model_limit", "dimensions 3 is not 6"),
        ({"encoding_format": "hex"}, "invalid_value", "encoding_format"),
        ({"n": 2}, "unknown_parameter", "n:"),
    ],
)
def test_what_is_refused(server: Running, fields: dict, code: str, words: str) -> None:
    status, _, body = server.ask("POST", "/v1/embeddings", {"model": MODEL, "input": "a"} | fields)
    assert status == 400 and body["error"]["code"] == code and words in body["error"]["message"], body


def test_time_that_is_over_and_artifacts_without_them(server: Running) -> None:
    status, _, body = server.ask("POST", "/v1/embeddings", {"model": MODEL, "input": "a", "deadline_s": 1e-9})
    assert status == 408 and body["error"]["code"] == "deadline"
    with running(ServerLimits(), device=replace(LIMITS, pooling=None, hidden=None)) as old:
        status, _, body = old.ask("POST", "/v1/embeddings", {"model": MODEL, "input": "a"})
        assert status == 400 and "compile the model again" in body["error"]["message"]


@pytest.mark.parametrize(("way", "code"), [("drains", "draining"), ("fails", "engine_dead")])
def test_an_end_before_the_texts_are_computed(way: str, code: str) -> None:
    with running() as it, ThreadPoolExecutor(1) as pool:
        it.model.gate.clear()
        asked = pool.submit(it.ask, "POST", "/v1/embeddings", {"model": MODEL, "input": "lazy " * 90})
        wait_until(lambda: it.engine.load.running)
        if way == "drains":
            it.end()
            wait_until(lambda: it.service.draining)
            it.end()
            time.sleep(0.2)  # until the second signal is noticed
        else:
            it.model.broken = True
        it.model.gate.set()
        status, _, body = asked.result()
    assert status == 503 and body["error"]["code"] == code
