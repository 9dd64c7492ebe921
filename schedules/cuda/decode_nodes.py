"""The fixed tree that decode attention sums in: nodes, each the attention over some keys, folded from the left."""

from tvm.script import tirx as T

from tilewright.schedules.cuda.decode_work import LEVELS

MASKED = -1e30  # below every real score, and finite

_GROUP_SPLITS, _SPAN_GROUPS = 1 << (LEVELS[1] - LEVELS[0]), 1 << (LEVELS[2] - LEVELS[1])


@T.meta_class
class Node:
    """Attention of four heads over some keys: their largest score, the sum of their weights, and the weighted values in
    `vectors` dimensions of the head. A weight is 2 ^ (exponent * (score - largest))."""

    def __init__(self, vectors: int, exponent: float) -> None:
        self.vectors, self.exponent = vectors, exponent
        self.largest = T.alloc_local([4], "float32")
        self.total = T.alloc_local([4], "float32")
        self.values = T.alloc_local([4 * vectors], "float32")
        self.scale = T.alloc_local([2], "float32")

    @T.inline
    def clear(self):
        """No key: folded into another it changes nothing, and another folded into it comes out unchanged."""
        for h in T.unroll(4):
            self.largest[h] = T.float32(MASKED)
            self.total[h] = T.float32(0)
        for i in T.unroll(4 * self.vectors):
            self.values[i] = T.float32(0)

    @T.inline
    def fold(self, other):
        """Takes `other` in; by instructions that leave the compiler no choice of rounding."""
        for h in T.unroll(4):
            larger: T.float32 = T.max(self.largest[h], other.largest[h])
            T.ptx["ex2.approx.ftz.f32"](self.scale[0], (self.largest[h] - larger) * T.float32(self.exponent))
            T.ptx["ex2.approx.ftz.f32"](self.scale[1], (other.largest[h] - larger) * T.float32(self.exponent))
            T.ptx["mul.rn.f32"](self.total[h], self.total[h], self.scale[0])
            T.ptx["fma.rn.f32"](self.total[h], other.total[h], self.scale[1], self.total[h])
            for i in T.unroll(self.vectors):
                T.ptx["mul.rn.f32"](self.values[i * 4 + h], self.values[i * 4 + h], self.scale[0])
                T.ptx["fma.rn.f32"](
                    self.values[i * 4 + h], other.values[i * 4 + h], self.scale[1], self.values[i * 4 + h]
                )
            self.largest[h] = larger


@T.meta_class
class Tree:
    """The nodes that are open as a query's keys are walked: a group of splits, a span of groups, and the whole.

    Nodes are numbered within their level from position 0, so that groups and spans end at fixed positions.
    """

    def __init__(self, vectors: int, exponent: float) -> None:
        self.group, self.span, self.whole = (Node(vectors, exponent) for _ in range(3))

    @T.inline
    def clear(self):
        self.group.clear()
        self.span.clear()
        self.whole.clear()

    @T.inline
    def add_split(self, node, number, is_last):
        self.group.fold(node)
        if T.Or(is_last, T.truncmod(number + 1, _GROUP_SPLITS) == 0):
            self.add_group(self.group, T.truncdiv(number, _GROUP_SPLITS), is_last)
            self.group.clear()

    @T.inline
    def add_group(self, node, number, is_last):
        self.span.fold(node)
        if T.Or(is_last, T.truncmod(number + 1, _SPAN_GROUPS) == 0):
            self.whole.fold(self.span)
            self.span.clear()

    @T.inline
    def add(self, node, level, number, is_last):
        """A node of a level, as log2 of its keys."""
        if level == LEVELS[0]:
            self.add_split(node, number, is_last)
        elif level == LEVELS[1]:
            self.add_group(node, number, is_last)
        else:
            self.whole.fold(node)
