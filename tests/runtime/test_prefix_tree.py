"""Prefixes that are kept: the tree, the pool with a tree against a plain model of both, and the engine on it."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.runtime.fake import LIMITS, Bench, completions, expected
from tilewright.runtime.kv_cache import PagePool, PageTable, pages_for
from tilewright.runtime.prefix_tree import Node, PrefixTree
from tilewright.runtime.types import DeviceLimits, EngineLimits, SamplingParams

SIZE = 3


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


class KeptPool(RuleBasedStateMachine):
    """Slots hold what a device would write there: a value made of all tokens up to it. Two letters, so that sequences
    begin alike."""

    PAGES = 10

    def __init__(self) -> None:
        super().__init__()
        self.tree = PrefixTree(SIZE)
        self.pool = PagePool(self.PAGES, SIZE, self.tree)
        self.slots: list[object] = [None] * (self.PAGES * SIZE)
        self.tables: list[tuple[PageTable, list[int]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=11))
    def begin(self, tokens: list[int]) -> None:
        """What is kept of it, and the rest computed; the ledger foretells what that leaves free."""
        pages = self.pool.match(ids(*tokens[:-1]))
        ledger = self.pool.ledger()
        need = pages_for(len(tokens), SIZE) - len(pages) + ledger.idle(pages)
        assert len(pages) * SIZE < len(tokens)
        if need > ledger.free:
            return
        assert ledger.extend(ledger.share(pages), len(pages) * SIZE, len(tokens) - len(pages) * SIZE)
        table = self.pool.share(pages)
        self.tables.append((table, tokens[: len(pages) * SIZE]))
        self.write(len(self.tables) - 1, tokens[len(pages) * SIZE :])
        assert self.pool.free == ledger.free

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def grow(self, which: int, tokens: list[int]) -> None:
        self.write(which % len(self.tables), tokens)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        table, tokens = self.tables[which % len(self.tables)]
        self.tables.append((self.pool.fork(table), list(tokens)))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def keep(self, which: int) -> None:
        table, tokens = self.tables[which % len(self.tables)]
        self.pool.keep(table, ids(*tokens))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), keep=st.booleans())
    def release(self, which: int, keep: bool) -> None:
        table, tokens = self.tables.pop(which % len(self.tables))
        if keep:
            self.pool.keep(table, ids(*tokens))
        self.pool.release(table)

    def write(self, which: int, tokens: list[int]) -> None:
        table, known = self.tables[which]
        if self.pool.ledger().need(table, len(known), len(tokens)) > self.pool.free:
            return
        copy = self.pool.extend(table, len(known), len(tokens))
        if copy:
            source, target = (page * SIZE for page in copy)
            self.slots[target : target + SIZE] = self.slots[source : source + SIZE]
        for token in tokens:
            page, offset = divmod(len(known), SIZE)
            known.append(token)
            self.slots[table.pages[page] * SIZE + offset] = tuple(known)

    @invariant()
    def every_table_reads_its_own(self) -> None:
        for table, tokens in self.tables:
            read = [self.slots[page * SIZE + offset] for page in table.pages for offset in range(SIZE)]
            assert read[: len(tokens)] == [tuple(tokens[: i + 1]) for i in range(len(tokens))]

    @invariant()
    def books_are_right(self) -> None:
        self.pool.check(table for table, _ in self.tables)

    def teardown(self) -> None:
        for table, _ in self.tables:
            self.pool.release(table)
        self.pool.check([])
        assert self.pool.free == self.PAGES
        self.pool.extend(PageTable(), 0, self.PAGES * SIZE)  # every kept page can be had
        assert len(self.tree) == 0


TestKeptPool = KeptPool.TestCase
TestKeptPool.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def filled(pool: PagePool, *tokens: int) -> PageTable:
    """A table whose full pages are kept."""
    table = PageTable()
    pool.extend(table, 0, len(tokens))
    pool.keep(table, ids(*tokens))
    return table


def test_whole_pages_match_and_no_part_of_one() -> None:
    pool = PagePool(8, SIZE, PrefixTree(SIZE))
    table = filled(pool, 1, 2, 3, 4, 5, 6, 7)
    assert pool.match(ids(1, 2, 3, 4, 5, 6, 7, 8, 9)) == table.pages[:2]
    assert pool.match(ids(1, 2, 3, 4, 5)) == table.pages[:1]
    assert pool.match(ids(1, 2)) == pool.match(ids(2, 2, 3)) == []
    assert pool.match(ids(1, 2, 3, 9, 5, 6)) == table.pages[:1]


def test_the_least_recently_used_leaf_goes_first() -> None:
    pool = PagePool(4, SIZE, PrefixTree(SIZE))
    for tokens in ((1, 1, 1, 2, 2, 2), (3, 3, 3), (4, 4, 4)):
        pool.release(filled(pool, *tokens))
    pool.release(pool.share(pool.match(ids(3, 3, 3))))
    assert pool.free == 4 and len(pool.match(ids(1, 1, 1, 2, 2, 2))) == 2
    held = PageTable()
    pool.extend(held, 0, 1)
    assert len(pool.match(ids(1, 1, 1, 2, 2, 2))) == 1, "a leaf before its parent"
    pool.extend(held, 1, 5)
    assert pool.match(ids(1, 1, 1)) == [] and pool.match(ids(4, 4, 4)) and pool.match(ids(3, 3, 3))
    pool.extend(held, 6, 1)
    assert pool.match(ids(4, 4, 4)) == [] and pool.match(ids(3, 3, 3))
    pool.check([held])


def test_another_policy_decides_otherwise() -> None:
    @dataclass(frozen=True)
    class MostRecentlyUsed:
        def rank(self, node: Node) -> int:
            return -node.used

    pool = PagePool(2, SIZE, PrefixTree(SIZE, MostRecentlyUsed()))
    for tokens in ((1, 1, 1), (2, 2, 2)):
        pool.release(filled(pool, *tokens))
    pool.extend(PageTable(), 0, 1)
    assert pool.match(ids(1, 1, 1)) and not pool.match(ids(2, 2, 2))


def test_offers_that_lapsed_do_not_pile_up() -> None:
    tree = PrefixTree(SIZE)
    pool = PagePool(4, SIZE, tree)
    pool.release(filled(pool, 1, 1, 1))
    for _ in range(1000):
        pool.release(pool.share(pool.match(ids(1, 1, 1))))
    assert len(tree._offers) < 100
    pool.check([])


KEEP = EngineLimits(keep_prefixes=True)
SYSTEM = list(range(30))  # seven pages and a half


def ask(bench: Bench, prompt: list[int], **fields: object) -> int:
    """Tokens that the device computed for a request, whose answer is what it is alone."""
    params = SamplingParams(**{"seed": 1, "max_tokens": 3, **fields})  # type: ignore[arg-type]
    before = sum(tokens for tokens, _ in bench.model.steps)
    said = bench.complete(prompt, params)
    for index, completion in enumerate(said):
        assert list(completion.token_ids) == expected(prompt, params, index, limits=bench.model.limits)
    return sum(tokens for tokens, _ in bench.model.steps) - before


def test_what_begins_alike_is_computed_once() -> None:
    bench = Bench(limits=KEEP)
    assert ask(bench, [*SYSTEM, 40]) == 31 + 2
    assert ask(bench, [*SYSTEM, 41]) == 31 - 28 + 2, "seven whole pages are there"
    assert ask(bench, [*SYSTEM, 41], n=3) == 31 - 28 + 6
    assert ask(bench, SYSTEM[:28]) == 28 - 24 + 2, "the last token is computed, to draw from it"
    assert ask(bench, [9, *SYSTEM]) == 31 + 2
    stats = bench.core.stats
    assert (stats.prefix_queries, stats.prefix_hits) == (31 * 4 + 28, 28 * 2 + 24)


def test_a_conversation_goes_on_from_its_own_answer() -> None:
    bench = Bench(limits=KEEP)
    [first] = bench.complete(SYSTEM, SamplingParams(seed=1, max_tokens=11))
    prompt = [*SYSTEM, *first.token_ids, 7, 7]
    assert ask(bench, prompt) == 43 - 40 + 2, "of 41 tokens 40 are computed and fill ten pages"


def test_where_answers_are_not_computed_as_prompts_are_only_prompts_are_kept() -> None:
    bench = Bench(limits=KEEP, host_pages=8)
    [first] = bench.complete(SYSTEM, SamplingParams(seed=1, max_tokens=11))
    assert ask(bench, [*SYSTEM, *first.token_ids, 7, 7]) == 43 - 28 + 2


def test_requests_at_the_same_time_share_what_one_of_them_has_computed() -> None:
    bench = Bench(limits=KEEP)
    first = bench.submit([*SYSTEM, 40], SamplingParams(seed=1, max_tokens=40))
    bench.core.turn()
    used = bench.core.load.used_pages
    second = bench.submit([*SYSTEM, 41], SamplingParams(seed=2, max_tokens=2))
    bench.core.turn()
    assert second.cached_tokens == 28 and bench.core.load.used_pages <= used + 2
    bench.run()
    for request in (first, second):
        assert list(completions(request)[0].token_ids) == expected(request.prompt.tolist(), request.params)


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["in_step", "ahead"])
@pytest.mark.parametrize("host_pages", [None, 0, 6], ids="host{}".format)
@pytest.mark.parametrize("pages", [10, 16, 40], ids="pages{}".format)
def test_kept_pages_give_way_and_change_nothing(pages: int, host_pages: int | None, runs_ahead: bool) -> None:
    """Pools that hold less than is asked for: kept pages are evicted, sequences preempted, and answers stay."""
    limits = DeviceLimits(**{**LIMITS.__dict__, "num_pages": pages})
    hits = []
    for keep in (True, False):
        bench = Bench(limits, EngineLimits(keep_prefixes=keep), runs_ahead=runs_ahead, host_pages=host_pages)
        requests = []
        for i in range(24):
            prompt = [*SYSTEM[: 4 * (i % 6)], i, i % 3]
            requests.append(bench.submit(prompt, SamplingParams(seed=i, n=1 + i % 2, max_tokens=9, temperature=i % 2)))
            for _ in range(i % 4):
                bench.core.turn()
                bench.core.check_invariants()
        bench.run()
        for request in requests:
            for k, completion in enumerate(completions(request)):
                assert list(completion.token_ids) == expected(request.prompt.tolist(), request.params, k, limits=limits)
        hits.append(bench.core.stats.prefix_hits)
    assert hits[0] > 0 and hits[1] == 0
