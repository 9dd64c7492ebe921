"""Starting costs little: fresh interpreters, their clock, their modules and their memory map."""

import json
import subprocess
import sys
import time

import pytest

# The figure that counts is 0.3 s on a quiet machine (bench/); this bound only catches a heavy import slipping in.
IMPORT_BOUND_S = 1.5

# Parts of mapped files' names that no serving process may show.
FORBIDDEN_MAPS = ("libtvm_compiler", "libtvm.so", "libtorch", "libnvrtc", "libnvvm")
FORBIDDEN_MODULES = ("tvm", "torch", "transformers", "triton", "numpy", "rich", "typer")


def run_fresh(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60, check=True)


def test_import_is_quick():
    best = min(_timed_import() for _ in range(3))
    assert best < IMPORT_BOUND_S, f"`import tilewright` took {best:.2f} s"


def _timed_import() -> float:
    start = time.perf_counter()
    run_fresh("-c", "import tilewright")
    return time.perf_counter() - start


def test_import_adds_next_to_nothing():
    """By the interpreter's own clock, which other processes disturb less: microseconds of our modules, cumulative."""
    report = run_fresh("-X", "importtime", "-c", "import tilewright").stderr
    [line] = [line for line in report.splitlines() if line.split("|")[-1].strip() == "tilewright"]
    assert int(line.split("|")[1]) < 100_000


def test_import_loads_no_heavy_module():
    script = "import json, sys, tilewright; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(run_fresh("-c", script).stdout)
    assert [name for name in FORBIDDEN_MODULES if name in modules] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "names",
    [
        pytest.param((), id="import"),
        pytest.param(("load", "Model", "Engine", "SamplingParams", "Artifact", "Completion"), id="serving_names"),
    ],
)
def test_serving_maps_no_compiler(names):
    script = f"import tilewright\nfor n in {names!r}: getattr(tilewright, n)\nprint(open('/proc/self/maps').read())"
    maps = run_fresh("-c", script).stdout
    assert "python" in maps
    assert [part for part in FORBIDDEN_MAPS if part in maps] == []


def test_the_command_line_starts_without_the_compiler():
    script = "import json, sys, tilewright.cli; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(run_fresh("-c", script).stdout)
    assert [name for name in ("tvm", "torch", "transformers", "numpy") if name in modules] == []


def test_every_public_name_is_listed_once():
    import tilewright

    assert sorted([*tilewright._HOMES, "__version__"]) == sorted(tilewright.__all__) == dir(tilewright)
    assert tilewright.UserError.__name__ == "UserError"
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_it'"):
        tilewright.nothing_like_it  # noqa: B018
