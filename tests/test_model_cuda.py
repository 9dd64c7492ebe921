"""Serving on a GPU: the logits are the model's, and a request's tokens do not depend on what runs beside it.

CUDA_TEST_ARTIFACT names an artifact to take instead of compiling one, CUDA_TEST_MODEL the Hugging
Face directory that it was made from, for the comparison of logits, and CUDA_TEST_STRICT_ARTIFACT one compiled strictly.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tilewright
from tests.checkpoints import make_checkpoint
from tilewright import Engine, EngineLimits, SamplingParams
from tilewright.runtime.types import Completion

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

# Sizes that the GPU's matrix units take, unlike those of the other tests.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
}

# Logits from bfloat16 activations against float32's, as a share of their norm.
LOGITS_BF16 = 3e-2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    if "CUDA_TEST_ARTIFACT" in os.environ:
        given = os.environ.get("CUDA_TEST_MODEL")
        return Path(given) if given else None
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", **SIZES)


@pytest.fixture(scope="module")
def path(source: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("CUDA_TEST_ARTIFACT")
    if given:
        return Path(given)
    assert source is not None
    output = tmp_path_factory.mktemp("artifact") / "tiny.tw"
    return tilewright.compile(source, target="cuda", output=output, max_tokens=256).path


@pytest.fixture(scope="module")
def model(path: Path) -> tilewright.Model:
    return tilewright.load(path, device="cuda", kv_tokens=16384)


def prompts(model: tilewright.Model, count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    vocab = model.limits.vocab_size
    return [rng.integers(0, vocab, int(n)).tolist() for n in rng.integers(1, 90, count)]


def params(index: int, **changes: object) -> SamplingParams:
    """Greedy ones, drawn ones and penalised ones by turns."""
    settings: dict[str, object] = {"max_tokens": 24, "seed": index, "temperature": index % 2, "ignore_eos": True}
    if index % 5 == 4:
        settings["frequency_penalty"] = 0.5
    return SamplingParams(**(settings | changes))  # type: ignore[arg-type]


def tokens_of(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module")
def alone(model: tilewright.Model) -> list[tuple[int, ...]]:
    """What each prompt gets with nothing beside it."""
    with Engine(model) as engine:
        asked = enumerate(prompts(model, 24))
        return [engine.generate([prompt], params(i))[0].token_ids for i, prompt in asked]


def test_logits_are_those_of_transformers(model: tilewright.Model, source: Path | None) -> None:
    if source is None:
        pytest.skip("CUDA_TEST_MODEL is not given")
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for length in (1, 3, 17, 64, 130):
        ids = np.random.default_rng(length).integers(0, model.limits.vocab_size, length).tolist()
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0].numpy()
        actual = model.logits(ids)
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert error < LOGITS_BF16, f"{length} tokens: {error:.2e}"


def test_the_first_token_is_the_most_likely_one(model: tilewright.Model) -> None:
    asked = prompts(model, 6, seed=1)
    with Engine(model) as engine:
        found = engine.generate(asked, SamplingParams(temperature=0, max_tokens=1, logprobs=3))
    for prompt, completion in zip(asked, found, strict=True):
        row = model.logits(prompt)[-1].astype(np.float64)
        assert completion.token_ids[0] == row.argmax()
        assert completion.logprobs is not None
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        for token, logprob in completion.logprobs[0].top:
            assert abs(logprob - expected[token]) < 1e-3


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "in_step"])
def test_in_a_batch_as_alone(model: tilewright.Model, alone, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ahead:
        monkeypatch.setattr(type(model), "runs_ahead", False)
    asked = prompts(model, 24)
    with Engine(model) as engine:
        assert tokens_of(engine.generate(asked, [params(i) for i in range(24)])) == alone
        again = engine.generate(asked, [params(i, logprobs=i % 3) for i in range(24)])
        engine.check_invariants()
    assert tokens_of(again) == alone, "asking for alternatives changes nothing"


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_in_chunks_as_alone(model: tilewright.Model, alone, chunk: int) -> None:
    with Engine(model, EngineLimits(max_chunk=chunk)) as engine:
        assert tokens_of(engine.generate(prompts(model, 24), [params(i) for i in range(24)])) == alone


@pytest.fixture(scope="module")
def small_pool(path: Path, alone) -> Iterator[tilewright.Model]:
    yield tilewright.load(path, device="cuda", kv_tokens=512, check=False)


@pytest.mark.parametrize("host_pages", [None, 0, 3], ids="host{}".format)
def test_preempted_as_alone(small_pool: tilewright.Model, alone, host_pages: int | None) -> None:
    swap = small_pool.executor.swap
    if host_pages is not None:
        swap._most = min(swap._most, host_pages)
    with Engine(small_pool) as engine:
        found = engine.generate(prompts(small_pool, 24), [params(i) for i in range(24)])
        assert tokens_of(found) == alone
        assert engine.stats.preemptions > 0
        assert host_pages is not None or engine.stats.replays == 0
        engine.check_invariants()


def test_samples_of_one_prompt(model: tilewright.Model) -> None:
    [prompt] = prompts(model, 1, seed=5)
    with Engine(model) as engine:
        several = engine.generate([prompt], params(1, n=4))
        [one] = engine.generate([prompt], params(1))
    assert several[0].token_ids == one.token_ids
    assert len({c.token_ids for c in several}) > 1


# ---- strict ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(source: Path | None, tmp_path_factory: pytest.TempPathFactory) -> tilewright.Model:
    given = os.environ.get("CUDA_TEST_STRICT_ARTIFACT")
    if given is None:
        assert source is not None
        output = tmp_path_factory.mktemp("artifact") / "strict.tw"
        given = str(tilewright.compile(source, target="cuda", output=output, max_tokens=256, strict=True).path)
    return tilewright.load(given, device="cuda", kv_tokens=16384)


def test_strict_answers_go_on_from_any_point(strict: tilewright.Model) -> None:
    """What was generated so far, asked for as a prompt, leads to the same tokens and log-probabilities, in every bit:
    greedy, since the draws' counter starts anew."""
    asked = prompts(strict, 16, seed=3)
    settings = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=2)
    with Engine(strict) as engine:
        whole = engine.generate(asked, settings)
        cuts = np.random.default_rng().integers(1, 40, len(asked)).tolist()
        longer = [prompt + list(c.token_ids[:cut]) for prompt, c, cut in zip(asked, whole, cuts, strict=True)]
        rest = [SamplingParams(max_tokens=40 - cut, temperature=0, ignore_eos=True, logprobs=2) for cut in cuts]
        resumed = engine.generate(longer, rest)
        alone = [engine.generate([prompt], settings)[0] for prompt in asked]
        engine.check_invariants()
    for first, then, cut in zip(whole, resumed, cuts, strict=True):
        assert first.logprobs is not None
        assert first.token_ids[cut:] == then.token_ids
        assert first.logprobs[cut:] == then.logprobs
    assert [(c.token_ids, c.logprobs) for c in alone] == [(c.token_ids, c.logprobs) for c in whole]


def test_strict_logits_are_those_of_the_default(strict: tilewright.Model, model: tilewright.Model) -> None:
    """Of a prompt: the same kernels run there."""
    [prompt] = prompts(model, 1, seed=9)
    np.testing.assert_array_equal(strict.logits(prompt), model.logits(prompt))
