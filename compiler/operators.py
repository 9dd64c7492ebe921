"""The plain operators of a model, by how they treat axes. Names as in Relax, without "relax."."""

UNARY = frozenset(
    [
        "abs",
        "astype",
        "ceil",
        "clip",
        "cos",
        "erf",
        "exp",
        "floor",
        "log",
        "logical_not",
        "negative",
        "nn.gelu",
        "nn.gelu_tanh",
        "nn.relu",
        "nn.silu",
        "round",
        "rsqrt",
        "sigmoid",
        "sin",
        "sqrt",
        "square",
        "tan",
        "tanh",
    ]
)
BINARY = frozenset(
    [
        "add",
        "divide",
        "equal",
        "floor_divide",
        "greater",
        "greater_equal",
        "less",
        "less_equal",
        "logical_and",
        "logical_or",
        "maximum",
        "minimum",
        "mod",
        "multiply",
        "not_equal",
        "power",
        "subtract",
        "where",
    ]
)
ELEMENTWISE = UNARY | BINARY  # operands broadcast to the result, trailing axes aligned

VIEWS = frozenset(
    ["broadcast_to", "expand_dims", "flatten", "permute_dims", "repeat", "reshape", "squeeze", "strided_slice", "take"]
)  # elements rearranged; a take by data is a gather

REDUCTIONS = frozenset(
    ["argmax", "argmin", "max", "mean", "min", "prod", "std", "sum", "variance"]
)  # attributes axis, keepdims
ALONG_AXIS = frozenset(["cumprod", "cumsum", "nn.log_softmax", "nn.softmax"])  # attribute axis; the shape stays
NORMS = frozenset(["nn.layer_norm", "nn.rms_norm"])  # attribute axes; the shape stays
CREATORS = frozenset(["arange", "full", "full_like", "ones", "ones_like", "zeros", "zeros_like"])
TRIANGLES = frozenset(["tril", "triu"])
JOINS = frozenset(["concat", "split"])

PLAIN = ELEMENTWISE | VIEWS | REDUCTIONS | ALONG_AXIS | NORMS | CREATORS | TRIANGLES | JOINS | {"matmul"}
