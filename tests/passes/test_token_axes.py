"""The proof accepts every way to keep tokens apart, and names the operator that does not."""

import pytest

from tests.passes.served_models import Tiny, fused_model
from tilewright.compiler.errors import CompileError
from tilewright.compiler.relax_utils import bindings, composite_of
from tilewright.passes.token_axes import token_axes

TROUBLE = {
    "mean": ("mean", "reduces over the tokens"),
    "concat": ("concat", "joins values with tokens to values without"),
    "reshape": ("reshape", "moves data from token to token"),
    "matmul": ("matmul", "multiplies every token with every token"),
    "softmax": ("nn.softmax", "runs over the tokens"),
    "cumsum": ("cumsum", "runs over the tokens"),
    "strided_slice": ("strided_slice", "picks among tokens"),
    "take": ("take", "picks among tokens"),
    "sort": ("sort", "is not known to keep tokens apart"),
    "bidirectional": ("attention", "sees later tokens"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_mixing_tokens_is_refused_with_operator_and_reason(trouble):
    operator, reason = TROUBLE[trouble]
    mod = fused_model(Tiny(trouble=trouble))
    with pytest.raises(CompileError, match=rf"^operator {operator} \(\w+\) {reason}"):
        token_axes(mod, mod["forward"])


def test_every_composite_has_tokens_on_axis_0():
    mod = fused_model(Tiny(qk_norm=True, bias=True, taps=True))
    axes = token_axes(mod, mod["forward"])
    for b in bindings(mod["forward"]):
        if composite_of(mod, b.value):
            assert axes[b.var] == 0
    assert axes[mod["forward"].params[0]] == 0 and axes[mod["forward"].params[1]] is None
