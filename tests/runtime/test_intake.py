"""Every refusal names the value, the limit and the remedy, and comes before anything runs."""

import math

import numpy as np
import pytest

from tests.runtime.fake import LIMITS, Bench
from tests.runtime.tokenizers_made import byte_level
from tilewright.compiler.errors import RequestError
from tilewright.runtime.tokenizer import Tokenizer
from tilewright.runtime.types import DeviceLimits, EngineLimits, SamplingParams

WRONG = {
    "temperature": [-0.1, math.nan, math.inf, 1e-9, "hot", None],
    "top_k": [-1, 1.5, True],
    "top_p": [0, -0.5, 1.01, math.nan],
    "min_p": [-0.1, 1.5, math.nan],
    "repetition_penalty": [0, -1, math.nan, math.inf],
    "presence_penalty": [-2.5, 3, math.nan],
    "frequency_penalty": [-2.5, 3, math.nan],
    "logit_bias": [{-1: 0.0}, {0: math.nan}, {0: math.inf}, {0: 101}, {"a": 1.0}, [1]],
    "seed": [-1, 2**63, 0.5],
    "n": [0, -1, 1.0],
    "stop": [("",), (3,)],
    "stop_token_ids": [(-1,), ("x",)],
    "max_tokens": [0, -5, 2.5],
    "min_tokens": [-1, 0.5],
    "logprobs": [-1, 0.5],
    "deadline_s": [0, -1, math.nan],
    "priority": [0.5, math.nan],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_parameters_out_of_range(name: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    text = str(caught.value)
    assert name.split("_")[0] in text and "\n" not in text


def test_parameters_in_range_are_kept() -> None:
    params = SamplingParams(stop="end", logit_bias={np.int64(3): -math.inf}, top_p=np.float32(0.5), seed=2**63 - 1)
    assert params.stop == ("end",) and params.logit_bias == {3: -math.inf}
    with pytest.raises(RequestError, match="min_tokens 5 is above max_tokens 4"):
        SamplingParams(max_tokens=4, min_tokens=5)


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ([], {}, "prompt is empty"),
        ([50], {}, "token 50 is not in the vocabulary of 50"),
        ([-1], {}, "token -1 is not in the vocabulary"),
        ([0.5], {}, "not understood"),
        (7, {}, "not one int"),
        ({"role": "user", "content": "x"}, {}, "not one dict"),
        ([[1]], {}, "not understood"),
        ("text", {}, "no tokenizer; give the prompt as token ids"),
        ([{"role": "user", "content": "x"}], {}, "no tokenizer"),
        ([1] * 96, {}, "prompt of 96 tokens is longer than 95"),
        ([1] * 90, {"max_tokens": 7}, "max_tokens 7 after a prompt of 90 is above 6"),
        ([1] * 90, {"min_tokens": 7}, "min_tokens 7 is above 6"),
        ([1], {"n": 9}, "n 9 is above 8"),
        ([1], {"logprobs": 4}, "logprobs 4 is above 3"),
        ([1], {"logit_bias": {50: 1.0}}, "logit_bias token 50 is not in the vocabulary of 50"),
        ([1], {"stop_token_ids": (50,)}, "stop_token_ids token 50"),
        ([1], {"stop": "x"}, "needs a tokenizer"),
        ([1], {"logit_bias": dict.fromkeys(range(50), -math.inf)}, "bans all 50 tokens"),
    ],
)
def test_requests_refused(prompt: object, params: dict, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        Bench().submit(prompt, SamplingParams(**params))


def test_what_the_pool_can_never_hold_is_refused() -> None:
    bench = Bench(DeviceLimits(**{**LIMITS.__dict__, "num_pages": 5}))
    with pytest.raises(RequestError, match="prompt of 20 tokens is longer than 19"):
        bench.submit([1] * 20, SamplingParams())
    with pytest.raises(RequestError, match=r"above 10, what context and KV pages \(20 tokens\) leave"):
        bench.submit([1] * 10, SamplingParams(max_tokens=11))
    assert len(bench.complete([1] * 19, SamplingParams())[0].token_ids) == 1
    assert len(bench.complete([1], SamplingParams())[0].token_ids) == 19


def test_empty_text_is_an_empty_prompt() -> None:
    tokenizer = Tokenizer(byte_level())
    bench = Bench(DeviceLimits(**{**LIMITS.__dict__, "vocab_size": 400}), tokenizer=tokenizer)
    with pytest.raises(RequestError, match="prompt is empty"):
        bench.submit("", SamplingParams())


@pytest.mark.parametrize(
    "limits",
    [{"max_batch": 9}, {"max_tokens": 0}, {"max_context": 97}, {"max_chunk": 0}, {"max_queue": 0}, {"max_tokens": 5}],
    ids=str,
)
def test_engine_limits_refused(limits: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(limits))):
        Bench(limits=EngineLimits(**limits))


def test_requests_without_a_seed_differ() -> None:
    bench = Bench()
    bench.intake._entropy = iter(range(100)).__next__
    first, second = (bench.complete([1], SamplingParams(max_tokens=8))[0].token_ids for _ in range(2))
    assert first != second
