"""What the manifest and costs.json say of a compiled model."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilewright.compiler import artifact as sealed
from tilewright.compiler.artifact import Manifest, Param
from tilewright.compiler.checkpoint import Checkpoint
from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS, KVFormat
from tilewright.compiler.options import TOP_LOGPROBS, Options
from tilewright.compiler.targets import host


def split_kernels(mod: Any) -> tuple[Any, dict[str, Any]]:
    """The module without its kernels, and the kernels by name."""
    import tvm

    kernels = {g.name_hint: f for g, f in mod.functions.items() if "tw.kernel" in (f.attrs or {})}
    rest = {g: f for g, f in mod.functions.items() if g.name_hint not in kernels}
    return tvm.IRModule(rest, mod.attrs), dict(sorted(kernels.items()))


def step_params(mod: Any) -> tuple[Param, ...]:
    """The weights that the step takes, in order."""
    func = mod["step"]
    count = int(func.attrs["num_input"])
    params = []
    for var, about in zip(func.params[count:], json.loads(str(func.attrs["tw.params"])), strict=True):
        shape = tuple(int(s) for s in var.ty.shape.values)
        matrix = len(about["shape"]) == 2
        params.append(
            Param(
                name=about["name"],
                shape=shape,
                dtype=str(var.ty.dtype),
                sources=tuple(about["sources"]),
                format=about["format"],
                rows=about["shape"][0],
                columns=about["shape"][1] if matrix else None,
            )
        )
    return tuple(params)


def describe(
    root: Path,
    checkpoint: Checkpoint,
    options: Options,
    scheduled: Any,
    params: tuple[Param, ...],
    workspace: Mapping[str, int],
    operators: Sequence[Mapping[str, Any]] = (),
) -> Manifest:
    """The manifest of what stands in `root`; writes costs.json on the way. operators: plain ones that a tuning record
    has a trace of, listed after the kernels."""
    import tvm

    import tilewright

    config = checkpoint.config
    target = options.target
    machine = {"host": host.arch()} if target.kind == "cuda" else {}  # what the code beside the kernels is for
    calls = kernel_calls(scheduled)
    kernels = describe_kernels(scheduled, calls)
    (root / sealed.COSTS).write_text(json.dumps(_costs(kernels, tuple(calls)), indent=1, sort_keys=True) + "\n")
    pages = next(p for p in scheduled["step"].params if p.name == "pages")
    kv = KVFormat(
        config.layers,
        config.kv_heads,
        config.head_dim,
        options.page_size,
        dtype=str(pages.ty.dtype),
        k_transposed=options.defaults.k_transposed,
    )
    page_bytes = kv.layers * 2 * kv.kv_heads * kv.page_size * kv.head_dim * sealed.numpy_dtype(kv.dtype).itemsize
    tokenizer = dataclasses.asdict(checkpoint.tokenizer) if checkpoint.tokenizer else {}
    tokenizer.pop("tokenizer_json", None)
    return Manifest(
        name=checkpoint.name,
        target={
            "name": target.name,
            "kind": target.kind,
            "arch": target.arch,
            "features": list(target.features),
            **machine,
        },
        model=json.loads(json.dumps(dataclasses.asdict(config))),
        limits={
            "max_batch": options.max_batch,
            "max_tokens": options.max_tokens,
            "max_context": config.max_position,
            "page_size": options.page_size,
        },
        kv=dataclasses.asdict(kv),
        step={
            "inputs": [*STEP_INPUTS, *SAMPLING_INPUTS],
            "top_logprobs": TOP_LOGPROBS,
            "buckets": [
                *(
                    {"function": "step_decode" if options.any_decode else f"step_{n}", "tokens": n, "static": True}
                    for n in options.decode_buckets
                ),
                {"function": "step", "tokens": options.max_tokens, "static": False},
            ],
        },
        params=params,
        kernels=(*kernels, *operators),
        memory={
            "weights_bytes": sum(p.bytes for p in params),
            "workspace_bytes": max(size for name, size in workspace.items() if name.startswith(("step", "hidden"))),
            "page_bytes": page_bytes,
        },
        tokenizer=json.loads(json.dumps(tokenizer)),
        provenance={
            "tilewright": tilewright.__version__,
            "tvm": tvm.__version__,
            "source": dict(checkpoint.source),
            "weights": options.weights,
            "quant": options.quant,
            "strict": options.strict,
        },
        embedding={"pooling": options.pooling, "dimensions": config.hidden, "normalized": True},
        warnings=(*conversions(checkpoint, params), *references(scheduled)),
    )


def conversions(checkpoint: Checkpoint, params: tuple[Param, ...]) -> tuple[str, ...]:
    """A line for each pair of formats, where matrices are not kept in the one they are stored in."""
    changed = {(s, p.format) for p in params if p.columns is not None for s in p.sources}
    pairs = Counter((checkpoint.tensors[source].format, made) for source, made in changed)
    return tuple(
        f"{count} tensors of {stored} become {made}" if count > 1 else f"1 tensor of {stored} becomes {made}"
        for (stored, made), count in sorted(pairs.items())
        if stored != made
    )


def references(mod: Any, function: str = "step") -> tuple[str, ...]:
    """A line for each kind of composite that runs by its reference body in the general step, for want of a schedule."""
    from tilewright.compiler.relax_utils import bindings, composite_of

    found = (composite_of(mod, b.value) for b in bindings(mod[function]))
    calls = Counter(composite[0] for composite in found if composite is not None)
    return tuple(
        f"{count} calls of {name} run slowly, by the reference body: no schedule takes them"
        for name, count in sorted(calls.items())
    )


def kernel_calls(mod: Any) -> dict[str, Counter[str]]:
    """How often each function calls each kernel: function -> kernel -> calls."""
    from tvm import relax

    from tilewright.compiler.relax_utils import bindings, op_name

    calls: dict[str, Counter[str]] = {}
    for gvar, func in mod.functions.items():
        if isinstance(func, relax.Function):
            kernels = (b.value.args[0] for b in bindings(func) if op_name(b.value) == "call_dps_packed")
            calls[gvar.name_hint] = Counter(str(kernel.global_symbol) for kernel in kernels)
    return calls


def describe_kernels(mod: Any, calls: Mapping[str, Counter[str]]) -> list[dict[str, Any]]:
    """A record a kernel: schedule, tile, floor of one call, and how often each function calls it.

    One that passes its calls on to others lists them: picks, [[most rows, name], ...].
    """
    from tilewright.compiler.codegen.by_rows import by_rows

    described = []
    for gvar, func in sorted(mod.functions.items(), key=lambda item: item[0].name_hint):
        if "tw.kernel" not in (func.attrs or {}):
            continue
        name = gvar.name_hint
        about = json.loads(str(func.attrs["tw.kernel"]))
        if (picks := by_rows(func)) is not None:
            about["picks"] = picks
        described.append({"name": name, **about, "calls": {f: c[name] for f, c in sorted(calls.items()) if c[name]}})
    return described


def _costs(kernels: list[dict[str, Any]], functions: tuple[str, ...]) -> dict[str, Any]:
    """Floor of each function: bytes whatever the batch, bytes a row, operations a row (rows: tokens or wanted rows)."""
    nothing = {"bytes_fixed": 0, "bytes_per_row": 0, "flops_per_row": 0}
    costs = {function: Counter(nothing) for function in sorted(functions)}
    for kernel in kernels:
        for function, count in kernel["calls"].items():
            for field, value in (kernel["floor"] or {}).items():
                costs[function][field] += value * count
    return {function: {"floor": dict(total)} for function, total in costs.items()}
