"""What compiling costs: time and memory in fresh processes, with an empty cache of kernels and with a filled one."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cases import COMPILE_CASES
from results_file import Results, about

RESULTS = Path(__file__).parent / "results" / "compile.jsonl"


def time_compile(source: str, results: Results, options: dict[str, Any] | None = None, **facts: Any) -> None:
    """source: a model. options: of tilewright.compile. facts: for the lines of results."""
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "TILEWRIGHT_CACHE_DIR": str(Path(place) / "cache")}
        given = {"output": str(Path(place) / "m.tw"), **(options or {})}
        # Kernels compile in processes of their own: the greatest of them counts beside this one.
        code = (
            "import resource, time; t = time.perf_counter(); import tilewright; "
            f"tilewright.compile({source!r}, **{given!r}); "
            "used = [resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]; "
            "print(time.perf_counter() - t, max(used) / 1024)"
        )
        cold, memory = map(float, python(code, environment).split())
        warm = [float(python(code, environment).split()[0]) for _ in range(3)]
    results.add("compile-cold", "tilewright", [cold], **facts)
    results.add("compile-memory", "tilewright", [memory], **facts)
    results.add("compile-warm", "tilewright", warm, **facts)


def python(code: str, environment: dict[str, str] | None = None) -> str:
    """What a fresh interpreter prints. Raises SystemExit with its error."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    return result.stdout


def processor() -> str:
    from tilewright.compiler.targets import host

    return f"{host.processor()}, {host.cores()} cores"


def run(args: argparse.Namespace) -> None:
    """The suite: a model for a target, with random weights, which need no download."""
    results = Results(args.results or RESULTS, COMPILE_CASES, about(args.commit, processor()))
    options = {"target": args.target, "weights": "random:0"}
    time_compile(args.artifact, results, options, model=Path(args.artifact).name, target=args.target)
