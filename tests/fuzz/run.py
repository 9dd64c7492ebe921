"""Fuzzes targets by atheris, which looks for inputs that reach new code: `make fuzz SECONDS=60`.

    python -m tests.fuzz.run SECONDS [TARGET ...]

Each target has a process of its own. Inputs that reach something new are kept in build/fuzz/TARGET, and so is what
breaks a target: to keep it from coming back, put it into tests/fuzz/corpus/TARGET.
"""

import os
import subprocess
import sys
from pathlib import Path

_FOUND = Path("build", "fuzz")


def main() -> int:
    """The number of targets that something was found in."""
    seconds, *names = sys.argv[1:]
    from tests.fuzz.targets import TARGETS

    broken = [name for name in names or TARGETS if not _holds(name, int(seconds))]
    print(f"fuzzed {', '.join(names or TARGETS)}: {'found ' + ', '.join(broken) if broken else 'nothing found'}")
    return len(broken)


def _holds(name: str, seconds: int) -> bool:
    found = _FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={found}/broken-", "-timeout=20", "-max_len=4096"]
    places = [str(found), str(Path(__file__).with_name("corpus") / name)]
    command = [sys.executable, "-m", "tests.fuzz.run", "--one", name, *options, "-verbosity=0", *places]
    print(f"{name}: {seconds} s", flush=True)
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}).returncode == 0


def one(name: str, arguments: list[str]) -> None:
    """Fuzzes one target in this process, which atheris ends."""
    import atheris

    with atheris.instrument_imports(include=["tilewright"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        one(sys.argv[2], sys.argv[3:])
    sys.exit(main())
