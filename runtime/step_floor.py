"""The floor of a step: what costs.json says it reads and computes at the least, and how long that takes here."""

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.compiler.artifact import COSTS, Artifact, Manifest
from tilewright.compiler.artifact_form import read_json
from tilewright.compiler.errors import ArtifactError
from tilewright.compiler.targets import measured_here, target_of
from tilewright.runtime.types import Work


@dataclass(frozen=True)
class StepFloor:
    """The least traffic and work of a step: bytes whatever it holds, bytes and operations for each row of it."""

    bytes_fixed: int
    bytes_per_row: int
    flops_per_row: int

    def bytes(self, rows: int = 1) -> int:
        return self.bytes_fixed + rows * self.bytes_per_row


@dataclass(frozen=True)
class Rates:
    """The ceilings that turn floors into time: GB/s read, and 10^12 operations a second where known. source: whose."""

    bandwidth_gbs: float
    matrix_tops: float | None
    source: str

    def us(self, count_bytes: float, operations: float = 0) -> float:
        """The least time of a call that moves so many bytes and computes so much."""
        computing = operations / (self.matrix_tops * 1e6) if self.matrix_tops else 0.0
        return max(count_bytes / (self.bandwidth_gbs * 1e3), computing)

    def __str__(self) -> str:
        rates = [f"{self.bandwidth_gbs:.4g} GB/s"]
        if self.matrix_tops:
            rates.append(f"{self.matrix_tops:.4g} TFLOP/s")
        return f"{' and '.join(rates)}, {self.source}"


def rates_of(manifest: Manifest) -> Rates | None:
    """What was measured here, where this is a machine for the artifact, else what its target's record says; None where
    neither is known. Raises TargetError where the measured figures are damaged."""
    target = target_of(manifest.target)
    found = measured_here(target)
    if found is not None:
        here = found.of(target)
        return Rates(found.ceilings.bandwidth_gbs, here.matrix_tops, f"measured here on {found.date}")
    if target.bandwidth_gbs is None:
        return None
    return Rates(target.bandwidth_gbs, target.matrix_tops, f"the record of {target.name}")


def decode_floor(artifact: Artifact) -> StepFloor:
    """The floor of the smallest step, which decodes one token."""
    file = artifact.path / COSTS
    costs = read_json(file, "table of costs")
    smallest = min(artifact.manifest.buckets, key=lambda bucket: bucket.tokens)
    try:
        return StepFloor(**{name: int(value) for name, value in costs[smallest.function]["floor"].items()})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ArtifactError(f"{file} has no floor of {smallest.function}; compile the model again") from None


def floor_of(artifact: Artifact) -> Callable[[Work], float] | None:
    """The least seconds of a step; None where no ceilings of the machine are known. Logits count for no token: which
    tokens want them is not known. Raises TargetError where the measured figures are damaged."""
    rates = rates_of(artifact.manifest)
    if rates is None:
        return None
    floor, model = decode_floor(artifact), artifact.manifest.model
    operations = max(0, floor.flops_per_row - 2 * model["vocab"] * model["hidden"])
    return lambda work: rates.us(floor.bytes_fixed, operations * (work.decodes + work.prompt_tokens)) / 1e6
