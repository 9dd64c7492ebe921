"""LLVM takes every CPU record as it is written: known levels and attributes, and vectors of the level's width."""

import dataclasses

import pytest
import tvm
from tvm.script import tirx as T

from tilewright.compiler.codegen.llvm_target import llvm_target
from tilewright.compiler.targets import cpu, host
from tilewright.compiler.targets.base import Target

HERE = [record for record in (*cpu.RECORDS, cpu.this_machine()) if record.arch == host.arch()]


@T.prim_func(s_tir=True)
def add_one(a: T.Buffer((16,), "float32"), b: T.Buffer((16,), "float32")):
    T.func_attr({"global_symbol": "add_one"})
    for i in T.vectorized(16):
        with T.sblock("add"):
            vi = T.axis.spatial(16, i)
            b[vi] = a[vi] + T.float32(1)


def assembly(target: Target) -> str:
    return tvm.compile(tvm.IRModule({"add_one": add_one}), llvm_target(target)).mod.inspect_source("asm")


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
def test_llvm_knows_the_record(target, capfd):
    text = assembly(target)
    assert ("zmm" in text) == target.has("avx512")
    complaints = capfd.readouterr().err
    assert "not a recognized" not in complaints and "nknown" not in complaints


def test_llvm_complains_of_what_it_does_not_know(capfd):
    """So that the test above means something."""
    assembly(dataclasses.replace(HERE[0], mattr=("+no-such-feature",)))
    assert "no-such-feature" in capfd.readouterr().err
