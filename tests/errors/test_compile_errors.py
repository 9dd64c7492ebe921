"""What stops a compile: bad models and options, places that can't be written, full disks, a second compile, Ctrl-C.

Each is one sentence, exit code 2, and leaves nothing behind.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints import make_checkpoint, make_gguf
from tests.cli_runner import make_runner
from tilewright.compiler import artifact as sealed
from tilewright.compiler import env
from tilewright.compiler.codegen import kernels, program
from tilewright.compiler.errors import ArtifactError, CompileError

SIZES = ("--target", "cpu", "--max-batch", "4", "--max-tokens", "64")  # those of compile_tiny, whose kernels are cached


@pytest.fixture
def refused(capsys, monkeypatch) -> Callable[..., str]:
    """refused(*arguments) -> the sentence of a refused compile; what it said of its progress is left out."""
    cache = os.environ[env.CACHE_DIR]
    run = make_runner(capsys, monkeypatch)
    monkeypatch.setenv(env.CACHE_DIR, cache)

    def check(*arguments: str) -> str:
        code, out, err = run("compile", *arguments)
        assert (code, out) == (2, "")
        *progress, last = err.splitlines()
        assert last.startswith("error: ") and not any(line.startswith("error") for line in progress)
        return last.removeprefix("error: ")

    return check


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def start(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "tilewright", "compile", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert condition(), process.communicate()


# -- models ---


def _edit_config(**fields):
    def edit(path: Path) -> None:
        file = path / "config.json"
        config = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return edit


def _edit_weights(**weights):
    def edit(path: Path) -> None:
        file = path / "model.safetensors"
        tensors = load_file(file) | {name.replace("__", "."): array for name, array in weights.items()}
        save_file({name: array for name, array in tensors.items() if array is not ...}, file)

    return edit


def _cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


BAD_MODELS = {
    "architecture": (_edit_config(architectures=["MambaForCausalLM"]), "families are llama"),
    "missing field": (_edit_config(hidden_size=...), "field 'hidden_size' is missing"),
    "contradiction": (_edit_config(num_attention_heads=5, num_key_value_heads=2), "5 attention heads can't be shared"),
    "missing weight": (_edit_weights(model__norm__weight=...), "weight 'norm.weight' is missing"),
    "extra weight": (_edit_weights(model__more__weight=np.ones(4, np.float32)), "is not known to a llama model"),
    "wrong shape": (_edit_weights(model__norm__weight=np.ones(95, np.float32)), "has shape (95,)"),
    "wrong dtype": (_edit_weights(model__norm__weight=np.ones(96, np.int64)), "has dtype I64"),
    "cut short": (_cut, "download it again"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models(refused, tmp_path, name):
    edit, sentence = BAD_MODELS[name]
    path = make_checkpoint(tmp_path / "model", "llama")
    edit(path)
    assert sentence in refused(str(path), "-o", str(tmp_path / "out" / "x.tw"), *SIZES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [(lambda data: b"PK" + data[2:], "not a GGUF file"), (lambda data: data[:-7], "bytes too early")],
)
def test_gguf_files(refused, tmp_path, edit, sentence):
    path = make_gguf(tmp_path, "llama")
    path.write_bytes(edit(path.read_bytes()))
    assert sentence in refused(str(path), "-o", str(tmp_path / "x.tw"), *SIZES)
    assert list(tmp_path.glob("*x.tw*")) == []


# -- options, refused before a model is read or downloaded ---


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--quant", "q9_9"), "--quant is 'q9_9'; use auto, none or one of "),
        (("--weights", "random"), "--weights is 'random'; use auto or random:SEED"),
        (("--weights", "random:-1"), "--weights is 'random:-1'; use auto or random:SEED"),
        (("--pooling", "max"), "--pooling is 'max'; use last or mean"),
        (("--max-batch", "64", "--max-tokens", "32"), "--max-batch 64 is more than --max-tokens 32"),
    ],
)
def test_options(refused, arguments, sentence):
    assert sentence in refused("org/no-such-model", "--target", "cpu", *arguments)


# -- places ---


@pytest.mark.parametrize("place", [".", "/", "..", ""])
def test_places_without_a_name(refused, checkpoint, place):
    said = refused(str(checkpoint), "-o", place, *SIZES)
    assert said == f"{Path(place)} is no name for an artifact; give one such as model.tw with -o"


def test_a_place_below_a_file(refused, checkpoint, tmp_path):
    (tmp_path / "file").write_text("mine")
    said = refused(str(checkpoint), "-o", str(tmp_path / "file" / "x.tw"), *SIZES)
    assert said == f"{tmp_path / 'file'} can't be written to (a file is in its way); give another place with -o"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_place_that_nobody_may_write_to(refused, checkpoint):
    """Whoever runs the tests: /proc takes no files from root either."""
    said = refused(str(checkpoint), "-o", "/proc/x.tw", *SIZES)
    assert said.startswith("/proc can't be written to (") and said.endswith("; give another place with -o")


@pytest.mark.parametrize("directory", [False, True])
def test_a_place_that_holds_something_else(refused, checkpoint, tmp_path, directory):
    place = tmp_path / "thesis"
    mine = place / "chapter.txt" if directory else place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert "exists and is no artifact; give another place with -o" in refused(str(checkpoint), "-o", str(place), *SIZES)
    assert mine.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_a_dump_into_a_file(refused, checkpoint, tmp_path):
    (tmp_path / "file").touch()
    said = refused(str(checkpoint), "-o", str(tmp_path / "x.tw"), "--dump", str(tmp_path / "file"), *SIZES)
    assert f"--dump {tmp_path / 'file'} can't be written to" in said and "name another directory" in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# -- full disks ---


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path, code):
    path = tmp_path / "x.tw"
    path.mkdir()
    (path / sealed.MANIFEST).write_text("the old one")
    with pytest.raises(ArtifactError) as caught, sealed.writing(path) as root:
        (root / "half").write_text("written")
        raise OSError(code, os.strerror(code))
    assert str(caught.value) == (
        f"{path} can't be written ({os.strerror(code)}) and nothing was left there; "
        "make room, or give another place with -o"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["x.tw"]
    assert [p.name for p in path.iterdir()] == [sealed.MANIFEST]


def test_a_file_that_can_grow_no_further(checkpoint, tmp_path):
    """The system's own refusal, in the middle of the weights."""
    limit = 500_000
    assert (checkpoint / "model.safetensors").stat().st_size > limit
    process = start(
        str(checkpoint), "-o", str(tmp_path / "out" / "x.tw"), *SIZES,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, ""), err
    assert "x.tw can't be written (File too large) and nothing was left there" in err.splitlines()[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_kernel_cache_that_cannot_be_written(refused, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(env.CACHE_DIR, str(tmp_path / "file" / "cache"))
    said = refused(str(checkpoint), "-o", str(tmp_path / "x.tw"), *SIZES)
    assert said.startswith(f"the kernel cache {tmp_path / 'file' / 'cache' / 'kernels'} can't be written to (")
    assert said.endswith("set TILEWRIGHT_CACHE_DIR to another place")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_kernel_cache_that_fills_up(tmp_path, monkeypatch):
    """LLVM would end the process; kernels are written by way of memory. Nothing half-written stays in the cache."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kernels.os, "replace", full)
    monkeypatch.setattr(kernels, "_object_code", lambda mod: b"code")
    monkeypatch.setattr("tvm.compile", lambda *_: type("Executable", (), {"mod": None}))
    monkeypatch.setattr("tvm.IRModule", lambda functions: functions)
    monkeypatch.setattr(kernels, "llvm_target", lambda target: None)
    func = type("Func", (), {"attrs": {}, "without_attr": lambda self, name: self})()
    with pytest.raises(CompileError, match=r"the kernel cache .* can't be written to \(No space left on device\)"):
        kernels._compile(func, "k", None, tmp_path / "k.o")
    assert list(tmp_path.iterdir()) == []


def test_no_room_to_link_in(monkeypatch):
    monkeypatch.setattr(program.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5 << 20}))
    with pytest.raises(CompileError, match="has 5 MiB left and linking takes up to 64; make room, or set TMPDIR"):
        program.link(None, [], Path("unused"))


# -- two at once, and Ctrl-C ---


def test_two_compiles_into_one_place(refused, checkpoint, tmp_path):
    """The second is told who is there; the first finishes whole."""
    place = tmp_path / "x.tw"
    first = start(str(checkpoint), "-o", str(place), *SIZES)
    wait_for(lambda: (tmp_path / ".x.tw.partial").exists(), first)
    said = refused(str(checkpoint), "-o", str(place), *SIZES)
    assert said == f"process {first.pid} is compiling into {place} now; wait for it, or give another place with -o"
    assert first.poll() is None, "the first was over before the second began"
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    assert sealed.Artifact.open(place).manifest.files
    assert [p.name for p in tmp_path.iterdir()] == ["x.tw"]


def test_what_a_killed_compile_leaves_is_cleared_away(checkpoint, tmp_path):
    """Nothing can tidy up after SIGKILL; the next compile does, and is not kept out by the lock."""
    place = tmp_path / "x.tw"
    killed = start(str(checkpoint), "-o", str(place), *SIZES)
    wait_for(lambda: (tmp_path / ".x.tw.partial").exists(), killed)
    killed.kill()
    killed.communicate()
    assert not place.exists()
    with sealed.writing(place) as root:
        assert list(root.iterdir()) == []
        (root / sealed.MANIFEST).write_text("{}")
    assert [p.name for p in tmp_path.iterdir()] == ["x.tw"]


def test_an_interrupted_compile_goes_on_from_the_cache(checkpoint, tmp_path):
    environment = os.environ | {env.CACHE_DIR: str(tmp_path / "cache"), env.JOBS: "1"}
    place, cache = tmp_path / "out" / "x.tw", tmp_path / "cache" / "kernels"
    process = start(str(checkpoint), "-o", str(place), *SIZES, env=environment)
    wait_for(lambda: any(cache.glob("[0-9a-f]*.o")), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert list(place.parent.iterdir()) == []

    kept = {file: file.stat().st_ino for file in cache.iterdir()}
    again = start(str(checkpoint), "-o", str(place), *SIZES, env=environment)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert {file: file.stat().st_ino for file in kept} == kept, "a cached kernel was compiled again"
    assert len(list(cache.iterdir())) > len(kept)
    assert [p.name for p in place.parent.iterdir()] == ["x.tw"]
