"""An artifact as tables: what it is, its kernels with tile and floor, its memory plan."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tilewright import console
from tilewright.compiler.artifact import Artifact, Manifest
from tilewright.runtime.step_floor import Rates, decode_floor, rates_of


def show_summary(artifact: Artifact, elapsed_s: float) -> None:
    """What `compile` says at the end: place, time taken, size, kernels, floor, warnings."""
    table = console.table(str(artifact.path), "", "")
    table.add_row("compiled in", console.duration(elapsed_s))
    table.add_row("size", console.size(artifact.bytes))
    table.add_row("kernels", str(len(artifact.manifest.kernels)))
    table.add_row("floor", _floor_words(artifact))
    table.add_row("target", _target(artifact.manifest))
    for name, words in tile_sources(artifact.manifest).items():
        table.add_row(name, words)
    table.add_row("warnings", str(len(artifact.manifest.warnings) or "none"))
    console.show(table)
    show_warnings(artifact.manifest)


def tile_sources(manifest: Manifest) -> dict[str, str]:
    """Where the kernels' tiles come from: which tuning records, and which schedules ran on their defaults."""
    tiled = [kernel for kernel in manifest.kernels if kernel["tile"] is not None]
    places = sorted({str(kernel["record"]) for kernel in tiled if "record" in kernel})
    lines: dict[str, list[str]] = {}
    for place in places:
        file, _, line = place.rpartition(":")
        lines.setdefault(file, []).append(line)
    defaults = Counter(kernel["schedule"] for kernel in tiled if "record" not in kernel)
    by_records = "; ".join(f"{file}:{','.join(sorted(each, key=int))}" for file, each in lines.items())
    by_default = ", ".join(f"{count} of {name}" for name, count in sorted(defaults.items()))
    return {"tiles by records": by_records or "none", "tiles by default": by_default or "none"}


def show_warnings(manifest: Manifest) -> None:
    for warning in manifest.warnings:
        console.warn(warning)


def manifest_table(artifact: Artifact) -> Table:
    """What the artifact is: model, target, limits, provenance."""
    manifest = artifact.manifest
    table = console.table(manifest.name, "", "")
    rates = rates_of(manifest)
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
        **({"ceilings": str(rates)} if rates else {}),
        **tile_sources(manifest),
        **{f"from {key}": value for key, value in sorted(manifest.provenance.items())},
    }
    for name, value in rows.items():
        table.add_row(name, _words(value))
    return table


def kernel_table(manifest: Manifest) -> Table:
    """Every kernel (its schedule's name and a digest) with its tile, its calls in each step, and the floor of one call:
    in bytes and operations, and in microseconds for one row where the machine's ceilings are known.

    A call of several kernels has its floor at the last one.
    """
    steps = [bucket.function for bucket in manifest.buckets]
    rates = rates_of(manifest)
    numeric = (*(f"in {step}" for step in steps), "bytes", "+ a row", "op. a row", *(["us, one row"] if rates else []))
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
            *([_least_us(rates, floor)] if rates else []),
        )
    return table


def _least_us(rates: Rates, floor: Mapping[str, int]) -> str:
    if not floor:
        return ""
    return f"{rates.us(floor['bytes_fixed'] + floor['bytes_per_row'], floor['flops_per_row']):.3g}"


def memory_table(manifest: Manifest) -> Table:
    """What serving takes: weights, workspace, and the KV cache by page and by token."""
    table = console.table("Memory", "", "")
    for name, count in manifest.memory.items():
        table.add_row(name.removesuffix("_bytes").replace("_", " "), console.size(count))
    slots = manifest.limits["page_size"]
    table.add_row(f"KV cache of a token ({slots} a page)", console.size(manifest.memory["page_bytes"] / slots))
    return table


def _floor_words(artifact: Artifact) -> str:
    floor, rates = decode_floor(artifact), rates_of(artifact.manifest)
    words = f"{console.size(floor.bytes())} and {console.amount(floor.flops_per_row)} operations for a decoded token"
    return f"{words}, {rates.us(floor.bytes(), floor.flops_per_row) / 1e3:.3g} ms" if rates else words


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
