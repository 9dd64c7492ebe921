"""Kernels that TVM's parser reads without walking through the sources of its stack are the same kernels."""

import subprocess
import sys
from pathlib import Path

# In a process of its own: what spares the parser its walks stays.
COMPARE = """
import tvm
from tests.kernel_runner import lower
from tests.schedules.cuda.test_attention_decode import SPECS, call_of, cuda_target
from tilewright.schedules.cuda.paged_attention import PagedAttention
from tvm.script.parser.core.parser import ScriptMacro

kernels = lower(PagedAttention(), call_of(SPECS["9of3x64"]), cuda_target()).kernels
as_it_is = [kernel.func.make() for kernel in kernels]
before = ScriptMacro._find_parser_def
spared = [kernel.written() for kernel in kernels]
assert ScriptMacro._find_parser_def is not before
for one, other in zip(as_it_is, spared, strict=True):
    tvm.ir.assert_structural_equal(one, other, map_free_vars=True)
print(len(spared))
"""


def test_kernels_are_the_same():
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout.split() == ["2"], done.stderr
