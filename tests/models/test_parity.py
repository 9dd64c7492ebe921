"""Every family against transformers, in float32, on tiny random checkpoints."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import CASES, Case, load_reference, logits_of, make_checkpoint
from tests.reference import ReferenceModel
from tests.tolerances import TOLERANCE, assert_close
from tilewright.compiler.checkpoint import Checkpoint
from tilewright.compiler.frontends import load_checkpoint
from tilewright.models.registry import build_model

GREEDY_STEPS = 64

_SCALED = (
    Case(
        "llama-rope-llama3",
        "llama",
        (
            ("num_hidden_layers", 1),
            (
                "rope_parameters",
                {
                    "rope_type": "llama3",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
            ),
        ),
    ),
    Case(
        "gemma3-rope-linear",
        "gemma3",
        (
            ("num_hidden_layers", 2),
            ("layer_types", ["sliding_attention", "full_attention"]),
            (
                "rope_parameters",
                {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
        ),
    ),
)


@dataclass(frozen=True)
class Pair:
    """Our model and transformers' of the same checkpoint."""

    case: Case
    checkpoint: Checkpoint
    ours: ReferenceModel
    theirs: Any

    def tokens(self, length: int) -> list[int]:
        return np.random.default_rng().integers(0, self.checkpoint.config.vocab, length).tolist()


@pytest.fixture(scope="module", params=[*CASES, *_SCALED], ids=lambda case: case.id)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    case: Case = request.param
    path = make_checkpoint(tmp_path_factory.mktemp("model"), case.family, **dict(case.overrides))
    checkpoint = load_checkpoint(path)
    ours = ReferenceModel(build_model(checkpoint.config), checkpoint)
    yield Pair(case, checkpoint, ours, load_reference(path))


@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_logits(pair: Pair, length: int) -> None:
    tokens = pair.tokens(length)
    assert_close(pair.ours(tokens), logits_of(pair.theirs, tokens), "logits_float32")


def test_greedy_tokens(pair: Pair) -> None:
    """The same tokens for 64 steps. Being causal, ours need not be run step by step: each must follow its prefix.

    A token may differ only where two are equally likely to within the tolerance on logits.
    """
    prompt = pair.tokens(5)
    options = {"max_new_tokens": GREEDY_STEPS, "min_new_tokens": GREEDY_STEPS, "do_sample": False, "eos_token_id": -1}
    seen = torch.ones(1, len(prompt), dtype=torch.int64)  # else padding is guessed from the prompt's tokens
    theirs = pair.theirs.generate(torch.tensor([prompt]), attention_mask=seen, **options)[0].tolist()
    logits = pair.ours(theirs[:-1])[len(prompt) - 1 :]
    chosen = np.take_along_axis(logits, np.array(theirs[len(prompt) :])[:, None], -1)[:, 0]
    assert len(logits) == GREEDY_STEPS
    assert (logits.max(-1) - chosen).max() <= TOLERANCE["logits_float32"] * np.abs(logits).max()


def test_taps(tmp_path: Path) -> None:
    """With taps the hidden state after each layer follows the logits."""
    path = make_checkpoint(tmp_path, "gemma3")
    checkpoint = load_checkpoint(path)
    tokens = np.random.default_rng().integers(0, checkpoint.config.vocab, 9).tolist()
    logits, *hidden = ReferenceModel(build_model(checkpoint.config, taps=True), checkpoint)(tokens)
    theirs = _hidden_states(load_reference(path), tokens)
    assert_close(logits, theirs.pop(), "logits_float32")
    assert len(hidden) == checkpoint.config.layers
    for actual, expected in zip(hidden[:-1], theirs, strict=True):
        assert_close(actual, expected, "logits_float32")


def _hidden_states(model: Any, tokens: list[int]) -> list[np.ndarray]:
    """After each layer but the last, which transformers gives behind the last norm; then the logits."""
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    return [*(h[0].numpy() for h in out.hidden_states[1:-1]), out.logits[0].numpy()]
