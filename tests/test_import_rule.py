"""The import rule: what each package may import of the others, and what serving may never import.

Every import counts, at the top of a file or inside a function: a rule that a lazy import gets around is none.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("compiler", "models", "passes", "runtime", "schedules", "tilewright", "tuner")

# Module prefixes below `tilewright.` that a package may import, its own aside; "" is everything.
ALLOWED = {
    "compiler": (),
    "models": ("compiler",),
    "passes": ("compiler",),
    "schedules": ("compiler", "models.quant"),
    "runtime": (
        "compiler.artifact",
        "compiler.artifact_form",
        "compiler.composites",
        "compiler.env",
        "compiler.errors",
        "compiler.targets",
        "compiler.without_torch",
    ),
    "tuner": ("compiler", "models.quant", "runtime", "schedules"),
    "tilewright": ("",),
}

# Files that may import more: the story of a compile, and the check of what it made.
EXCEPTIONS = {
    "compiler/build.py": ("models", "passes", "schedules"),
    "compiler/verify_artifact.py": ("models", "runtime"),
}

# Nothing but build.py may start a compile from below the front door.
NEVER_FROM_BELOW = "compiler.build"

# What the serving path never loads: a compiler, torch, triton, a CUDA toolkit.
HEAVY = ("tvm", "torch", "triton", "cuda", "nvidia", "cupy", "transformers")


def source_files(root: Path = ROOT) -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            yield package, file


def imports(tree: ast.AST, package: str, file: Path, root: Path) -> Iterator[tuple[str, int]]:
    """Full names of the modules that a file imports, as written, with their lines.

    `from a import b` counts as a.b, which covers b being a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = file.relative_to(root).with_suffix("").parts[: -node.level]
                parts = folder if package == "tilewright" else ("tilewright", *folder)
                base = ".".join([*parts, *([base] if base else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def at_import_time(tree: ast.Module) -> ast.Module:
    """The statements that run when the module is imported: no function bodies, no `if TYPE_CHECKING`."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                return [self.visit(s) for s in node.orelse]
            return self.generic_visit(node)

    return Strip().visit(tree)


def covers(prefix: str, name: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def violations(root: Path = ROOT) -> list[str]:
    found = []
    for package, file in source_files(root):
        place = str(file.relative_to(root))
        allowed = (*ALLOWED[package], package, *EXCEPTIONS.get(place, ()))
        for name, line in imports(ast.parse(file.read_text()), package, file, root):
            if not name.startswith("tilewright."):
                continue
            inner = name.removeprefix("tilewright.")
            if inner == "__version__":
                continue
            below = package != "tilewright" and covers(NEVER_FROM_BELOW, inner)
            if below or not any(covers(prefix, inner) for prefix in allowed):
                found.append(f"{place}:{line} imports {name}")
    return found


def heavy_imports(root: Path = ROOT) -> list[str]:
    """Imports of HEAVY anywhere in runtime, and at import time in the front door."""
    found = []
    for package, file in source_files(root):
        if package not in ("runtime", "tilewright"):
            continue
        tree = ast.parse(file.read_text())
        if package == "tilewright":
            tree = at_import_time(tree)
        for name, line in imports(tree, package, file, root):
            if any(covers(heavy, name) for heavy in HEAVY):
                found.append(f"{file.relative_to(root)}:{line} imports {name}")
    return found


def test_packages_import_only_what_they_may():
    assert len(list(source_files())) > 30
    assert violations() == []


def test_serving_imports_no_compiler_library():
    assert heavy_imports() == []


@pytest.mark.parametrize(
    ("place", "source", "complaint"),
    [
        ("passes/a.py", "from tilewright.models import llama", "imports tilewright.models.llama"),
        ("passes/a.py", "from tilewright import schedules", "imports tilewright.schedules"),
        ("passes/a.py", "import tilewright.schedules.order", "imports tilewright.schedules.order"),
        ("passes/a.py", "from ..schedules import order", "imports tilewright.schedules.order"),
        ("passes/a.py", "def f():\n    from tilewright.runtime import engine", "imports tilewright.runtime.engine"),
        ("passes/a.py", "from tilewright.compiler.build import compile", "imports tilewright.compiler.build.compile"),
        ("models/a.py", "from tilewright.passes import pipeline", "imports tilewright.passes.pipeline"),
        ("schedules/cpu/a.py", "from tilewright.models import llama", "imports tilewright.models.llama"),
        ("compiler/a.py", "from tilewright.models import registry", "imports tilewright.models.registry"),
        ("schedules/a.py", "from tilewright.tuner import log", "imports tilewright.tuner.log"),
        ("tuner/a.py", "from tilewright.passes import pipeline", "imports tilewright.passes.pipeline"),
        ("compiler/a.py", "from tilewright.compiler import build", "imports tilewright.compiler.build"),
        (
            "runtime/a.py",
            "from tilewright.compiler.checkpoint import Rope",
            "imports tilewright.compiler.checkpoint.Rope",
        ),
    ],
)
def test_the_rule_finds(tmp_path, place, source, complaint):
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert [text.partition(" ")[2] for text in violations(tmp_path)] == [complaint]


@pytest.mark.parametrize(
    ("place", "source"),
    [
        (
            "passes/a.py",
            "from tilewright.compiler.pass_base import Pass\nfrom . import b\nfrom tilewright.passes import c",
        ),
        ("schedules/a.py", "from tilewright.models.quant import q4_0"),
        ("compiler/build.py", "from tilewright.models import registry\nfrom tilewright.passes import pipeline"),
        ("runtime/a.py", "from tilewright.compiler.errors import UserError\nimport numpy"),
        ("tilewright/a.py", "from tilewright.compiler.build import compile"),
        ("compiler/a.py", "from tilewright import __version__\nimport tvm"),
    ],
)
def test_the_rule_lets_pass(tmp_path, place, source):
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == heavy_imports(tmp_path) == []


@pytest.mark.parametrize(
    ("place", "source", "count"),
    [
        ("runtime/a.py", "import tvm", 1),
        ("runtime/a.py", "def f():\n    from torch import nn", 1),
        ("runtime/a.py", "import tvm_ffi", 0),
        ("tilewright/a.py", "import tvm.relax", 1),
        ("tilewright/a.py", "def f():\n    import tvm", 0),
        ("tilewright/a.py", "class A:\n    import torch", 1),
    ],
)
def test_heavy_imports_are_found(tmp_path, place, source, count):
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert len(heavy_imports(tmp_path)) == count
