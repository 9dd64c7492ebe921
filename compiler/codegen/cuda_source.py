"""The CUDA source that TVM generates, to a cubin.

Approximations are off: no --use_fast_math, which TVM would set. So division and square root are rounded correctly,
subnormal numbers are kept, and `expf` is what CUDA documents. A kernel that can do with less asks for it by naming the
instruction. Only then do two kernels that compute the same thing agree, whatever surrounds it.
"""

import hashlib
import json

from tilewright.compiler.codegen.cuda_headers import HEADERS, PREAMBLE
from tilewright.compiler.codegen.cuda_nvrtc import compile_source
from tilewright.compiler.codegen.cuda_toolchain import find_toolchain

_OPERATORS = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS", "BFLOAT162_OPERATORS")

_FLAGS = (
    "--device-int128",
    # Operators of 16-bit floats, which the headers leave out where these are defined.
    *(f"-U__CUDA_NO_{what}__" for what in (*_OPERATORS, "BFLOAT162_CONVERSIONS")),
    # Kernels are written to fit in registers: ptxas may use them all to hide latency.
    "--ptxas-options=--register-usage-level=10",
)


def cubin(source: str, arch: str) -> bytes:
    """The cubin of `source` for an architecture such as "sm_90a".

    Raises CompileError where NVRTC refuses it, TargetError where a wheel is missing.
    """
    toolchain = find_toolchain()
    options = (f"--gpu-architecture={arch}", *_FLAGS, f"-I{toolchain.include}")
    return compile_source(toolchain.nvrtc, PREAMBLE + source, options, HEADERS)


def how() -> str:
    """A hash of all that a cubin depends on besides its source and its architecture."""
    parts = [find_toolchain().version, PREAMBLE, HEADERS, _FLAGS]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
