"""Tilewright: an LLM inference stack that is a compiler.

    artifact = tilewright.compile("smollm2-135m")
    model = tilewright.load(artifact.path)
    engine = tilewright.Engine(model)
    [completion] = engine.generate(["Hello"], tilewright.SamplingParams(max_tokens=32))

Names are loaded when first used: importing the package loads neither the compiler nor a model's libraries, and serving
never loads the compiler.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.compiler.artifact import Artifact, Manifest
    from tilewright.compiler.build import compile
    from tilewright.compiler.errors import (
        ArtifactError,
        CompileError,
        ModelError,
        RequestError,
        TargetError,
        UserError,
    )
    from tilewright.compiler.progress import Progress
    from tilewright.compiler.targets import resolve_target
    from tilewright.compiler.targets.base import Target
    from tilewright.runtime.engine import Engine
    from tilewright.runtime.model import Model, load
    from tilewright.runtime.types import Completion, EngineLimits, SamplingParams, StreamEvent

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "compiler.artifact",
    "ArtifactError": "compiler.errors",
    "CompileError": "compiler.errors",
    "Completion": "runtime.types",
    "Engine": "runtime.engine",
    "EngineLimits": "runtime.types",
    "Manifest": "compiler.artifact",
    "Model": "runtime.model",
    "ModelError": "compiler.errors",
    "Progress": "compiler.progress",
    "RequestError": "compiler.errors",
    "SamplingParams": "runtime.types",
    "StreamEvent": "runtime.types",
    "Target": "compiler.targets.base",
    "TargetError": "compiler.errors",
    "UserError": "compiler.errors",
    "compile": "compiler.build",
    "load": "runtime.model",
    "resolve_target": "compiler.targets",
}

__all__ = [
    "Artifact",
    "ArtifactError",
    "CompileError",
    "Completion",
    "Engine",
    "EngineLimits",
    "Manifest",
    "Model",
    "ModelError",
    "Progress",
    "RequestError",
    "SamplingParams",
    "StreamEvent",
    "Target",
    "TargetError",
    "UserError",
    "__version__",
    "compile",
    "load",
    "resolve_target",
]


def __getattr__(name: str) -> Any:
    """Loads a public name from its home on first use and keeps it here."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
    value = getattr(import_module(f"tilewright.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
