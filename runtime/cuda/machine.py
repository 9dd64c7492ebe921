"""Whether an artifact for a GPU can run on this machine, before any of its code is loaded."""

from tilewright.compiler.artifact import Artifact
from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import find_target, host, run_obstacle


def check_machine(artifact: Artifact) -> None:
    """Raises TargetError where its kernels are for another GPU, or its host code for another processor."""
    target = artifact.manifest.target
    compiled_on = target.get("host", host.arch())  # the first artifacts do not tell
    if compiled_on != host.arch():
        raise TargetError(
            f"{artifact.path} has host code for {compiled_on}, and this machine is {host.arch()}; "
            "compile the model on a machine of this architecture"
        )
    obstacle = run_obstacle(find_target(target["name"]))
    if obstacle:
        raise TargetError(f"{artifact.path} is for {target['name']} and can't run here: {obstacle}")
