"""A kernel that is several: a function that passes its call on to the one for as many rows as the call has.

The choice costs a comparison, and the kernels have the same arguments, so it is made where all kernels are called the
same way: in TVM's calling convention, by a few lines of C.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tilewright.compiler.codegen.c_compiler import c_compiler
from tilewright.compiler.errors import TargetError

_SOURCE = """\
#include <tvm/ffi/c_api.h>

typedef int32_t Kernel(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result);
{declarations}
int32_t __tvm_ffi_{name}(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {{
  const char *first = (const char *)args[0].v_ptr;
  if (args[0].type_index == kTVMFFITensor) first += sizeof(TVMFFIObject);
  const int64_t rows = ((const DLTensor *)first)->shape[0];
{choices}
  {last}
}}
"""


def by_rows(func: Any) -> list[tuple[int, str]] | None:
    """The kernels that a function of a scheduled module chooses from, each after the most rows that it is for; "" where
    nothing is launched for them."""
    listed = (func.attrs or {}).get("tw.by_rows")
    return None if listed is None else [(rows, name) for rows, name in json.loads(str(listed))]


def compile_choice(parts: list[tuple[int, str]], name: str) -> bytes:
    """The object code of the function `name`. Raises TargetError where the C compiler fails."""
    import tvm_ffi.libinfo

    *few, (_, last) = parts
    source = _SOURCE.format(
        name=name,
        last=_pass_on(last),
        declarations="\n".join(f"Kernel __tvm_ffi_{part};" for _, part in parts if part),
        choices="\n".join(f"  if (rows <= {rows}) {_pass_on(part)}" for rows, part in few),
    )
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "choice.o"
        command = [c_compiler(), "-O1", "-fPIC", "-I", tvm_ffi.libinfo.find_include_path(), "-x", "c", "-c", "-"]
        result = subprocess.run([*command, "-o", output], input=source, capture_output=True, text=True, check=False)
        if result.returncode:
            raise TargetError(f"{command[0]} could not compile the choice of a kernel: {result.stderr.strip()}")
        return output.read_bytes()


def _pass_on(part: str) -> str:
    return f"return __tvm_ffi_{part}(self, args, count, result);" if part else "return 0;"
