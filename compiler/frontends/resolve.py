"""What a model's name stands for: an alias, a directory, a GGUF file, or a model on the hub."""

import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from tilewright.compiler.checkpoint import Checkpoint
from tilewright.compiler.errors import ModelError
from tilewright.compiler.frontends.packages import PACKAGED_MODELS, packaged_model_path
from tilewright.compiler.progress import Progress

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_checkpoint(
    model: str | Path, progress: Callable[[Progress], None] | None = None, weights: bool = True
) -> Checkpoint:
    """The checkpoint that `model` names.

    In this order: an alias (`aliases()`), a directory with config.json and safetensors, a .gguf file, a hub id
    ("org/name"). `progress` hears of downloads. Without `weights`, those of a directory or of the hub are neither
    downloaded nor read, and `tensors` may be empty. ModelError where the model can't be found, read or understood.
    """
    report = progress or (lambda _: None)
    name = str(model)
    path = Path(name).expanduser()
    if isinstance(model, str) and name in PACKAGED_MODELS:
        return _load_gguf(packaged_model_path(name, report), name)
    if path.is_dir():
        return _load_huggingface(path, None, weights)
    if path.exists():
        return _load_gguf(path, None)
    if isinstance(model, str) and _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        from tilewright.compiler.frontends.hub import download_model

        return _load_huggingface(download_model(name, weights, report), name, weights)
    raise ModelError(_unknown(name))


def aliases() -> tuple[str, ...]:
    """The short names of models whose weights are packages."""
    return tuple(PACKAGED_MODELS)


def _load_gguf(path: Path, name: str | None) -> Checkpoint:
    from tilewright.compiler.frontends.gguf import load_gguf

    return load_gguf(path, name)


def _load_huggingface(path: Path, name: str | None, weights: bool) -> Checkpoint:
    from tilewright.compiler.frontends.huggingface import load_huggingface

    return load_huggingface(path, name, weights)


def _unknown(name: str) -> str:
    if "/" in name or name.endswith(".gguf"):
        return f"{name}: there is no such file or directory; check the path"
    near = get_close_matches(name.lower(), PACKAGED_MODELS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(PACKAGED_MODELS)}"
    return (
        f"unknown model {name!r} ({hint}); give one of these names, a directory with config.json, "
        "a .gguf file, or a hub id (org/name)"
    )
