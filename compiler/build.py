"""The story of a compile: checkpoint, model, passes, kernels, weights, artifact."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.compiler import artifact as sealed
from tilewright.compiler import env
from tilewright.compiler.artifact import Artifact, Manifest, Param, TensorWriter
from tilewright.compiler.checkpoint import DENSE_FORMATS, Checkpoint
from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS, KVFormat
from tilewright.compiler.errors import CompileError, ModelError
from tilewright.compiler.progress import Progress
from tilewright.compiler.targets import resolve_target
from tilewright.compiler.targets.base import Target

TOP_LOGPROBS = 20
DEFAULT_MAX_BATCH = 16
DEFAULT_MAX_TOKENS = 512
DEFAULT_PAGE_SIZE = 16

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Options:
    """What a user can choose about a compile; sizes in sequences and tokens."""

    target: Target
    weights: str = "auto"
    quant: str = "auto"
    max_batch: int = DEFAULT_MAX_BATCH
    max_tokens: int = DEFAULT_MAX_TOKENS
    page_size: int = DEFAULT_PAGE_SIZE
    dump: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_tokens", "page_size"):
            value = getattr(self, name)
            if not 1 <= value <= 65536:
                raise CompileError(f"--{name.replace('_', '-')} is {value}; give a number from 1 to 65536")
        if self.max_batch > self.max_tokens:
            raise CompileError(
                f"--max-batch {self.max_batch} is more than --max-tokens {self.max_tokens}, but a step holds a token of "
                "every sequence; raise --max-tokens or lower --max-batch"
            )


def compile(
    model: str | os.PathLike[str],
    *,
    target: str = "auto",
    output: str | os.PathLike[str] | None = None,
    weights: str = "auto",
    quant: str = "auto",
    max_batch: int = DEFAULT_MAX_BATCH,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    page_size: int = DEFAULT_PAGE_SIZE,
    dump: str | os.PathLike[str] | None = None,
    progress: Report | None = None,
) -> Artifact:
    """Compile a model into an artifact.

    model: an alias, a Hugging Face directory, a .gguf file or a hub id. target: see `tilewright doctor`. output: default
    NAME.tw here. weights: "auto" or "random:SEED". quant: "auto" keeps what the model is stored in, "none" computes in
    float, or a weight format. max_batch: sequences a step; max_tokens: tokens a step; page_size: tokens a KV page.
    dump: a directory for the IR after every pass. Raises UserError for whatever the caller can mend.
    """
    options = Options(
        resolve_target(target), weights, quant, max_batch, max_tokens, page_size, Path(dump) if dump else None
    )
    report = progress or (lambda _: None)
    checkpoint = _read(model, options, report)
    path = Path(output) if output else Path(f"{checkpoint.name}.tw")
    with sealed.writing(path) as root:
        manifest = _fill(root, checkpoint, options, report)
        manifest = sealed.seal(root, manifest)
        report(Progress("seal", 1, 1))
    return Artifact(path, manifest)


def _read(model: str | os.PathLike[str], options: Options, report: Report) -> Checkpoint:
    from tilewright.compiler.frontends import load_checkpoint, random_checkpoint

    checkpoint = load_checkpoint(model, progress=report)
    if options.weights == "auto":
        return checkpoint
    kind, _, seed = options.weights.partition(":")
    if kind != "random" or not seed.isdecimal():
        raise ModelError(f"--weights is {options.weights!r}; use auto or random:SEED, such as random:0")
    return random_checkpoint(checkpoint, int(seed))


def _fill(root: Path, checkpoint: Checkpoint, options: Options, report: Report) -> Manifest:
    """Everything but the manifest, into `root`; the manifest that describes it."""
    from tilewright.compiler.codegen.kernels import compile_kernels
    from tilewright.compiler.codegen.program import build_program, link

    formats = weight_formats(checkpoint, options.quant)
    scheduled = lower(checkpoint, formats, options, report)
    program, kernels = split_kernels(scheduled)
    params = _params(scheduled)

    compiled = 0

    def done(name: str, cached: bool) -> None:
        nonlocal compiled
        compiled += 1
        report(Progress("kernels", compiled, len(kernels), f"{name} (cached)" if cached else name))

    report(Progress("kernels", 0, len(kernels)))
    objects = compile_kernels(kernels, options.target, env.cache_dir() / "kernels", env.jobs(), done)
    report(Progress("link", 0, 1))
    executable, workspace = build_program(program, options.target)
    link(executable, objects.values(), root / sealed.LIBRARY)
    report(Progress("link", 1, 1))
    _write_weights(root, checkpoint, params, report)
    _write_tokenizer(root, checkpoint)
    return _describe(root, checkpoint, options, scheduled, params, workspace)


def weight_formats(checkpoint: Checkpoint, quant: str) -> dict[str, str]:
    """Weight format of every matrix of the checkpoint, by tensor name."""
    from tilewright.models.quant import FORMATS
    from tilewright.models.quant.convert import kernel_format, requested_format

    if quant not in ("auto", "none", *FORMATS):
        raise CompileError(f"--quant is {quant!r}; use auto, none or one of {', '.join(FORMATS)}")
    formats = {}
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) != 2:
            continue
        if quant == "auto":
            formats[name] = kernel_format([tensor.format], tensor.shape[1])
        elif quant == "none":
            formats[name] = tensor.format if tensor.format in DENSE_FORMATS else "f32"
        else:
            formats[name] = requested_format(quant, tensor.shape[1])
    return formats


def lower(
    checkpoint: Checkpoint, formats: Mapping[str, str], options: Options, report: Report, taps: bool = False
) -> Any:
    """The scheduled module: model, then every pass with the verifier after it. With `taps`, `logits` gives layers too."""
    from tilewright.compiler.verify import verify
    from tilewright.models.registry import build_model
    from tilewright.passes.pipeline import PipelineOptions, pipeline
    from tilewright.schedules.order import Chooser

    stages = pipeline(
        PipelineOptions(
            formats=tuple(sorted(formats.items())),
            page_size=options.page_size,
            k_transposed=options.target.kind == "cpu",
            decode_buckets=(1,),
            max_tokens=options.max_tokens,
            max_batch=options.max_batch,
            top_logprobs=TOP_LOGPROBS,
            choose=Chooser(options.target),
        )
    )
    total = sum(len(passes) for _, passes in stages)
    mod = build_model(checkpoint.config, taps=taps)
    dump = _Dump(options.dump)
    dump(mod, "model")
    verify(mod, "model")
    done = 0
    for stage, passes in stages:
        for p in passes:
            report(Progress("passes", done, total, p.name))
            mod = p(mod)
            dump(mod, p.name)
            done += 1
        verify(mod, stage)
    report(Progress("passes", total, total))
    return mod


class _Dump:
    """Writes NNN_passname.py into a directory after each pass, if there is one."""

    def __init__(self, directory: Path | None):
        self._directory = directory
        self._count = 0
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CompileError(f"--dump {directory} can't be made ({error.strerror}); name another place") from None

    def __call__(self, mod: Any, name: str) -> None:
        if self._directory is not None:
            (self._directory / f"{self._count:03d}_{name}.py").write_text(mod.script(show_meta=True))
            self._count += 1


def split_kernels(mod: Any) -> tuple[Any, dict[str, Any]]:
    """The module without its kernels, and the kernels by name."""
    import tvm

    kernels = {g.name_hint: f for g, f in mod.functions.items() if "tw.kernel" in (f.attrs or {})}
    rest = {g: f for g, f in mod.functions.items() if g.name_hint not in kernels}
    return tvm.IRModule(rest, mod.attrs), dict(sorted(kernels.items()))


def _params(mod: Any) -> tuple[Param, ...]:
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


def _write_weights(root: Path, checkpoint: Checkpoint, params: tuple[Param, ...], report: Report) -> None:
    """Packs one weight after the other, so that no more than one is in memory."""
    import numpy as np

    from tilewright.models.quant.convert import pack_tensors

    (root / sealed.PARAMS).parent.mkdir()
    writer = TensorWriter(root / sealed.PARAMS, params)
    for done, param in enumerate(writer.order):
        report(Progress("weights", done, len(params), param.name))
        tensors = [checkpoint.tensors[s] for s in param.sources]
        if param.columns is None:
            writer.write(param, np.concatenate([t.read() for t in tensors]).astype(param.dtype))
        else:
            writer.write(param, pack_tensors(tensors, param.format).reshape(param.shape))
    writer.close()
    report(Progress("weights", len(params), len(params)))


def _write_tokenizer(root: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.tokenizer is not None:
        (root / sealed.TOKENIZER).write_text(checkpoint.tokenizer.tokenizer_json)


def _describe(
    root: Path,
    checkpoint: Checkpoint,
    options: Options,
    scheduled: Any,
    params: tuple[Param, ...],
    workspace: Mapping[str, int],
) -> Manifest:
    """The manifest of what stands in `root`; writes costs.json on the way."""
    import tvm

    import tilewright

    config = checkpoint.config
    target = options.target
    calls = kernel_calls(scheduled)
    kernels = describe_kernels(scheduled, calls)
    (root / sealed.COSTS).write_text(json.dumps(_costs(kernels), indent=1, sort_keys=True) + "\n")
    kv = KVFormat(config.layers, config.kv_heads, config.head_dim, options.page_size, k_transposed=target.kind == "cpu")
    page_bytes = kv.layers * 2 * kv.kv_heads * kv.page_size * kv.head_dim * 4
    tokenizer = dataclasses.asdict(checkpoint.tokenizer) if checkpoint.tokenizer else {}
    tokenizer.pop("tokenizer_json", None)
    return Manifest(
        name=checkpoint.name,
        target={"name": target.name, "kind": target.kind, "arch": target.arch, "features": list(target.features)},
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
                {"function": "step_1", "tokens": 1, "static": True},
                {"function": "step", "tokens": options.max_tokens, "static": False},
            ],
        },
        params=params,
        kernels=tuple(kernels),
        memory={
            "weights_bytes": sum(p.bytes for p in params),
            "workspace_bytes": max(workspace.values(), default=0),
            "page_bytes": page_bytes,
        },
        tokenizer=json.loads(json.dumps(tokenizer)),
        provenance={
            "tilewright": tilewright.__version__,
            "tvm": tvm.__version__,
            "source": dict(checkpoint.source),
            "weights": options.weights,
            "quant": options.quant,
        },
        warnings=checkpoint.notes,
    )


def kernel_calls(mod: Any) -> dict[str, Counter[str]]:
    """How often each function calls each kernel: function -> kernel -> calls."""
    from tvm import ir, relax

    calls: dict[str, Counter[str]] = {}
    for gvar, func in mod.functions.items():
        if not isinstance(func, relax.Function):
            continue
        counter: Counter[str] = Counter()

        def visit(expr: Any, counter: Counter[str] = counter) -> None:
            if isinstance(expr, ir.Call) and getattr(expr.op, "name", "") == "relax.call_dps_packed":
                counter[str(expr.args[0].global_symbol)] += 1

        relax.analysis.post_order_visit(func.body, visit)
        calls[gvar.name_hint] = counter
    return calls


def describe_kernels(mod: Any, calls: Mapping[str, Counter[str]]) -> list[dict[str, Any]]:
    """A record a kernel: schedule, tile, floor of one call, and how often each function calls it."""
    described = []
    for gvar, func in sorted(mod.functions.items(), key=lambda item: item[0].name_hint):
        if "tw.kernel" not in (func.attrs or {}):
            continue
        name = gvar.name_hint
        about = json.loads(str(func.attrs["tw.kernel"]))
        described.append({"name": name, **about, "calls": {f: c[name] for f, c in sorted(calls.items()) if c[name]}})
    return described


def _costs(kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """Floor of each function: bytes whatever the batch, bytes a row, operations a row (rows: tokens or wanted rows)."""
    costs: dict[str, Counter[str]] = {}
    for kernel in kernels:
        for function, count in kernel["calls"].items():
            for field, value in (kernel["floor"] or {}).items():
                costs.setdefault(function, Counter())[field] += value * count
    return {function: {"floor": dict(total)} for function, total in costs.items()}
