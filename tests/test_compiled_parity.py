"""Every family as it is served, compiled into an artifact, against transformers: logits, and what the engine says.

tests/models/test_parity.py holds the plain mathematics of more of each family to the same reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tilewright
from tests.checkpoints import CASES, Case, load_reference, logits_of, make_checkpoint
from tests.tolerances import assert_close
from tilewright.compiler.options import POOLINGS

GREEDY_STEPS = 64
CHUNK = 64  # tokens a step, so that the longest prompt comes in five chunks, the last one short
# Each family; between them head_dim 48 and 80, 1, 3 and 8 queries per KV head, tied and untied, biases, windows.
SERVED = [
    case
    for case in CASES
    if case.id
    in (
        "llama-1to1-d80-untied",
        "llama-8to1-biases",
        "mistral-6to2-window",
        "qwen2-8to1-window-tied",
        "qwen3-8to1-d80-untied",
        "gemma3-3to1",
    )
]
PAGE_SIZES = (16, 48)  # the second is no power of two and divides no chunk


@dataclass(frozen=True)
class Pair:
    """The compiled model and transformers' of the same checkpoint."""

    case: Case
    ours: tilewright.Model
    theirs: Any
    pooling: str

    def tokens(self, length: int, seed: int | None = None) -> list[int]:
        return np.random.default_rng(seed).integers(0, self.ours.limits.vocab_size, length).tolist()


@pytest.fixture(scope="module", params=enumerate(SERVED), ids=lambda numbered: numbered[1].id)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, compile_tiny: Callable[..., Path]
) -> Iterator[Pair]:
    number, case = request.param
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("model"), case.family, **dict(case.overrides))
    pooling = POOLINGS[number % len(POOLINGS)]
    artifact = compile_tiny(
        checkpoint, max_tokens=CHUNK, page_size=PAGE_SIZES[number % len(PAGE_SIZES)], pooling=pooling
    )
    yield Pair(case, tilewright.load(artifact, kv_tokens=1024), load_reference(checkpoint), pooling)


@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_logits(pair: Pair, length: int) -> None:
    tokens = pair.tokens(length)
    assert_close(pair.ours.logits(tokens), logits_of(pair.theirs, tokens), "logits_float32")


def test_greedy_tokens(pair: Pair) -> None:
    """Three prompts at a time; fixed ones, as two logits of a tiny random model can lie within rounding."""
    prompts = [pair.tokens(length, seed=length) for length in (1, 5, 70)]
    params = tilewright.SamplingParams(temperature=0, max_tokens=GREEDY_STEPS, ignore_eos=True)
    with tilewright.Engine(pair.ours) as engine:
        completions = engine.generate(prompts, params)
        engine.check_invariants()
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == _greedy(pair.theirs, prompt), f"after a prompt of {len(prompt)}"


def test_embeddings(pair: Pair) -> None:
    """Beside an answer that runs, in chunks of which the longest text fills several."""
    prompts = [pair.tokens(length) for length in (1, 5, 150)]
    with tilewright.Engine(pair.ours) as engine:
        other = engine.stream_sync(pair.tokens(9), tilewright.SamplingParams(max_tokens=40, ignore_eos=True))
        next(other)
        vectors = engine.embed(prompts)
        alone = engine.embed(prompts[2:])
        for _ in other:
            pass
        engine.check_invariants()
    np.testing.assert_array_equal(vectors[2], alone[0])
    for prompt, vector in zip(prompts, vectors, strict=True):
        with torch.no_grad():
            states = pair.theirs(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].numpy()
        pooled = states.mean(axis=0) if pair.pooling == "mean" else states[-1]
        assert_close(vector, pooled / np.linalg.norm(pooled), "logits_float32")


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    model.generation_config.eos_token_id = None  # go on after it
    options = {"max_new_tokens": GREEDY_STEPS, "min_new_tokens": GREEDY_STEPS, "do_sample": False}
    return model.generate(torch.tensor([prompt]), **options)[0].tolist()[len(prompt) :]
