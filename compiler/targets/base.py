"""A target: one frozen record that says all the compiler may know about a machine."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    """One machine to compile for. No target's name is compared anywhere: code asks for features.

    kind: "cpu" or "cuda". arch: "x86_64", "aarch64", "sm_90a" ... features: what the kernels may use and load checks
    for, of "avx2", "f16c", "fma", "avx512", "avx512vnni", "amx_int8" on x86-64, and of "tma", "wgmma", "pdl", "fp8" on
    GPUs, where the architecture implies them. mcpu, mattr: LLVM's settings for them. sms, shared_memory_bytes (of one
    block), l2_bytes: a GPU's sizes, 0 on CPUs. bandwidth_gbs, matrix_tops: ceilings, a record's as measured once, this
    machine's as `tilewright doctor --measure` found them; None where not measured. They guide the choice of tiles and
    are in no kernel's code, so targets that differ in nothing else are equal and share kernels.
    """

    name: str
    kind: str
    arch: str
    features: tuple[str, ...] = ()
    mcpu: str = ""
    mattr: tuple[str, ...] = ()
    sms: int = 0
    shared_memory_bytes: int = 0
    l2_bytes: int = 0
    bandwidth_gbs: float | None = field(default=None, compare=False, repr=False)
    matrix_tops: float | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in ("cpu", "cuda"):
            raise ValueError(f"target kind {self.kind!r} is neither cpu nor cuda")

    def has(self, feature: str) -> bool:
        return feature in self.features
