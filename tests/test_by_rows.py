"""Kernels of which the number of rows picks one: which one runs, and that equal ones are one."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm.script import tirx as T

from tests.kernel_runner import host_target
from tilewright.compiler.calls import ByRows, Call
from tilewright.compiler.codegen.by_rows import by_rows
from tilewright.compiler.codegen.c_compiler import c_compiler
from tilewright.compiler.codegen.kernels import compile_kernels
from tilewright.compiler.composites import GatedSpec
from tilewright.compiler.errors import TargetError
from tilewright.schedules.base import Floor, KernelCall, Lowering, Output, Schedule
from tilewright.schedules.order import Chooser


def kernel(value: int) -> Any:
    """y = value, for any number of rows."""

    @T.prim_func(s_tir=True)
    def fill(x_handle: T.handle, y_handle: T.handle):
        n = T.int64()
        T.match_buffer(x_handle, (n,), "float32")
        y = T.match_buffer(y_handle, (n,), "float32")
        for i in T.serial(n):
            with T.sblock("fill"):
                at = T.axis.spatial(n, i)
                y[at] = T.float32(value)

    return fill


def built(listed: str, count: int, folder: Path) -> Any:
    """The function "choice" of fill_1 to fill_count."""
    empty = tvm.tirx.PrimFunc([], tvm.tirx.Evaluate(0))
    kernels = {f"fill_{i + 1}": kernel(i + 1).with_attr("global_symbol", f"fill_{i + 1}") for i in range(count)}
    kernels["choice"] = empty.with_attrs({"global_symbol": "choice", "tw.content": listed, "tw.by_rows": listed})
    objects = compile_kernels(kernels, host_target(), folder / "cache", 2)
    library = folder / "choice.so"
    subprocess.run([c_compiler(), "-shared", "-o", library, *objects.values(), "-lm"], check=True)
    return tvm.runtime.load_module(str(library))["choice"]


def test_the_first_kernel_for_as_many_rows_runs(tmp_path: Path) -> None:
    choose = built('[[2, "fill_1"], [5, "fill_2"], [9, "fill_3"]]', 3, tmp_path)
    for rows, value in ((1, 1), (2, 1), (3, 2), (5, 2), (6, 3), (9, 3), (20, 3)):
        x, y = np.zeros(rows, np.float32), np.full(rows, np.nan, np.float32)
        choose(tvm_ffi.from_dlpack(x), tvm_ffi.from_dlpack(y))
        assert (y == value).all(), f"{rows} rows"


def test_nothing_runs_where_no_kernel_is_named(tmp_path: Path) -> None:
    choose = built('[[2, ""], [5, "fill_2"], [9, ""]]', 3, tmp_path)
    for rows, value in ((2, np.nan), (3, 2), (6, np.nan), (20, np.nan)):
        x, y = np.zeros(rows, np.float32), np.full(rows, np.nan, np.float32)
        choose(tvm_ffi.from_dlpack(x), tvm_ffi.from_dlpack(y))
        assert np.array_equal(y, np.full(rows, value, np.float32), equal_nan=True), f"{rows} rows"


@dataclass(frozen=True)
class _Fill(Schedule):
    """One tile up to 4 rows and another up to 8, of which the latter is that for 16 as well."""

    name = "fill"
    composite = "gated"
    kind = "cpu"

    def match(self, call: Call, target: Any) -> int:
        return call.rows

    def bounds(self, call: Call, target: Any) -> tuple[int, ...]:
        return (4, 8, 16)

    def space(self, facts: int, target: Any) -> list[int]:
        return [1 if facts <= 4 else 2 if facts <= 16 else 3]

    def floor(self, facts: int, target: Any) -> Floor:
        return Floor(0)

    def apply(self, facts: int, tile: int, target: Any) -> Lowering:
        return Lowering((KernelCall(_KERNELS[tile], (0,), (Output("y", ("m",), "float32"),)),), ("y",))


_KERNELS = {value: kernel(value) for value in (1, 2, 3)}


@pytest.mark.parametrize(
    ("m", "m_max", "expected"),
    [(None, 64, [(4, 1), (16, 2), (64, 3)]), (None, 12, [(4, 1), (12, 2)]), (None, 3, None), (5, 5, None)],
)
def test_equal_kernels_are_one(m: int | None, m_max: int, expected: list[tuple[int, int]] | None) -> None:
    choice = Chooser(host_target(), order=(_Fill(),))(Call("gated", GatedSpec(8, "silu"), m, m_max))
    func = choice.lowering.kernels[0].func
    if expected is None:
        assert func is _KERNELS[1 if m_max <= 4 else 2]
    else:
        assert isinstance(func, ByRows)
        assert [(part.rows, part.tile) for part in func.parts] == expected
        assert [part.func for part in func.parts] == [_KERNELS[tile] for _, tile in expected]


def test_a_kernel_is_no_choice() -> None:
    assert by_rows(kernel(1)) is None


def test_what_the_c_compiler_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.compiler.codegen.by_rows.c_compiler", lambda: "false")
    with pytest.raises(TargetError, match="false could not compile the choice of a kernel"):
        built('[[2, "fill_1"], [5, "fill_2"]]', 2, tmp_path)
