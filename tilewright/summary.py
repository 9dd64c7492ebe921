"""An artifact as tables: what it is, its kernels with tile and floor, its memory plan."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tilewright import console
from tilewright.compiler.artifact import Artifact, Manifest


def show_summary(artifact: Artifact) -> None:
    """What `compile` says at the end: place, size, kernels, floor."""
    manifest = artifact.manifest
    table = console.table(str(artifact.path), "", "")
    table.show_header = False
    table.add_row("size", console.size(artifact.bytes))
    table.add_row("kernels", str(len(manifest.kernels)))
    table.add_row("floor", decode_floor(manifest))
    table.add_row("target", _target(manifest))
    console.show(table)


def decode_floor(manifest: Manifest) -> str:
    """The least traffic and work of decoding one token, in words."""
    return "{} and {} operations a decoded token".format(
        console.size(sum(k["calls"] * k["floor_bytes"] for k in manifest.kernels)),
        console.amount(sum(k["calls"] * k["floor_flops"] for k in manifest.kernels)),
    )


def manifest_table(artifact: Artifact) -> Table:
    """What the artifact is: model, target, limits, provenance."""
    manifest = artifact.manifest
    table = console.table(manifest.name, "", "")
    table.show_header = False
    rows = {
        "place": str(artifact.path),
        "size": console.size(artifact.bytes),
        "schema": manifest.schema,
        "target": _target(manifest),
        "model": _words(manifest.model),
        "limits": _words(manifest.limits),
        "buckets": ", ".join(str(bucket.tokens) for bucket in manifest.buckets),
        **{f"from {key}": value for key, value in sorted(manifest.provenance.items())},
    }
    for name, value in rows.items():
        table.add_row(name, _words(value) if isinstance(value, Mapping) else str(value))
    return table


def kernel_table(manifest: Manifest) -> Table:
    """Every kernel with its schedule, tile, calls a step, and floor a call."""
    numeric = ("calls", "floor bytes", "floor operations")
    table = console.table("Kernels", "kernel", "composite", "schedule", "tile", *numeric, numeric=numeric)
    for kernel in manifest.kernels:
        table.add_row(
            kernel["name"],
            kernel["composite"],
            kernel["schedule"],
            _words(kernel["tile"]) if isinstance(kernel["tile"], Mapping) else str(kernel["tile"]),
            str(kernel["calls"]),
            console.size(kernel["floor_bytes"]),
            console.amount(kernel["floor_flops"]),
        )
    return table


def memory_table(manifest: Manifest) -> Table:
    """What serving takes: weights, workspace, and the KV cache by page."""
    table = console.table("Memory", "", "", numeric=("",))
    table.show_header = False
    for name, count in manifest.memory.items():
        table.add_row(name.removesuffix("_bytes").replace("_", " "), console.size(count))
    page = manifest.limits["page_size"]
    table.add_row(f"KV cache a token (pages of {page})", console.size(manifest.memory["page_bytes"] / page))
    return table


def _target(manifest: Manifest) -> str:
    target = manifest.target
    return f"{target['name']} ({', '.join([target['arch'], *target['features']])})"


def _words(fields: Mapping[str, Any]) -> str:
    """Fields in one line, those without a value left out: hidden 576, layers 30, ..."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in fields.items() if value not in (None, (), [])
    )
