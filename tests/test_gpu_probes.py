"""The kernels that measure a GPU: they move every byte once, by vectors, and the figures are what a GPU can deliver."""

from pathlib import Path
from typing import Any

import pytest

from tests.cubins import kernels_of
from tilewright.compiler import env, targets
from tilewright.compiler.codegen import cuda_probes
from tilewright.compiler.codegen.cuda_module import CudaKernel
from tilewright.compiler.codegen.kernels import compile_kernels, read_kernel
from tilewright.compiler.targets.base import Target

BLOCKS, TURNS = 6, 3
SIZE = TURNS * cuda_probes.turn_bytes(BLOCKS)


def compiled(name: str, target: Target) -> CudaKernel:
    func = {"read": cuda_probes.read_kernel, "copy": cuda_probes.copy_kernel}[name](BLOCKS, SIZE)
    named = {name: func.with_attr("global_symbol", name)}
    return read_kernel(compile_kernels(named, target, env.cache_dir() / "kernels", 1)[name])


@pytest.mark.parametrize("target", ["nvidia-h100", "nvidia-a100", "nvidia-l40s"])
@pytest.mark.parametrize("name", ["read", "copy"])
def test_probes_move_vectors(name: str, target: str) -> None:
    [kernel] = kernels_of(compiled(name, targets.RECORDS[target]).cubin)
    assert "LDG.E.128" in kernel.sass and ("STG.E.128" in kernel.sass) == (name == "copy")
    assert (kernel.resources["LOCAL"], kernel.resources["STACK"]) == (0, 0)
    assert kernel.resources["REG"] <= 64, "four blocks of 256 threads have room"


@pytest.mark.gpu
def test_probes_move_every_byte(tmp_path: Path) -> None:
    import torch
    import tvm_ffi

    from tilewright.measure_gpu import load_function

    target = targets.resolve_target("cuda")
    x = torch.randint(-(2**31), 2**31 - 1, (SIZE // 4,), dtype=torch.int32, device="cuda")
    sums = torch.full((BLOCKS * cuda_probes.THREADS,), -7, dtype=torch.int32, device="cuda")
    copied = torch.full_like(x, -7)

    def run(name: str, *tensors: Any) -> None:
        function = load_function(name, compiled(name, target), tmp_path)
        function(*(tvm_ffi.from_dlpack(t.view(torch.uint32)) for t in tensors))
        torch.cuda.synchronize()

    run("copy", x, copied)
    assert torch.equal(x, copied)
    run("read", x, sums)
    assert (int(sums.long().sum()) - int(x.long().sum())) % 2**32 == 0


@pytest.mark.gpu
def test_a_gpu_is_measured() -> None:
    """Near what its record says, where it says something; twice alike."""
    from tilewright.compiler.targets import cuda
    from tilewright.measure_gpu import measure

    record = cuda.this_machine()
    one, two = measure(record), measure(record)
    assert one.copy_gbs and two.copy_gbs
    assert abs(one.bandwidth_gbs / two.bandwidth_gbs - 1) < 0.05
    assert 0.6 < one.copy_gbs / one.bandwidth_gbs < 1.2
    if record.bandwidth_gbs:
        assert 0.9 < one.bandwidth_gbs / record.bandwidth_gbs < 1.1
    if record.matrix_tops:
        assert one.matrix_tops and 0.8 < one.matrix_tops / record.matrix_tops < 1.2
