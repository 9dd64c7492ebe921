"""RMS norm on a GPU: values against float64, and a row's bits whatever stands beside it."""

import pytest

from tests.cuda_runner import CudaRunner, cuda_target
from tests.kernel_runner import lower
from tests.schedules.cuda.row_inputs import RandomRows, compare
from tilewright.compiler.composites import NormSpec
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.base import Call, Reject
from tilewright.schedules.cuda.rms_norm import NormTile, RMSNorm

EPS = 1e-3  # large enough to be seen in the result

# Features, dtype, inner. Of one thread a row to 32 values in each of 1024.
CASES = [
    (1, "float16", ()),
    (5, "bfloat16", (3,)),
    (37, "float32", ()),
    (64, "bfloat16", (9,)),
    (80, "float16", (2, 3)),
    (128, "bfloat16", (5,)),
    (256, "float32", (2,)),
    (576, "bfloat16", ()),
    (1001, "bfloat16", ()),
    (1026, "float16", ()),
    (2048, "float16", ()),
    (4096, "bfloat16", ()),
    (5000, "bfloat16", ()),
    (16383, "bfloat16", ()),
]
IDS = [f"{'x'.join(map(str, (*inner, k)))}-{dtype}" for k, dtype, inner in CASES]


def call(features: int, dtype: str, inner: tuple[int, ...] = ()) -> Call:
    return Call("rms_norm", NormSpec(features, EPS, dtype), None, 64, inner)


@pytest.mark.gpu
@pytest.mark.parametrize("features, dtype, inner", CASES, ids=IDS)
def test_values_and_equal_bits_for_any_number_of_rows(features: int, dtype: str, inner: tuple[int, ...]) -> None:
    import torch

    random = RandomRows()
    run = CudaRunner(lower(RMSNorm(), call(features, dtype, inner), cuda_target()))
    weight = random.normal(features)
    x = random.normal(131, *inner, features, dtype=dtype, scale=0.1)
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    (whole,) = run(x, weight)
    compare(whole, expected, dtype)
    for rows in (slice(0, 1), slice(130, 131), slice(17, 64)):
        (part,) = run(x[rows], weight)
        assert torch.equal(part, whole[rows])


@pytest.mark.gpu
def test_number_of_rows_in_a_block_changes_no_bit() -> None:
    import torch

    random = RandomRows()
    one = call(128, "bfloat16", (3,))
    tiles = RMSNorm().space(RMSNorm().match(one, cuda_target()), cuda_target())
    x, weight = random.normal(33, 3, 128, dtype="bfloat16"), random.normal(128)
    first, *rest = [CudaRunner(lower(RMSNorm(), one, cuda_target(), tile))(x, weight)[0] for tile in tiles]
    assert rest and all(torch.equal(first, other) for other in rest)


@pytest.mark.parametrize("record", ["nvidia-h100", "nvidia-a100", "nvidia-l40s"])
@pytest.mark.parametrize("features", [128, 576, 4096, 16383])
def test_needs_no_local_memory(features: int, record: str) -> None:
    target = RECORDS[record]
    run = CudaRunner(lower(RMSNorm(), call(features, "bfloat16"), target), target)
    assert " LOCAL:0" in run.resources(0)


def test_the_weight_is_read_before_the_wait_and_the_rest_after_it() -> None:
    sass = CudaRunner(lower(RMSNorm(), call(4096, "bfloat16"), cuda_target())).sass(0)
    before, after = sass.split("ACQBULK")
    assert "PREEXIT" in before and before.count("LDG.E.128") == 4
    assert after.count("LDG.E.128") == 2 and after.count("BAR.SYNC") == 1


@pytest.mark.parametrize(
    "spec, reason",
    [
        (NormSpec(64, 1e-5, "float8_e4m3fn"), "values in float8_e4m3fn"),
        (NormSpec(40000, 1e-5, "bfloat16"), "rows of 40000 features are longer than 32768"),
    ],
)
def test_rejects_with_a_reason(spec: NormSpec, reason: str) -> None:
    rejected = RMSNorm().match(Call("rms_norm", spec, None, 8), cuda_target())
    assert isinstance(rejected, Reject) and reason in rejected.reason


@pytest.mark.parametrize(
    "threads, rows, reason",
    [
        (48, 2, "48 threads of a row are no power of two"),
        (2048, 1, "2048 threads of a row"),
        (16, 1, "1 rows of 16 threads are no block"),
        (32, 64, "64 rows of 32 threads are no block"),
        (64, 2, "2 rows share a block"),
    ],
)
def test_tile_checks_itself(threads: int, rows: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        NormTile(threads, rows)


@pytest.mark.parametrize("features, threads", [(1, 1), (64, 8), (128, 16), (256, 32), (576, 32), (4096, 256)])
def test_all_tiles_give_a_row_the_same_threads(features: int, threads: int) -> None:
    facts = RMSNorm().match(call(features, "bfloat16"), cuda_target())
    assert {tile.threads for tile in RMSNorm().space(facts, cuda_target())} == {threads}


def test_floor_counts_each_byte_once() -> None:
    facts = RMSNorm().match(call(64, "bfloat16", (3,)), cuda_target())
    floor = RMSNorm().floor(facts, cuda_target())
    assert (floor.bytes_fixed, floor.bytes_per_row) == (256, 768)


@pytest.mark.gpu
def test_a_chain_in_a_graph_reads_what_was_written_last() -> None:
    """Each launch may start before the one ahead of it has ended, and buffers are written again in every replay."""
    import torch

    random, features = RandomRows(), 576
    run = CudaRunner(lower(RMSNorm(), call(features, "bfloat16"), cuda_target()))
    weight = 1 + random.normal(features, scale=0.1)
    x = random.normal(300, features, dtype="bfloat16")
    launches, outputs = [], [x]
    for _ in range(12):
        launch, (y,) = run.bind(outputs[-1], weight)
        launches.append(launch)
        outputs.append(y)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launches[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            for launch in launches:
                launch()
        for _ in range(3):
            x.copy_(random.normal(300, features, dtype="bfloat16"))
            graph.replay()
            stream.synchronize()
            expected = x
            for y in outputs[1:]:
                (expected,) = run(expected, weight)
                stream.synchronize()
                assert torch.equal(y, expected)
