"""The story of a compile: checkpoint, model, passes, kernels, weights, artifact."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tilewright.compiler import artifact as sealed
from tilewright.compiler import env
from tilewright.compiler.artifact import Artifact, Manifest, Param, TensorWriter
from tilewright.compiler.checkpoint import BLOCK_FORMATS, DENSE_FORMATS, Checkpoint, ModelConfig
from tilewright.compiler.describe import describe, split_kernels, step_params
from tilewright.compiler.dump import Dump
from tilewright.compiler.errors import CompileError
from tilewright.compiler.options import DEFAULT_PAGE_SIZE, TOP_LOGPROBS, Options
from tilewright.compiler.progress import Progress
from tilewright.compiler.targets import resolve_target
from tilewright.compiler.without_torch import without_torch

Report = Callable[[Progress], None]

# Weight formats that matrix units read, and the dtype of the activations that go with them.
_ROWS = {"bf16_rows": "bfloat16", "f16_rows": "float16"}

_WITH_OFFSET = ("q4_0", "q4_1")  # weights beside which 8-bit activations round to finer steps


def compile(
    model: str | os.PathLike[str],
    *,
    target: str = "auto",
    output: str | os.PathLike[str] | None = None,
    weights: str = "auto",
    quant: str = "auto",
    max_batch: int | None = None,
    max_tokens: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    strict: bool = False,
    pooling: str = "last",
    dump: str | os.PathLike[str] | None = None,
    logs: str | os.PathLike[str] | None = None,
    progress: Report | None = None,
) -> Artifact:
    """Compile a model into an artifact.

    model: an alias, a Hugging Face directory, a .gguf file or a hub id. target: see `tilewright doctor`.
    output: by default NAME.tw here. weights: "auto" or "random:SEED".
    quant: "auto" keeps what the model is stored in, "none" computes in float, or a weight format for all matrices.
    max_batch: sequences a step; max_tokens: tokens a step, by default what suits the kind of target.
    page_size: tokens a KV page.
    strict: a token gets the same bits whether it was generated or stands in a prompt. On a CPU it always does; on a
    GPU generated tokens then run by the prompts' attention kernel, which is slower where few sequences are long.
    pooling: what an embedding of a text is made of: the state of its last token, or the mean of all.
    dump: a directory for the IR after every pass. logs: a directory of tuning records, by default that of the
    installation. Raises UserError for whatever the caller can mend.
    """
    with without_torch():
        import tvm  # noqa: F401  first here, so that no later import brings torch along
    options = compile_options(target, weights, quant, max_batch, max_tokens, page_size, strict, pooling)
    options = replace(options, dump=Path(dump) if dump else None, logs=Path(logs) if logs else None)
    report = progress or (lambda _: None)
    checkpoint = read_checkpoint(model, options, report)
    path = Path(output) if output else Path(f"{Path(checkpoint.name).name}.tw")  # a hub id is org/name
    with sealed.writing(path) as root:
        manifest = _fill(root, checkpoint, options, report)
        report(Progress("seal", 0, 1))
        manifest = sealed.seal(root, manifest)
        report(Progress("seal", 1, 1))
    return Artifact(path, manifest)


def compile_options(
    target: str,
    weights: str = "auto",
    quant: str = "auto",
    max_batch: int | None = None,
    max_tokens: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    strict: bool = False,
    pooling: str = "last",
) -> Options:
    """What `compile` makes of its arguments. Raises UserError for what can't be."""
    batch, tokens = _given("max_batch", max_batch), _given("max_tokens", max_tokens)
    options = Options(resolve_target(target), weights, quant, batch, tokens, page_size, strict, pooling)
    _check_quant(options)
    return options


def read_checkpoint(model: str | os.PathLike[str], options: Options, report: Report) -> Checkpoint:
    from tilewright.compiler.frontends import load_checkpoint, random_checkpoint

    checkpoint = load_checkpoint(os.fspath(model), progress=report, weights=options.weights == "auto")
    if options.weights == "auto":
        return checkpoint
    return random_checkpoint(checkpoint, options.seed)


def _given(name: str, size: int | None) -> int:
    """A size as Options takes it: 0 for the default, which nobody may ask for by number."""
    if size == 0:
        raise CompileError(f"--{name.replace('_', '-')} is 0; give a number from 1 to 65536")
    return size or 0


def _check_quant(options: Options) -> None:
    from tilewright.models.quant import FORMATS

    quant = options.quant
    if options.target.kind == "cuda":
        if quant not in ("auto", "none", *_ROWS):
            raise CompileError(
                f"--quant is {quant!r}, and kernels for {options.target.name} take dense weights only; "
                f"use auto, none or one of {', '.join(_ROWS)}"
            )
        return
    if quant not in ("auto", "none", *FORMATS):
        raise CompileError(f"--quant is {quant!r}; use auto, none or one of {', '.join(FORMATS)}")


def _fill(root: Path, checkpoint: Checkpoint, options: Options, report: Report) -> Manifest:
    """Everything but the manifest, into `root`; the manifest that describes it."""
    from tilewright.compiler.codegen.kernels import compile_kernels
    from tilewright.compiler.codegen.program import build_program, link
    from tilewright.schedules.generic import Tuned
    from tilewright.schedules.order import Chooser
    from tilewright.schedules.records import known_here

    formats = weight_formats(checkpoint, options)
    known = known_here(options.logs or env.tuning_logs(), options.target)
    choose, tuned = Chooser(options.target, known), Tuned(known)
    scheduled = lower(checkpoint, formats, options, report, choose)
    program, kernels = split_kernels(scheduled)
    params = step_params(scheduled)

    compiled = 0

    def done(name: str, cached: bool) -> None:
        nonlocal compiled
        compiled += 1
        report(Progress("kernels", compiled, len(kernels), f"{name} (cached)" if cached else name))

    report(Progress("kernels", 0, len(kernels)))
    objects = compile_kernels(kernels, options.target, env.cache_dir() / "kernels", env.jobs(), done, choose.written)
    report(Progress("link", 0, 1))
    executable, workspace = build_program(program, options.target, tuned)
    link(executable, objects.values(), root / sealed.LIBRARY)
    report(Progress("link", 1, 1))
    if not fills_on_device(options):
        _write_weights(root, checkpoint, params, report)
    _write_tokenizer(root, checkpoint)
    return describe(root, checkpoint, options, scheduled, params, workspace, tuned.described())


def weight_formats(checkpoint: Checkpoint, options: Options) -> dict[str, str]:
    """Weight format of every matrix of the checkpoint, by tensor name."""
    from tilewright.models.quant.convert import kernel_format, requested_format

    quant, formats = options.quant, {}
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) != 2:
            continue
        if options.target.kind == "cuda":
            formats[name] = quant if quant in _ROWS else "bf16_rows"
        elif quant == "auto":
            formats[name] = kernel_format([tensor.format], tensor.shape[1])
        elif quant == "none":
            formats[name] = tensor.format if tensor.format in DENSE_FORMATS else "f32"
        else:
            formats[name] = requested_format(quant, tensor.shape[1])
    return formats


def activations(options: Options) -> str:
    """dtype of what kernels hand on: on a GPU that of the weights, which its matrix units multiply it with."""
    return _ROWS.get(options.quant, options.defaults.activations)


def kv_dtype(options: Options, formats: Mapping[str, str]) -> str:
    """dtype of the pages. On a CPU 16 bits beside weights in block formats, where the machine converts them: a step of
    many sequences reads almost as many bytes of float32 pages as of weights, and rounding pages adds less than a
    twentieth to what rounding activations does to the distribution of the next token."""
    target = options.target
    if target.kind == "cpu" and (target.has("f16c") or target.has("avx512")):
        return "float16" if set(BLOCK_FORMATS) & set(formats.values()) else options.defaults.kv_dtype
    return _ROWS.get(options.quant, options.defaults.kv_dtype)


def narrow_activations(config: ModelConfig, formats: Mapping[str, str]) -> tuple[str, ...]:
    """Weights in block formats whose products may take 8-bit activations: half of the work, at a cost in accuracy.

    They are gate and up, the largest matrices, whose error the gate and the down projection damp; and beside weights of
    4 bits, where activations of 8 bits have an offset (schedules/cpu/block_dot.py), what is added to the residual
    stream. But none of the last layers, which no later layer averages out. tests/test_real_weights.py holds
    SmolLM2-135M in Q4_1 to float32's greedy choice on 99 % of tokens under this rule; 8 bits everywhere fall short of
    that.
    """
    exact_layers = 2
    parts = {"mlp.gate": BLOCK_FORMATS, "mlp.up": BLOCK_FORMATS, "mlp.down": _WITH_OFFSET, "attn.o": _WITH_OFFSET}
    names = [(f"layers.{i}.{part}.weight", part) for i in range(config.layers - exact_layers) for part in parts]
    return tuple(name for name, part in names if formats[name] in parts[part])


def lower(
    checkpoint: Checkpoint, formats: Mapping[str, str], options: Options, report: Report, choose: Any = None
) -> Any:
    """The scheduled module: the model, then every pass, verified stage by stage."""
    from tilewright.compiler.feed import add_feed
    from tilewright.compiler.random_fill import add_fill
    from tilewright.compiler.verify import verify
    from tilewright.models.registry import build_model
    from tilewright.passes.pipeline import PipelineOptions, pipeline
    from tilewright.schedules.order import Chooser, takes_norm

    stages = pipeline(
        PipelineOptions(
            formats=tuple(sorted(formats.items())),
            narrow=narrow_activations(checkpoint.config, formats),
            page_size=options.page_size,
            strict=options.strict and options.target.kind == "cuda",
            k_transposed=options.defaults.k_transposed,
            activations=activations(options),
            kv_dtype=kv_dtype(options, formats),
            decode_buckets=() if options.any_decode else options.decode_buckets,
            any_decode=options.any_decode,
            max_tokens=options.max_tokens,
            max_batch=options.max_batch,
            top_logprobs=TOP_LOGPROBS,
            choose=choose or Chooser(options.target),
            takes_norm=partial(takes_norm, options.target),
        )
    )
    total = sum(len(passes) for _, passes in stages)
    mod = build_model(checkpoint.config, taps=True)
    dump = Dump(options.dump)
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
    if options.target.kind == "cuda":
        mod = add_feed(mod)
    return add_fill(mod, options.seed) if fills_on_device(options) else mod


def fills_on_device(options: Options) -> bool:
    """Whether random weights are made where they are used, and none are stored."""
    return options.target.kind == "cuda" and options.weights != "auto"


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
            packed = pack_tensors(tensors, param.format).reshape(param.shape)
            writer.write(param, packed.view(sealed.numpy_dtype(param.dtype)))
    writer.close()
    report(Progress("weights", len(params), len(params)))


def _write_tokenizer(root: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.tokenizer is not None:
        (root / sealed.TOKENIZER).write_text(checkpoint.tokenizer.tokenizer_json)
