"""SmolLM2 with its real weights: as true as float32 allows, and the same answer however it is served."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tilewright
from tests.checkpoints import load_gguf_reference, logits_of
from tests.logits_batch import LogitsBatch
from tests.tolerances import assert_close
from tilewright import Engine, EngineLimits, SamplingParams
from tilewright.compiler.frontends.packages import packaged_model_path

pytestmark = pytest.mark.weights

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how a compiler works.",
    "List three uses of copper.",
    "Tell me a story about a fox.",
    "How do I bake bread?",
    "What is the difference between a list and a tuple in Python?",
    "Summarise the water cycle.",
    "Why is the sky blue?",
    "What should I pack for a week in the mountains?",
)
GREEDY_STEPS = 200
AGREEMENT = 0.99  # of the most likely token, quantised compute against float32


# ---- against transformers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A prompt, what float32 compute makes of it, and the token that transformers would have put in each place."""

    prompt: list[int]
    answer: list[int]
    expected: list[int]


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_gguf_reference(packaged_model_path("smollm2-135m", lambda _: None))


@pytest.fixture(scope="module")
def texts(smollm2_float: Path, reference: Any) -> list[Text]:
    model = tilewright.load(smollm2_float, kv_tokens=4096)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    with Engine(model) as engine:
        params = SamplingParams(temperature=0, max_tokens=GREEDY_STEPS, ignore_eos=True)
        answers = [list(completion.token_ids) for completion in engine.generate(prompts, params)]
    with _torch_threads(model.threads):
        expected = [_followers(reference, p, a) for p, a in zip(prompts, answers, strict=True)]
    return [Text(*parts) for parts in zip(prompts, answers, expected, strict=True)]


def _followers(reference: Any, prompt: list[int], answer: list[int]) -> list[int]:
    """The reference's greedy choice in each place of the answer, after what stands before it."""
    return logits_of(reference, prompt + answer[:-1])[len(prompt) - 1 :].argmax(axis=-1).tolist()


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """More than the one that tests keep torch to."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_float_compute_gives_the_logits_of_transformers(smollm2_float: Path, reference: Any) -> None:
    """transformers dequantises the same file."""
    model = tilewright.load(smollm2_float, kv_tokens=64)
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode("The capital of France is Paris, and its river")
    assert_close(model.logits(tokens), logits_of(reference, tokens), "logits_float32")


@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_float_compute_says_what_transformers_says(texts: list[Text], number: int) -> None:
    """Each of our tokens is the reference's choice after the tokens before it, so it would say the same text."""
    text = texts[number]
    assert len(text.answer) == GREEDY_STEPS
    assert text.answer == text.expected


def test_quantised_compute_agrees_with_float(texts: list[Text], smollm2: Path) -> None:
    model = tilewright.load(smollm2, kv_tokens=4096)
    equal = []
    for text in texts:
        logits = model.logits(text.prompt + text.answer[:-1])
        equal += (logits[len(text.prompt) - 1 :].argmax(axis=-1) == text.expected).tolist()
    assert len(equal) == GREEDY_STEPS * len(QUESTIONS)
    assert np.mean(equal) >= AGREEMENT


# ---- the same logits -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["smollm2", "smollm2_float"])
def either(request: pytest.FixtureRequest) -> tilewright.Model:
    """The model with quantised compute, and with float32."""
    return tilewright.load(request.getfixturevalue(request.param), kv_tokens=1024)


def random_tokens(model: tilewright.Model, length: int) -> list[int]:
    return np.random.default_rng().integers(0, model.limits.vocab_size, length).tolist()


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def test_logits_step_by_step_have_the_bits_of_logits_in_one_go(either: tilewright.Model) -> None:
    tokens = random_tokens(either, 37)
    batch = LogitsBatch(either)
    steps = [batch.step({0: [token]})[0] for token in tokens]
    assert_same_bits(np.concatenate(steps), either.logits(tokens))


def test_logits_in_a_batch_have_the_bits_of_logits_alone(either: tilewright.Model) -> None:
    """Seven sequences that come, grow by chunks of any size beside each other's decodes, and end."""
    rng = np.random.default_rng()
    whole = {name: random_tokens(either, length) for name, length in enumerate((1, 2, 17, 33, 48, 70, 131))}
    batch, done = LogitsBatch(either), dict.fromkeys(whole, 0)
    parts: dict[int, list[np.ndarray]] = {name: [] for name in whole}
    while unfinished := [name for name in whole if done[name] < len(whole[name])]:
        chosen = rng.permutation(unfinished)[: rng.integers(1, len(unfinished), endpoint=True)].tolist()
        lengths = {name: int(rng.choice([1, 1, 3, 16, 40])) for name in chosen}
        result = batch.step({name: whole[name][done[name] : done[name] + n] for name, n in lengths.items()})
        for name, logits in result.items():
            parts[name].append(logits)
            done[name] += len(logits)
    for name, tokens in whole.items():
        assert_same_bits(np.concatenate(parts[name]), either.logits(tokens))


# ---- the same tokens -------------------------------------------------------------------------------------------------

PASSAGE = (
    "The lighthouse had stood on the headland for two hundred years before anybody thought to ask who had built it. "
    "Fishermen steered by it, children climbed it, and in winter the schoolmaster kept his boat in its cellar. Then, "
    "one spring, a letter came from the capital: an inspector wished to see the papers. There were no papers. There "
    "was only the tower, a brass lamp that nobody had ever been seen to light, and a door whose lock had no key. "
    "Continue the story, and explain where the lamp's oil came from."
)


@dataclass(frozen=True)
class Asked:
    prompt: str
    params: SamplingParams


def asked(prompt: str, max_tokens: int, **params: Any) -> Asked:
    """Log-probabilities are asked for as well: they tell rounding that changes no token."""
    return Asked(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=2, **params))


GREEDY = asked(PASSAGE, 48, temperature=0)
SEEDED = asked(PASSAGE, 48, temperature=0.8, top_p=0.9, seed=11)
OTHERS = tuple(
    asked(f"{question} {question}" * (1 + i % 3), 8 + 5 * (i % 4), temperature=(i % 3) / 2, top_k=7 * (i % 2), seed=i)
    for i, question in enumerate([*QUESTIONS, *QUESTIONS[:5]])
)
CROWD = (GREEDY, SEEDED, *OTHERS)  # 17: each is among 16 others
BOTH = pytest.mark.parametrize("number", [0, 1], ids=["greedy", "seeded"])  # of the crowd

Said = tuple[tuple[int, ...], Any]


def say(engine: Engine, *requests: Asked) -> list[Said]:
    """Tokens and log-probabilities of requests handed in together."""
    completions = engine.generate([r.prompt for r in requests], [r.params for r in requests])
    return [(completion.token_ids, completion.logprobs) for completion in completions]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> tilewright.Model:
    return tilewright.load(smollm2, kv_tokens=8192)


@pytest.fixture(scope="module")
def alone(model: tilewright.Model) -> list[Said]:
    """What each request of the crowd gets when it is all there is."""
    with Engine(model) as engine:
        return [say(engine, request)[0] for request in CROWD]


def prompt_tokens(model: tilewright.Model, request: Asked) -> int:
    assert model.tokenizer is not None
    return len(model.tokenizer.encode(request.prompt))


def test_repeated(model: tilewright.Model, alone: list[Said]) -> None:
    assert alone[0][0] != alone[1][0]
    with Engine(model) as engine:
        for request, expected in zip(CROWD[:2], alone, strict=False):
            assert say(engine, request) == [expected]


def test_among_others_that_arrive_at_random(model: tilewright.Model, alone: list[Said]) -> None:
    """All 17 are compared; each comes from a thread of its own, at a time of its own."""
    delays = np.random.default_rng().uniform(0, 2, len(CROWD)).tolist()
    with Engine(model) as engine, ThreadPoolExecutor(len(CROWD)) as threads:

        def arrive(request: Asked, delay_s: float) -> Said:
            time.sleep(delay_s)
            return say(engine, request)[0]

        said = list(threads.map(arrive, CROWD, delays))
        engine.check_invariants()
        assert engine.stats.drawn > engine.stats.steps, "no two of them were ever in one step"
    assert said == alone


@pytest.mark.parametrize("chunk", [1, 7, 64, None], ids=lambda chunk: f"chunk-{chunk or 'all'}")
@BOTH
def test_prefill_in_chunks(model: tilewright.Model, alone: list[Said], number: int, chunk: int | None) -> None:
    request = CROWD[number]
    with Engine(model, EngineLimits(max_chunk=chunk)) as engine:
        assert say(engine, request) == [alone[number]]
        length = prompt_tokens(model, request)
        prefill = -(-length // (chunk or length))
        assert engine.stats.steps == prefill + len(alone[number][0]) - 1


@BOTH
def test_after_preemption(smollm2: Path, model: tilewright.Model, alone: list[Said], number: int) -> None:
    """Beside one that came earlier and answers at length, in a pool too small for both: the later one gives way."""
    earlier = asked("Count from one to one hundred.", 120, temperature=0)
    small = tilewright.load(smollm2, kv_tokens=prompt_tokens(model, CROWD[number]) + 64)
    with Engine(small) as engine:
        said = say(engine, earlier, CROWD[number])
        engine.check_invariants()
        assert engine.stats.preemptions >= 1
    assert said[1] == alone[number]
    with Engine(model) as engine:
        assert said[:1] == say(engine, earlier)
