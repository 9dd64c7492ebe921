"""CPU targets: portable records by level of features, and `cpu`, which is this machine.

LLVM gets a level and attributes, never "native" and never a model name: virtual machines report models whose features
they do not have, and an artifact must say exactly what it needs.
"""

from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import host
from tilewright.compiler.targets.base import Target

_V3 = ("avx2", "f16c", "fma")
_V4 = (*_V3, "avx512")
_VNNI = (*_V4, "avx512vnni")

# What a feature adds to LLVM's x86-64-v3 or x86-64-v4.
_ATTRIBUTES = {
    "avx512vnni": ("+avx512vnni",),
    "amx_int8": ("+amx-tile", "+amx-int8"),
}


def _x86(name: str, features: tuple[str, ...]) -> Target:
    level = "x86-64-v4" if "avx512" in features else "x86-64-v3"
    attributes = tuple(a for feature in features for a in _ATTRIBUTES.get(feature, ()))
    return Target(name, "cpu", "x86_64", features, mcpu=level, mattr=attributes)


RECORDS = (
    _x86("cpu-x86-64-v3", _V3),
    _x86("cpu-x86-64-v4", _V4),
    _x86("cpu-x86-64-v4-vnni", _VNNI),
    _x86("cpu-x86-64-v4-vnni-amx", (*_VNNI, "amx_int8")),
    Target("cpu-aarch64", "cpu", "aarch64", mcpu="generic", mattr=("+neon",)),
)


def this_machine() -> Target:
    """The record `cpu`: this machine's architecture and every feature that the kernels know and it has.

    Raises TargetError on an architecture, or an x86-64 level, that there are no kernels for.
    """
    arch = host.arch()
    if arch == "aarch64":
        return Target("cpu", "cpu", arch, mcpu="generic", mattr=("+neon",))
    if arch != "x86_64":
        raise TargetError(f"this machine's architecture {arch} is not supported; use x86_64 or aarch64")
    absent = host.missing(_V3)
    if absent:
        raise TargetError(
            f"this processor lacks {', '.join(absent)}; tilewright needs {', '.join(_V3)} (any x86-64-v3 processor)"
        )
    features = host.features()
    # Wider features are of use only on top of the level below them.
    return _x86("cpu", features if "avx512" in features else _V3)
