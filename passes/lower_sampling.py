"""The step that draws: logits and the sampler in one function; and what the logits are made of, for embeddings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import tvm
from tvm import relax

from tilewright.compiler.bodies import add_composite
from tilewright.compiler.composites import SAMPLING_INPUTS, SampleSpec
from tilewright.compiler.errors import CompileError
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    bindings,
    composite_of,
    input_count,
    main_function,
    op_name,
    remove_dead_code,
    shape,
    static,
)
from tilewright.compiler.served_bodies import add_served_composite, input_vars


@dataclass(frozen=True)
class LowerSampling(Pass):
    """Add `step` and `hidden` beside `logits`, and `layers` where the model has taps. Stage "served".

    before   logits(STEP_INPUTS..., pages, *params) -> logits[r, V]                # or (logits, tap0, tap1 ...)
    after    logits -> logits[r, V];  layers -> (logits, tap0, tap1 ...);
             hidden -> x[r, K], after the last norm, where logits = linear(x, w);  and
             step(STEP_INPUTS..., SAMPLING_INPUTS..., pages, *params):
                 ...                                                     # as in logits
                 return sample(logits[r, V], temperature[r], ...)        # ids, logprobs, top_ids, top_logprobs

    What `sample` does with a row of logits l, all in float32:

    1. Log-probabilities and the `top_logprobs` alternatives (largest first, lowest token on ties) are log_softmax of
       the raw logits, whatever follows.
    2. Bias: l[token] += value.
    3. Repetition penalty p, for every token listed: l > 0 ? l / p : l * p. Then, where its count c is above 0, presence
       and frequency: l -= presence; l -= frequency * c.
    4. Temperature 0: the token is the argmax, the lowest on ties, and the rest does not apply.
    5. Divide by the temperature.
    6. Top-k keeps the tokens at or above the k-th largest value.
    7. Top-p: of what is left, renormalised, the smallest set of most probable tokens that reaches p; ties with the
       least of them are kept.
    8. Min-p keeps the tokens whose probability is at least min_p times the largest.
    9. One uniform number from Philox4x32-10 (Salmon et al. 2011) with the seed's low and high words as key and
       (draws, 0, 0, 0) as counter: u = (first word >> 8) * 2^-24. The token is the first, in token order, whose
       cumulative probability exceeds u.

    A row must keep one finite logit, and list a token at most once among its penalties.
    """

    top_logprobs: int = 20

    def __post_init__(self) -> None:
        if self.top_logprobs < 1:
            raise CompileError(f"top_logprobs is {self.top_logprobs}; a step returns at least 1 alternative")

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        served = main_function(mod)[1]
        tapped = not isinstance(served.ret_ty, relax.TensorType)
        builder = relax.BlockBuilder(tvm.IRModule({g: f for g, f in mod.functions.items() if g.name_hint != "logits"}))
        if tapped:
            _add(builder, "layers", served, lambda emitter, value, _: value)
        _add(builder, "logits", served, lambda emitter, value, _: _first(emitter, value))
        _add(builder, "hidden", served, _hidden)
        _add(builder, "step", served, self._sample, SAMPLING_INPUTS)
        return remove_dead_code(builder.get(), *(["layers"] if tapped else []), "logits", "hidden", "step")

    def _sample(self, emitter: Emitter, value: Expr, sampling: Sequence[Any]) -> Expr:
        scores = _first(emitter, value)
        vocab = static(shape(scores)[1])
        assert vocab is not None, "a served function has static columns"
        spec = SampleSpec(vocab, min(self.top_logprobs, vocab))
        sample = add_served_composite(emitter.builder, "sample", spec)
        return relax.Call(sample, [scores, *sampling])


# What a function returns, given the body's own result and the added inputs.
Finish: TypeAlias = Callable[[Emitter, Expr, Sequence[Any]], Expr]


def _add(
    builder: Any, name: str, served: relax.Function, finish: Finish, more: Mapping[str, tuple[str, str]] | None = None
) -> None:
    """Add a function of the body of `served`, with `more` inputs before the pages, that returns what `finish` gives."""
    # A copy, since two functions of a module share neither parameters nor symbolic sizes.
    func = relax.utils.copy_with_new_vars(served)
    old, at = list(func.params), input_count(func) - 1
    extents = {"r": next(p for p in old if p.name == "rows").ty.shape.values[0]}
    added = list(input_vars(dict(more or {}), extents).values())
    attrs = {k: v for k, v in func.attrs.items() if k != "global_symbol"} | {"num_input": at + len(added) + 1}
    emitter = Emitter(builder)
    with builder.function(name, [*old[:at], *added, *old[at:]], attrs=attrs):
        with builder.dataflow():
            for binding in bindings(func):
                emitter.new[binding.var] = emitter(emitter.map(binding.value), binding.var.name)
            output = builder.emit_output(finish(emitter, emitter.map(func.body.body), added))
        builder.emit_func_output(output)


def _first(emitter: Emitter, value: Expr) -> Expr:
    """The logits, which come first where the function returns taps as well."""
    return value if isinstance(value.ty, relax.TensorType) else emitter(relax.TupleGetItem(value, 0))


def _hidden(emitter: Emitter, value: Expr, _: Sequence[Any]) -> Expr:
    """What the projection to the vocabulary reads; a norm that has joined it stands alone again."""
    builder = emitter.builder
    projection = _defined(builder, _first(emitter, value))
    while op_name(projection) is not None and composite_of(builder.get(), projection) is None:  # logits are scaled, say
        values = [arg for arg in projection.args if isinstance(arg, relax.Var)]
        if len(values) != 1:
            break
        projection = _defined(builder, values[0])
    composite = composite_of(builder.get(), projection)
    if composite is None or composite[0] != "linear":
        raise CompileError("the logits are not made of one linear, so there are no hidden states to embed texts by")
    x, _, *others = projection.args
    spec = composite[1]
    if spec.norm is None:
        return x
    norm = add_composite(builder, "rms_norm", replace(spec.norm, dtype=spec.dtype))
    return relax.Call(norm, [x, others[0]])


def _defined(builder: Any, value: Expr) -> Expr:
    """What stands behind names and elements of tuples."""
    while True:
        if isinstance(value, relax.Var) and (found := builder.lookup_binding(value)) is not None:
            value = found
            continue
        whole = _defined(builder, value.tuple_value) if isinstance(value, relax.TupleGetItem) else None
        if not isinstance(whole, relax.Tuple):
            return value
        value = whole.fields[value.index]
