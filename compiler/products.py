"""Products taken apart: factors are found in whatever order and grouping they were multiplied."""

from dataclasses import dataclass

from tilewright.compiler.relax_utils import Expr, Scope, op_name


@dataclass(frozen=True)
class Product:
    """number * tensors[0] * tensors[1] * ..., broadcast together."""

    number: float
    tensors: tuple[Expr, ...]


def factors(scope: Scope, expr: Expr, whole: Expr | None = None) -> Product:
    """`expr` as a product: through multiplications, through divisions by numbers; numbers are gathered.

    A value equal to `whole` is one factor, though it be a product itself.
    """
    value = scope.value(expr)
    number = scope.number(expr)
    if number is not None:
        return Product(float(number), ())
    if whole is not None and scope.same(expr, whole):
        return Product(1.0, (scope.resolve(expr),))
    if op_name(value) == "multiply":
        left, right = (factors(scope, a, whole) for a in value.args)
        return Product(left.number * right.number, (*left.tensors, *right.tensors))
    if op_name(value) == "divide" and scope.number(value.args[1]):
        inner = factors(scope, value.args[0], whole)
        return Product(inner.number / scope.number(value.args[1]), inner.tensors)
    return Product(1.0, (scope.resolve(expr),))
