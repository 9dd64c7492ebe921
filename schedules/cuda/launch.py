"""How kernels follow one another on a GPU: programmatic dependent launch.

Where the target has it ("pdl"), a kernel starts while the one before it still runs, and does what depends on no other
kernel: it sets up barriers and loads weights. Its `griddepcontrol.wait` returns when the kernels before it have ended
and what they wrote can be read. Every kernel of a chain must therefore wait before it first reads or writes what an
earlier one writes or reads; then all of them may let the next one start at once (`griddepcontrol.launch_dependents`).
One that lets the next one start only when it has waited, and written its results, spares all later ones the wait for
these: each of them starts after the one before it has.

    @T.prim_func
    def kernel(...):
        ...
        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
            T.ptx["griddepcontrol.wait"]()
    return chained(kernel, target)
"""

from typing import Any

from tilewright.compiler.targets.base import Target


def chained(func: Any, target: Target, *, cluster: bool = False, shared: bool = False) -> Any:
    """A TIRx kernel over blockIdx.x and threadIdx.x, launched as part of a chain where the target can.

    cluster: it runs in clusters. shared: it takes dynamic shared memory. As TVM has it, a launch reads these tags in
    order, dynamic shared memory last; a function attribute of the same name is ignored.
    """
    if not target.has("pdl"):
        return func
    tags = ["blockIdx.x", *(["clusterCtaIdx.x"] if cluster else []), "threadIdx.x"]
    tags += ["tirx.use_programtic_dependent_launch", *(["tirx.use_dyn_shared_memory"] if shared else [])]
    return func.with_attr("tirx.kernel_launch_params", tags)
