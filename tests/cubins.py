"""The device code in a compiled artifact: every cubin in its library, with its kernels' names, code and resources."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.cuda_runner import disassemble, tool

_MAGIC = b"\x7fELF\x02\x01\x01"
_EM_CUDA = 190
_NO_BITS = 8  # a section without bytes in the file


@dataclass(frozen=True)
class DeviceKernel:
    """One kernel. cubin: the file it is in, which may hold others. resources: by name, such as REG, and in bytes STACK,
    LOCAL and SHARED."""

    name: str
    cubin: bytes
    resources: dict[str, int]

    @cached_property
    def sass(self) -> str:
        """Its disassembly."""
        code = disassemble(tool("nvdisasm"), self.cubin, "-c")
        parts = re.split(r"^\s*\.section\s+\.text\.([\w$]+),.*$", code, flags=re.M)
        return dict(zip(parts[1::2], parts[2::2], strict=True))[self.name]


def device_kernels(library: Path) -> dict[str, DeviceKernel]:
    """The kernels of all cubins in a library, by name. Raises FileNotFoundError where a tool is not installed."""
    found = [kernel for cubin in cubins(library.read_bytes()) for kernel in kernels_of(cubin)]
    by_name = {kernel.name: kernel for kernel in found}
    assert len(by_name) == len(found), "two kernels of one name"
    return by_name


def cubins(content: bytes) -> Iterator[bytes]:
    """Every ELF file for CUDA that stands in a file's bytes."""
    at = content.find(_MAGIC)
    while at >= 0:
        (machine,) = struct.unpack_from("<H", content, at + 18)
        if machine == _EM_CUDA:
            yield content[at : at + _elf_size(content, at)]
        at = content.find(_MAGIC, at + 1)


def _elf_size(content: bytes, at: int) -> int:
    """Up to the end of what lies last: a section, the table of them, or that of segments."""
    segments, sections = struct.unpack_from("<QQ", content, at + 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", content, at + 54)
    ends = [segments + segment_size * segment_count, sections + section_size * section_count]
    for i in range(section_count):
        kind, offset, size = struct.unpack_from("<4xI16xQQ", content, at + sections + i * section_size)
        ends.append(offset + (0 if kind == _NO_BITS else size))
    return max(ends)


def kernels_of(cubin: bytes) -> Iterator[DeviceKernel]:
    """The kernels of one cubin."""
    told = disassemble(tool("cuobjdump"), cubin, "-res-usage")
    for name, words in re.findall(r"Function (\S+):\s+(.*)", told):
        resources = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", words)}
        yield DeviceKernel(name, cubin, resources)
