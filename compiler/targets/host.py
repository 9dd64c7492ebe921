"""What this machine's processor can do, read without the compiler: the serving path asks too.

Feature names are those of `Target.features`. A feature stands for all that LLVM emits under the matching attribute, so
"avx2" means the whole x86-64-v3 level and "avx512" the whole x86-64-v4 level.
"""

import ctypes
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

# Flags as Linux spells them, without underscores (macOS has none).
X86_FEATURES: dict[str, frozenset[str]] = {
    "avx2": frozenset({"avx2", "bmi1", "bmi2", "abm", "movbe"}),
    "f16c": frozenset({"f16c"}),
    "fma": frozenset({"fma"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "avx512vnni": frozenset({"avx512vnni"}),
    "amx_int8": frozenset({"amxtile", "amxint8"}),
}

_ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}

_SYS_ARCH_PRCTL = 158  # x86-64 Linux
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@lru_cache(maxsize=1)
def arch() -> str:
    """The instruction set, "x86_64" or "aarch64"; any other as the system names it."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


@lru_cache(maxsize=1)
def features() -> tuple[str, ...]:
    """Features of this processor that a process here may use, in the order of `X86_FEATURES`; () off x86-64.

    Asking includes the system's permission for AMX tiles, which is granted to the whole process: a kernel that needs
    "amx_int8" may run once this has returned it.
    """
    if arch() != "x86_64":
        return ()
    found = features_of(_flags())
    if "amx_int8" in found and not _grant_amx():
        return tuple(f for f in found if f != "amx_int8")
    return found


def features_of(flags: Iterable[str]) -> tuple[str, ...]:
    """Features that the given processor flags (Linux or macOS spelling) amount to."""
    plain = {flag.lower().replace("_", "") for flag in flags}
    if "lzcnt" in plain:  # macOS's name
        plain.add("abm")
    return tuple(name for name, needed in X86_FEATURES.items() if needed <= plain)


def missing(needed: Iterable[str]) -> tuple[str, ...]:
    """Those of `needed` that this machine lacks, in their order."""
    here = features()
    return tuple(name for name in needed if name not in here)


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name as the system reports it, for people only: names may be wrong, features are not."""
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or arch()
    return _cpuinfo_field("model name") or arch()


def cores() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _flags() -> list[str]:
    if platform.system() == "Darwin":
        names = ("machdep.cpu.features", "machdep.cpu.leaf7_features", "machdep.cpu.extfeatures")
        return " ".join(_sysctl(name) for name in names).split()
    return _cpuinfo_field("flags").split()


def _cpuinfo_field(name: str) -> str:
    """The first value of a field of /proc/cpuinfo, "" where there is none."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _sysctl(name: str) -> str:
    """A macOS system value, "" where there is none."""
    try:
        return subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _grant_amx() -> bool:
    """Asks the kernel to let this process use AMX tiles; the first tile instruction without it is a fault."""
    if platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0
