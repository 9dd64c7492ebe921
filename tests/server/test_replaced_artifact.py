"""A real artifact that is replaced, or damaged, under the server that serves it."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.checkpoints import make_checkpoint
from tests.runtime.tokenizers_made import EOS, byte_level
from tests.server.processes import ROOT, client, serving
from tilewright.compiler.artifact import PARAMS

pytestmark = pytest.mark.timeout(300)

PROGRAM = ("-m", "tilewright")
ASK = {"model": "m", "prompt": "the dog", "max_tokens": 60, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, compile_tiny: Callable[..., Path]) -> list[Path]:
    """Two models of one shape and other weights."""
    made = []
    for seed in (0, 1):
        checkpoint = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", vocab_size=400, seed=seed)
        (checkpoint / "tokenizer.json").write_text(byte_level())
        (checkpoint / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
        made.append(compile_tiny(checkpoint))
    return made


@pytest.fixture
def served(compiled: list[Path], tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen, openai.OpenAI, str]]:
    """A copy of the first, the server's process, a client of it, and what it answers."""
    path = tmp_path / "m.tw"
    shutil.copytree(compiled[0], path)
    with serving(f"m={path}", program=PROGRAM) as process, client(process) as ask:
        yield path, process, ask, said(ask)


def said(ask: openai.OpenAI) -> str:
    return ask.completions.create(**ASK).choices[0].text


def test_replaced_by_renaming_it_goes_on_with_what_it_has_loaded(served, compiled: list[Path], tmp_path: Path) -> None:
    path, process, ask, before = served
    aside = tmp_path / "new.tw"
    shutil.copytree(compiled[1], aside)
    with ask.completions.create(**ASK, stream=True) as stream:
        chunks = iter(stream)
        first = next(chunks)
        path.rename(tmp_path / "old.tw")
        aside.rename(path)
        shutil.rmtree(tmp_path / "old.tw")
        assert "".join(c.choices[0].text for c in itertools.chain([first], chunks) if c.choices) == before
    assert said(ask) == before
    with serving(f"m={path}", program=PROGRAM) as fresh, client(fresh) as ask_fresh:
        assert said(ask_fresh) != before, "a fresh server loads what is there now"
    assert said(ask) == before and process.poll() is None


def test_weights_overwritten_in_place_end_nothing(served) -> None:
    """Answers are no longer the model's: the weights are the file's. A fresh server refuses it."""
    path, process, ask, before = served
    size = (path / PARAMS).stat().st_size
    with (path / PARAMS).open("r+b") as file:
        file.seek(size // 2)
        file.write(os.urandom(size - size // 2))
    for _ in range(3):
        assert isinstance(said(ask), str)
    assert process.poll() is None
    assert "does not match its checksum; compile the model again" in refused(path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()
    assert before


def test_what_was_read_whole_may_change_or_go(served) -> None:
    path, process, ask, before = served
    for name in ("tokenizer.json", "manifest.json", "costs.json"):
        (path / name).write_text("{")
        assert said(ask) == before
        (path / name).unlink()
        assert said(ask) == before and process.poll() is None


def refused(path: Path) -> str:
    """What a server says that finds this artifact: one line, and exit code 2."""
    done = subprocess.run(
        [sys.executable, *PROGRAM, "serve", str(path), "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    return done.stderr
