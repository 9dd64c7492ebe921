"""The step that draws: logits and the sampler in one function."""

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from tilewright.compiler.composites import SAMPLING_INPUTS, SampleSpec
from tilewright.compiler.errors import CompileError
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    bindings,
    input_count,
    main_function,
    remove_dead_code,
    shape,
    static,
)
from tilewright.compiler.served_bodies import add_served_composite, input_vars


@dataclass(frozen=True)
class LowerSampling(Pass):
    """Add `step` beside `logits`. Stage "served".

    before   logits(STEP_INPUTS..., pages, *params) -> logits[r, V]
    after    logits as before, and
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
        # A copy, since two functions of a module share neither parameters nor symbolic sizes.
        logits = relax.utils.copy_with_new_vars(main_function(mod)[1])
        emitter = Emitter(relax.BlockBuilder(mod))
        builder = emitter.builder
        params = self._params(logits)
        attrs = {k: v for k, v in logits.attrs.items() if k != "global_symbol"}
        attrs["num_input"] = input_count(logits) + len(SAMPLING_INPUTS)
        sampling = params[input_count(logits) - 1 : attrs["num_input"] - 1]
        with builder.function("step", params, attrs=attrs):
            with builder.dataflow():
                for binding in bindings(logits):
                    emitter.new[binding.var] = emitter(emitter.map(binding.value), binding.var.name)
                scores = self._first_output(emitter, logits.body.body)
                vocab = static(shape(scores)[1])
                assert vocab is not None, "a served function has static columns"
                spec = SampleSpec(vocab, min(self.top_logprobs, vocab))
                sample = add_served_composite(builder, "sample", spec)
                output = builder.emit_output(relax.Call(sample, [scores, *sampling]))
            builder.emit_func_output(output)
        return remove_dead_code(builder.get(), "logits", "step")

    @staticmethod
    def _params(logits: relax.Function) -> list[Any]:
        """The function's parameters, with the sampler's inputs before the pages."""
        old, at = list(logits.params), input_count(logits) - 1
        extents = {"r": next(p for p in old if p.name == "rows").ty.shape.values[0]}
        return [*old[:at], *input_vars(SAMPLING_INPUTS, extents).values(), *old[at:]]

    @staticmethod
    def _first_output(emitter: Emitter, result: Expr) -> Expr:
        """The logits, which come first where the function returns taps as well."""
        value = emitter.map(result)
        return value if isinstance(value.ty, relax.TensorType) else emitter(relax.TupleGetItem(value, 0))
