"""A schedule whose tiles sleep as long as they say, and some of which are planted to fail in each way there is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tests.kernel_runner import host_target
from tilewright.compiler.calls import Call
from tilewright.compiler.composites import GatedSpec
from tilewright.schedules.base import Floor, KernelCall, Lowering, Output, Schedule
from tilewright.tuner.tasks import Task

FEATURES = 16
HUGE = 1 << 46  # float32 values that no machine has memory for
PLANTED = ("wrong", "crash", "hang", "memory", "compile")


@dataclass(frozen=True)
class PlantedTile:
    """What a kernel does besides its work."""

    sleep_us: int
    fault: str = ""


@dataclass(frozen=True)
class PlantedFacts:
    spec: GatedSpec


@dataclass(frozen=True)
class Planted(Schedule):
    """tiles: its space."""

    tiles: tuple[PlantedTile, ...] = ()

    name = "planted"
    composite = "gated"
    kind = "cpu"

    def match(self, call: Call, target: Any) -> PlantedFacts:
        return PlantedFacts(call.spec)

    def space(self, facts: PlantedFacts, target: Any) -> Sequence[PlantedTile]:
        return self.tiles

    def floor(self, facts: PlantedFacts, target: Any) -> Floor:
        return Floor(0, bytes_per_row=12 * FEATURES)

    def apply(self, facts: PlantedFacts, tile: PlantedTile, target: Any) -> Lowering:
        if tile.fault == "compile":
            raise RuntimeError("planted")
        func = {"crash": crashing, "hang": hanging, "memory": starving}.get(tile.fault, gated)
        kernel = func(tile.sleep_us, {"wrong": 1.5, "near": 1.00001}.get(tile.fault, 1.0))
        return Lowering((KernelCall(kernel, (0,), (Output("y", ("m", FEATURES), "float32"),)),), ("y",))


def task(sleeps_us: Sequence[int], faults: Sequence[str] = (), rows: int = 4, load_us: float = 1.0) -> Task:
    """A task of as many good tiles, the default first, and after that those planted."""
    tiles = (*(PlantedTile(us) for us in sleeps_us), *(PlantedTile(sleeps_us[0], fault) for fault in faults))
    target, call = host_target(), Call("gated", GatedSpec(FEATURES, "silu"), rows, rows)
    schedule = Planted(tiles)
    return Task(schedule, schedule.match(call, target), call, target, calls=1.0, load_us=load_us)


def gated(sleep_us: int, factor: float) -> Any:
    @T.prim_func(s_tir=True)
    def kernel(x_handle: T.handle, y_handle: T.handle):
        n = T.int64()
        x = T.match_buffer(x_handle, (n, 2 * FEATURES), "float32")
        y = T.match_buffer(y_handle, (n, FEATURES), "float32")
        for i, j in T.grid(n, FEATURES):
            with T.sblock("gate"):
                r, c = T.axis.remap("SS", [i, j])
                y[r, c] = T.float32(factor) * x[r, c] / (T.float32(1) + T.exp(-x[r, c])) * x[r, c + FEATURES]
        T.evaluate(T.call_extern("int32", "usleep", sleep_us))

    return kernel


def crashing(sleep_us: int, factor: float) -> Any:
    return _calling("abort")


def hanging(sleep_us: int, factor: float) -> Any:
    return _calling("pause")


def _calling(name: str) -> Any:
    @T.prim_func(s_tir=True)
    def kernel(x_handle: T.handle, y_handle: T.handle):
        n = T.int64()
        T.match_buffer(x_handle, (n, 2 * FEATURES), "float32")
        T.match_buffer(y_handle, (n, FEATURES), "float32")
        T.evaluate(T.call_extern("int32", name))

    return kernel


def starving(sleep_us: int, factor: float) -> Any:
    @T.prim_func(s_tir=True)
    def kernel(x_handle: T.handle, y_handle: T.handle):
        n = T.int64()
        x = T.match_buffer(x_handle, (n, 2 * FEATURES), "float32")
        y = T.match_buffer(y_handle, (n, FEATURES), "float32")
        scratch = T.sblock_alloc_buffer((n * HUGE,), "float32")
        for i in T.serial(n):
            with T.sblock("fill"):
                r = T.axis.spatial(n, i)
                scratch[r * HUGE] = x[r, 0]
        for i in T.serial(n):
            with T.sblock("read"):
                r = T.axis.spatial(n, i)
                y[r, 0] = scratch[r * HUGE]

    return kernel
