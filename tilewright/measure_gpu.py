"""What this machine's GPU delivers, measured with kernels that go through our own compiler: memory and matrices."""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets.base import Target
from tilewright.compiler.targets.measured import Ceilings

_BUFFER_BYTES = 2 << 30  # of each of two; far above any second-level cache
_LEAST_BUFFER_BYTES = 448 << 20  # three matrices, and a little
_SHARE = 0.4  # of the free memory, for each buffer
_ROUNDS = 9
_SIZE = 8192  # rows and columns of the matrices

Launch = Callable[[], None]


def measure(target: Target) -> Ceilings:
    """The ceilings of the first GPU here, which `target` describes. Takes a few seconds and up to 4 GiB of its memory.

    bandwidth: sums over 2 GiB; copy: 2 GiB to another place, both ways counted; matrix: a product of bfloat16 matrices
    of 8192 x 8192 by the linear that models run with, None where `target` has none. Raises TargetError where a compiler
    is missing, or memory.
    """
    from tilewright.compiler.codegen.cuda_toolchain import find_toolchain
    from tilewright.runtime.cuda.cudart import load_cudart

    find_toolchain()
    cuda = load_cudart()
    probe = _Probe(target, cuda)
    read_ms, copy_ms = probe.read_ms(), probe.copy_ms()
    matrix_ms = probe.matrix_ms()
    return Ceilings(
        bandwidth_gbs=probe.size / read_ms / 1e6,
        copy_gbs=2 * probe.size / copy_ms / 1e6,
        matrix_tops=None if matrix_ms is None else 2 * _SIZE**3 / matrix_ms / 1e9,
    )


class _Probe:
    """Two buffers, read and written by turns so that nothing stays in the cache for the next call."""

    def __init__(self, target: Target, cuda: Any) -> None:
        from tilewright.compiler.codegen.cuda_probes import BLOCKS_PER_SM, turn_bytes
        from tilewright.runtime.cuda.memory import DeviceMemory

        self.target, self.cuda = target, cuda
        self.blocks = target.sms * BLOCKS_PER_SM
        self.size = _buffer_bytes(*cuda.memory()) // turn_bytes(self.blocks) * turn_bytes(self.blocks)
        self.buffers = [DeviceMemory(cuda, self.size) for _ in range(2)]

    def read_ms(self) -> float:
        from tilewright.compiler.codegen.cuda_probes import THREADS, read_kernel
        from tilewright.runtime.cuda.memory import DeviceMemory

        count = self.blocks * THREADS
        sums = DeviceMemory(self.cuda, 4 * count)
        with self._loaded("read", read_kernel(self.blocks, self.size)) as function:
            total = self._tensor(sums.address, (count,), "uint32")
            calls = [self._call(function, self._words(i), total) for i in range(2)]
            return self._median_ms(calls)

    def copy_ms(self) -> float:
        from tilewright.compiler.codegen.cuda_probes import copy_kernel

        with self._loaded("copy", copy_kernel(self.blocks, self.size)) as function:
            return self._median_ms([self._call(function, self._words(i), self._words(1 - i)) for i in range(2)])

    def matrix_ms(self) -> float | None:
        """Of a product as a model's step calls it; the operands are random, which costs a GPU power and clock."""
        from tilewright.compiler.composites import LinearSpec
        from tilewright.schedules.base import Call
        from tilewright.schedules.order import Chooser

        spec = LinearSpec(_SIZE, _SIZE, "bf16_rows", dtype="bfloat16", out_dtype="bfloat16")
        choice = Chooser(self.target)(Call("linear", spec, _SIZE, _SIZE))
        if choice is None or len(choice.lowering.kernels) != 1:
            return None
        [kernel] = choice.lowering.kernels
        operands = self._operands()
        with self._loaded("linear", kernel.written()) as function:
            calls = []
            for i in range(2):
                inputs = [operands[i][k] for k in kernel.inputs if isinstance(k, int)]
                calls.append(self._call(function, *inputs, operands[i][-1]))
            return self._median_ms(calls)

    def _operands(self) -> list[tuple[Any, Any, Any]]:
        """x, weight and y in each buffer."""
        matrix = 2 * _SIZE * _SIZE
        shape = (_SIZE, _SIZE)
        values = np.random.default_rng(0).standard_normal(_SIZE * 256).astype(np.float32)
        block = (values.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16, cut
        for buffer in self.buffers:
            for at in range(0, 2 * matrix, block.nbytes):
                self.cuda.copy(buffer.address + at, block.ctypes.data, block.nbytes, 0)
        self.cuda.synchronize(0)
        return [tuple(self._tensor(b.address + i * matrix, shape, "bfloat16") for i in range(3)) for b in self.buffers]

    def _words(self, buffer: int) -> Any:
        return self._tensor(self.buffers[buffer].address, (self.size // 4,), "uint32")

    def _tensor(self, address: int, shape: Sequence[int], dtype: str) -> Any:
        from tilewright.runtime.cuda.memory import tensor
        from tilewright.runtime.library import load_runtime

        return tensor(load_runtime(), self.cuda.device_type, address, shape, dtype)

    @contextmanager
    def _loaded(self, name: str, func: Any) -> Iterator[Any]:
        """The kernel as a function of tensors."""
        from tilewright.compiler import env
        from tilewright.compiler.codegen.kernels import compile_kernels, read_kernel

        named = func.with_attr("global_symbol", name)
        [file] = compile_kernels({name: named}, self.target, env.cache_dir() / "kernels", 1).values()
        with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
            yield load_function(name, read_kernel(file), Path(folder))

    @staticmethod
    def _call(function: Any, *tensors: Any) -> Launch:
        return lambda: function(*tensors)

    def _median_ms(self, calls: Sequence[Launch]) -> float:
        """Of a call, by the GPU's clock, the calls by turns."""
        for call in calls:
            call()
        marks = []
        for i in range(_ROUNDS):
            start, end = self.cuda.timer(), self.cuda.timer()
            self.cuda.record(start, 0)
            calls[i % len(calls)]()
            self.cuda.record(end, 0)
            marks.append((start, end))
        self.cuda.synchronize(0)
        return statistics.median(self.cuda.elapsed_ms(start, end) for start, end in marks)


def _buffer_bytes(free: int, total: int) -> int:
    """Bytes of each buffer. Raises TargetError where too little is free."""
    size = min(_BUFFER_BYTES, int(_SHARE * free))
    if size < _LEAST_BUFFER_BYTES:
        needed = int(_LEAST_BUFFER_BYTES / _SHARE)
        raise TargetError(
            f"measuring takes {needed / 1e9:.2f} GB of GPU memory and {free / 1e9:.2f} GB of {total / 1e9:.2f} are "
            "free; end what else runs there"
        )
    return size


def load_function(name: str, kernel: Any, folder: Path) -> Any:
    """A compiled kernel linked as a model's are, and loaded."""
    import tvm

    from tilewright.compiler.codegen.cuda_module import load_device_part
    from tilewright.compiler.codegen.kernel_library import link_kernels

    code, library = folder / f"{name}.o", folder / f"{name}.so"
    code.write_bytes(kernel.object)
    link_kernels([code], library)
    module = tvm.runtime.load_module(str(library))
    module.import_module(load_device_part(kernel.device))
    return module[name]
