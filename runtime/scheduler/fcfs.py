"""First come, first served, by priority: decodes of all, prompt chunks with what is left of the step (room.py).

Running sequences go first, most senior first. Where pages run out, the most junior ones are preempted until the senior
one fits; a sequence that has no junior waits in place. A new sequence is admitted when its whole prompt fits beside
what the running prompts still need and one page for each running sequence to grow into; pages that are kept of its
beginning it shares. Nobody overtakes the most
senior waiting one, new or back from the host's pages (the core sees to the latter). So the most senior sequence of all
always moves on, unless it came late with a high priority: then it is the next to start. And each becomes the most
senior in time, unless higher priorities keep coming.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tilewright.runtime.kv_cache import pages_for
from tilewright.runtime.scheduler.policy import C, Plan, View
from tilewright.runtime.scheduler.room import PromptRoom


@dataclass(frozen=True)
class FCFS:
    def plan(self, view: View[C]) -> Plan[C]:
        room = PromptRoom(view, [c for c in view.running if c.length - c.computed == 1])
        preempt, chunks = _continue(view, room)
        if preempt or not view.waiting:
            return Plan(preempt, [], chunks)
        admitted, begun = _admit(view, self.order(view), chunks, room)
        return Plan([], admitted, chunks + begun)

    def order(self, view: View[C]) -> Iterable[C]:
        """Those that wait, in the order in which they are admitted."""
        return view.waiting


def _continue(view: View[C], room: PromptRoom) -> tuple[list[C], list[tuple[C, int]]]:
    """-> whom to preempt, chunks of the others."""
    ledger, running = view.ledger, list(view.running)
    preempt: list[C] = []
    chunks: list[tuple[C, int]] = []
    place = 0
    while place < len(running):
        candidate = running[place]
        place += 1
        left = candidate.length - candidate.computed
        tokens = 1 if left == 1 else room.offer(candidate.computed, left)
        if tokens == 0:
            continue
        while not (fits := ledger.extend(candidate.table, candidate.computed, tokens)) and place < len(running):
            preempt.append(junior := running.pop())
            ledger.release(junior.table)
        if fits:
            chunks.append((candidate, tokens))
            if left > 1:
                room.take(candidate.computed, tokens)
    return preempt, chunks


def _admit(
    view: View[C], waiting: Iterable[C], chunks: list[tuple[C, int]], room: PromptRoom
) -> tuple[list[tuple[C, Sequence[int]]], list[tuple[C, int]]]:
    """-> the waiting sequences that can start now, with what is kept of their beginning, and their first chunks."""
    ledger, page_size = view.ledger, view.ledger.page_size
    places = view.budget.max_batch - sum(c.width for c in view.running)
    admitted: list[tuple[C, Sequence[int]]] = []
    begun: list[tuple[C, int]] = []
    if places == 0 or room.tokens == 0:
        return admitted, begun
    planned = {c.rank: tokens for c, tokens in chunks}
    promised = len(view.running)  # pages that others will want: one to grow into, and the rest of their prompts
    for c in view.running:
        promised += pages_for(c.length, page_size) - pages_for(c.computed + planned.get(c.rank, 0), page_size)
    for candidate in waiting:
        if candidate.width > places:
            break
        cached = view.cached(candidate)
        stored = len(cached) * page_size
        tokens = room.offer(stored, candidate.length - stored)
        need = pages_for(candidate.length, page_size) - len(cached)
        if tokens == 0 or need + ledger.idle(cached) + promised > ledger.free:
            break
        ledger.extend(ledger.share(cached), stored, tokens)
        admitted.append((candidate, cached))
        begun.append((candidate, tokens))
        room.take(stored, tokens)
        places -= candidate.width
        promised += 1 + need + len(cached) - pages_for(stored + tokens, page_size)
    return admitted, begun
