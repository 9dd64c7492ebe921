"""The loop on the fake device: whatever the schedule, a request's tokens are those it gets alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.runtime.fake import LIMITS, Bench, completions, expected, expected_embedding
from tilewright.runtime.request import Request, Sample
from tilewright.runtime.types import DeviceLimits, EngineLimits, SamplingParams


def device(**changes: Any) -> DeviceLimits:
    return DeviceLimits(**{**LIMITS.__dict__, **changes})


FRESH = st.lists(st.integers(0, LIMITS.vocab_size - 1), min_size=1, max_size=14)
COMMON = st.builds(lambda cut, end: [*range(cut), *end], st.integers(0, 13), st.lists(st.integers(0, 1), max_size=3))
PROMPTS = st.one_of(FRESH, COMMON.filter(bool))  # the second kind begin alike, and find pages of each other

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, 49), st.sampled_from([-float("inf"), 2.5]), max_size=3),
    seed=st.integers(0, 2**63 - 1),
    n=st.sampled_from([1, 1, 2, 3]),
    stop_token_ids=st.sampled_from([(), (3, 17), tuple(range(10))]),
    max_tokens=st.integers(1, 10),
    min_tokens=st.sampled_from([0, 0, 1]),
    logprobs=st.sampled_from([None, 0, 2]),
)


def check(request: Request, limits: DeviceLimits) -> None:
    """Every sample of a finished request says what it says alone, or the beginning of it if it was ended early."""
    prompt = request.prompt.tolist()
    if request.embeds:
        [done] = completions(request)
        assert done.finish_reason in ("stop", "cancelled", "deadline") and not done.token_ids
        if done.finish_reason == "stop":
            np.testing.assert_array_equal(done.embedding, expected_embedding(prompt, limits.pooling))
        return
    for index, completion in enumerate(completions(request)):
        alone = expected(prompt, request.params, index, limits=limits)
        said = list(completion.token_ids)
        if completion.finish_reason in ("cancelled", "deadline"):
            assert said == alone[: len(said)]
            continue
        assert said == alone
        ended = said[-1] in request.params.stop_token_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        wanted = request.params.logprobs
        assert (completion.logprobs is None) == (wanted is None)
        for token, logprob in zip(said, completion.logprobs or (), strict=wanted is not None):
            top = tuple(((token + i) % limits.vocab_size, -(token + i) % -limits.vocab_size) for i in range(wanted))
            assert (logprob.token_id, logprob.logprob, logprob.top) == (token, -token, top)


class CoreMachine(RuleBasedStateMachine):
    """Arrivals, cancels, deadlines and forks at random, on a device and a pool of random size."""

    @initialize(
        pages=st.integers(7, 24),
        batch=st.integers(3, 8),
        tokens=st.integers(8, 40),
        chunk=st.sampled_from([1, 2, 7, None]),
        runs_ahead=st.booleans(),
        host_pages=st.sampled_from([None, 0, 3, 8, 100]),
        keep=st.booleans(),
        pooling=st.sampled_from(["mean", "last"]),
    )
    def boot(
        self,
        pages: int,
        batch: int,
        tokens: int,
        chunk: int | None,
        runs_ahead: bool,
        host_pages: int | None,
        keep: bool,
        pooling: str,
    ) -> None:
        self.limits = device(num_pages=pages, max_batch=batch, max_tokens=tokens, pooling=pooling)
        limits = EngineLimits(max_chunk=chunk, keep_prefixes=keep)
        self.bench = Bench(self.limits, limits, runs_ahead=runs_ahead, host_pages=host_pages)
        self.slack = 1 + runs_ahead
        self.requests: list[Request] = []
        self.work = 0

    @rule(prompt=PROMPTS, params=PARAMS)
    def submit(self, prompt: list[int], params: SamplingParams) -> None:
        self.requests.append(self.bench.submit(prompt, params))
        self.work += params.n * (len(prompt) + params.max_tokens)

    @rule(prompt=PROMPTS, deadline_s=st.sampled_from([None, 0.02]))
    def embed(self, prompt: list[int], deadline_s: float | None) -> None:
        self.requests.append(self.bench.embed(prompt, SamplingParams(deadline_s=deadline_s)))
        self.work += len(prompt)

    @rule(prompt=PROMPTS, after_s=st.floats(1e-3, 0.1))
    def submit_with_deadline(self, prompt: list[int], after_s: float) -> None:
        self.submit(prompt, SamplingParams(max_tokens=8, n=2, seed=1, deadline_s=after_s))

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        self.bench.core.cancel(self.requests[which % len(self.requests)])

    @rule(turns=st.integers(1, 12))
    def turn(self, turns: int) -> None:
        core = self.bench.core
        for _ in range(turns):
            senior = self.most_senior()
            before = (senior.known, senior.computed) if senior else (0, 0)
            for _ in range(self.slack):  # a turn may do no more than process the step in flight
                core.turn()
                core.check_invariants()
            if senior and not senior.output.completion:
                assert (senior.known, senior.computed) > before, "the oldest sample did not move on"

    def most_senior(self) -> Sample | None:
        """Of the samples that have not ended; the parts of a request count from its first draw on."""
        live = [s for r in self.requests for s in r.samples if s.width and not s.output.completion]
        return min(live, key=lambda s: s.rank, default=None)

    @invariant()
    def nobody_is_overtaken(self) -> None:
        """All have one priority here, so that whoever runs came before whoever waits, and the oldest of all runs."""
        core = self.bench.core
        idle = min((s.rank for s in [*core.waiting, *core.swapped]), default=None)
        assert idle is None or all(s.rank < idle for s in core.running), "a sample waits behind a younger one"

    @invariant()
    def times_are_kept(self) -> None:
        now_s = self.bench.core.clock()
        for request in self.requests:
            for sample in request.samples:
                done = sample.output.completion
                assert done or request.deadline_s > now_s - 1, "a deadline was missed by a second"

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        # Each step moves somebody on; computing again and turns without a step come on top.
        again = 1 if self.bench.model.host_pages is None else 1 + self.work
        self.bench.run(most=self.slack * (self.work + 1) * again)
        for request in self.requests:
            check(request, self.limits)
        reasons = [e.completion.finish_reason for _, e in self.bench.events if e.completion]
        assert len(reasons) == sum(r.params.n for r in self.requests), "a sample ended twice, or never"


TestCore = CoreMachine.TestCase
TestCore.settings = settings(max_examples=200, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("host_pages", [None, 0, 6, 100], ids="host{}".format)
@pytest.mark.parametrize("runs_ahead", [False, True], ids=["in_step", "ahead"])
@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("pages", [8, 20, 64], ids="pages{}".format)
def test_chunks_and_preemption_change_nothing(
    chunk: int | None, pages: int, runs_ahead: bool, host_pages: int | None
) -> None:
    limits = device(num_pages=pages)
    bench = Bench(limits, EngineLimits(max_chunk=chunk), runs_ahead=runs_ahead, host_pages=host_pages)
    requests = [
        bench.submit(
            [(7 * i + j) % 50 for j in range(1 + 3 * i % 17)],
            SamplingParams(temperature=i % 2, seed=i, n=1 + i % 3, max_tokens=12, frequency_penalty=i % 2),
        )
        for i in range(16)
    ]
    bench.run()
    for request in requests:
        check(request, limits)
    stats = bench.core.stats
    assert (stats.preemptions > 0) == (pages < 64)
    if host_pages in (None, 100):
        assert stats.replays == 0
    if host_pages == 0:
        assert stats.replays == stats.preemptions


@settings(max_examples=25, deadline=None)
@given(
    arrivals=st.lists(st.tuples(PROMPTS, st.integers(-2, 2), st.integers(0, 4)), min_size=2, max_size=12),
    pages=st.integers(7, 20),
)
def test_priorities_change_the_order_only(arrivals: list[tuple[list[int], int, int]], pages: int) -> None:
    limits = device(num_pages=pages, max_batch=3)
    bench = Bench(limits)
    requests = []
    for prompt, priority, turns in arrivals:
        requests.append(bench.submit(prompt, SamplingParams(max_tokens=9, priority=priority, seed=5, n=2)))
        for _ in range(turns):
            bench.core.turn()
            bench.core.check_invariants()
    bench.run()
    for request in requests:
        check(request, limits)


def test_higher_priority_starts_first() -> None:
    bench = Bench(device(max_batch=1))
    low, high = (bench.submit([1, 2], SamplingParams(max_tokens=3, priority=p, seed=0)) for p in (0, 1))
    bench.run()
    ended = [request for request, event in bench.events if event.completion]
    assert ended == [high, low]


def test_samples_of_one_prompt_share_its_prefill_and_pages() -> None:
    bench = Bench()
    prompt = list(range(10))  # two and a half pages
    request = bench.submit(prompt, SamplingParams(n=4, seed=9, max_tokens=2, temperature=1))
    bench.core.turn()
    assert bench.model.steps == [(10, 1)] and request.samples[3].drawn == 1
    assert bench.model.limits.num_pages - bench.core.pool.free == 3
    bench.core.turn()
    assert bench.model.steps[1] == (4, 4)
    assert bench.core.stats.copied_pages == 3, "the last holder of a shared page need not copy it"
    bench.run()
    answers = [c.token_ids for c in completions(request)]
    assert answers == [tuple(expected(prompt, request.params, i)) for i in range(4)]
    assert len(set(answers)) == 4, "samples draw from streams of their own"


def test_the_first_of_n_samples_is_the_only_one_of_one() -> None:
    [alone] = Bench().complete([1, 2, 3], SamplingParams(seed=4, max_tokens=5))
    first, second = Bench().complete([1, 2, 3], SamplingParams(seed=4, max_tokens=5, n=2))
    assert alone.token_ids == first.token_ids != second.token_ids


def test_prompt_chunks_and_decodes_share_a_step_within_the_budget() -> None:
    bench = Bench(limits=EngineLimits(max_tokens=10, max_batch=4))
    first = bench.submit([1], SamplingParams(max_tokens=20, seed=0))
    bench.core.turn()
    bench.submit(list(range(25)), SamplingParams(max_tokens=2, seed=0))
    bench.core.turn()
    assert bench.model.steps == [(1, 1), (10, 2)], "one token of decode, nine of the new prompt"
    bench.run()
    assert len(completions(first)[0].token_ids) == 20


def test_a_sample_preempted_while_its_siblings_run_comes_back() -> None:
    limits = device(num_pages=5, max_context=20)  # 20 slots; three samples of 8 + 9 tokens want 5 pages each
    bench = Bench(limits)
    request = bench.submit(list(range(8)), SamplingParams(n=3, seed=1, max_tokens=10))
    bench.run()
    check(request, limits)
    assert bench.core.stats.preemptions > 0


def test_minimum_length_bans_stop_tokens_until_then() -> None:
    every = tuple(range(1, 50))
    [c] = Bench().complete([5], SamplingParams(stop_token_ids=every, min_tokens=4, max_tokens=9, seed=0))
    assert c.token_ids[:4] == (0, 0, 0, 0) and len(c.token_ids) == 5 and c.finish_reason == "stop"


def test_cancelled_before_during_and_after() -> None:
    bench = Bench()
    early, running, done = (bench.submit([i], SamplingParams(max_tokens=30, n=2, seed=i)) for i in range(3))
    bench.core.cancel(early)
    for _ in range(5):
        bench.core.turn()
    bench.core.cancel(running)
    bench.run()
    bench.core.cancel(done)
    bench.run()
    ended = [(c.finish_reason, len(c.token_ids)) for r in (early, running, done) for c in completions(r)]
    assert ended == [("cancelled", 0)] * 2 + [("cancelled", 5)] * 2 + [("length", 30)] * 2


def test_deadline_and_timings_follow_the_clock() -> None:
    bench = Bench(limits=EngineLimits(max_chunk=1))
    request = bench.submit([1, 2, 3], SamplingParams(max_tokens=90, seed=0, deadline_s=0.02))
    bench.run()
    [completion] = completions(request)
    assert completion.finish_reason == "deadline"
    assert 0.02 <= bench.model.clock.now_s < 0.022
    times = completion.timings
    assert times.load_s == 0.5 and times.queue_ms == 0
    assert times.ttft_ms == pytest.approx(1e3 * sum(1.1e-3 + 1e-6 * k for k in (1, 2, 3)))
    assert times.itl_ms == pytest.approx(1.11, abs=0.01)


def test_nothing_is_lost_when_the_device_fails() -> None:
    bench = Bench(device(max_batch=2))
    requests = [bench.submit([i], SamplingParams(max_tokens=5, seed=0)) for i in range(4)]
    bench.core.turn()
    requests.append(bench.submit([9], SamplingParams(max_tokens=5)))
    bench.model.step = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        bench.core.turn()
    assert [c.finish_reason for r in requests for c in completions(r)] == ["error"] * 5
    assert isinstance(bench.core.failure, TypeError)
    with pytest.raises(RuntimeError, match="engine is dead"):
        bench.submit([1], SamplingParams())


def test_a_policy_that_does_nothing_is_an_error_not_a_hang() -> None:
    class Idle:
        def plan(self, view):
            from tilewright.runtime.scheduler.policy import Plan

            return Plan([], [], [])

    bench = Bench(policy=Idle())
    bench.submit([1], SamplingParams())
    with pytest.raises(RuntimeError, match="computes nothing with 1"):
        bench.core.turn()


# -- a device that runs ahead ------------------------------------------------------------------------------------------


class Order:
    """Notes when steps are launched and collected."""

    def __init__(self, bench: Bench) -> None:
        self.events: list[str] = []
        launch, collect = bench.model.launch, bench.model.collect
        bench.model.launch = lambda batch: (self.events.append("launch"), launch(batch))[1]
        bench.model.collect = lambda pending: (self.events.append("collect"), collect(pending))[1]


def test_a_step_is_launched_before_the_last_one_is_collected() -> None:
    bench = Bench(runs_ahead=True)
    order = Order(bench)
    request = bench.submit([1, 2], SamplingParams(max_tokens=4, seed=0))
    bench.run()
    check(request, LIMITS)
    assert order.events == ["launch", *["launch", "collect"] * 3, "collect"], "the last draw is known to be the last"


def test_penalties_wait_for_the_tokens_they_count() -> None:
    bench = Bench(runs_ahead=True)
    order = Order(bench)
    request = bench.submit([1, 2], SamplingParams(max_tokens=3, seed=0, presence_penalty=0.5))
    bench.run()
    check(request, LIMITS)
    assert order.events == ["launch", "collect"] * 3


def test_a_row_that_was_one_too_many_is_dropped_and_its_pages_wait() -> None:
    answer = expected([1, 2, 3], SamplingParams(max_tokens=9, seed=0, temperature=1))
    bench = Bench(runs_ahead=True)
    params = SamplingParams(max_tokens=9, seed=0, temperature=1, stop_token_ids=(answer[1],))
    request = bench.submit([1, 2, 3], params)
    ends = answer.index(answer[1]) + 1
    for _ in range(ends + 1):
        bench.core.turn()
    assert request.finished and not bench.core.running
    assert bench.core.pool.free < LIMITS.num_pages and bench.core.busy, "a step still writes to the pages"
    bench.core.check_invariants()
    bench.core.turn()
    assert bench.core.pool.free == LIMITS.num_pages and not bench.core.busy
    assert bench.core.stats.drawn == ends and bench.core.stats.steps == ends + 1
    check(request, LIMITS)


def test_nothing_is_lost_when_the_device_fails_with_a_step_in_flight() -> None:
    bench = Bench(device(max_batch=2), runs_ahead=True)
    requests = [bench.submit([i], SamplingParams(max_tokens=1 + i, seed=0)) for i in range(4)]
    bench.core.turn()  # the first one's only token is in flight, and it is on no list any more

    def broken(pending: object) -> None:
        raise MemoryError("the device is gone")

    bench.model.collect = broken
    with pytest.raises(MemoryError):
        bench.core.turn()
    assert [c.finish_reason for r in requests for c in completions(r)] == ["error"] * 4
    assert not bench.core.busy


def test_cancelled_in_flight_and_swapped_out() -> None:
    bench = Bench(device(num_pages=5, max_context=20), runs_ahead=True, host_pages=20)
    requests = [bench.submit(list(range(8)), SamplingParams(max_tokens=10, seed=i)) for i in range(3)]
    while not bench.core.swapped:
        bench.core.turn()
    swapped = bench.core.swapped[0].request
    bench.core.cancel(swapped)
    bench.core.cancel(requests[0])
    bench.run()
    reasons = [completions(r)[0].finish_reason for r in requests]
    assert reasons.count("cancelled") == 2 and swapped is not requests[0]
    for request in requests:
        check(request, bench.model.limits)


def second_swapped_out() -> tuple[Bench, Request, Request]:
    """Two requests that ran until one had to go."""
    bench = Bench(device(num_pages=5, max_context=20), host_pages=20)
    first, second = (bench.submit(list(range(6)), SamplingParams(max_tokens=10, seed=i)) for i in range(2))
    while not bench.core.swapped:
        bench.core.turn()
    return bench, first, second


def test_who_was_swapped_out_comes_back_before_anybody_new_starts() -> None:
    bench, first, second = second_swapped_out()
    later = bench.submit([1], SamplingParams(max_tokens=1, seed=0))
    bench.run()
    ended = [request for request, event in bench.events if event.completion]
    assert ended.index(second) < ended.index(later) or later.started_s >= second.started_s
    assert bench.core.stats.replays == 0 and bench.core.stats.tokens == 2 * (6 + 9) + 1, "nothing is computed twice"
    for request in (first, second, later):
        check(request, bench.model.limits)


def test_who_computes_again_is_not_overtaken_by_a_swapped_sibling() -> None:
    limits = device(num_pages=7, max_batch=4, max_tokens=15)
    bench = Bench(limits, host_pages=8)  # room for the younger sibling's four pages, not for the older one's five too
    core = bench.core
    requests = [bench.submit(prompt, SamplingParams(max_tokens=8, n=2, seed=1)) for prompt in ([0], [0] * 14)]
    older, younger = requests[1].samples
    while not core.stats.replays:
        core.turn()
    assert core.waiting == [older] and core.swapped == [younger]
    while not older.output.completion:
        assert older in core.running or younger in core.swapped, "the younger one took its place"
        oldest, before = requests[0].finished, (older.known, older.computed)
        core.turn()
        core.check_invariants()
        assert not oldest or (older.known, older.computed) > before, "the oldest sample did not move on"
    bench.run()
    for request in requests:
        check(request, limits)


def test_who_was_swapped_out_does_not_overtake_a_higher_priority() -> None:
    bench, first, second = second_swapped_out()
    urgent = bench.submit(list(range(14)), SamplingParams(max_tokens=2, seed=0, priority=1))
    bench.run()
    ended = [request for request, event in bench.events if event.completion]
    assert ended == [first, urgent, second]
    for request in ended:
        check(request, bench.model.limits)
