"""The GPU sampler against tests/sampling_reference.py, on rows of random settings."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.breadth import quick
from tests.cuda_runner import CudaRunner, cuda_target
from tests.sampling_reference import log_softmax, sample_reference, uniform
from tests.schedules.test_sample import decided, make_inputs, one_row, without_lists
from tests.tolerances import assert_close
from tilewright.compiler.composites import SAMPLING_INPUTS, SampleSpec
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cuda.sample import Sample, SampleTile

LARGE = 128256
IN_SCRATCH = SampleTile(1, 512, False)  # what GPUs without clusters run


@cache
def compiled(vocab: int, top: int = 20, tile: SampleTile | None = None, target: str = "nvidia-h100") -> CudaRunner:
    record = RECORDS[target]
    facts = Sample().match(Call("sample", SampleSpec(vocab, top), None, 64), record)
    assert not isinstance(facts, Reject), facts.reason
    tile = tile or Sample().space(facts, record)[0]
    return CudaRunner(Sample().apply(facts, tile, record), record)


def fresh() -> np.random.Generator:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"{seed=}")
    return np.random.default_rng(seed)


def run(
    logits: np.ndarray, inputs: dict[str, np.ndarray], top: int = 20, tile: SampleTile | None = None
) -> tuple[Any, ...]:
    """ids, logprobs, top_ids, top_logprobs."""
    outputs = compiled(logits.shape[1], top, tile)(*arguments(logits, inputs))
    return tuple(o.cpu().numpy() for o in outputs)


def arguments(logits: np.ndarray, inputs: dict[str, np.ndarray]) -> list[Any]:
    """On the GPU. Every list has an entry more that must not be read, and so is never empty."""
    import torch

    def ended(name: str, array: np.ndarray) -> np.ndarray:
        if SAMPLING_INPUTS[name][0] not in ("c", "e"):
            return array
        return np.append(array, np.array([np.nan if array.dtype.kind == "f" else 0], array.dtype))

    given = [logits, *(ended(name, array) for name, array in inputs.items())]
    return [torch.from_numpy(array).cuda() for array in given]


def check(
    logits: np.ndarray, inputs: dict[str, np.ndarray], top: int = 20, tile: SampleTile | None = None
) -> tuple[int, np.ndarray]:
    """Compares with the reference; returns how many rows were compared token by token, and the tokens."""
    ids, logprobs, top_ids, top_logprobs = run(logits, inputs, top, tile)
    want_ids, _, want_top_ids, want_top = sample_reference(logits, **inputs, top_logprobs=top)
    for r, wanted in enumerate(inputs["alternatives"]):
        np.testing.assert_array_equal(top_ids[r, :wanted], want_top_ids[r, :wanted])
    some = np.arange(top) < inputs["alternatives"][:, None]
    finite = some & np.isfinite(want_top)
    assert (top_logprobs[some & ~finite] == -np.inf).all()
    assert_close(top_logprobs[finite], want_top[finite])
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    compared = [r for r in range(len(logits)) if decided(logits, inputs, r)]
    np.testing.assert_array_equal(ids[compared], want_ids[compared])
    assert_close(logprobs, np.take_along_axis(log_softmax(logits), ids[:, None], -1)[:, 0])
    return len(compared), ids


def mixed(rows: int, vocab: int, rng: np.random.Generator, **fixed: object) -> dict[str, np.ndarray]:
    """Random settings, some without alternatives."""
    inputs = make_inputs(rows, max(vocab, 2), rng, **fixed)
    if vocab < 2:
        inputs = without_lists(inputs, rows)
    inputs["alternatives"] = rng.choice([0, 1, min(20, vocab)], rows).astype(np.int32)
    return inputs


@pytest.mark.parametrize("vocab", quick((LARGE,), (1, 17, 1000, 49152, LARGE)), ids=lambda v: f"v{v}")
def test_fits_in_registers_and_runs_in_clusters(vocab: int) -> None:
    kernel = compiled(vocab, min(20, vocab))
    resources = kernel.resources(0)
    assert "LOCAL:0" in resources and "STACK:0" in resources
    assert "UCGABAR" in kernel.sass(0) and "ST.E.CLUSTER" not in kernel.sass(0)


@pytest.mark.parametrize("target", quick(("nvidia-a100",), ("nvidia-a100", "nvidia-rtx-4090")))
def test_compiles_without_clusters(target: str) -> None:
    kernel = compiled(LARGE, 20, None, target)
    assert "UCGABAR" not in kernel.sass(0)


def test_a_vocabulary_that_does_not_fit_is_kept_in_scratch() -> None:
    target = cuda_target()
    for vocab, resident in ((262144, True), (500000, False)):
        facts = Sample().match(Call("sample", SampleSpec(vocab, 20), None, 8), target)
        assert all(tile.resident == resident for tile in Sample().space(facts, target))


def test_rejects_what_it_is_not_made_for() -> None:
    for spec, reason in (
        (SampleSpec(10, 20), "top_logprobs 20 is not within 1..10"),
        (SampleSpec(1000, 65), "top_logprobs 65 is above 64"),
        (SampleSpec(1 << 25, 20), "a vocabulary of 33554432 is above"),
    ):
        rejected = Sample().match(Call("sample", spec, None, 8), cuda_target())
        assert isinstance(rejected, Reject) and reason in rejected.reason


def test_tile_checks_itself() -> None:
    with pytest.raises(ValueError, match="a cluster of 3 blocks is none of"):
        SampleTile(3, 256, True)
    with pytest.raises(ValueError, match="100 threads are none of"):
        SampleTile(8, 100, True)
    with pytest.raises(ValueError, match="4 blocks of 1024 threads do not fit side by side"):
        SampleTile(8, 1024, True, 4)


def test_floor_reads_the_logits_once() -> None:
    facts = Sample().match(Call("sample", SampleSpec(100, 5), None, 8), cuda_target())
    assert Sample().floor(facts, cuda_target()).bytes_per_row == 400 + 8 + 40


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("vocab", [17, 1000, 4099, 49152, LARGE], ids=lambda v: f"v{v}")
def test_matches_the_reference(vocab: int, scale: float) -> None:
    rng = fresh()
    rows = 200 if vocab < 10000 else 10
    logits = (rng.standard_normal((rows, vocab)) * scale).astype(np.float32)
    compared, _ = check(logits, mixed(rows, vocab, rng), min(20, vocab))
    assert compared > (0.5 * rows if vocab < 10000 else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1000, 49153])
def test_matches_the_reference_without_clusters(vocab: int) -> None:
    rng = fresh()
    rows = 60 if vocab < 10000 else 16
    logits = (rng.standard_normal((rows, vocab)) * 4).astype(np.float32)
    check(logits, mixed(rows, vocab, rng), tile=IN_SCRATCH)


@pytest.mark.gpu
def test_a_vocabulary_of_one_token() -> None:
    rng = fresh()
    inputs = mixed(3, 1, rng) | {"alternatives": np.ones(3, np.int32)}
    ids, logprobs, top_ids, top_logprobs = run(np.full((3, 1), 2.5, np.float32), inputs, 1)
    assert (ids == 0).all() and (top_ids == 0).all()
    assert (logprobs == 0).all() and (top_logprobs == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.0},
        {"temperature": 0.7, "top_k": 64, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 500, "top_p": 0.9, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_p": 0.0},
        {"temperature": 1.3, "top_k": 0, "top_p": 1.0, "min_p": 0.02},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    ],
    ids=["greedy", "k50-p90", "k64", "k500-p90", "p90", "min-p", "plain"],
)
def test_each_filter_on_a_large_vocabulary(settings: dict[str, float]) -> None:
    rng = fresh()
    logits = (rng.standard_normal((6, LARGE)) * 3).astype(np.float32)
    inputs = make_inputs(6, LARGE, rng, alternatives=0, **settings)
    check(logits, inputs)
    check(logits, without_lists(inputs, 6))


@pytest.mark.gpu
def test_likely_tokens_beside_one_another() -> None:
    """All of the largest logits in one block's slice, in one warp's, and in one thread's."""
    rng = fresh()
    logits = rng.standard_normal((9, LARGE)).astype(np.float32)
    for r in range(9):
        logits[r, 4 * r :: (1, 1, 128)[r % 3]][: (3000, 300, 100)[r % 3]] += 9
    check(logits, mixed(9, LARGE, rng, top_k=50))


@pytest.mark.gpu
def test_ties_go_to_the_lowest_token() -> None:
    rng = fresh()
    logits = rng.integers(-2, 3, (100, 600)).astype(np.float32)
    check(logits, mixed(100, 600, rng))
    flat = np.zeros((3, 600), np.float32)
    inputs = without_lists(make_inputs(3, 600, rng, temperature=0), 3)
    ids, _, top_ids, _ = run(flat, inputs)
    assert (ids == 0).all() and (top_ids == np.arange(20)).all()


@pytest.mark.gpu
def test_zeros_of_either_sign_are_ties() -> None:
    rng = fresh()
    logits = np.full((40, 300), -1, np.float32)
    logits[:, ::7] = -0.0
    logits[:, 3::7] = 0.0
    check(logits, without_lists(mixed(40, 300, rng), 40))


@pytest.mark.gpu
def test_banned_tokens_and_tokens_without_a_chance() -> None:
    """A bias of -inf bans; raw logits of -inf are never drawn, and come last among the alternatives."""
    rng = fresh()
    logits = rng.standard_normal((50, 40)).astype(np.float32)
    logits[:, 5:30] = -np.inf
    inputs = make_inputs(50, 40, rng)
    inputs["bias_indptr"] = np.arange(0, 51 * 2, 2, dtype=np.int32)
    inputs["bias_tokens"] = np.tile(np.array([2, 33], np.int32), 50)
    inputs["bias_values"] = np.full(100, -np.inf, np.float32)
    ids, _, top_ids, top_logprobs = run(logits, inputs)
    assert not np.isin(ids, [2, 33, *range(5, 30)]).any()
    want = sample_reference(logits, **inputs)
    np.testing.assert_array_equal(top_ids, want[2])
    assert (np.isneginf(top_logprobs) == np.isneginf(want[3])).all()


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [0, 40])
def test_draws_follow_the_distribution(top_k: int) -> None:
    rng = fresh()
    vocab, rows = 50, 20000
    logits = np.repeat(rng.standard_normal((1, vocab)).astype(np.float32), rows, 0)
    settings = {"temperature": 1.0, "top_k": top_k, "top_p": 1.0, "min_p": 0.0, "seeds": 1234567890123}
    inputs = without_lists(make_inputs(rows, vocab, rng, alternatives=0, **settings), rows)
    inputs["draws"] = np.arange(rows, dtype=np.int32)
    ids = run(logits, inputs)[0]
    p = np.exp(logits[0].astype(np.float64))
    if top_k:
        p[p < np.sort(p)[-top_k]] = 0
    p /= p.sum()
    share = np.bincount(ids, minlength=vocab) / rows
    assert np.abs(share - p).max() < 5 * np.sqrt(p.max() / rows)


@pytest.mark.gpu
def test_random_numbers_are_those_of_the_reference() -> None:
    """Of two equal tokens the draw takes the first where u < 1/2."""
    rng = fresh()
    inputs = make_inputs(500, 2, rng, temperature=1, top_k=0, top_p=1, min_p=0, alternatives=0)
    inputs = without_lists(inputs, 500)
    ids = run(np.zeros((500, 2), np.float32), inputs, 2)[0]
    want = [uniform(int(s), int(d)) >= 0.5 for s, d in zip(inputs["seeds"], inputs["draws"], strict=True)]
    np.testing.assert_array_equal(ids, want)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1000, LARGE], ids=lambda v: f"v{v}")
def test_a_row_has_the_same_bits_alone(vocab: int) -> None:
    rng = fresh()
    logits = rng.standard_normal((5, vocab)).astype(np.float32) * 3
    inputs = mixed(5, vocab, rng)
    whole = run(logits, inputs)
    for r, wanted in enumerate(inputs["alternatives"]):
        alone = run(logits[r : r + 1].copy(), one_row(inputs, r))
        assert alone[0][0] == whole[0][r] and alone[1][0] == whole[1][r]
        for a, b in zip(alone[2:], whole[2:], strict=True):
            np.testing.assert_array_equal(a[0, :wanted], b[r, :wanted])


@pytest.mark.gpu
def test_reads_nothing_beyond_its_inputs() -> None:
    """Logits and lists amid NaN and tokens that do not exist."""
    import torch

    rng = fresh()
    rows, vocab = 7, 1001
    inputs = mixed(rows, vocab, rng)
    logits = rng.standard_normal((rows, vocab)).astype(np.float32)
    want = run(logits, inputs)

    def amid(array: np.ndarray) -> Any:
        edge = np.full(64, np.nan if array.dtype.kind == "f" else 2**30, array.dtype)
        held = torch.from_numpy(np.concatenate([edge, array.ravel(), edge])).cuda()
        return held[64 : 64 + array.size].view(array.shape)

    outputs = compiled(vocab)(*(amid(a) for a in (logits, *inputs.values())))
    for r, wanted in enumerate(inputs["alternatives"]):
        for i, (a, b) in enumerate(zip(outputs, want, strict=True)):
            place = (r, slice(wanted)) if i > 1 else r
            np.testing.assert_array_equal(a[place].cpu(), b[place])
