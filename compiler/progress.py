"""How far a compile is, as the build reports it and the command line shows it."""

from dataclasses import dataclass

# In the order in which a compile goes through them.
STAGES = ("download", "passes", "kernels", "link", "weights", "seal")


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `stage` are finished; `detail` names the one at hand (a pass, a kernel, a tensor)."""

    stage: str
    done: int
    total: int
    detail: str = ""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage {self.stage!r} is none of {', '.join(STAGES)}")
        if not 0 <= self.done <= self.total:
            raise ValueError(f"{self.done} of {self.total} {self.stage} done")
