"""Which page holds which beginning of a sequence: a radix tree whose edges are pages full of tokens.

A node is one page; the way to it from the root spells all tokens before and in it. A page is kept here after the
sequence that filled it has ended, until the pool needs it for something else. Nothing is known here of tables and
counts: the pool (runtime/kv_cache.py) says which pages are idle, that is, read by no sequence. Who reads a page reads
all pages before it too, so below an idle page all are idle, and idle pages can always be given up from the leaves on.

The idea is SGLang's RadixAttention (Zheng et al. 2023), with whole pages for edges as in vLLM's prefix cache.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import numpy as np


@dataclass(eq=False)
class Node:
    """One page. key: its tokens' bytes. used: when it was last asked for, in the tree's own ticks."""

    page: int
    key: bytes
    parent: "Node | None"
    used: int = 0
    idle: bool = False
    children: dict[bytes, "Node"] = field(default_factory=dict)
    ticket: int = -1  # of the last time it was offered for eviction


class Eviction(Protocol):
    """Which idle leaf is given up first."""

    def rank(self, node: Node) -> Any:
        """The least goes first."""


@dataclass(frozen=True)
class LeastRecentlyUsed:
    def rank(self, node: Node) -> int:
        return node.used


class PrefixTree:
    """Pages by the tokens that they and those before them hold."""

    def __init__(self, page_size: int, eviction: Eviction | None = None) -> None:
        self._page_size = page_size
        self._eviction = eviction or LeastRecentlyUsed()
        self._root: dict[bytes, Node] = {}
        self._nodes: dict[int, Node] = {}
        self._offers: list[tuple[Any, int, Node]] = []  # a heap of idle leaves, with some that are none any more
        self._tickets, self._ticks = count(), count()

    def __contains__(self, page: int) -> bool:
        return page in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, tokens: np.ndarray) -> list[int]:
        """Pages that hold the beginning of `tokens`, int32[n], as many as there are."""
        pages, level = [], self._root
        for key in self._keys(tokens):
            node = level.get(key)
            if node is None:
                break
            pages.append(node.page)
            level = node.children
        return pages

    def insert(self, tokens: np.ndarray, pages: Sequence[int]) -> None:
        """Keeps the pages that `tokens` fill. From where the tree has another page for the same tokens on, nothing is
        kept: who reads the pages behind would not read those before them."""
        parent, level, tick = None, self._root, next(self._ticks)
        for key, page in zip(self._keys(tokens), pages, strict=False):
            node = level.get(key)
            if node is None:
                node = level[key] = self._nodes[page] = Node(page, key, parent)
            elif node.page != page:
                return
            node.used = tick
            parent, level = node, node.children

    def use(self, pages: Iterable[int]) -> None:
        """A sequence reads these pages from now on."""
        tick = next(self._ticks)
        for page in pages:
            node = self._nodes[page]
            node.used, node.idle = tick, False

    def rest(self, page: int) -> None:
        """No sequence reads this page any more."""
        node = self._nodes[page]
        node.idle = True
        self._offer(node)

    def evict(self) -> int:
        """Forgets an idle leaf, the one of least rank, and gives its page. There must be an idle page."""
        while True:
            _, ticket, node = heapq.heappop(self._offers)
            if _offered(node, ticket):
                break
        siblings = self._root if node.parent is None else node.parent.children
        del siblings[node.key], self._nodes[node.page]
        node.idle = False
        if node.parent is not None:
            self._offer(node.parent)
        return node.page

    def check(self, idle: Iterable[int]) -> None:
        """Raises AssertionError unless just these pages are idle, and every one of them can be evicted."""
        expected = set(idle)
        assert {page for page, node in self._nodes.items() if node.idle} == expected, "a page is idle by mistake"
        for node in self._nodes.values():
            assert not node.idle or all(child.idle for child in node.children.values()), (
                "a page is read, not its parent"
            )
        offered = {node.page for _, ticket, node in self._offers if _offered(node, ticket)}
        leaves = {page for page in expected if not self._nodes[page].children}
        assert offered == leaves, "a leaf can't be evicted"

    def _keys(self, tokens: np.ndarray) -> Iterator[bytes]:
        size = self._page_size
        return (tokens[at : at + size].tobytes() for at in range(0, len(tokens) - size + 1, size))

    def _offer(self, node: Node) -> None:
        if not node.idle or node.children:
            return
        node.ticket = next(self._tickets)
        heapq.heappush(self._offers, (self._eviction.rank(node), node.ticket, node))
        if len(self._offers) > 2 * len(self._nodes) + 64:
            self._offers = [offer for offer in self._offers if _offered(offer[2], offer[1])]
            heapq.heapify(self._offers)


def _offered(node: Node, ticket: int) -> bool:
    """Whether an offer still stands."""
    return node.idle and not node.children and node.ticket == ticket
