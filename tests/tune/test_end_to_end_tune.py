"""`tilewright tune` and then `compile` on a model that is nothing but its configuration."""

import os
from pathlib import Path

from tests.checkpoints import make_checkpoint
from tests.cli_runner import make_runner
from tilewright.cache import cached_path
from tilewright.compiler import env
from tilewright.compiler.artifact import Artifact
from tilewright.schedules.records import read_file

# Of the sizes that other tests compile, whose kernels are cached.
SIZES = ("--target", "cpu", "--weights", "random:0", "--max-batch", "4", "--max-tokens", "64")


def test_a_tuned_model_says_which_records_it_uses(tmp_path: Path, capsys, monkeypatch) -> None:
    model = make_checkpoint(tmp_path, "llama")
    (model / "model.safetensors").unlink()
    cache, logs = os.environ[env.CACHE_DIR], tmp_path / "logs"
    run = make_runner(capsys, monkeypatch)
    monkeypatch.setenv(env.CACHE_DIR, cache)
    monkeypatch.setenv(env.TUNING_LOGS, str(logs))

    code, out, err = run("tune", str(model), *SIZES, "--list")
    assert code == 0 and "linear_dense" in out, err
    assert not logs.exists()
    before = cached_path(str(model))

    code, out, err = run("tune", str(model), *SIZES, "--trials", "2", "--workload", "decode")
    assert code == 0 and out.startswith("2 trials in "), err
    files = sorted(logs.glob("*/*.jsonl"))
    records = [record for file in files for record in read_file(file)[0]]
    assert len(records) == 2 and all(not read_file(file)[2] for file in files)
    assert all(record.versions.count("tilewright") for record in records)
    assert cached_path(str(model)) != before  # what is compiled on first use follows the records

    code, out, err = run("compile", str(model), *SIZES, "-o", str(tmp_path / "tuned.tw"))
    assert code == 0, err
    kernels = Artifact.open(tmp_path / "tuned.tw").manifest.kernels
    used = {str(kernel["record"]) for kernel in kernels if "record" in kernel}
    assert used and used <= {record.place for record in records}
    lines = dict(line.split("  ", 1) for line in out.splitlines() if line.startswith("tiles by "))
    assert files[0].parent.name in lines["tiles by records"] and " of " in lines["tiles by default"]
