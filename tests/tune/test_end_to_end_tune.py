"""`tilewright tune` and then `compile` on a model that is nothing but its configuration."""

import json
import os
from pathlib import Path

from tests.cli_runner import make_runner
from tests.tune.test_tasks import CONFIG
from tilewright.cache import cached_path
from tilewright.compiler import env
from tilewright.compiler.artifact import Artifact
from tilewright.schedules.records import read_file

SIZES = ("--target", "cpu", "--weights", "random:0", "--max-batch", "2", "--max-tokens", "16")


def test_a_tuned_model_says_which_records_it_uses(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 64, "intermediate_size": 96}))
    cache, logs = os.environ[env.CACHE_DIR], tmp_path / "logs"
    run = make_runner(capsys, monkeypatch)
    monkeypatch.setenv(env.CACHE_DIR, cache)
    monkeypatch.setenv(env.TUNING_LOGS, str(logs))

    code, out, err = run("tune", str(tmp_path), *SIZES, "--list")
    assert code == 0 and "linear_dense" in out, err
    assert not logs.exists()
    before = cached_path(str(tmp_path))

    code, out, err = run("tune", str(tmp_path), *SIZES, "--trials", "2", "--workload", "decode")
    assert code == 0 and out.startswith("2 trials in "), err
    files = sorted(logs.glob("*/*.jsonl"))
    records = [record for file in files for record in read_file(file)[0]]
    assert len(records) == 2 and all(not read_file(file)[2] for file in files)
    assert all(record.versions.count("tilewright") for record in records)
    assert cached_path(str(tmp_path)) != before  # what is compiled on first use follows the records

    code, out, err = run("compile", str(tmp_path), *SIZES, "-o", str(tmp_path / "tuned.tw"))
    assert code == 0, err
    kernels = Artifact.open(tmp_path / "tuned.tw").manifest.kernels
    used = {str(kernel["record"]) for kernel in kernels if "record" in kernel}
    assert used and used <= {record.place for record in records}
    lines = dict(line.split("  ", 1) for line in out.splitlines() if line.startswith("tiles by "))
    assert files[0].parent.name in lines["tiles by records"] and " of " in lines["tiles by default"]
