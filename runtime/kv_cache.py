"""The page pool: which page belongs to whom, and how often. Where a page lies on the device is not known here.

A sequence's page table holds ceil(stored / page_size) pages, where `stored` tokens are in the cache. Samples of one
prompt share pages by reference count; a shared page that is about to be written is copied first.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np


class PageTable:
    """The pages of one sequence in order, as a list and as the int32 array that goes into a step."""

    __slots__ = ("array", "pages")

    def __init__(self, pages: Iterable[int] = ()) -> None:
        self.replace(list(pages))

    def replace(self, pages: list[int]) -> None:
        self.pages = pages
        self.array = np.array(pages, np.int32)

    def __len__(self) -> int:
        return len(self.pages)


class PagePool:
    """Reference counts and the free list over `num_pages` pages of `page_size` tokens."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.refcounts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is the likeliest in a cache

    @property
    def free(self) -> int:
        return len(self._free)

    def extend(self, table: PageTable, stored: int, tokens: int) -> tuple[int, int] | None:
        """Makes room in `table` for `tokens` more after the `stored` ones, all of them in pages that nobody else reads.

        Returns the (source, destination) of the page copy that must run before the step, if a shared page is written.
        """
        pages, copy = table.pages, None
        grown = pages_for(stored + tokens, self.page_size) - len(pages)
        shared = stored % self.page_size != 0 and self.refcounts[pages[-1]] > 1
        if not grown and not shared:
            return None
        if shared:
            copy = (pages[-1], self._take())
            self.refcounts[copy[0]] -= 1
            pages = [*pages[:-1], copy[1]]
        table.replace(pages + [self._take() for _ in range(grown)])
        return copy

    def fork(self, table: PageTable) -> PageTable:
        """A second table over the same pages."""
        for page in table.pages:
            self.refcounts[page] += 1
        return PageTable(table.pages)

    def release(self, table: PageTable) -> None:
        """Gives the table's pages back; those that nobody else holds become free."""
        for page in reversed(table.pages):
            self.refcounts[page] -= 1
            if self.refcounts[page] == 0:
                self._free.append(page)
        table.replace([])

    def ledger(self) -> "PageLedger":
        """A scratch copy of the accounts, to plan with."""
        return PageLedger(self)

    def check(self, tables: Iterable[PageTable]) -> None:
        """Raises AssertionError unless the counts are exactly what `tables` hold and all other pages are free."""
        held = Counter(page for table in tables for page in table.pages)
        expected = [held[page] for page in range(self.num_pages)]
        assert self.refcounts == expected, f"reference counts {self.refcounts} are not {expected}"
        unheld = [page for page in range(self.num_pages) if not held[page]]
        assert sorted(self._free) == unheld, f"free pages {sorted(self._free)} are not {unheld}"

    def _take(self) -> int:
        if not self._free:
            raise RuntimeError(f"all {self.num_pages} pages are taken: the plan asked for more than its ledger had")
        page = self._free.pop()
        self.refcounts[page] = 1
        return page


class PageLedger:
    """What would be free if these sequences were extended and those given up: exact, sharing included, and harmless.

    Only differences to the pool are kept, so that making one costs nothing.
    """

    __slots__ = ("_pool", "_refs", "free", "page_size")

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.page_size = pool.page_size
        self._refs: dict[int, int] = {}  # pages whose count differs from the pool's
        self.free = pool.free

    def need(self, table: PageTable, stored: int, tokens: int) -> int:
        """Free pages that `PagePool.extend` would use."""
        pages, page_size = table.pages, self.page_size
        shared = stored % page_size != 0 and self._count(pages[-1]) > 1
        return pages_for(stored + tokens, page_size) - len(pages) + shared

    def extend(self, table: PageTable, stored: int, tokens: int) -> bool:
        """Books the extension if it fits; says whether it did."""
        need = self.need(table, stored, tokens)
        if need > self.free:
            return False
        self.free -= need
        if need and stored % self.page_size != 0:
            tail = table.pages[-1]
            if self._count(tail) > 1:
                self._refs[tail] = self._count(tail) - 1
        return True

    def release(self, table: PageTable) -> None:
        for page in table.pages:
            self._refs[page] = left = self._count(page) - 1
            self.free += left == 0

    def _count(self, page: int) -> int:
        return self._refs.get(page, self._pool.refcounts[page])


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)
