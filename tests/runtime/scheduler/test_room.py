"""Prompts beside running streams: what a step may take, what is learnt of steps, and deadlines, on a virtual clock."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.runtime.fake import LIMITS, Bench, LinearCosts, completions
from tests.runtime.scheduler.test_fcfs import Line
from tilewright.compiler.errors import RequestError
from tilewright.runtime.kv_cache import PagePool
from tilewright.runtime.scheduler.policy import Budget, View
from tilewright.runtime.scheduler.room import PromptRoom
from tilewright.runtime.step_costs import StepCosts
from tilewright.runtime.types import EngineLimits, SamplingParams, Work

LONG = replace(LIMITS, max_tokens=512, max_context=4200, num_pages=3000)
STREAM = SamplingParams(max_tokens=4000, seed=0, ignore_eos=True)


@dataclass(frozen=True)
class NearlyFreeKeys(LinearCosts):
    """Attention costs little, so that one token at the end of a long prompt fits any budget."""

    def step_s(self, work: Work) -> float:
        return 1e-3 + 1e-4 * (work.decodes + work.prompt_tokens) + 1e-8 * (work.keys + work.pairs)


def steps_beside_a_long_prompt(max_stretch: float | None, learnt: bool) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Milliseconds of steps, each of which draws a token of four streams: without the prompt of 4096 tokens that
    arrives then, and with it; and the first tokens of the prompt's answer."""
    bench = Bench(LONG, EngineLimits(max_stretch=max_stretch))
    bench.model.costs = NearlyFreeKeys()
    bench.core.costs = StepCosts() if learnt else bench.model.costs
    streams = [bench.submit([1 + i] * 8, STREAM) for i in range(4)]
    clock, took = bench.model.clock, [0.0]

    def turn() -> None:
        before = clock.now_s
        bench.core.turn()
        took.append(1e3 * (clock.now_s - before))

    for _ in range(50):
        turn()
    prompt = bench.submit([i % 50 for i in range(4096)], SamplingParams(max_tokens=3, seed=0))
    while not prompt.finished:
        turn()
    for request in streams:
        bench.core.cancel(request)
    bench.run()
    return np.array(took[2:51]), np.array(took[51:]), list(completions(prompt)[0].token_ids)


@pytest.mark.parametrize("learnt", [False, True], ids=["known", "learnt"])
def test_a_long_prompt_stretches_steps_by_no_more_than_the_stated_budget(learnt: bool) -> None:
    _, whole, answer = steps_beside_a_long_prompt(None, learnt)
    alone, beside, same = steps_beside_a_long_prompt(1.75, learnt)
    assert same == answer, "tokens do not depend on how a prompt is cut"
    assert np.percentile(whole, 99) > 20 * np.percentile(alone, 99), "what it is there for"
    assert np.percentile(beside, 99) <= 2 * np.percentile(alone, 99)
    assert len(beside) < 600, "the budget is used"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_prompts_get_the_budget_and_no_more_while_streams_grow(warm: bool, seed: int) -> None:
    """Keys are what steps wait for: a stream's once, a prompt's once for all of its tokens in the step. The streams
    grow with each step and never decode without the prompt, so that its steps must tell what they would take alone."""
    rng, costs, budget = np.random.default_rng(seed), StepCosts(), Budget(16, 512, 512, max_stretch=1.6)

    def true_s(work: Work) -> float:
        prompt_s = bool(work.prompt_tokens) * 1.5e-3 + 6e-4 * work.prompt_tokens + 7e-7 * work.pairs
        return 6e-3 + 1.2e-6 * (work.keys + work.prompt_keys) + prompt_s

    def observe(work: Work) -> None:
        costs.observe(work, true_s(work) * rng.lognormal(0, 0.05))

    if warm:
        for chunk in range(8):
            observe(Work(0).with_prompt(512 * chunk, 512))
    lengths = range(20, 10_000)
    for length in lengths[:200]:
        observe(Work(4, 4 * length))
    stretches, stored = [], 0
    for length in lengths[200:]:
        view: View = View([], [], PagePool(1, 16).ledger(), budget, now_s=0.0, costs=costs)
        room, alone = PromptRoom(view, [Line(0, length)] * 4), Work(4, 4 * length)
        stored += (tokens := room.offer(stored, 4096 - stored))
        work = alone.with_prompt(stored - tokens, tokens)
        stretches.append(true_s(work) / true_s(alone))
        observe(work)
        if stored == 4096:
            break
    assert np.percentile(stretches, 99) < 2
    assert np.median(stretches) > 1.4 and len(stretches) < 3000, "the budget is used: one token a step would be 4096"


def test_a_prompt_moves_on_where_one_token_is_above_the_budget() -> None:
    bench = Bench(LONG, EngineLimits(max_stretch=1.01))
    stream = bench.submit([1] * 8, STREAM)
    bench.core.turn()
    bench.core.turn()
    prompt = bench.submit([2] * 50, SamplingParams(max_tokens=1, seed=0))
    for _ in range(51):
        bench.core.turn()
    assert prompt.finished
    bench.core.cancel(stream)
    bench.run()


def test_prompts_have_whole_steps_where_nothing_decodes() -> None:
    bench = Bench(LONG, EngineLimits(max_stretch=1.1))
    bench.complete([1] * 1000, SamplingParams(max_tokens=1, seed=0))
    assert [tokens for tokens, _ in bench.model.steps] == [512, 488]


def test_costs_are_learnt_from_steps() -> None:
    costs, rng = StepCosts(), np.random.default_rng(0)
    assert costs.step_s(Work(3, 100)) is None and costs.step_s(Work(0).with_prompt(0, 9)) is None
    assert costs.least_s(Work(0).with_prompt(0, 9)) == 0

    def true_s(work: Work) -> float:
        return 3e-3 + 4e-4 * work.decodes + 1e-6 * work.keys + 5e-4 * work.prompt_tokens + 1e-6 * work.pairs

    for _ in range(300):
        decodes = Work(int(rng.integers(1, 9)), int(rng.integers(10, 5000)))
        for work in (decodes, decodes.with_prompt(int(rng.integers(0, 3000)), int(rng.integers(2, 64)))):
            costs.observe(work, true_s(work) * rng.uniform(0.95, 1.05))
    for work in (Work(5, 800), Work(5, 800).with_prompt(1000, 40), Work(2, 99).with_prompt(3000, 12)):
        assert costs.step_s(work) == pytest.approx(true_s(work), rel=0.1)
        assert 0.7 * true_s(work) < costs.least_s(work) < true_s(work)


def test_steps_with_many_more_tokens_than_ran_are_not_known() -> None:
    costs = StepCosts()
    for tokens in (1, 3):
        costs.observe(Work(2, 40).with_prompt(100, tokens), 1e-2)
    assert costs.step_s(Work(2, 40).with_prompt(100, 6)) is not None
    assert costs.step_s(Work(2, 40).with_prompt(100, 7)) is None and costs.least_s(Work(0).with_prompt(0, 7)) == 0
    for _ in range(200):
        costs.observe(Work(2, 40).with_prompt(100, 1), 1e-2)
    assert costs.step_s(Work(2, 40).with_prompt(100, 3)) is None, "it was too long ago"


def test_a_floor_is_the_least_until_steps_were_measured() -> None:
    costs = StepCosts(floor=lambda work: 0.01 * work.prompt_tokens)
    assert costs.least_s(Work(0).with_prompt(0, 7)) == 0.07


def test_a_deadline_that_cant_be_met_is_refused_at_once() -> None:
    bench = Bench(LONG)
    ask = SamplingParams(max_tokens=2, seed=0, ignore_eos=True, deadline_s=1.0)
    late = bench.submit([1] * 4000, ask)
    soon = bench.submit([1] * 100, ask)
    bench.core.turn()
    assert late.finished and completions(late)[0].token_ids == () and "at best" in str(late.refusal)
    assert completions(late)[0].finish_reason == "deadline" and late.refusal.retry_s is None
    bench.run()
    assert soon.refusal is None and len(completions(soon)[0].token_ids) == 2
    assert max(tokens for tokens, _ in bench.model.steps) == 100, "nothing of it was computed"


def test_prompts_that_are_being_computed_count() -> None:
    bench = Bench(LONG)
    bench.submit([1] * 4000, SamplingParams(max_tokens=1, seed=0))
    bench.core.turn()
    ask = SamplingParams(max_tokens=2, seed=0, ignore_eos=True, deadline_s=1.0)
    late, patient = bench.submit([2] * 100, ask), bench.submit([3] * 100, replace(ask, deadline_s=60.0))
    bench.core.turn()
    assert "prompts before it" in str(late.refusal) and late.refusal.retry_s > 1
    bench.run()
    assert patient.refusal is None and len(completions(patient)[0].token_ids) == 2


@pytest.mark.parametrize("value", [1.0, 0.5, float("inf"), float("nan")])
def test_a_stretch_that_is_none(value: float) -> None:
    with pytest.raises(RequestError, match="max_stretch"):
        Bench(LONG, EngineLimits(max_stretch=value))
