"""The fuzz targets hold for their corpus, and for what a second of plain mutation makes of it. `make fuzz` looks on."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import CORPUS, MOST_BYTES, TARGETS

INTERESTING = [
    b"\0",
    b"\xff",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 40,
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"\\u0000",
    b"[" * 300,
    b"\n",
]


def corpus(name: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, said twice, or replaced by what readers stumble over."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(out) + 1), rng.choice([0, 1, 1, 4, 16, 64])
        piece = rng.choice(
            [b"", rng.choice(INTERESTING), rng.randbytes(rng.randint(1, 4)), bytes(out[at : at + 2 * size])]
        )
        out[at : at + size] = piece
    return bytes(out[:MOST_BYTES])


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_and_its_neighbours(name: str) -> None:
    seeds, rng = corpus(name), random.Random(0)
    for data in [*seeds, b"", *(mutated(rng.choice(seeds), rng) for _ in range(100))]:
        TARGETS[name](data)


def test_every_corpus_has_its_target() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_json_that_is_nested_beyond_any_reader(name: str) -> None:
    """Python's reader raises an error of its own there; atheris stays below such a depth."""
    deep = b"[" * 100_000
    for data in (deep, b'{"version": ' + deep, len(deep).to_bytes(8, "little") + deep, b"\0" + deep):
        TARGETS[name](data)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="atheris has no wheel for Python 3.10")
@pytest.mark.parametrize("name", ["record", "manifest"])
def test_atheris_runs_and_tells_what_it_finds(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.run"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, "2", name], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"fuzzed {name}: nothing found" in done.stdout, done.stdout + done.stderr
