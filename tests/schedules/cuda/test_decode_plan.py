"""The decode planner: every key of every query is in one part, parts are nodes of the tree, none is out of bounds."""

from itertools import pairwise

import pytest

from tests.cuda_runner import CudaRunner, cuda_target
from tests.schedules.cuda.paged_batches import make_spec
from tilewright.compiler.composites import PagedAttentionSpec
from tilewright.schedules.base import KernelCall, Lowering
from tilewright.schedules.cuda.decode_plan import MODES, plan_kernel
from tilewright.schedules.cuda.decode_work import (
    COUNTERS,
    END,
    FIRST,
    LEVEL,
    PAGES,
    PART,
    PARTIAL,
    PARTS,
    QUERY,
    WHOLE,
    WORK,
    HeadBlocks,
    plan_outputs,
)

M_MAX = 300


def planner(spec: PagedAttentionSpec, static: bool = True, mode: str = "auto") -> CudaRunner:
    kernel = plan_kernel(spec, cuda_target(), static, M_MAX, mode, 2.0)
    outputs = plan_outputs(spec, M_MAX)
    return CudaRunner(Lowering((KernelCall(kernel, (0, 1, 2, 3, 4), outputs, shared=True),), (WORK, COUNTERS)))


def plan(run: CudaRunner, arrays: tuple) -> list[list[int]]:
    import torch

    work, counters = run(*(torch.tensor(a, dtype=torch.int32, device="cuda") for a in arrays))
    assert not counters.any()
    return work[1 : 1 + int(work[0, 0])].tolist()


def decoding(lengths: list[int]) -> tuple:
    """positions, indptr, page_indptr, kv_len, phases of one generated token a sequence; a length of 0 pads."""
    count = len(lengths)
    return [max(n - 1, 0) for n in lengths], range(count + 1), range(100, 101 + count), lengths, [1] * count


def check(parts: list[list[int]], ends: dict[int, int], spec: PagedAttentionSpec) -> None:
    """ends: the keys of each query by its row."""
    window, kept = spec.attention.window, {}
    assert {p[QUERY] for p in parts} == set(ends)
    for row, end in ends.items():
        own = sorted((p for p in parts if p[QUERY] == row), key=lambda p: p[PART])
        first = max(0, end - window) if window else 0
        assert [p[PART] for p in own] == list(range(len(own))) and {p[PARTS] for p in own} == {len(own)}
        assert own[0][FIRST] == first and own[-1][END] == end
        for before, after in pairwise(own):
            assert before[END] == after[FIRST] and after[FIRST] % (1 << own[0][LEVEL]) == 0
            assert after[END] - after[FIRST] <= 1 << own[0][LEVEL]
        if len(own) > 1:
            kept[row] = range(own[0][PARTIAL], own[0][PARTIAL] + len(own))
    places = [i for part in kept.values() for i in part]
    assert len(set(places)) == len(places) and max(places, default=0) < HeadBlocks.of(spec).partials


def sizes(parts: list[list[int]]) -> list[int]:
    return [p[END] - p[FIRST] for p in parts]


def test_compiles_into_registers() -> None:
    for static in (True, False):
        assert "STACK:0 " in planner(make_spec(), static).resources(0)


@pytest.mark.parametrize(
    "heads, kv_heads, heads_of_block, blocks, units",
    [
        (32, 8, 4, 1, 8),
        (9, 3, 3, 1, 3),
        (8, 1, 8, 1, 1),
        (16, 1, 8, 2, 2),
        (9, 1, 5, 2, 2),
        (14, 2, 7, 1, 2),
        (4, 4, 1, 1, 4),
    ],
)
def test_heads_are_dealt_to_blocks(heads: int, kv_heads: int, heads_of_block: int, blocks: int, units: int) -> None:
    found = HeadBlocks.of(make_spec(heads, kv_heads))
    assert (found.heads, found.blocks, found.units) == (heads_of_block, blocks, units)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 300])
def test_lists_every_key_once(window: int | None) -> None:
    spec = make_spec(32, 8, 128, window=window)
    run = planner(spec)
    for lengths in ([1], [1024], [65536], [5, 0, 9000, 129], [1000] * 256, [0, 0], [*range(290), 40000]):
        parts = plan(run, decoding(lengths))
        check(parts, {row: n for row, n in enumerate(lengths) if n}, spec)
        assert {p[QUERY]: p[PAGES] for p in parts} == {row: 100 + row for row, n in enumerate(lengths) if n}


@pytest.mark.gpu
def test_few_queries_are_cut_and_many_are_not() -> None:
    run = planner(make_spec(32, 8, 128))
    for lengths, level in [([1024], 7), ([8192], 9), ([65536], 12), ([1024] * 64, WHOLE), ([100], WHOLE)]:
        assert {p[LEVEL] for p in plan(run, decoding(lengths))} == {level}, lengths
    levels = {p[QUERY]: p[LEVEL] for p in plan(run, decoding([100000] + [200] * 40))}
    assert levels[0] < WHOLE and levels[1] == WHOLE


@pytest.mark.gpu
def test_the_costly_come_first() -> None:
    import random

    run = planner(make_spec(32, 8, 128), mode="whole")
    found = sizes(plan(run, decoding([random.randint(1, 5000) for _ in range(290)])))
    assert all(after <= 1.3 * before for before, after in pairwise(found))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_parts_never_exceed_the_memory_kept_for_them(mode: str) -> None:
    """As many queries as there are, each of so many keys that all parts would need more: they stay whole."""
    spec = make_spec(32, 8, 128)
    parts = plan(planner(spec, mode=mode), decoding([600000] * M_MAX))
    assert len(parts) == M_MAX and {p[LEVEL] for p in parts} == {WHOLE}


@pytest.mark.gpu
def test_prompts_are_left_out() -> None:
    """In a mixed step a sequence may have several generated tokens, a prompt's are not for decode attention."""
    spec = make_spec(9, 3, 64)
    positions = [*range(10), 700, *range(50, 53), *range(5)]
    arrays = (positions, [0, 10, 11, 14, 14, 19], [0, 1, 45, 49, 49, 50], [10, 701, 53, 0, 5], [0, 1, 1, 1, 0])
    parts = plan(planner(spec, static=False), arrays)
    check(parts, {10: 701, 11: 51, 12: 52, 13: 53}, spec)
    assert {p[QUERY]: p[PAGES] for p in parts} == {10: 1, 11: 45, 12: 45, 13: 45}
