"""Fairness between tenants: the order alone, the counters, and what becomes of it on the virtual clock."""

import pytest

from tests.runtime.fake import Bench, completions
from tests.runtime.scheduler.test_fcfs import Line, view
from tilewright.compiler.errors import QueueFullError
from tilewright.runtime.queue_room import QueueRoom
from tilewright.runtime.scheduler.counters import VirtualCounters
from tilewright.runtime.scheduler.fair import FairShare
from tilewright.runtime.scheduler.fcfs import FCFS
from tilewright.runtime.types import EngineLimits, SamplingParams


def order(waiting: list[Line], **served: float) -> list[int]:
    seen = view([], waiting, pages=8)
    return [line.arrival for line in FairShare().order(type(seen)(**{**seen.__dict__, "served": served}))]


def test_the_least_served_goes_first_and_each_turn_counts() -> None:
    a, b = [Line(i, 10, tenant="a") for i in range(3)], [Line(3 + i, 25, tenant="b") for i in range(2)]
    assert order([*a, *b]) == [0, 3, 1, 2, 4]
    assert order([*a, *b], a=30) == [3, 4, 0, 1, 2]
    assert order([*a, *b], b=15) == [0, 1, 3, 2, 4]
    assert order(a) == [0, 1, 2], "one tenant's requests stay in order"


def test_priorities_go_before_fairness_and_the_preempted_before_the_new() -> None:
    high, old, new = Line(9, 4, priority=1, tenant="a"), Line(1, 4, tenant="a", begun=True), Line(2, 4, tenant="b")
    assert order([high, old, new], a=1000) == [9, 1, 2]
    assert order([high, Line(1, 4, tenant="a"), new], a=1000) == [9, 2, 1]


def test_time_without_requests_is_no_credit() -> None:
    counters = VirtualCounters()
    counters.arrive("a", [])
    counters.admit("a", 100)
    counters.answer("a", 50)
    counters.arrive("b", ["a"])
    assert counters.served == {"a": 200, "b": 200}
    counters.answer("b", 5)
    counters.arrive("b", ["a", "b"])
    assert counters.served["b"] == 210, "who waits already is not lifted"
    counters.arrive("c", [])
    assert counters.served["c"] == 200, "the level of who left the queue last"


def first_tokens_ms(policy: FCFS, flood: int) -> tuple[list[float], float]:
    """Times to the first token: of a tenant's `flood` requests that come at once, and of another's one after them."""
    bench = Bench(policy=policy, limits=EngineLimits(max_batch=2))
    params = SamplingParams(max_tokens=10, seed=0, ignore_eos=True)
    many = [bench.submit([1 + i % 40] * 20, params, "many") for i in range(flood)]
    bench.core.turn()
    one = bench.submit([3] * 20, params, "one")
    bench.run()
    return [completions(r)[0].timings.ttft_ms for r in many], completions(one)[0].timings.ttft_ms


def test_a_hundred_requests_of_one_tenant_do_not_hold_up_the_one_of_another() -> None:
    many, fair = first_tokens_ms(FairShare(), 100)
    _, unfair = first_tokens_ms(FCFS(), 100)
    assert fair < 2 * many[2], "it has the next place that comes free"
    assert unfair > 20 * fair, "what it is there for"


def test_two_tenants_with_long_queues_get_the_same() -> None:
    bench = Bench(limits=EngineLimits(max_batch=2))
    params = SamplingParams(max_tokens=10, seed=0, ignore_eos=True)
    requests = [bench.submit([1 + i] * 30, params, tenant) for tenant in ("a", "b") for i in range(20)]
    while sum(r.finished for r in requests) < 20:
        bench.core.turn()
    done = [sum(r.finished for r in requests if r.tenant == tenant) for tenant in ("a", "b")]
    assert abs(done[0] - done[1]) <= 1
    bench.run()


def test_a_full_queue_has_room_for_who_has_less_than_its_part() -> None:
    room = QueueRoom(4)
    for _ in range(4):
        room.enter("many", wait=False)
    with pytest.raises(QueueFullError, match="4 requests are waiting"):
        room.enter("many", wait=False)
    room.enter("one", wait=False)
    room.enter("one", wait=False)
    with pytest.raises(QueueFullError):
        room.enter("one", wait=False)
    room.enter("third", wait=False)
    for tenant in ("many",) * 4 + ("one",) * 2 + ("third",):
        room.leave(tenant)
    for _ in range(4):
        room.enter("many", wait=False)
