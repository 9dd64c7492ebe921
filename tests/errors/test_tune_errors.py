"""What stops `tilewright tune`: one sentence, exit code 2, no traceback, nothing lost."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli_runner import make_runner
from tests.tune.examples import DEVICE, record
from tilewright.compiler import targets
from tilewright.tuner.log import Log, locked

NO_GPU = pytest.mark.skipif(targets.device_name("cuda") is not None, reason="needs a machine without a GPU")


@pytest.fixture
def refused(capsys, monkeypatch) -> Callable[..., str]:
    """refused(*arguments) -> the sentence."""
    run = make_runner(capsys, monkeypatch)

    def check(*arguments: str) -> str:
        code, out, err = run("tune", *arguments)
        assert (code, out) == (2, ""), err
        *_, last = err.splitlines()
        assert "Traceback" not in err
        return last.removeprefix("error: ")

    return check


@pytest.mark.parametrize("budget", ["0", "-3m", "0s", "soon", "", "nan", "inf"])
def test_a_budget_that_is_none(refused, budget: str) -> None:
    said = refused("tiny", "--budget", budget)
    assert said == f"--budget is {budget!r}; give a time above 0 such as 90s, 20m or 2h"


def test_numbers_out_of_range(refused) -> None:
    assert refused("tiny", "--trials", "0") == "--trials is 0; give a number from 1 on"
    assert refused("tiny", "--until", "1.5") == "--until is 1.5; give a fraction of the floor above 0, up to 1"
    assert refused("tiny", "--max-batch", "0") == "--max-batch is 0; give a number from 1 to 65536"


def test_what_to_tune_is_said_once(refused, tmp_path: Path) -> None:
    assert refused("--budget", "1m") == "tune takes one of MODEL, --measure and --import, and was given none"
    both = refused("tiny", "--measure", str(tmp_path / "a.tar"))
    assert both == "tune takes one of MODEL, --measure and --import, and was given MODEL and --measure"


def test_an_unknown_model_target_or_workload(refused) -> None:
    assert "tiny-of-nobody" in refused("tiny-of-nobody", "--target", "cpu")
    assert refused("tiny", "--target", "nvidia-h900").startswith("unknown target 'nvidia-h900'; did you mean")
    said = refused("smollm2-135m", "--target", "cpu", "--workload", "chat", "--list")
    assert said == "--workload is 'chat'; use decode, prefill, mixed, or a file of steps"


@NO_GPU
def test_a_gpu_that_is_not_here(refused) -> None:
    assert refused("tiny", "--target", "cuda").startswith("target cuda means this machine's GPU and it has none")
    said = refused("tiny", "--target", "nvidia-h100")
    assert said == (
        "tuning for nvidia-h100 measures on it, and this machine has no NVIDIA driver; "
        "run this there, or make a bundle with --export"
    )


def test_files_that_are_none(refused, tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing")
    assert refused("--measure", nothing).startswith(f"{nothing} is no bundle of tuning tasks; make one with")
    assert refused("--import", nothing) == f"{nothing} is no file or folder of tuning records"
    assert refused("merge", nothing) == f"{nothing} is no file or folder of tuning records"
    assert refused("report", "--logs", nothing) == f"{nothing} has no tuning records; run tilewright tune MODEL first"


def test_a_log_folder_that_can_not_be_written(refused, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    source = tmp_path / "records.jsonl"
    source.write_text(record().line() + "\n")
    said = refused("merge", str(source), "--logs", str(file))
    assert said == f"the log folder {file} can't be written to (File exists); make room, or use another --logs"


def test_a_log_folder_in_use(refused, tmp_path: Path) -> None:
    source = tmp_path / "records.jsonl"
    source.write_text(record().line() + "\n")
    with locked(tmp_path / "logs"):
        said = refused("merge", str(source), "--logs", str(tmp_path / "logs"))
    assert said.startswith(f"{tmp_path / 'logs'} is in use by process {os.getpid()} on ")


def test_lines_that_are_no_records_are_named_and_the_rest_is_used(capsys, monkeypatch, tmp_path: Path) -> None:
    run = make_runner(capsys, monkeypatch)
    source = tmp_path / "records.jsonl"
    source.write_text(f"{record(1).line()}\n{{torn\n{record(2).line()}\n")
    code, out, err = run("tune", "merge", str(source), "--logs", str(tmp_path / "logs"))
    assert (code, out) == (0, f"2 of 2 records taken into {tmp_path / 'logs'}\n")
    assert err == f"warning: {source}:2 is no JSON: skipped\n"
    assert len(Log(tmp_path / "logs", DEVICE).records) == 2


def test_a_bad_log_place_in_the_environment(refused, monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("TILEWRIGHT_TUNING_LOGS", str(file))
    assert (
        refused("tiny")
        == f"TILEWRIGHT_TUNING_LOGS={str(file)!r} is not a directory; name one that exists or can be made"
    )
