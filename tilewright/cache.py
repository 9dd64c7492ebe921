"""Artifacts that `generate` and `chat` compile on first use, kept by what they were made from."""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tilewright import console
from tilewright.compiler import env
from tilewright.compiler.artifact import MANIFEST, Artifact
from tilewright.compiler.errors import ArtifactError
from tilewright.compiler.targets import resolve_target
from tilewright.progress_display import compile_progress

ARTIFACT_SUFFIX = ".tw"

# Packages that an artifact depends on. Models that come as packages are pinned in the compiler's own sources.
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "gguf")


def artifact_path(model: str) -> Path:
    """The directory of an artifact that serves `model`: itself if it is one, else one of the cache, made when absent.

    Compiling shows its progress on stderr. Raises UserError.
    """
    given = Path(model).expanduser()
    if given.suffix == ARTIFACT_SUFFIX or (given / MANIFEST).is_file():
        return given
    path = cached_path(model)
    if _is_whole(path):
        return path
    from tilewright.compiler.build import compile

    console.note(f"{model} is not compiled for this machine yet: compiling into {path}, once")
    with compile_progress() as report:
        return compile(model, output=path, progress=report).path


def cached_path(model: str) -> Path:
    """Where the artifact of `model` for this machine, with every option at its default, is kept."""
    from tilewright.schedules.records import known_here

    target = resolve_target("auto")
    key = {
        "model": list(_identity(model)),
        "target": repr(target),
        "compiler": _compiler(),
        "records": known_here(env.tuning_logs(), target).digest,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return env.cache_dir() / "artifacts" / f"{_slug(model)}-{digest[:16]}{ARTIFACT_SUFFIX}"


def _is_whole(path: Path) -> bool:
    """Whether an artifact stands there with files of the right sizes; loading it checks their sums."""
    try:
        Artifact.open(path, check=False)
    except ArtifactError:
        return False
    return True


def _identity(model: str) -> Iterator[str]:
    """What tells one model from another: the name of an alias or hub id; for files, place, size and time of change."""
    path = Path(model).expanduser()
    if not path.exists():
        yield model
        return
    yield str(path.resolve())
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            status = file.stat()
            yield f"{file.name} {status.st_size} {status.st_mtime_ns}"


@lru_cache(maxsize=1)
def _compiler() -> str:
    """A digest of the compiler's own sources and of the packages it uses: a change to either compiles again."""
    digest = hashlib.sha256()
    for name in _PACKAGES:
        digest.update(f"{name} {_version(name)}\n".encode())
    from tilewright import compiler, models, passes, schedules

    for package in (compiler, models, passes, schedules):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _slug(model: str) -> str:
    """A short file name part that a person recognises the model by."""
    name = Path(model).name.lower()
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in name).strip("-")[:40] or "model"
