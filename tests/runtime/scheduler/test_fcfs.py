"""The policy alone, on views made by hand, and what it does to time on the virtual clock."""

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fake import LIMITS, Bench, completions
from tilewright.runtime.kv_cache import PagePool, PageTable
from tilewright.runtime.scheduler.fcfs import FCFS
from tilewright.runtime.scheduler.policy import Budget, Plan, View
from tilewright.runtime.types import DeviceLimits, SamplingParams

SIZE = 4


@dataclass(eq=False)
class Line:
    """A sequence as policies see it."""

    arrival: int
    length: int
    computed: int = 0
    width: int = 1
    priority: int = 0
    table: PageTable = field(default_factory=PageTable)
    tenant: str = ""
    begun: bool = False

    @property
    def rank(self) -> tuple[int, int, int]:
        return (-self.priority, self.arrival, 0)


def view(
    running: list[Line], waiting: list[Line], pages: int, batch: int = 8, tokens: int = 16, chunk: int = 16
) -> View:
    pool = PagePool(pages, SIZE)
    for line in running:
        pool.extend(line.table, 0, line.computed)
    return View(waiting, running, pool.ledger(), Budget(batch, tokens, chunk), now_s=0.0)


def plan(*args, **kwargs) -> Plan:
    return FCFS().plan(view(*args, **kwargs))


def test_decodes_of_all_then_prompts_with_what_is_left() -> None:
    decode, prompt, decode_2 = Line(0, 9, 8), Line(1, 40, 8), Line(2, 5, 4)
    new, newer = Line(3, 3), Line(4, 30)
    got = plan([decode, prompt, decode_2], [new, newer], pages=64, tokens=24, chunk=16)
    assert got.chunks == [(decode, 1), (prompt, 16), (decode_2, 1), (new, 3), (newer, 3)]
    assert [c for c, _ in got.admit] == [new, newer] and got.preempt == []


def test_nobody_overtakes_the_first_that_waits() -> None:
    big, small = Line(1, 30), Line(2, 2)
    got = plan([Line(0, 9, 8)], [big, small], pages=8)
    assert got.admit == [] and len(got.chunks) == 1


def test_width_counts_against_the_batch() -> None:
    assert plan([Line(0, 9, 8)], [Line(1, 3, width=4), Line(2, 3)], pages=64, batch=4).admit == []
    assert len(plan([Line(0, 9, 8)], [Line(1, 3, width=3), Line(2, 3)], pages=64, batch=4).admit) == 1


@pytest.mark.parametrize(("pages", "admitted"), [(6, False), (7, True)])
def test_admission_leaves_the_running_ones_a_page_each_to_grow(pages: int, admitted: bool) -> None:
    running = [Line(0, 4, 3), Line(1, 4, 3)]  # a page each
    assert bool(plan(running, [Line(2, 9)], pages=pages).admit) == admitted


@pytest.mark.parametrize(("pages", "admitted"), [(9, False), (10, True)])
def test_admission_counts_the_rest_of_running_prompts(pages: int, admitted: bool) -> None:
    running = [Line(0, 32, 4)]  # one page of eight; four tokens a step
    got = plan(running, [Line(1, 3)], pages=pages, chunk=4)
    assert bool(got.admit) == admitted


def test_the_most_junior_gives_way_and_nobody_is_admitted_meanwhile() -> None:
    senior, middle, junior = Line(0, 9, 8), Line(1, 8, 7), Line(2, 7, 6)
    got = plan([senior, middle, junior], [Line(3, 1)], pages=6)
    assert got.preempt == [junior] and got.chunks == [(senior, 1), (middle, 1)] and got.admit == []


def test_a_junior_without_room_waits_in_place() -> None:
    senior, junior = Line(0, 8, 7), Line(1, 9, 8)
    got = plan([senior, junior], [], pages=4)
    assert got.preempt == [] and got.chunks == [(senior, 1)]


def test_siblings_give_way_until_the_shared_page_is_ones_own() -> None:
    pool = PagePool(2, SIZE)
    first = Line(0, 7, 6)
    pool.extend(first.table, 0, 6)
    second, third = (Line(i, 7, 6, table=pool.fork(first.table)) for i in (1, 2))
    seen = View([], [first, second, third], pool.ledger(), Budget(8, 16, 16), 0.0)
    got = FCFS().plan(seen)
    assert got.preempt == [third, second] and got.chunks == [(first, 1)]


LINES = st.lists(
    st.tuples(st.integers(1, 20), st.integers(0, 19), st.integers(1, 3), st.integers(-1, 1)), min_size=1, max_size=8
)


@settings(max_examples=300, deadline=None)
@given(running=LINES, waiting=LINES, spare=st.integers(0, 12), chunk=st.integers(1, 16), tokens=st.integers(24, 40))
def test_plans_stay_within_the_budget_and_change_nothing(running, waiting, spare, chunk, tokens) -> None:
    lines = [Line(i, n, min(c, n - 1), w, p) for i, (n, c, w, p) in enumerate(running)]
    new = [Line(50 + i, n, 0, w, p) for i, (n, _, w, p) in enumerate(waiting)]
    lines.sort(key=lambda c: c.rank)
    new.sort(key=lambda c: c.rank)
    pages = max(5, sum(-(-c.computed // SIZE) for c in lines) + spare)
    batch = max(24, sum(c.width for c in lines))
    seen = view(lines, new, pages, batch, tokens, chunk)
    before = copy.deepcopy([(c.length, c.computed, c.table.pages) for c in lines + new])
    got = FCFS().plan(seen)
    assert before == [(c.length, c.computed, c.table.pages) for c in lines + new]
    assert sum(n for _, n in got.chunks) <= tokens
    computing = [c for c, _ in got.chunks]
    assert len(set(map(id, computing))) == len(computing)
    assert computing and computing[0] is (lines[0] if lines else new[0]), "the most senior one moves on"
    assert not set(map(id, got.preempt)) & set(map(id, computing))
    assert all(1 <= n <= min(max(chunk, 1), c.length - c.computed) for c, n in got.chunks)
    left = [c for c in lines if c not in got.preempt] + [c for c, _ in got.admit]
    assert sum(c.width for c in left) <= batch
    pool = PagePool(pages, SIZE)
    for c in left:
        grown = {id(c): n for c, n in got.chunks}.get(id(c), 0)
        pool.extend(PageTable(), 0, c.computed + grown)  # raises where the plan needs more than there is


def simulate(policy: FCFS, arrivals: list[tuple[float, int]], limits: DeviceLimits) -> tuple[list[float], int]:
    """Times to the first token in ms, and preemptions, of prompts that arrive at given times: the runtime itself."""
    bench = Bench(limits, policy=policy)
    clock, requests, todo = bench.model.clock, [], list(arrivals)
    while todo or bench.core.busy:
        while todo and todo[0][0] <= clock.now_s:
            requests.append(bench.submit([1] * todo.pop(0)[1], SamplingParams(max_tokens=20, seed=0)))
        if bench.core.busy:
            bench.core.turn()
        else:
            clock.now_s = todo[0][0]
    return [completions(r)[0].timings.ttft_ms for r in requests], bench.core.stats.preemptions


def test_the_simulator_is_the_runtime() -> None:
    arrivals = [(0.01 * i, 5 + 11 * i % 37) for i in range(40)]
    roomy = simulate(FCFS(), arrivals, LIMITS)
    assert roomy == simulate(FCFS(), arrivals, LIMITS), "a simulation repeats exactly"
    tight = simulate(FCFS(), arrivals, DeviceLimits(**{**LIMITS.__dict__, "num_pages": 24}))
    assert sum(tight[0]) > sum(roomy[0])
    assert tight[1] < len(arrivals), "admission keeps preemption rare"
