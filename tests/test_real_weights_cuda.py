"""Real models on a GPU, their weights dequantised to bfloat16: they say what transformers says on the same GPU, and the
same however they are served."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tilewright
from tests.checkpoints import load_gguf_reference
from tests.test_real_weights import CROWD, GREEDY_STEPS, QUESTIONS, Said, prompt_tokens, say
from tests.tolerances import TOLERANCE
from tilewright import Engine, EngineLimits, SamplingParams
from tilewright.compiler.frontends.packages import packaged_model_path

pytestmark = [pytest.mark.gpu, pytest.mark.weights, pytest.mark.timeout(300)]

NOISE = 1.25  # times that of another implementation in the same dtype
AGREEMENT = 0.98  # of the most likely token, bfloat16 compute against float32
MODELS = {"smollm2-135m": True, "gemma3-270m": False}  # and whether they were taught to chat


@dataclass(frozen=True)
class Pair:
    """A compiled model, the artifact that it came from, and transformers' on the same GPU in float32."""

    path: Path
    model: tilewright.Model
    reference: Any
    chats: bool

    def prompt(self, question: str) -> list[int]:
        """Tokens of a question, as the model was taught to read it."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        return (
            tokenizer.encode_chat([{"role": "user", "content": question}]) if self.chats else tokenizer.encode(question)
        )

    def logits(self, tokens: list[int]) -> np.ndarray:
        """The reference's, float32[n, vocab]."""
        with torch.no_grad():
            return (
                self.reference(torch.tensor([tokens], device="cuda"), use_cache=False).logits[0].float().cpu().numpy()
            )


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param
    output = tmp_path_factory.mktemp(name) / "model.tw"
    path = tilewright.compile(name, target="cuda", output=output, max_tokens=512).path
    reference = load_gguf_reference(packaged_model_path(name, lambda _: None)).to("cuda")
    return Pair(path, tilewright.load(path, device="cuda", kv_tokens=32768), reference, MODELS[name])


def test_logits_are_as_close_to_float32_as_transformers_in_bfloat16(pair: Pair) -> None:
    """By the root of the mean square over ten prompts. The largest of millions of differences is a matter of luck: at
    the start of a sequence these models have activations in the thousands, whose rounding alone moves it."""
    rounded = copy.deepcopy(pair.reference).to(torch.bfloat16)
    ours, theirs = [], []
    for tokens in map(pair.prompt, QUESTIONS):
        expected = pair.logits(tokens)
        ours.append(root_mean_square(pair.model.logits(tokens), expected))
        theirs.append(root_mean_square(replace(pair, reference=rounded).logits(tokens), expected))
    print(f"error {np.mean(ours):.4f}, of transformers in bfloat16 {np.mean(theirs):.4f}")
    assert np.mean(ours) <= NOISE * np.mean(theirs)
    assert max(ours) <= TOLERANCE["logits_bfloat16"]


def root_mean_square(logits: np.ndarray, expected: np.ndarray) -> float:
    """Of the difference, relative to the largest magnitude that is expected."""
    difference = np.asarray(logits, np.float64) - expected
    assert np.isfinite(difference).all()
    return float(np.sqrt(np.mean(difference**2)) / np.abs(expected).max())


def test_greedy_tokens_are_those_of_transformers(pair: Pair) -> None:
    """Of each answer's tokens, the share that is the reference's choice after what stands before it."""
    prompts = [pair.prompt(question) for question in QUESTIONS]
    with Engine(pair.model) as engine:
        params = SamplingParams(temperature=0, max_tokens=GREEDY_STEPS, ignore_eos=True)
        answers = [list(completion.token_ids) for completion in engine.generate(prompts, params)]
    equal = []
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = pair.logits(prompt + answer[:-1])[len(prompt) - 1 :].argmax(axis=-1)
        equal += (expected == answer).tolist()
    assert len(equal) == GREEDY_STEPS * len(QUESTIONS)
    print(f"agreement {np.mean(equal):.4f}")
    assert np.mean(equal) >= AGREEMENT


@pytest.fixture(scope="module")
def alone(pair: Pair) -> list[Said]:
    with Engine(pair.model) as engine:
        return [say(engine, request)[0] for request in CROWD]


def test_in_a_batch_as_alone(pair: Pair, alone: list[Said]) -> None:
    """Tokens and log-probabilities, so every rounding."""
    with Engine(pair.model) as engine:
        for _ in range(3):
            assert say(engine, *CROWD) == alone
        engine.check_invariants()


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_in_chunks_as_alone(pair: Pair, alone: list[Said], chunk: int) -> None:
    with Engine(pair.model, EngineLimits(max_chunk=chunk)) as engine:
        assert say(engine, *CROWD) == alone


def test_preempted_as_alone(pair: Pair, alone: list[Said]) -> None:
    longest = max(prompt_tokens(pair.model, request) + (request.params.max_tokens or 0) for request in CROWD)
    small = tilewright.load(pair.path, device="cuda", kv_tokens=longest + 64)
    with Engine(small) as engine:
        assert say(engine, *CROWD) == alone
        assert engine.stats.preemptions > 0
        assert engine.stats.replays == 0, "pages are kept in host memory, not computed again"
        engine.check_invariants()
