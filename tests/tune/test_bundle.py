"""Compile here, measure there: a bundle holds all that measuring needs, and its records come home."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tune import planted
from tests.tune.planted import PlantedTile
from tests.tune.sweep_planted import BY, FOLDER
from tilewright.compiler import targets
from tilewright.compiler.errors import UserError
from tilewright.compiler.targets import resolve_target
from tilewright.schedules.records import Record, text_of
from tilewright.tuner import bundle
from tilewright.tuner.candidates import Compilers
from tilewright.tuner.export import export
from tilewright.tuner.log import Log, merge
from tilewright.tuner.measuring import Measurer
from tilewright.tuner.search import RandomSearch

TASK = planted.task((400, 100, 200), ["compile", "wrong"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bundle") / "tasks.tar"
    compilers, said = Compilers(1), []
    try:
        counts = export(
            file, resolve_target("cpu"), [TASK], RandomSearch(), compilers, "{}", None, lambda *done: said.append(done)
        )
    finally:
        compilers.close()
    assert counts == (4, 1) and said[-1] == (5, 5)
    return file


@pytest.fixture
def measurer() -> Iterator[Measurer]:
    made = Measurer("cpu", {"TVM_NUM_THREADS": "1"})
    yield made
    made.close()


def test_a_bundle_is_measured_and_its_records_come_home(exported: Path, measurer: Measurer, tmp_path: Path) -> None:
    output, seen = tmp_path / "tasks.jsonl", []
    with bundle.opened(exported) as (kind, tasks):
        assert kind == "cpu" and [len(task.tiles) for task in tasks] == [4]
        assert bundle.measure(tasks, measurer, BY, output, seen.append) == 4
        # A run that was cut off goes on where it was.
        lines = output.read_text().splitlines()
        output.write_text("\n".join([*lines[:3], lines[3][:70]]))
        again: list[Record] = []
        assert bundle.measure(tasks, measurer, BY, output, again.append) == 4
        assert [r.tile for r in again] == [seen[3].tile]
    assert merge([output], tmp_path / "logs") == (4, 4, [])
    records = Log(tmp_path / "logs", BY.device).records
    assert (tmp_path / "logs" / FOLDER / "planted.jsonl").exists()
    assert records[0].tile == text_of(PlantedTile(100)) and records[0].space == TASK.space_hash
    assert [r.failure for r in records] == ["", "", "", "wrong"]
    assert [r.trial for r in records if r.tile == TASK.default_text] == [1]


def test_measuring_loads_no_compiler() -> None:
    modules = "tilewright.commands.tune, tilewright.tuning, tilewright.compiler.build, tilewright.tuner.bundle"
    check = "print([name for name in ('tvm', 'torch', 'xgboost') if name in sys.modules])"
    command = [sys.executable, "-c", f"import sys, {modules}, tilewright.tuner.device_cuda; {check}"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "[]\n"


def contents(file: Path) -> dict:
    with tarfile.open(file) as tar:
        member = tar.extractfile("bundle.json")
        assert member is not None
        return json.loads(member.read())


def bundle_of(folder: Path, about: dict) -> Path:
    file = folder / "other.tar"
    text = json.dumps(about).encode()
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo("bundle.json")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    return file


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as refused, bundle.opened(file):
        pass
    return str(refused.value)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tasks.tar"
    expected = f"{file} is no bundle of tuning tasks; make one with tilewright tune --export"
    assert refusal(file) == expected
    file.write_text("no tar")
    assert refusal(file) == expected
    other = bundle_of(tmp_path, {})
    assert refusal(other) == expected.replace("tasks.tar", "other.tar")


def test_a_bundle_of_another_version_or_machine_is_refused(exported: Path, tmp_path: Path) -> None:
    about = contents(exported)
    newer = bundle_of(tmp_path, about | {"version": 2})
    assert refusal(newer) == f"{newer} has version 2, and this tilewright reads 1; export it anew"
    wider = bundle_of(tmp_path, about | {"machine": about["machine"] + " avx1024"})
    assert "can't be measured here: it was made for" in refusal(wider)


@pytest.mark.skipif(targets.device_name("cuda") is not None, reason="needs a machine without a GPU")
def test_a_bundle_for_a_gpu_wants_one(exported: Path, tmp_path: Path) -> None:
    gpu = bundle_of(tmp_path, contents(exported) | {"target": "nvidia-h100", "kind": "cuda"})
    assert "is for nvidia-h100 and can't be measured here: this machine has no NVIDIA" in refusal(gpu)


def test_a_place_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    compilers = Compilers(1)
    try:
        file = tmp_path / "none"
        file.write_text("")
        with pytest.raises(UserError, match=r"tasks.tar can't be written \(.*\); make room, or name another place"):
            export(file / "tasks.tar", resolve_target("cpu"), [], RandomSearch(), compilers, "{}", None)
    finally:
        compilers.close()
