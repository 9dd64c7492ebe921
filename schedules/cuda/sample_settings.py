"""What a row's own settings say: read at once, and then at hand in shared memory."""

from typing import Any

from tvm.script import tirx as T

from tilewright.schedules.cuda.philox import uniform

_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_INTEGERS = ("top_k", "wanted", "penalty_begin", "penalty_end", "bias_begin", "bias_end")
_DRAWING_THREAD = 32  # of another warp than the one that reads the rest


@T.meta_class
class Settings:
    """A row's settings by name: `settings.top_p`. wanted is the number of alternatives, u the draw's random number.

    fetch() asks for them; keep(), later, puts them where all threads see them after the block's next barrier.
    """

    def __init__(self, pool: Any, thread: Any) -> None:
        self.thread = thread
        self.floats = pool.alloc((len(_FLOATS) + 1,), "float32", align=16)
        self.integers = pool.alloc((len(_INTEGERS),), "int32", align=16)
        self.float_registers = T.alloc_local([len(_FLOATS)], "float32")
        self.integer_registers = T.alloc_local([len(_INTEGERS)], "int32")
        self.seed = T.alloc_local([1], "int64")
        self.draws = T.alloc_local([1], "int32")

    def __getattr__(self, name: str) -> Any:
        if name == "u":
            return self.floats[len(_FLOATS)]
        if name in _FLOATS:
            return self.floats[_FLOATS.index(name)]
        if name in _INTEGERS:
            return self.integers[_INTEGERS.index(name)]
        raise AttributeError(name)

    def fetch(self, floats: tuple, integers: tuple, seed: Any, draws: Any) -> None:
        """floats, integers: the values in global memory, in the order of their names above."""
        for i, value in enumerate(floats):
            self._move(0, self.float_registers, i, value)
        for i, value in enumerate(integers):
            self._move(0, self.integer_registers, i, value)
        self._move(_DRAWING_THREAD, self.seed, 0, seed)
        self._move(_DRAWING_THREAD, self.draws, 0, draws)

    def keep(self) -> None:
        for i in range(len(_FLOATS)):
            self._move(0, self.floats, i, self.float_registers[i])
        for i in range(len(_INTEGERS)):
            self._move(0, self.integers, i, self.integer_registers[i])
        self._move(_DRAWING_THREAD, self.floats, len(_FLOATS), uniform(self.seed[0], self.draws[0]))

    @T.inline
    def _move(self, thread, registers, i, value):
        if self.thread == thread:
            registers[i] = value
