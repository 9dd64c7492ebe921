"""`step` draws from what `logits` gives, as the reference does; Philox agrees with its published vectors."""

import math

import numpy as np
import pytest
import tvm

from tests.passes.served_models import TARGET, Batch, Tiny, composite_names, fused_model, random_params, round_trip
from tests.sampling_reference import philox4x32, sample_reference, uniform
from tests.tolerances import assert_close
from tilewright.compiler.composites import SAMPLING_INPUTS, SampleSpec
from tilewright.compiler.errors import CompileError
from tilewright.compiler.relax_utils import param_entries, weight_params
from tilewright.compiler.sample_body import sample_kernel
from tilewright.compiler.verify import verify
from tilewright.passes.fuse_linear_neighbours import FuseLinearNeighbours
from tilewright.passes.insert_paged_kv import InsertPagedKV
from tilewright.passes.lower_sampling import LowerSampling
from tilewright.passes.quantize_weights import QuantizeWeights

VOCAB, ALTERNATIVES = 83, 5


def sampling_arrays(rows: int, **chosen: float) -> dict[str, np.ndarray]:
    """All filters and penalties off, greedy; `chosen` sets some for every row."""
    off = {"top_p": 1.0, "repetition_penalty": 1.0}
    arrays = {
        name: np.full(rows, chosen.get(name, off.get(name, 0)), dtype)
        for name, (shape, dtype) in SAMPLING_INPUTS.items()
        if shape == "r"
    }
    for name, (shape, dtype) in SAMPLING_INPUTS.items():
        if shape != "r":
            arrays[name] = np.zeros(rows + 1 if shape == "r+1" else 0, dtype)
    return {name: arrays[name] for name in SAMPLING_INPUTS}


def random_lists(rng: np.random.Generator, rows: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """CSR lists of distinct tokens, some of them empty."""
    sizes = rng.integers(0, 9, rows)
    tokens = [rng.choice(vocab, n, replace=False) for n in sizes]
    return np.concatenate([[0], np.cumsum(sizes)]).astype("int32"), np.concatenate(tokens).astype("int32")


@pytest.fixture(scope="module")
def run_sampler():
    kernel = sample_kernel(SampleSpec(VOCAB, ALTERNATIVES)).with_attr("global_symbol", "main")
    compiled = tvm.compile(tvm.IRModule({"main": kernel}), TARGET)

    def run(logits: np.ndarray, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        rows = len(logits)
        out = [
            ((rows,), "int32"),
            ((rows,), "float32"),
            ((rows, ALTERNATIVES), "int32"),
            ((rows, ALTERNATIVES), "float32"),
            *[((rows, VOCAB), "float32")] * 2,  # scratch
        ]
        outputs = [tvm.runtime.tensor(np.full(shape, -1, dtype)) for shape, dtype in out]
        compiled["main"](*map(tvm.runtime.tensor, (logits, *arrays.values())), *outputs)
        return [o.numpy() for o in outputs[:4]]

    return run


def check(run, logits: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The body's result, equal to the reference's. Returns the ids."""
    actual = run(logits, arrays)
    expected = sample_reference(logits, **arrays, top_logprobs=ALTERNATIVES)
    for got, want in zip(actual, expected, strict=True):
        if got.dtype == np.int32:
            np.testing.assert_array_equal(got, want)
        else:
            assert_close(got, want)
    return actual[0]


def random_logits(rng: np.random.Generator, rows: int) -> np.ndarray:
    return (rng.normal(size=(rows, VOCAB)) * 3).astype("float32")


def test_philox_agrees_with_the_published_vectors():
    ones = 0xFFFFFFFF
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox4x32(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform_numbers_are_in_range_and_spread():
    numbers = np.array([uniform(seed, draw) for seed in (-1, 7, 2**62) for draw in range(500)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.03 and len(np.unique(numbers)) > 1490


def test_every_setting_at_once(run_sampler):
    rng = np.random.default_rng(20)  # fixed: a draw within rounding of a boundary may go either way
    rows = 96
    arrays = sampling_arrays(rows)
    arrays |= {
        "temperature": rng.choice([0, 0.5, 1, 1.7], rows).astype("float32"),
        "top_k": rng.choice([0, 1, 5, 40, 1000], rows).astype("int32"),
        "top_p": rng.choice([1, 0.9, 0.3, 0], rows).astype("float32"),
        "min_p": rng.choice([0, 0.05, 0.2, 1], rows).astype("float32"),
        "repetition_penalty": rng.choice([1, 1.3, 0.8], rows).astype("float32"),
        "presence_penalty": rng.choice([0, 0.5, -1], rows).astype("float32"),
        "frequency_penalty": rng.choice([0, 0.2], rows).astype("float32"),
        "seeds": rng.integers(-(2**63), 2**63 - 1, rows),
        "draws": rng.integers(0, 2**31 - 1, rows).astype("int32"),
    }
    arrays["penalty_indptr"], arrays["penalty_tokens"] = random_lists(rng, rows, VOCAB)
    arrays["penalty_counts"] = rng.integers(0, 4, len(arrays["penalty_tokens"])).astype("int32")
    arrays["bias_indptr"], arrays["bias_tokens"] = random_lists(rng, rows, VOCAB)
    arrays["bias_values"] = rng.choice([-np.inf, 1.5, -2], len(arrays["bias_tokens"])).astype("float32")
    check(run_sampler, random_logits(rng, rows), arrays)


def test_greedy_takes_the_lowest_token_on_ties(run_sampler):
    logits = random_logits(np.random.default_rng(), 3)
    logits[:, [70, 11, 40]] = 99
    assert check(run_sampler, logits, sampling_arrays(3)).tolist() == [11, 11, 11]


def test_top_k_and_top_p_keep_ties(run_sampler):
    rows = 400
    logits = np.full((rows, VOCAB), -5, "float32")
    logits[:, 3], logits[:, [8, 9, 60]] = 1, 0.5
    for setting in ({"top_k": 2}, {"top_p": 0.4}):
        arrays = sampling_arrays(rows, temperature=1, seeds=5, **setting)
        arrays["draws"] = np.arange(rows, dtype="int32")
        assert set(check(run_sampler, logits, arrays).tolist()) == {3, 8, 9, 60}


def test_a_banned_token_is_never_drawn_though_everything_else_is_filtered(run_sampler):
    rows = 50
    logits = np.full((rows, VOCAB), -30, "float32")
    logits[:, 4] = 30
    arrays = sampling_arrays(rows, temperature=1, top_k=VOCAB - 1, seeds=1)
    arrays["draws"] = np.arange(rows, dtype="int32")
    arrays["bias_indptr"] = np.arange(rows + 1, dtype="int32")
    arrays["bias_tokens"] = np.full(rows, 4, "int32")
    arrays["bias_values"] = np.full(rows, -np.inf, "float32")
    ids = check(run_sampler, logits, arrays)
    assert 4 not in ids and len(set(ids.tolist())) > 10


def test_draws_follow_the_distribution(run_sampler):
    rows = 4000
    logits = np.full((rows, VOCAB), -40, "float32")
    logits[:, :3] = np.log([0.5, 0.3, 0.2])
    arrays = sampling_arrays(rows, temperature=1, seeds=11)
    arrays["draws"] = np.arange(rows, dtype="int32")
    share = np.bincount(run_sampler(logits, arrays)[0], minlength=3)[:3] / rows
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=0.03)


def test_step_draws_from_the_logits_beside_it():
    c = Tiny(windows=(None,), taps=True)
    rng = np.random.default_rng()
    logits_only = InsertPagedKV(4).run(fused_model(c))
    mod = LowerSampling(ALTERNATIVES).run(logits_only)
    verify(mod, "served")
    round_trip(mod)
    params = random_params(mod["logits"], rng)
    first, second, third = (Batch(mod, params, 4) for _ in range(3))
    for request in ({0: [1, 2, 3], 1: [4]}, {0: [5], 1: [6, 7]}):
        arrays = sampling_arrays(2, temperature=0.9, top_k=10, seeds=3)
        logits = first.step(request)
        layers = third.step(request, function="layers")
        assert len(layers) == 2, "logits, and one layer's output"
        np.testing.assert_array_equal(layers[0], logits)
        expected = sample_reference(logits, **arrays, top_logprobs=ALTERNATIVES)
        actual = second.step(request, function="step", sampling=arrays)
        np.testing.assert_array_equal(actual[0], expected[0])
        np.testing.assert_array_equal(actual[2], expected[2])
        assert_close(actual[1], expected[1])
        assert_close(actual[3], expected[3])


@pytest.mark.parametrize("logits_scale", [None, 0.5])
def test_hidden_states_are_what_the_logits_are_made_of(logits_scale: float | None):
    c = Tiny(windows=(None,), taps=True, logits_scale=logits_scale)
    mod = LowerSampling(ALTERNATIVES).run(InsertPagedKV(4).run(fused_model(c)))
    verify(mod, "served")
    round_trip(mod)
    params = random_params(mod["logits"], np.random.default_rng())
    first, second = (Batch(mod, params, 4) for _ in range(2))
    head = params[[p.name for p in weight_params(mod["logits"])].index("embed")]
    for request in ({0: [1, 2, 3], 1: [4]}, {0: [5], 1: [6, 7]}):
        states = second.step(request, all_rows=True, function="hidden")
        assert_close(states @ head.T * (logits_scale or 1), first.step(request, all_rows=True))


def test_hidden_states_are_normalised_where_the_norm_has_joined_the_projection():
    c = Tiny(windows=(None,))
    plain = InsertPagedKV(4).run(fused_model(c))
    formats = tuple((s, "f32") for e in param_entries(plain["logits"]) for s in e["sources"])
    joined = FuseLinearNeighbours().run(QuantizeWeights(formats).run(plain))
    mod = LowerSampling(ALTERNATIVES).run(joined)
    verify(mod, "served")
    assert composite_names(mod, "hidden").count("rms_norm") == 1 and not composite_names(mod).count("rms_norm")
    assert composite_names(mod, "hidden").count("linear") == composite_names(mod).count("linear") - 1


def test_hidden_states_need_a_projection():
    mod = InsertPagedKV(4).run(fused_model(Tiny(windows=(None,), logits_scale=math.nan)))
    with pytest.raises(CompileError, match="no hidden states to embed"):
        LowerSampling(ALTERNATIVES).run(mod)


def test_no_more_alternatives_than_tokens():
    mod = LowerSampling(20).run(InsertPagedKV(4).run(fused_model(Tiny(vocab=7, windows=(None,)))))
    assert int(mod["step"].ret_ty.fields[2].shape.values[1]) == 7
    with pytest.raises(CompileError, match="top_logprobs is 0"):
        LowerSampling(0)
