"""A gate on its own on a GPU, against float64."""

import pytest

from tests.cuda_runner import CudaRunner, cuda_target
from tests.kernel_runner import lower
from tests.schedules.cuda.row_inputs import RandomRows, compare
from tilewright.compiler.composites import GatedSpec
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cuda.gated import Gated

CASES = [
    GatedSpec(1536, "silu", "bfloat16"),
    GatedSpec(14336, "gelu_tanh", "float16"),
    GatedSpec(37, "silu", "float16"),
    GatedSpec(1, "gelu_tanh", "bfloat16"),
    GatedSpec(100, "gelu_tanh", "float32"),
]
IDS = [f"{s.features}-{s.activation}-{s.dtype}" for s in CASES]


def call(spec: GatedSpec) -> Call:
    return Call("gated", spec, None, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", CASES, ids=IDS)
def test_values_and_equal_bits_for_any_number_of_rows(spec: GatedSpec) -> None:
    import torch

    random = RandomRows()
    run = CudaRunner(lower(Gated(), call(spec), cuda_target()))
    x = random.normal(131, 2 * spec.features, dtype=spec.dtype, scale=3)
    gate, up = x.double().chunk(2, -1)
    silu = torch.nn.functional.silu(gate)
    expected = up * (silu if spec.activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh"))
    (whole,) = run(x)
    compare(whole, expected, spec.dtype)
    for rows in (slice(0, 1), slice(130, 131), slice(17, 64)):
        assert torch.equal(run(x[rows])[0], whole[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_of_any_size(activation: str) -> None:
    """No overflow on the way makes a NaN."""
    import torch

    gate = torch.tensor([[-1e4, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e4]], device="cuda")
    run = CudaRunner(lower(Gated(), call(GatedSpec(8, activation, "float32")), cuda_target()))
    (y,) = run(torch.cat([gate, torch.ones_like(gate)], -1))
    torch.testing.assert_close(y, gate.clamp(min=0), rtol=0, atol=1e-30)


@pytest.mark.parametrize("record", ["nvidia-h100", "nvidia-a100", "nvidia-l40s"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_needs_no_local_memory(activation: str, record: str) -> None:
    target = RECORDS[record]
    run = CudaRunner(lower(Gated(), call(GatedSpec(1536, activation, "bfloat16")), target), target)
    assert " LOCAL:0" in run.resources(0)


@pytest.mark.parametrize(
    "spec, reason",
    [
        (GatedSpec(64, "relu", "bfloat16"), "activation 'relu' is none of silu, gelu_tanh"),
        (GatedSpec(64, "silu", "float64"), "values in float64"),
    ],
)
def test_rejects_with_a_reason(spec: GatedSpec, reason: str) -> None:
    rejected = Gated().match(call(spec), cuda_target())
    assert isinstance(rejected, Reject) and reason in rejected.reason


def test_floor_counts_each_byte_once() -> None:
    facts = Gated().match(call(GatedSpec(64, "silu", "bfloat16")), cuda_target())
    assert Gated().floor(facts, cuda_target()).bytes_per_row == 2 * (2 * 64 + 64)
