"""The sampler's kernel against tests/sampling_reference.py, on rows of random settings."""

from functools import cache

import numpy as np
import pytest

from tests.kernel_runner import KernelRunner, host_target, lower
from tests.sampling_reference import kept_weights, penalise, sample_reference, uniform
from tests.tolerances import assert_close
from tilewright.compiler.composites import SAMPLING_INPUTS, SampleSpec
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cpu.sample import Sample, Tile

NEAR = 1e-5  # a boundary of the distribution this close may fall to either side: float32 sums against float64


@cache
def compiled(vocab: int, top: int = 20, bits: int = 2) -> KernelRunner:
    return KernelRunner(lower(Sample(), Call("sample", SampleSpec(vocab, top), None, 64), tile=Tile(bits)))


def make_inputs(rows: int, vocab: int, rng: np.random.Generator, **fixed: object) -> dict[str, np.ndarray]:
    """Random settings for every row; `fixed` values hold for all of them."""

    def choose(*options: float) -> np.ndarray:
        return rng.choice(options, rows).astype(np.float32)

    def lists(longest: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = [rng.permutation(vocab)[: rng.integers(0, longest)] for _ in range(rows)]
        return np.cumsum([0, *map(len, tokens)]).astype(np.int32), np.concatenate(tokens).astype(np.int32)

    penalty_indptr, penalty_tokens = lists(min(vocab, 30))
    bias_indptr, bias_tokens = lists(min(vocab // 2, 6))
    biases = rng.choice([-np.inf, -3.0, 2.5], len(bias_tokens)).astype(np.float32)
    inputs = {
        "temperature": choose(0.0, 0.3, 1.0, 1.7),
        "top_k": rng.choice([0, 1, 5, 40, vocab], rows).astype(np.int32),
        "top_p": choose(1.0, 0.9, 0.5, 0.01),
        "min_p": choose(0.0, 0.05, 0.3),
        "repetition_penalty": choose(1.0, 1.3),
        "presence_penalty": choose(0.0, 0.7),
        "frequency_penalty": choose(0.0, 0.2),
        "seeds": rng.integers(-(2**63), 2**63 - 1, rows),
        "draws": rng.integers(0, 1000, rows).astype(np.int32),
        "penalty_indptr": penalty_indptr,
        "penalty_tokens": penalty_tokens,
        "penalty_counts": rng.integers(0, 4, len(penalty_tokens)).astype(np.int32),
        "bias_indptr": bias_indptr,
        "bias_tokens": bias_tokens,
        "bias_values": biases,
        "alternatives": np.full(rows, 20, np.int32),
    }
    for name, value in fixed.items():
        inputs[name] = np.full_like(inputs[name], value)
    return {name: inputs[name] for name in SAMPLING_INPUTS}


def without_lists(inputs: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    empty = {n: np.zeros(0, d) for n, (e, d) in SAMPLING_INPUTS.items() if e in ("c", "e")}
    return inputs | empty | {n: np.zeros(rows + 1, np.int32) for n in ("penalty_indptr", "bias_indptr")}


def one_row(inputs: dict[str, np.ndarray], r: int) -> dict[str, np.ndarray]:
    """The settings of row r alone."""
    row = {}
    for name, (extent, dtype) in SAMPLING_INPUTS.items():
        if extent == "r":
            row[name] = inputs[name][r : r + 1].copy()
        elif extent == "r+1":
            row[name] = np.array([0, inputs[name][r + 1] - inputs[name][r]], dtype)
        else:
            indptr = inputs["penalty_indptr" if extent == "c" else "bias_indptr"]
            row[name] = inputs[name][indptr[r] : indptr[r + 1]].copy()
    return row


def decided(logits: np.ndarray, inputs: dict[str, np.ndarray], r: int) -> bool:
    """Whether rounding can't change row r's token: no boundary of top-p, min-p or the draw is near."""
    if inputs["temperature"][r] == 0:
        return True
    bias, listed = (slice(*inputs[f"{n}_indptr"][r : r + 2]) for n in ("bias", "penalty"))
    row = penalise(
        logits[r],
        dict(zip(inputs["bias_tokens"][bias].tolist(), inputs["bias_values"][bias].tolist(), strict=True)),
        dict(zip(inputs["penalty_tokens"][listed].tolist(), inputs["penalty_counts"][listed].tolist(), strict=True)),
        *(float(inputs[f"{n}_penalty"][r]) for n in ("repetition", "presence", "frequency")),
    )
    settings = [inputs[n][r].item() for n in ("temperature", "top_k", "top_p", "min_p")]
    ranked = np.sort(kept_weights(row, settings[0], settings[1], 1.0, 0.0))[::-1].astype(np.float64)
    if settings[2] < 1 and np.abs(np.cumsum(ranked) / ranked.sum() - settings[2]).min() < NEAR:
        return False
    if settings[3] > 0 and np.abs(ranked - settings[3]).min() < NEAR:
        return False
    weights = kept_weights(row, *settings).astype(np.float64)
    draw = uniform(int(inputs["seeds"][r]), int(inputs["draws"][r]))
    return bool(np.abs(np.cumsum(weights) / weights.sum() - draw).min() > NEAR)


def check(logits: np.ndarray, inputs: dict[str, np.ndarray], top: int = 20, bits: int = 2) -> int:
    """Compares with the reference; returns how many rows were compared token by token."""
    vocab = logits.shape[1]
    ids, logprobs, top_ids, top_logprobs = compiled(vocab, top, bits)(logits, *inputs.values())
    want_ids, _, want_top_ids, want_top = sample_reference(logits, **inputs, top_logprobs=top)
    np.testing.assert_array_equal(top_ids, want_top_ids)
    assert_close(top_logprobs, want_top)
    compared = [r for r in range(len(logits)) if decided(logits, inputs, r)]
    np.testing.assert_array_equal(ids[compared], want_ids[compared])
    exact = logits.astype(np.float64)
    exact = exact - exact.max(-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    assert_close(logprobs, np.take_along_axis(exact, ids[:, None], -1)[:, 0])
    return len(compared)


@pytest.mark.parametrize("vocab", [21, 256, 1000, 4099])
def test_matches_the_reference(vocab: int) -> None:
    rng = np.random.default_rng()
    rows, compared = 400, 0
    for scale in (1.0, 6.0):
        logits = (rng.standard_normal((rows, vocab)) * scale).astype(np.float32)
        compared += check(logits, make_inputs(rows, vocab, rng))
    assert compared > 0.6 * 2 * rows


def test_the_other_tile_gives_the_same_tokens() -> None:
    rng = np.random.default_rng()
    logits = rng.standard_normal((60, 1000)).astype(np.float32) * 4
    inputs = make_inputs(60, 1000, rng)
    check(logits, inputs, bits=1)
    for a, b in zip(*(compiled(1000, 20, bits)(logits, *inputs.values()) for bits in (1, 2)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_ties_go_to_the_lowest_token() -> None:
    rng = np.random.default_rng()
    logits = rng.integers(-2, 3, (200, 600)).astype(np.float32)
    check(logits, make_inputs(200, 600, rng))
    flat = np.zeros((3, 600), np.float32)
    ids, _, top_ids, _ = compiled(600)(flat, *without_lists(make_inputs(3, 600, rng, temperature=0), 3).values())
    assert (ids == 0).all() and (top_ids == np.arange(20)).all()


def test_few_alternatives_of_a_tiny_vocabulary() -> None:
    rng = np.random.default_rng()
    logits = rng.standard_normal((30, 3)).astype(np.float32)
    check(logits, make_inputs(30, 3, rng), top=3)


def test_banned_tokens_and_tokens_without_a_chance() -> None:
    """A bias of -inf bans; raw logits of -inf are never drawn, and come last among the alternatives."""
    rng = np.random.default_rng()
    logits = rng.standard_normal((50, 40)).astype(np.float32)
    logits[:, 5:30] = -np.inf
    inputs = make_inputs(50, 40, rng, top_k=0)
    inputs["bias_indptr"] = np.arange(0, 51 * 2, 2, dtype=np.int32)
    inputs["bias_tokens"] = np.tile(np.array([2, 33], np.int32), 50)
    inputs["bias_values"] = np.full(100, -np.inf, np.float32)
    ids, _, top_ids, top_logprobs = compiled(40)(logits, *inputs.values())
    assert not np.isin(ids, [2, 33, *range(5, 30)]).any()
    want = sample_reference(logits, **inputs)
    np.testing.assert_array_equal(top_ids, want[2])
    assert (np.isneginf(top_logprobs) == np.isneginf(want[3])).all()


def test_draws_follow_the_distribution() -> None:
    rng = np.random.default_rng()
    vocab, rows = 50, 20000
    logits = np.repeat(rng.standard_normal((1, vocab)).astype(np.float32), rows, 0)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 1234567890123}
    inputs = without_lists(make_inputs(rows, vocab, rng, **settings), rows)
    inputs["draws"] = np.arange(rows, dtype=np.int32)
    ids = compiled(vocab)(logits, *inputs.values())[0]
    p = np.exp(logits[0].astype(np.float64))
    p /= p.sum()
    share = np.bincount(ids, minlength=vocab) / rows
    assert np.abs(share - p).max() < 5 * np.sqrt(p.max() / rows)


def test_a_row_has_the_same_bits_alone() -> None:
    rng = np.random.default_rng()
    logits = rng.standard_normal((12, 1000)).astype(np.float32) * 3
    inputs = make_inputs(12, 1000, rng)
    whole = compiled(1000)(logits, *inputs.values())
    for r in range(12):
        for alone, together in zip(
            compiled(1000)(logits[r : r + 1].copy(), *one_row(inputs, r).values()), whole, strict=True
        ):
            np.testing.assert_array_equal(alone[0], together[r])


def test_rejects_more_alternatives_than_tokens() -> None:
    rejected = Sample().match(Call("sample", SampleSpec(10, 20), None, 8), host_target())
    assert isinstance(rejected, Reject) and "top_logprobs 20 is not within 1..10" in rejected.reason


def test_tile_checks_itself() -> None:
    with pytest.raises(ValueError, match="bits 4 is neither 1 nor 2"):
        Tile(4)


def test_floor_reads_the_logits_once() -> None:
    facts = Sample().match(Call("sample", SampleSpec(100, 5), None, 8), host_target())
    assert Sample().floor(facts, host_target()).bytes_per_row == 400 + 8 + 40
