"""Products with a weight, and rows of a table, become composites: linear and embedding."""

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from tilewright.compiler.bodies import add_composite
from tilewright.compiler.composites import EmbeddingSpec, LinearSpec
from tilewright.compiler.pass_base import Pass
from tilewright.compiler.relax_utils import (
    Emitter,
    Expr,
    Rule,
    Scope,
    dtype,
    main_function,
    op_name,
    rebuild,
    shape,
    shortest,
    static,
    static_shape,
    weight_params,
)
from tilewright.compiler.views import Analyzer, index_vars, peel, simplify_views


@dataclass(frozen=True)
class FuseLinear(Pass):
    """Find x @ weight.T (+ bias) and table[tokens] (* scale) where weight, bias and table are parameters.

    before   y = matmul(x, permute_dims(w)) + b;      e = take(table, tokens, axis=0) * 27.7
    after    y = linear(x, w, b);                     e = embedding(table, tokens)

    A weight stored [in, out], and one that is computed, is left alone.
    """

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        _, func = main_function(mod)
        finder = _Finder(func)
        rules: dict[Any, Rule] = {}
        for var in finder.scope.definition:  # a sum or product comes after its operand, and takes its place
            rule = finder.linear(var) or finder.embedding(var)
            if rule is not None:
                rules[var] = rule
        return simplify_views(rebuild(mod, rules))


class _Finder:
    """Finds linears and embeddings in one function."""

    def __init__(self, func: relax.Function) -> None:
        self.scope = Scope(func)
        self.weights = set(weight_params(func))
        self.tokens = func.params[0]

    def linear(self, var: Any) -> Rule | None:
        biased = self._biased(var)
        product, bias = biased or (var, None)
        found = self._weight_product(product)
        if found is None:
            return None
        x, weight = found
        outs, ins = (static(e) or 0 for e in shape(weight))
        args = [x, weight] if bias is None else [x, weight, bias]
        return _call("linear", LinearSpec(outs, ins, bias=bias is not None), args)

    def embedding(self, var: Any) -> Rule | None:
        scaled = self.scope.without_number(var, "multiply")
        rows, scale = scaled if scaled is not None and self._only_user(scaled[0], var) else (var, 1.0)
        value = self.scope.value(rows)
        if op_name(value) != "take" or (value.attrs.axis or 0) != 0:
            return None
        table, tokens = (self.scope.resolve(a) for a in value.args)
        if table not in self.weights or len(shape(table)) != 2 or not tokens.same_as(self.tokens):
            return None
        vocab, features = (static(e) or 0 for e in shape(table))
        return _call("embedding", EmbeddingSpec(vocab, features, scale=shortest(scale)), [table, tokens])

    def _biased(self, var: Any) -> tuple[Expr, Expr] | None:
        """(product, bias) of a sum of a matmul that nothing else reads and a parameter[N], in either order."""
        if not self.scope.is_op(var, "add"):
            return None
        a, b = self.scope.args(var)
        for product, bias in ((a, b), (b, a)):
            bias = self.scope.resolve(bias)
            is_bias = bias in self.weights and static_shape(bias) == static_shape(product)[-1:]
            if is_bias and self.scope.is_op(product, "matmul") and self._only_user(product, var):
                return product, bias
        return None

    def _weight_product(self, var: Any) -> tuple[Expr, Expr] | None:
        """(x[n,K], weight[N,K]) of a matmul that reads the parameter at [column, k]."""
        value = self.scope.value(var)
        if op_name(value) != "matmul" or len(shape(value)) != 2 or len(shape(value.args[1])) != 2:
            return None
        x, right = value.args
        analyzer = Analyzer()
        k, column = index_vars(shape(right), analyzer)
        weight, index = peel(self.scope, right, [k, column], analyzer)
        plain = weight in self.weights and len(index) == 2 and static_shape(weight) == static_shape(right)[::-1]
        if not plain or not (index[0].same_as(column) and index[1].same_as(k)) or dtype(x) != "float32":
            return None
        return (x, weight) if isinstance(x, relax.Var) and not isinstance(shape(x)[0], tirx.IntImm) else None

    def _only_user(self, var: Any, user: Any) -> bool:
        users = self.scope.users.get(self.scope.resolve(var), [])
        return len(users) == 1 and users[0] is not None and users[0].same_as(user)


def _call(name: str, spec: Any, args: list[Expr]) -> Rule:
    def emit(emitter: Emitter) -> Expr:
        return relax.Call(add_composite(emitter.builder, name, spec), [emitter.map(a) for a in args])

    return emit
