"""The work list of prefill attention against one made on the host."""

from typing import Any

import numpy as np
import pytest

from tests.cuda_runner import CudaRunner, cuda_target
from tilewright.schedules.base import Lowering
from tilewright.schedules.cuda.prefill_plan import WORK, WORK_ROW, plan_call

KEYS = 64


def make_runner(tokens: int, window: int | None, m_max: int) -> CudaRunner:
    return CudaRunner(Lowering((plan_call(tokens, KEYS, window, m_max, cuda_target()),), (WORK,)))


def test_the_list_is_bounded_by_the_tokens() -> None:
    call = plan_call(32, KEYS, None, 100, cuda_target())
    assert call.shared and call.outputs[0].shape == (101, WORK_ROW)


def test_compiles_without_local_memory() -> None:
    assert " LOCAL:0 " in make_runner(42, 100, 512).resources(0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100], ids=["all", "window"])
@pytest.mark.parametrize("tokens", [1, 42, 128])
def test_lists_every_tile_once_and_costly_ones_first(tokens: int, window: int | None) -> None:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"{seed=}")
    rng = np.random.default_rng(seed)
    run = make_runner(tokens, window, 8192)
    for sequences, longest in [(1, 1), (1, 8192), (7, 300), (256, 32), (257, 31), (1025, 7), (3000, 2)]:
        new = rng.integers(0, longest + 1, sequences)
        new[0] = longest
        cached = new + rng.integers(0, 2, sequences) * rng.integers(0, 70_000, sequences)
        phases = rng.integers(0, 2, sequences)
        phases[0] = 0
        pages = np.cumsum([0, *(-(-cached // 16))])
        work = run_plan(run, new, cached, phases, pages)
        listed = work[1 : 1 + work[0, 0], :5]
        expected = tiles(tokens, new, cached, phases, pages)
        assert sorted(map(tuple, listed.tolist())) == sorted(expected)
        costs = (listed[:, 3] + listed[:, 1] - 1) // KEYS
        if window:
            costs -= np.maximum(listed[:, 3] - window + 1, 0) // KEYS
        # Large costs are sorted by 16.
        assert (np.diff(np.where(costs < 512, costs, costs // 16 * 16)) <= 0).all()


def run_plan(run: CudaRunner, new, cached, phases, pages) -> np.ndarray:
    import torch

    positions = np.concatenate([np.arange(c - n, c) for n, c in zip(new, cached, strict=True)])
    padded = np.concatenate([positions, np.full(5, 2**30)])  # a step's arrays may be longer than its tokens
    arrays = [padded, np.cumsum([0, *new]), pages, cached, phases]
    positions, *rest = (torch.from_numpy(np.ascontiguousarray(a, np.int32)).cuda() for a in arrays)
    unused: Any = None
    indptr, page_indptr, kv_len, phase = rest
    (work,) = run(unused, unused, positions, indptr, page_indptr, unused, kv_len, phase)
    return work.cpu().numpy()


def tiles(tokens: int, new, cached, phases, pages) -> list[tuple[int, ...]]:
    """(first row, tokens, first page entry, first position, cached tokens) of every tile."""
    rows = np.cumsum([0, *new])
    found = []
    for s in np.flatnonzero(phases == 0):
        for begin in range(0, int(new[s]), tokens):
            position = int(cached[s] - new[s]) + begin
            count = min(tokens, int(new[s]) - begin)
            found.append((int(rows[s]) + begin, count, int(pages[s]), position, int(cached[s])))
    return found
