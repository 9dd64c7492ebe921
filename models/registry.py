"""The families by name, and how one becomes an IRModule at stage "model"."""

import json
from collections.abc import Callable, Sequence

import tvm
from tvm import relax, tirx

from tilewright.compiler.checkpoint import ModelConfig
from tilewright.compiler.errors import ModelError
from tilewright.compiler.parameters import check_config, parameter_shapes
from tilewright.models.gemma3 import gemma3
from tilewright.models.layers import Layers, Tensor
from tilewright.models.llama import llama
from tilewright.models.qwen2 import qwen2
from tilewright.models.qwen3 import qwen3

Family = Callable[[Layers, Tensor], tuple[Tensor, Sequence[Tensor]]]

FAMILIES: dict[str, Family] = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "gemma3": gemma3}


def build_model(config: ModelConfig, taps: bool = False) -> tvm.IRModule:
    """The module whose one function is `forward(tokens i32[n], *params) -> logits f32[n, vocab]`.

    With `taps` it returns (logits, hidden f32[n, hidden] after layer 0, after layer 1 ...). `params` are float32, in
    the order of the attribute tw.params. ModelError for an unknown family or a configuration that contradicts itself.
    """
    if config.family not in FAMILIES:
        raise ModelError(f"model family {config.family!r} is unknown; known are {', '.join(FAMILIES)}")
    check_config(config, f"{config.family} model")
    shapes = parameter_shapes(config)
    params = {name: _variable(name, shape) for name, shape in shapes.items()}
    tokens = relax.Var("tokens", relax.TensorType((tirx.Var("n", "int64"),), "int32"))
    attributes = {"num_input": 1, "tw.stage": "model", "tw.params": _describe(shapes)}
    builder = relax.BlockBuilder()
    with builder.function("forward", [tokens, *params.values()], attrs=attributes):
        with builder.dataflow():
            logits, hidden = FAMILIES[config.family](Layers(builder, params, config), tokens)
            result = builder.emit_output(relax.Tuple([logits, *hidden]) if taps else logits)
        builder.emit_func_output(result)
    return builder.finalize()


def _param_name(name: str) -> str:
    """layers.0.attn.q.weight -> layers.0.attn.q; a bias keeps its suffix."""
    return name.removesuffix(".weight")


def _variable(name: str, shape: tuple[int, ...]) -> Tensor:
    return relax.Var(_param_name(name).replace(".", "_"), relax.TensorType(shape, "float32"))


def _describe(shapes: dict[str, tuple[int, ...]]) -> str:
    """The attribute tw.params: which weights of the checkpoint each parameter is made of."""
    return json.dumps(
        [
            {"name": _param_name(name), "sources": [name], "shape": list(shape), "format": "f32"}
            for name, shape in shapes.items()
        ]
    )
