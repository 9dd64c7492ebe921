"""The official client, sync and async, against our server: what it asks for is what the device was told to do."""

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.server.serving import MESSAGES, MODEL, TOKENIZER, Running, answer_to, chat_prompt
from tilewright.runtime.types import SamplingParams

pytestmark = pytest.mark.timeout(60)

PROMPT = chat_prompt(MESSAGES)


@pytest.fixture(scope="module")
def client(_shared: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{_shared.url}/v1", api_key="any", max_retries=0) as it:
        yield it


SETTINGS = {
    "greedy": ({"temperature": 0}, {"temperature": 0.0}),
    "seed": ({"seed": 7}, {"seed": 7}),
    "nucleus": ({"seed": 7, "top_p": 0.5, "temperature": 0.7}, {"seed": 7, "top_p": 0.5, "temperature": 0.7}),
    "penalties": (
        {"seed": 1, "presence_penalty": 0.5, "frequency_penalty": -1},
        {"seed": 1, "presence_penalty": 0.5, "frequency_penalty": -1.0},
    ),
    "bias": ({"seed": 1, "logit_bias": {"17": 2.5, "3": -100}}, {"seed": 1, "logit_bias": {17: 2.5, 3: -100.0}}),
    "samples": ({"seed": 5, "n": 3}, {"seed": 5, "n": 3}),
    "extensions": (
        {"seed": 2, "extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "min_tokens": 9}},
        {"seed": 2, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "min_tokens": 9},
    ),
    "stop_tokens": (
        {"seed": 3, "extra_body": {"stop_token_ids": list(range(100, 116)), "ignore_eos": True}},
        {"seed": 3, "stop_token_ids": tuple(range(100, 116)), "ignore_eos": True},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_reach_the_device(server: Running, client: openai.OpenAI, name: str) -> None:
    asked, meant = SETTINGS[name]
    params = SamplingParams(max_tokens=24, **meant)
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=24, **asked)
    assert [c.index for c in answer.choices] == list(range(params.n))
    said = [answer_to(PROMPT, params, k) for k in range(params.n)]
    assert [c.message.content for c in answer.choices] == said
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    with client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=24, stream=True, stream_options={"include_usage": True}, **asked
    ) as stream:
        chunks = list(stream)
    *parts, last = chunks
    assert last.choices == [] and last.usage.total_tokens == answer.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    for k, whole in enumerate(said):
        own = [chunk.choices[0] for chunk in parts if chunk.choices[0].index == k]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == whole
        assert [c.finish_reason for c in own if c.finish_reason] == [answer.choices[k].finish_reason]


def test_stop_strings(server: Running, client: openai.OpenAI) -> None:
    whole = answer_to(PROMPT, SamplingParams(seed=11, max_tokens=60))
    pairs = (whole[i : i + 2] for i in range(10, len(whole)))
    stop = next(pair for pair in pairs if whole.find(pair) >= 10 and "\ufffd" not in pair)
    asked = {"model": MODEL, "messages": MESSAGES, "seed": 11, "max_tokens": 60, "stop": ["never said", stop]}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == whole[: whole.find(stop)]
    assert answer.choices[0].finish_reason == "stop"
    with client.chat.completions.create(**asked, stream=True) as stream:
        assert "".join(c.choices[0].delta.content or "" for c in stream) == whole[: whole.find(stop)]


def test_log_probabilities(server: Running, client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "seed": 4, "max_tokens": 20, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**asked)
    content = answer.choices[0].logprobs.content
    said = b"".join(bytes(each.bytes) for each in content)
    assert said.decode(errors="replace") == answer.choices[0].message.content
    for each in content:
        assert each.top_logprobs[0].logprob == each.logprob and len(each.top_logprobs) == 2
    with client.chat.completions.create(**asked, stream=True) as stream:
        streamed = [t for c in stream if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == content


def test_completions(server: Running, client: openai.OpenAI) -> None:
    prompts = ["the dog", "quick"]
    params = SamplingParams(seed=9, max_tokens=12, n=2)
    expected = [answer_to(p, params, k) for p in prompts for k in range(2)]
    answer = client.completions.create(model=MODEL, prompt=prompts, n=2, seed=9, max_tokens=12)
    assert [c.text for c in answer.choices] == expected
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    tokens = client.completions.create(
        model=MODEL, prompt=[TOKENIZER.encode(p) for p in prompts], n=2, seed=9, max_tokens=12
    )
    assert [c.text for c in tokens.choices] == expected
    echoed = client.completions.create(model=MODEL, prompt=prompts, n=2, seed=9, max_tokens=12, echo=True)
    assert [c.text for c in echoed.choices] == [
        p + expected[2 * i + k] for i, p in enumerate(prompts) for k in range(2)
    ]
    with client.completions.create(
        model=MODEL, prompt=prompts, n=2, seed=9, max_tokens=12, echo=True, stream=True
    ) as stream:
        texts = dict.fromkeys(range(4), "")
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [c.text for c in echoed.choices]


def test_completions_have_sixteen_tokens_unless_asked(server: Running, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="the dog", seed=1, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16 and answer.choices[0].finish_reason == "length"


def test_completions_log_probabilities(server: Running, client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "the dog", "seed": 1, "max_tokens": 12, "logprobs": 3}
    answer = client.completions.create(**asked)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    with client.completions.create(**asked, stream=True) as stream:
        pieces = [c.choices[0].logprobs for c in stream if c.choices[0].logprobs]
    assert [t for piece in pieces for t in piece.token_logprobs] == logprobs.token_logprobs


def test_conversations_as_the_template_spells_them(server: Running, client: openai.OpenAI) -> None:
    spelt = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "dog"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and\x00?"},
    ]
    plain = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the\ndog"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and\x00?"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=spelt, seed=1, max_tokens=8)
    assert answer.choices[0].message.content == answer_to(chat_prompt(plain), SamplingParams(seed=1, max_tokens=8))


def test_models(server: Running, client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert card.id == MODEL and client.models.retrieve(MODEL) == card
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("gpt-5")
    assert refusal.value.code == "model_not_found" and "fake" in refusal.value.message


def test_errors_are_the_clients_own(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=10_000)
    assert refusal.value.code == "context_length_exceeded" and "512 tokens" in refusal.value.message
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
    assert refusal.value.param == "temperature" and refusal.value.type == "invalid_request_error"


def test_a_deadline_ends_an_answer(server: Running, client: openai.OpenAI) -> None:
    server.model.clock.now_s = 0.0
    asked = {"model": MODEL, "messages": MESSAGES, "seed": 1, "extra_body": {"deadline_s": 0.15, "ignore_eos": True}}
    server.model.step_s = 0.02
    try:
        answer = client.chat.completions.create(**asked)
    finally:
        server.model.step_s = 0.0
    [choice] = answer.choices
    assert choice.finish_reason == "length" and choice.stop_reason == "deadline"
    assert 1 <= answer.usage.completion_tokens < 20


def test_higher_priorities_go_first(server: Running, client: openai.OpenAI) -> None:
    """Twelve requests wait at the gate, of which a step takes eight: the four that came last go first."""
    server.model.gate.clear()
    order: list[int] = []

    async def ask(async_client: openai.AsyncOpenAI, i: int) -> None:
        extra = {"priority": 5 if i >= 8 else 0, "ignore_eos": True}
        await async_client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=8 if i else 64, seed=1, extra_body=extra
        )
        order.append(i)

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as async_client:
            first = asyncio.create_task(ask(async_client, 0))
            while not server.engine.busy:
                await asyncio.sleep(0.001)
            rest = []
            for i in range(1, 13):
                rest.append(asyncio.create_task(ask(async_client, i)))
                while server.engine.load.waiting + server.engine.load.running < i + 1:
                    await asyncio.sleep(0.001)
            server.model.gate.set()
            await asyncio.gather(first, *rest)

    asyncio.run(all_of_them())
    assert set(order[:5]) == {8, 9, 10, 11, 12}


def test_the_async_client(server: Running) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> None:
        params = SamplingParams(seed=i, max_tokens=4 + i % 9)
        asked = {"model": MODEL, "messages": MESSAGES, "seed": i, "max_tokens": 4 + i % 9}
        if i % 2:
            answer = await client.chat.completions.create(**asked)
            assert answer.choices[0].message.content == answer_to(PROMPT, params)
            return
        stream = await client.chat.completions.create(**asked, stream=True)
        said = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(said) == answer_to(PROMPT, params)

    async def many() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            await asyncio.gather(*(one(client, i) for i in range(24)))

    asyncio.run(many())


def test_a_client_that_stops_reading_frees_its_place(server: Running, client: openai.OpenAI) -> None:
    server.model.step_s = 0.005
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.model.step_s = 0.0
    drawn = server.engine.stats.drawn
    server.rest()
    assert server.engine.stats.drawn - drawn < 400
