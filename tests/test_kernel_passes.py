"""Kernels compiled without the passes that find nothing to do in them: the same bytes as with all of TVM's passes but
the one that takes most of the time."""

from typing import Any

import pytest
import tvm

from tests.checkpoints import make_checkpoint
from tilewright.compiler import env
from tilewright.compiler.codegen import kernels
from tilewright.compiler.codegen.llvm_target import build_llvm
from tilewright.compiler.codegen.object_code import object_code

pytestmark = pytest.mark.slow

SLOWEST = "s_tir.CompactBufferAllocation"


@pytest.mark.parametrize("target, quant", [("cpu-x86-64-v3", "none"), ("cpu-x86-64-v4-vnni-amx", "q4_1")])
def test_passes_left_out_change_no_byte(target, quant, compile_tiny, tmp_path, monkeypatch):
    compared = []

    def build(module: Any, machine: Any) -> Any:
        built = build_llvm(module, machine)
        with tvm.transform.PassContext(disabled_pass=[SLOWEST]):
            whole = tvm.compile(module, machine)
        [name] = module.get_global_vars()
        assert object_code(built.mod) == object_code(whole.mod), name
        compared.append(str(name.name_hint))
        return built

    monkeypatch.setattr(kernels, "build_llvm", build)
    monkeypatch.setenv(env.CACHE_DIR, str(tmp_path / "cache"))  # so that every kernel is compiled
    compile_tiny(make_checkpoint(tmp_path / "model", "gemma3"), target=target, quant=quant)
    families = {name.rsplit("_", 1)[0] for name in compared}
    assert {"paged_attention", "sample"} <= families and any("linear" in family for family in families), families
