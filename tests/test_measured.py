"""What `doctor --measure` keeps: where it is found again, what uses it, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from tests.cli_runner import make_runner
from tests.fake_model import fake_artifact
from tests.test_targets import gpu
from tilewright.compiler import env, targets
from tilewright.compiler.codegen import cuda_toolchain
from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import cuda, host, measured
from tilewright.compiler.targets.measured import Ceilings

H100 = "NVIDIA H100 80GB HBM3"
FOUND = Ceilings(bandwidth_gbs=3111.5, copy_gbs=2800.25, matrix_tops=701.0)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(env.CACHE_DIR, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, H100, (9, 0), 132)


@pytest.fixture
def run(capsys, monkeypatch, cache):
    runner = make_runner(capsys, monkeypatch)
    monkeypatch.setenv(env.CACHE_DIR, str(cache))
    return runner


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without measuring."""
    monkeypatch.setattr("tilewright.measure.read_bandwidth_gbs", lambda threads: 12.34)
    monkeypatch.setattr("tilewright.measure.copy_bandwidth_gbs", lambda threads: 8.5)
    monkeypatch.setattr("tilewright.measure_gpu.measure", lambda target: FOUND)


def test_figures_come_back_as_they_were_written() -> None:
    assert measured.read(H100) is None
    written = measured.write(H100, FOUND)
    assert measured.read(H100) == written
    assert written.ceilings == FOUND and re.fullmatch(r"\d{4}-\d\d-\d\d", written.date)
    assert measured.read("NVIDIA H200") is None
    again = measured.write(H100, Ceilings(3000.0))
    assert measured.read(H100) == again and again.ceilings.matrix_tops is None


def test_the_target_here_has_what_was_measured(h100) -> None:
    record = targets.RECORDS["nvidia-h100"]
    assert targets.resolve_target("cuda").bandwidth_gbs == record.bandwidth_gbs
    measured.write(H100, FOUND)
    here = targets.resolve_target("cuda")
    assert (here.bandwidth_gbs, here.matrix_tops) == (3111.5, 701.0)
    assert targets.resolve_target("nvidia-h100").bandwidth_gbs == record.bandwidth_gbs, "compiled for any such GPU"
    measured.write(H100, Ceilings(3000.0))
    assert targets.resolve_target("cuda").matrix_tops == record.matrix_tops


def test_figures_make_no_other_target_of_it(h100) -> None:
    """Kernels and artifacts are kept by what the target is: to measure must not compile everything again."""
    before = targets.resolve_target("cuda")
    measured.write(H100, FOUND)
    after = targets.resolve_target("cuda")
    assert (after, repr(after)) == (before, repr(before))


def test_the_processors_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    measured.write(f"{host.processor()}, {host.cores()} cores", Ceilings(17.0, 9.0))
    assert targets.resolve_target("auto").bandwidth_gbs == 17.0
    monkeypatch.setattr(host, "cores", lambda: 1000)
    assert targets.resolve_target("cpu").bandwidth_gbs is None, "of the same processor with other cores"


CHANGES = {
    "not JSON": lambda text: text[:-5],
    "no object": lambda text: "[1, 2]",
    "empty": lambda text: "",
    "no version": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "version"}),
    "newer": lambda text: json.dumps(json.loads(text) | {"version": 2}),
    "one more": lambda text: json.dumps(json.loads(text) | {"speed": 2}),
    "no ceilings": lambda text: json.dumps(json.loads(text) | {"ceilings": 7}),
    "no number": lambda text: text.replace("3111.5", '"fast"'),
    "not finite": lambda text: text.replace("3111.5", "NaN"),
    "negative": lambda text: text.replace("3111.5", "-1"),
    "null": lambda text: text.replace("3111.5", "null"),
    "no date": lambda text: json.dumps(json.loads(text) | {"date": "yesterday"}),
    "another device": lambda text: text.replace("H100", "H200"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_figures_are_refused(h100, run, cache: Path, change: str) -> None:
    measured.write(H100, FOUND)
    [file] = (cache / "measured").iterdir()
    file.write_text(CHANGES[change](file.read_text()))
    sentence = rf"^{re.escape(str(file))} .*; run tilewright doctor --measure, or remove it$"
    with pytest.raises(TargetError, match=sentence):
        targets.resolve_target("cuda")
    with pytest.raises(TargetError, match=sentence):
        targets.resolve_target("nvidia-h100")
    code, out, err = run("compile", "x", "--target", "cuda")
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith(f"error: {file} ")
    code, out, err = run("doctor")
    assert (code, err) == (0, "") and f"GPU measured     {file} " in out, "it goes on, and says so"


def test_figures_that_cannot_be_kept(cache: Path) -> None:
    cache.mkdir()
    (cache / "measured").touch()
    with pytest.raises(TargetError, match=rf"the cache {cache} can't be written to .*; make room, or set TILEWRI"):
        measured.write(H100, FOUND)
    assert measured.read(H100) is None
    (cache / "measured").unlink()
    (cache / "measured" / f"{H100.lower().replace(' ', '-')}.json").mkdir(parents=True)
    with pytest.raises(TargetError, match="can't be read"):
        measured.read(H100)


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor_measures_without_a_gpu(run, quick, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_driver", lambda: None)
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert re.search(r"^memory measured +not yet: tilewright doctor --measure$", out, re.M)
    assert re.search(r"^GPU measured +none$", out, re.M)
    code, out, err = run("doctor", "--measure")
    assert (code, err) == (0, "")
    assert re.search(r", \d+ cores +memory, read +12\.3 GB/s$", out, re.M)
    assert re.search(r", \d+ cores +memory, copied: read and written +8\.5 GB/s$", out, re.M)
    assert "TFLOP/s" not in out
    code, out, err = run("doctor")
    assert re.search(r"^memory measured +12\.34 GB/s read, on \d{4}-\d\d-\d\d$", out, re.M)


def test_doctor_measures_a_gpu_beside_its_record(run, quick, h100) -> None:
    code, out, err = run("doctor", "--measure")
    assert (code, err) == (0, "")
    assert re.search(r"^NVIDIA H100 80GB HBM3 +memory, read +3112 GB/s +3085 GB/s$", out, re.M)
    assert re.search(r"^NVIDIA H100 80GB HBM3 +memory, copied: read and written +2800 GB/s$", out, re.M)
    assert re.search(r"^NVIDIA H100 80GB HBM3 +product of bfloat16 .* +701 TFLOP/s +790 TFLOP/s$", out, re.M)
    code, out, err = run("doctor")
    assert re.search(r"^GPU measured +3112 GB/s read, 701 TFLOP/s in bfloat16, on ", out, re.M)


@pytest.mark.parametrize(
    ("device", "version", "sentence"),
    [
        (("NVIDIA B200", (10, 0), 148), (13, 0), r"the GPU NVIDIA B200 \(sm_100\) is newer than what this version"),
        (
            (H100, (9, 0), 132),
            (12, 4),
            r"the GPU NVIDIA H100 80GB HBM3 can't be measured: .* serves CUDA 12\.4 and",
        ),
    ],
)
def test_a_gpu_that_cannot_be_measured(run, quick, monkeypatch, device, version, sentence: str) -> None:
    """The figures of the processor are there, and one sentence."""
    gpu(monkeypatch, *device, version)
    code, out, err = run("doctor", "--measure")
    assert code == 2 and err.count("\n") == 1 and re.search(sentence, err)
    assert "memory, read" in out and device[0] + " " not in out.partition("Measured")[2]


def test_measuring_a_gpu_takes_the_compiler(run, quick, h100, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cuda_toolchain, "_wheel_roots", lambda: [tmp_path])
    monkeypatch.setattr(cuda_toolchain, "TOOLKIT", tmp_path)
    monkeypatch.setattr(cuda_toolchain, "find_toolchain", cuda_toolchain.find_toolchain.__wrapped__)
    code, _, err = run("doctor", "--measure")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(
        "error: the GPU NVIDIA H100 80GB HBM3 can't be measured: CUDA code is compiled by nvidia-cuda-"
    )
    assert err.endswith("not found; pip install 'tilewright[cuda]'\n")


def test_measuring_takes_some_memory() -> None:
    from tilewright.measure_gpu import _buffer_bytes

    assert _buffer_bytes(70 << 30, 80 << 30) == 2 << 30
    assert _buffer_bytes(2 << 30, 80 << 30) == int(0.4 * (2 << 30))
    with pytest.raises(TargetError, match=r"takes 1\.17 GB of GPU memory and 0\.10 GB of 85\.90 are free; end what"):
        _buffer_bytes(100_000_000, 80 << 30)


# -- floors ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_artifact(tmp_path: Path) -> Path:
    target = {"name": "nvidia-h100", "kind": "cuda", "arch": "sm_90a", "features": ["tma", "wgmma", "pdl", "fp8"]}
    return fake_artifact(tmp_path / "m.tw", target=target).path


def test_floors_take_the_records_figures(run, gpu_artifact, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "find_driver", lambda: None)
    measured.write(H100, FOUND)  # of a GPU that is not here
    code, out, err = run("inspect", str(gpu_artifact))
    assert (code, err) == (0, "")
    assert re.search(r"^floor +98\.5 MB and .* for a decoded token, 0\.0319 ms$", out, re.M)
    assert re.search(r"^ceilings +3085 GB/s and 790 TFLOP/s, the record of nvidia-h100$", out, re.M)
    assert re.search(r"^linear_block_gemv_0 +rows 16 +30 +1\.23 MB +2\.05 kB +3 M +0\.\d+$", out, re.M)


def test_floors_take_what_was_measured_here(run, gpu_artifact, h100) -> None:
    measured.write(H100, Ceilings(1000.0, None, 500.0))
    code, out, err = run("inspect", str(gpu_artifact))
    assert (code, err) == (0, "")
    assert re.search(r"^floor .* for a decoded token, 0\.0985 ms$", out, re.M)
    assert re.search(r"^ceilings +1000 GB/s and 500 TFLOP/s, measured here on \d{4}-\d\d-\d\d$", out, re.M)
    assert re.search(r"op\. a row +us, one row$", out, re.M)


def test_floors_without_ceilings_are_bytes(run, tmp_path) -> None:
    artifact = fake_artifact(tmp_path / "m.tw")
    _, out, _ = run("inspect", str(artifact.path))
    assert "\nceilings" not in out and "us, one row" not in out and re.search(r"for a decoded token$", out, re.M)


@pytest.mark.parametrize("name", ["nvidia-h100", "nvidia-h200"])
def test_bench_takes_the_gpus_memory_not_the_hosts(run, tmp_path, monkeypatch, name: str) -> None:
    from tests.fake_model import FakeModel
    from tilewright import timing
    from tilewright.runtime import model as runtime_model

    monkeypatch.setattr(runtime_model, "load", lambda path, threads: FakeModel())
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "read_bandwidth_gbs", None)
    target = {"name": name, "kind": "cuda", "arch": "sm_90a", "features": []}
    path = fake_artifact(tmp_path / "m.tw", target=target).path
    code, out, _ = run("bench", str(path), "latency", "--output", str(tmp_path / "results"))
    assert code == 0
    assert ("of floor" in out) == (targets.RECORDS[name].bandwidth_gbs is not None)


def test_the_tighter_ceiling_counts() -> None:
    from tilewright.runtime.step_floor import Rates

    rates = Rates(1000.0, 100.0, "here")
    assert rates.us(10**6) == pytest.approx(1.0)
    assert rates.us(10**6, 10**9) == pytest.approx(10.0)
    assert Rates(1000.0, None, "here").us(10**6, 10**12) == pytest.approx(1.0)
