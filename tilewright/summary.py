"""An artifact as tables: what it is, its kernels with tile and floor, its memory plan."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tilewright import console
from tilewright.compiler.artifact import COSTS, Artifact, Manifest


@dataclass(frozen=True)
class StepFloor:
    """The least traffic and work of a step: bytes whatever it holds, bytes and operations for each row of it."""

    bytes_fixed: int
    bytes_per_row: int
    flops_per_row: int

    def bytes(self, rows: int = 1) -> int:
        return self.bytes_fixed + rows * self.bytes_per_row


def decode_floor(artifact: Artifact) -> StepFloor:
    """The floor of the smallest step, which decodes one token."""
    costs = json.loads((artifact.path / COSTS).read_text())
    smallest = min(artifact.manifest.buckets, key=lambda bucket: bucket.tokens)
    return StepFloor(**costs[smallest.function]["floor"])


def show_summary(artifact: Artifact, elapsed_s: float) -> None:
    """What `compile` says at the end: place, time taken, size, kernels, floor, warnings."""
    table = console.table(str(artifact.path), "", "")
    table.add_row("compiled in", console.duration(elapsed_s))
    table.add_row("size", console.size(artifact.bytes))
    table.add_row("kernels", str(len(artifact.manifest.kernels)))
    table.add_row("floor", _floor_words(artifact))
    table.add_row("target", _target(artifact.manifest))
    table.add_row("warnings", str(len(artifact.manifest.warnings) or "none"))
    console.show(table)
    show_warnings(artifact.manifest)


def show_warnings(manifest: Manifest) -> None:
    for warning in manifest.warnings:
        console.warn(warning)


def manifest_table(artifact: Artifact) -> Table:
    """What the artifact is: model, target, limits, provenance."""
    manifest = artifact.manifest
    table = console.table(manifest.name, "", "")
    rows = {
        "place": artifact.path,
        "size": console.size(artifact.bytes),
        "schema": manifest.schema,
        "target": _target(manifest),
        "model": manifest.model,
        "limits": manifest.limits,
        "steps": ", ".join(
            f"{bucket.function} ({'' if bucket.static else 'up to '}{bucket.tokens} tokens)"
            for bucket in manifest.buckets
        ),
        "floor": _floor_words(artifact),
        **{f"from {key}": value for key, value in sorted(manifest.provenance.items())},
    }
    for name, value in rows.items():
        table.add_row(name, _words(value))
    return table


def kernel_table(manifest: Manifest) -> Table:
    """Every kernel (its schedule's name and a digest) with its tile, its calls in each step, and the floor of one call.

    A call of several kernels has its floor at the last one.
    """
    steps = [bucket.function for bucket in manifest.buckets]
    numeric = (*(f"in {step}" for step in steps), "bytes", "+ a row", "op. a row")
    table = console.table("Kernels", "kernel", "tile", *numeric, numeric=numeric)
    table.columns[0].no_wrap = True  # a name to search the dump for
    for kernel in manifest.kernels:
        floor = kernel["floor"] or {}
        table.add_row(
            kernel["name"],
            _words(kernel["tile"]),
            *(str(kernel["calls"].get(step, "")) for step in steps),
            console.size(floor["bytes_fixed"]) if floor else "",
            console.size(floor["bytes_per_row"]) if floor else "",
            console.amount(floor["flops_per_row"]) if floor else "",
        )
    return table


def memory_table(manifest: Manifest) -> Table:
    """What serving takes: weights, workspace, and the KV cache by page and by token."""
    table = console.table("Memory", "", "")
    for name, count in manifest.memory.items():
        table.add_row(name.removesuffix("_bytes").replace("_", " "), console.size(count))
    slots = manifest.limits["page_size"]
    table.add_row(f"KV cache of a token ({slots} a page)", console.size(manifest.memory["page_bytes"] / slots))
    return table


def _floor_words(artifact: Artifact) -> str:
    floor = decode_floor(artifact)
    return f"{console.size(floor.bytes())} and {console.amount(floor.flops_per_row)} operations for a decoded token"


def _target(manifest: Manifest) -> str:
    target = manifest.target
    return f"{target['name']} ({', '.join([target['arch'], *target['features']])})"


def _words(value: Any) -> str:
    """A value in one line; of fields, those that say nothing left out: hidden 576, layers 30, tied, ..."""
    if not isinstance(value, Mapping):
        return "" if value is None else str(value)
    said = {name: inner for name, inner in value.items() if inner is not False and inner not in (None, (), [], {})}
    named = ((name.replace("_", " "), inner) for name, inner in said.items())
    return ", ".join(name if inner is True else f"{name} {_words(inner)}" for name, inner in named)
