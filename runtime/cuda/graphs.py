"""A step's launches as one CUDA graph: captured once, launched again with what then lies in the same memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilewright.runtime.cuda.cudart import Cudart


@dataclass(frozen=True)
class StepGraph:
    """A graph, and the step's outputs in it, which keep their memory as long as they are held."""

    graph: int
    outputs: Any


def capture(cuda: Cudart, stream: int, work: Callable[[], Any]) -> StepGraph:
    """The graph of what `work` puts on the stream, which does not run now. `work` ran before, so that its kernels are
    loaded and TVM's pool has its memory: the pool hands out the same memory again, and never gives it back while there
    is some left on the GPU. Other steps use that memory too, in between."""
    cuda.begin_capture(stream)
    try:
        outputs = work()
    except BaseException:
        cuda.abort_capture(stream)
        raise
    return StepGraph(cuda.end_capture(stream), outputs)
