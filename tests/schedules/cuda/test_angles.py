"""Cosines and sines of large angles on a GPU, as accurate as float32 is."""

import numpy as np
import pytest

from tests.cuda_runner import CudaRunner, cuda_target
from tests.kernel_runner import lower
from tests.schedules.cuda.row_inputs import RandomRows, compare
from tilewright.compiler.composites import AnglesSpec
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.base import Call
from tilewright.schedules.cuda.angles import Angles


def call(head_dim: int) -> Call:
    return Call("angles", AnglesSpec(head_dim), None, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [2, 64, 80, 128, 256])
def test_values_and_equal_bits_for_any_number_of_rows(head_dim: int) -> None:
    import torch

    random = RandomRows()
    run = CudaRunner(lower(Angles(), call(head_dim), cuda_target()))
    positions = random.integers(0, 1 << 20, 131)
    positions[:3] = torch.tensor([0, 1, (1 << 24) - 1])
    half = head_dim // 2
    frequencies = torch.tensor(1e4 ** (-np.arange(half) / half), dtype=torch.float32, device="cuda")
    cos, sin = run(positions, frequencies, m=131)
    angles = (positions[:, None].float() * frequencies).double()
    compare(cos, angles.cos(), "float32")
    compare(sin, angles.sin(), "float32")
    for part in (slice(0, 1), slice(130, 131), slice(17, 64)):
        some = run(positions[part], frequencies, m=part.stop - part.start)
        assert torch.equal(some[0], cos[part]) and torch.equal(some[1], sin[part])


@pytest.mark.parametrize("record", ["nvidia-h100", "nvidia-a100", "nvidia-l40s"])
def test_compiles_without_approximations_for_every_architecture(record: str) -> None:
    target = RECORDS[record]
    sass = CudaRunner(lower(Angles(), call(64), target), target).sass(0)
    assert "STG" in sass and "MUFU" not in sass
