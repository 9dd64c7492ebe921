"""The page pool: which page belongs to whom, and how often. Where a page lies on the device is not known here.

A sequence's page table holds ceil(stored / page_size) pages, where `stored` tokens are in the cache. Samples of one
prompt share pages by reference count; a shared page that is about to be written is copied first.

Full pages may be kept for later sequences that begin alike (runtime/prefix_tree.py). A kept page that no sequence reads
counts as free: it is given up when no other page is left.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from tilewright.runtime.prefix_tree import PrefixTree


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
    """Reference counts and the free list over `num_pages` pages of `page_size` tokens. kept: full pages that outlive
    their sequences; None keeps none."""

    def __init__(self, num_pages: int, page_size: int, kept: PrefixTree | None = None) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.refcounts = [0] * num_pages  # by tables
        self._kept = kept
        self._idle = 0  # kept pages that no table holds
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is the likeliest in a cache

    @property
    def free(self) -> int:
        return len(self._free) + self._idle

    @property
    def idle(self) -> int:
        """Kept pages that no table holds: free, but not empty."""
        return self._idle

    def extend(self, table: PageTable, stored: int, tokens: int) -> tuple[int, int] | None:
        """Makes room in `table` for `tokens` more after the `stored` ones, all of them in pages that nobody else reads.

        Returns the (source, destination) of the page copy that must run before the step, if a shared page is written.
        """
        pages, copy = table.pages, None
        shared = stored % self.page_size != 0 and self.refcounts[pages[-1]] > 1
        if not shared and stored + tokens <= len(pages) * self.page_size:
            return None
        grown = pages_for(stored + tokens, self.page_size) - len(pages)
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

    def match(self, tokens: np.ndarray) -> list[int]:
        """Kept pages that hold the beginning of `tokens`, int32[n]."""
        return [] if self._kept is None else self._kept.match(tokens)

    def keep(self, table: PageTable, tokens: np.ndarray) -> None:
        """Keeps the pages of a table that `tokens`, int32[n], fill: they are not written any more."""
        if self._kept is not None:
            self._kept.insert(tokens, table.pages)

    def share(self, pages: list[int]) -> PageTable:
        """A table over kept pages, as `match` gives them."""
        for page in pages:
            self._idle -= self.refcounts[page] == 0
            self.refcounts[page] += 1
        if self._kept is not None and pages:
            self._kept.use(pages)
        return PageTable(pages)

    def release(self, table: PageTable) -> None:
        """Gives the table's pages back; those that nobody else holds become free."""
        for page in reversed(table.pages):
            self.refcounts[page] -= 1
            if self.refcounts[page] == 0:
                self._set_free(page)
        table.replace([])

    def ledger(self) -> "PageLedger":
        """A scratch copy of the accounts, to plan with."""
        return PageLedger(self)

    def check(self, tables: Iterable[PageTable]) -> None:
        """Raises AssertionError unless the counts are exactly what `tables` hold and all others are free or kept."""
        held = Counter(page for table in tables for page in table.pages)
        expected = [held[page] for page in range(self.num_pages)]
        assert self.refcounts == expected, f"reference counts {self.refcounts} are not {expected}"
        unheld = [page for page in range(self.num_pages) if not held[page]]
        idle = [page for page in unheld if self._kept is not None and page in self._kept]
        found = sorted([*self._free, *idle])
        assert found == unheld and len(idle) == self._idle, f"free pages {found} are not {unheld}"
        if self._kept is not None:
            self._kept.check(idle)

    def _set_free(self, page: int) -> None:
        if self._kept is not None and page in self._kept:
            self._kept.rest(page)
            self._idle += 1
        else:
            self._free.append(page)

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        elif self._kept is not None and self._idle:
            page = self._kept.evict()
            self._idle -= 1
        else:
            raise RuntimeError(f"all {self.num_pages} pages are taken: the plan asked for more than its ledger had")
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
        pages, page_size = table.pages, self.page_size
        if stored % page_size and stored + tokens <= len(pages) * page_size and self._count(pages[-1]) == 1:
            return True  # as most decodes do
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

    def idle(self, pages: Sequence[int]) -> int:
        """How many of these kept pages count as free."""
        return sum(self._count(page) == 0 for page in pages)

    def share(self, pages: Sequence[int]) -> PageTable:
        """Books a table over kept pages."""
        self.free -= self.idle(pages)
        for page in pages:
            self._refs[page] = self._count(page) + 1
        return PageTable(pages)

    def _count(self, page: int) -> int:
        return self._refs.get(page, self._pool.refcounts[page])


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)
