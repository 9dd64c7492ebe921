"""Dense linears on Hopper, y = x @ W^T with bias, gate and residual, for any number of tokens: wgmma fed by TMA."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilewright.compiler.composites import LinearSpec, NormSpec
from tilewright.compiler.packed_weights import ROWS
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import Call, Floor, KernelCall, Lowering, Output, Reject, Schedule
from tilewright.schedules.cuda.linear_few_kernel import linear_few_kernel
from tilewright.schedules.cuda.linear_few_tile import LinearFewTile, few_tiles
from tilewright.schedules.cuda.linear_kernel import linear_kernel
from tilewright.schedules.cuda.linear_parts import parts_of
from tilewright.schedules.cuda.linear_tile import LinearTile, tiles
from tilewright.schedules.cuda.rms_norm import WARP_FEATURES, NormFacts, RMSNorm, norm_kernel

# Tokens up to each of which a linear has tiles of its own; above the last, tiles are as good as they get.
_BOUNDS = (*(8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256), *(320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536))


@dataclass(frozen=True)
class LinearFacts:
    """rows: of tokens, that a tile is picked for."""

    spec: LinearSpec
    rows: int


def takes_norm(spec: LinearSpec) -> bool:
    """Whether a linear's kernel for few tokens takes the norm before it, as the spec has it: short rows, which a warp
    adds up. In the kernels' arguments the norm is in the place of a bias and a residual."""
    alone = not (spec.bias or spec.residual or spec.gated)
    return alone and spec.norm is not None and spec.in_features <= WARP_FEATURES and bool(few_tiles(spec, 1))


def _norm_of(spec: LinearSpec) -> NormSpec:
    """The norm before a linear, of its dtype."""
    assert spec.norm is not None
    return replace(spec.norm, dtype=spec.dtype)


def refuse_linear(spec: LinearSpec) -> Reject | None:
    """Why it has no kernel on any GPU, whatever its extents; None where it has."""
    if ROWS.get(spec.weight_format) != spec.dtype:
        return Reject(f"weights in {spec.weight_format} are not rows of the activations' {spec.dtype}")
    if spec.norm or spec.gated:
        return Reject("norms and gates before the product are kernels of their own")
    if spec.out_dtype not in (spec.dtype, "float32") or (spec.out_dtype == "float32" and spec.residual):
        return Reject(f"results in {spec.out_dtype}{' with a residual' * spec.residual} are not stored")
    return None


def linear_lowering(spec: LinearSpec, kernel: Any) -> Lowering:
    """The call of `kernel`, (x, weight, bias, residual, y): it takes the weight in place of a bias or residual that is
    not there, and does not read it."""
    bias = 2 if spec.bias else 1
    residual = 2 + spec.bias if spec.residual else 1
    out = Output("y", ("m", spec.result_features), spec.out_dtype)
    return Lowering((KernelCall(kernel, (0, 1, bias, residual), (out,)),), ("y",))


def _normed_lowering(spec: LinearSpec, norm: Any, kernel: Any) -> Lowering:
    """The call of a norm, and of `kernel` on its result; or of a `kernel` that normalises by itself."""
    x = Output("normed", ("m", spec.in_features), spec.dtype)
    out = Output("y", ("m", spec.result_features), spec.out_dtype)
    return Lowering((KernelCall(norm, (0, 2), (x,)), KernelCall(kernel, ("normed", 1, 2, 0), (out,))), ("y",))


class Linear(Schedule):
    name = "linear"
    composite = "linear"
    kind = "cuda"

    def match(self, call: Call, target: Target) -> LinearFacts | Reject:
        spec = call.spec
        if not (target.has("tma") and target.has("wgmma")):
            return Reject(f"{target.name} has no wgmma")
        refusal = refuse_linear(replace(spec, norm=None) if takes_norm(spec) else spec)
        if refusal is not None:
            return refusal
        if spec.in_features % 8:
            return Reject(f"rows of {spec.in_features} values are no multiple of 16 bytes")
        outs = spec.result_features
        if outs % 8 and (spec.gate or spec.out_dtype != "float32"):
            return Reject(f"{outs} outputs are no multiple of 8")
        return LinearFacts(spec, call.rows)

    def bounds(self, call: Call, target: Target) -> Sequence[int]:
        return _BOUNDS

    def space(self, facts: LinearFacts, target: Target) -> Sequence[LinearTile | LinearFewTile]:
        """Tiles for few tokens where there are any: in a step, where each kernel waits for the one before, they are
        faster than the others, which a chain of one kernel alone does not show."""
        spec = facts.spec
        few = few_tiles(spec, facts.rows)
        return few or tiles(spec.out_features, spec.in_features, facts.rows, target, parts_of(spec))

    def floor(self, facts: LinearFacts, target: Target) -> Floor:
        spec = facts.spec
        n, k = spec.out_features, spec.in_features
        wide = 4 if spec.out_dtype == "float32" else 2
        return Floor(
            bytes_fixed=2 * n * k + 4 * n * spec.bias,
            bytes_per_row=2 * k + spec.result_features * (wide + 2 * spec.residual),
            flops_per_row=2 * n * k,
        )

    def apply(self, facts: LinearFacts, tile: LinearTile | LinearFewTile, target: Target) -> Lowering:
        few = isinstance(tile, LinearFewTile)
        kernel = linear_few_kernel(facts.spec, tile, target) if few else linear_kernel(facts.spec, tile, target)
        if facts.spec.norm is None:
            return linear_lowering(facts.spec, kernel)
        return _normed_lowering(facts.spec, None if few else self._norm(facts.spec, target), kernel)

    def _norm(self, spec: LinearSpec, target: Target) -> Any:
        norm = _norm_of(spec)
        tile = RMSNorm().space(NormFacts(norm, ()), target)[0]
        return norm_kernel(norm, (), tile, target)
