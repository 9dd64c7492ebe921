"""Draws of the sampler, from logits to tokens, beside FlashInfer's two ways to the same distribution."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import SampleShape
from gpu_compiled import Compiled, compiled, lowered
from gpu_work import Variant, Work, copies, installed

from tilewright.compiler.composites import SAMPLING_INPUTS, SampleSpec
from tilewright.schedules.base import Call
from tilewright.schedules.cuda.sample import Sample

SCALE = 2.0  # of the normal logits
CHECKED_DRAWS = 100  # of all rows
# Half the sum of the differences of frequencies, which is about 0.02 for this many true draws.
MOST_ERROR = 0.05
_OFF = {"top_p": 1.0, "repetition_penalty": 1.0}


def compile_case(shape: SampleShape) -> Compiled:
    return compiled(lowered(Sample(), Call("sample", SampleSpec(shape.vocab), shape.rows, shape.rows)))


def work(shape: SampleShape, ours: Compiled) -> Work:
    """Logits differ from call to call, so that they come from memory."""
    count = copies(4 * shape.rows * shape.vocab)
    logits = [torch.randn(shape.rows, shape.vocab, device="cuda") * SCALE for _ in range(count)]
    probabilities = kept(logits[0], shape)
    variants = [_own(shape, ours, logits, probabilities), *_peers(shape, logits, probabilities)]
    return Work(variants, 4 * shape.rows * shape.vocab, 0)


def kept(logits: torch.Tensor, shape: SampleShape) -> torch.Tensor:
    """float32[rows, vocab], the probability of each token: of the top_k, the fewest likely ones that reach top_p."""
    values, tokens = logits.topk(shape.top_k, dim=-1)
    likely = values.softmax(-1)
    before = likely.cumsum(-1) - likely
    likely = likely.masked_fill(before >= shape.top_p, 0)
    return torch.zeros_like(logits).scatter_(1, tokens, likely / likely.sum(-1, keepdim=True))


def frequency_error(draw: Callable[[int], torch.Tensor], probabilities: torch.Tensor) -> float:
    """Half the sum of the differences between how often a row's first, second, ... token was drawn and how often it
    should be; infinite where one was drawn that should not be. draw(i): tokens of all rows, the i-th time."""
    order = probabilities.argsort(dim=-1, descending=True)
    expected = probabilities.gather(1, order).mean(0)
    seen = torch.zeros_like(expected)
    for i in range(CHECKED_DRAWS):
        tokens = draw(i).long()[:, None]
        if not bool((probabilities.gather(1, tokens) > 0).all()):
            return float("inf")
        ranks = (order == tokens).int().argmax(-1)
        seen += torch.bincount(ranks, minlength=len(seen))
    return float((seen / seen.sum() - expected).abs().sum() / 2)


def _own(shape: SampleShape, ours: Compiled, logits: list[torch.Tensor], probabilities: torch.Tensor) -> Variant:
    given = {name: _input(name, shape) for name in SAMPLING_INPUTS}
    made: dict[str, torch.Tensor] = {}
    calls = [ours.bind((one, *given.values()), shape.rows, made)[1] for one in logits]

    def draw(i: int) -> torch.Tensor:
        given["draws"].fill_(i)
        calls[0]()
        return made["ids"]

    return Variant("tilewright", calls, lambda: frequency_error(draw, probabilities), MOST_ERROR)


def _input(name: str, shape: SampleShape) -> torch.Tensor:
    """One of the sampler's inputs: no penalties, no biases, no alternatives, and every row its own seed."""
    rows = {"r": shape.rows, "r+1": shape.rows + 1}
    size, dtype = SAMPLING_INPUTS[name]
    asked = {"temperature": 1.0, "top_k": shape.top_k, "top_p": shape.top_p}
    value = asked.get(name, _OFF.get(name, 0))
    made = torch.full((rows.get(size, 1),), value, dtype=getattr(torch, dtype), device="cuda")
    return torch.arange(1, shape.rows + 1, device="cuda") if name == "seeds" else made


def _peers(shape: SampleShape, logits: list[torch.Tensor], probabilities: torch.Tensor) -> Iterator[Variant]:
    if not installed("flashinfer"):
        return
    from flashinfer import sampling

    # Its host code makes a generator for each call, which can't be captured; a number as good is given instead.
    numbers = {"seed": 7, "offset": 0}
    sampling.get_seed_and_offset = lambda increment, generator=None: (numbers["seed"], numbers["offset"])

    def masked(one: torch.Tensor) -> torch.Tensor:
        return sampling.top_k_top_p_sampling_from_logits(one, shape.top_k, shape.top_p)

    def renormalised(one: torch.Tensor) -> torch.Tensor:
        return sampling.top_k_top_p_sampling_from_probs(sampling.softmax(one), shape.top_k, shape.top_p)

    ways: dict[str, Any] = {"masked logits": masked, "probabilities": renormalised}
    for name, way in ways.items():

        def draw(i: int, way: Any = way) -> torch.Tensor:
            numbers["offset"] = i << 32
            return way(logits[0])

        calls = [lambda one=one, way=way: way(one) for one in logits]
        yield Variant(f"flashinfer {name}", calls, lambda d=draw: frequency_error(d, probabilities), MOST_ERROR)
