"""The page pool against a plain model of it: tables are lists of page contents, sharing is copying."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tilewright.runtime.kv_cache import PagePool, PageTable

PAGES, SIZE = 12, 3


class PoolMachine(RuleBasedStateMachine):
    """Writes marks into slots as a device would and reads them back through the tables."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES, SIZE)
        self.slots = [None] * (PAGES * SIZE)
        self.tables: list[tuple[PageTable, list[object]]] = []

    @rule(tokens=st.integers(1, 7))
    def start(self, tokens: int) -> None:
        self.tables.append((PageTable(), []))
        self.write(len(self.tables) - 1, tokens)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), tokens=st.integers(1, 7))
    def grow(self, which: int, tokens: int) -> None:
        self.write(which % len(self.tables), tokens)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        table, marks = self.tables[which % len(self.tables)]
        self.tables.append((self.pool.fork(table), list(marks)))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        table, _ = self.tables.pop(which % len(self.tables))
        self.pool.release(table)
        assert not len(table) and not len(table.array)

    @precondition(lambda self: self.tables)
    @rule(
        leaving=st.sets(st.integers(0, 99), max_size=2), growing=st.dictionaries(st.integers(0, 99), st.integers(1, 9))
    )
    def plan(self, leaving: set[int], growing: dict[int, int]) -> None:
        """The ledger foretells exactly what releasing some and then extending others will leave free."""
        count = len(self.tables)
        grow = {which % count: tokens for which, tokens in growing.items()}
        leave = {which % count for which in leaving} - set(grow)
        ledger, foretold = self.pool.ledger(), []
        for which in leave:
            ledger.release(self.tables[which][0])
            foretold.append(ledger.free)
        for which, tokens in grow.items():
            table, marks = self.tables[which]
            ledger.extend(table, len(marks), tokens)
            foretold.append(ledger.free)
        for which in leave:
            self.pool.release(self.tables[which][0])
            assert self.pool.free == foretold.pop(0)
        for which, tokens in grow.items():
            self.write(which, tokens)
            assert self.pool.free == foretold.pop(0)
        self.tables = [entry for i, entry in enumerate(self.tables) if i not in leave]

    def write(self, which: int, tokens: int) -> None:
        table, marks = self.tables[which]
        if self.pool.ledger().need(table, len(marks), tokens) > self.pool.free:
            return
        copy = self.pool.extend(table, len(marks), tokens)
        if copy:
            source, target = (page * SIZE for page in copy)
            self.slots[target : target + SIZE] = self.slots[source : source + SIZE]
        for position in range(len(marks), len(marks) + tokens):
            page, offset = divmod(position, SIZE)
            mark = object()
            self.slots[table.pages[page] * SIZE + offset] = mark
            marks.append(mark)

    @invariant()
    def every_table_reads_its_own(self) -> None:
        for table, marks in self.tables:
            read = [self.slots[page * SIZE + offset] for page in table.pages for offset in range(SIZE)]
            assert read[: len(marks)] == marks
            assert table.array.tolist() == table.pages

    @invariant()
    def counts_are_exact(self) -> None:
        self.pool.check(table for table, _ in self.tables)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_check_sees_a_leak() -> None:
    pool = PagePool(4, 2)
    pool.extend(PageTable(), 0, 3)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([])


def test_a_plan_beyond_the_pool_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="all 2 pages are taken"):
        PagePool(2, 2).extend(PageTable(), 0, 5)


def test_ledgers_change_nothing() -> None:
    pool, table = PagePool(4, 2), PageTable()
    pool.extend(table, 0, 3)
    ledger = pool.ledger()
    assert ledger.extend(table, 3, 4)
    ledger.release(table)
    pool.check([table])
    assert pool.free == 2


def test_the_last_holder_of_a_page_may_keep_it_within_one_plan() -> None:
    pool, first = PagePool(4, 2), PageTable()
    pool.extend(first, 0, 3)
    second = pool.fork(first)
    ledger = pool.ledger()
    assert ledger.extend(first, 3, 1) and ledger.free == 1, "a copy of the shared page"
    assert ledger.extend(second, 3, 1) and ledger.free == 1, "which is its own by then"
