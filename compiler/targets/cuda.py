"""NVIDIA targets: one frozen record for each device, and what the driver says of the devices here."""

import ctypes
import re
from dataclasses import dataclass
from functools import lru_cache

from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets.base import Target

_HOPPER = ("tma", "wgmma", "pdl", "fp8")


def _hopper(name: str, bandwidth_gbs: float | None = None, matrix_tops: float | None = None) -> Target:
    return Target(
        name,
        "cuda",
        "sm_90a",
        _HOPPER,
        sms=132,
        shared_memory_bytes=227 << 10,
        l2_bytes=50 << 20,
        bandwidth_gbs=bandwidth_gbs,
        matrix_tops=matrix_tops,
    )


RECORDS = (
    # Ceilings as `tilewright doctor --measure` found them on an H100 80GB HBM3 (SXM).
    _hopper("nvidia-h100", bandwidth_gbs=3085.0, matrix_tops=790.0),
    _hopper("nvidia-h200"),
    Target("nvidia-a100", "cuda", "sm_80", sms=108, shared_memory_bytes=163 << 10, l2_bytes=40 << 20),
    Target("nvidia-l40s", "cuda", "sm_89", ("fp8",), sms=142, shared_memory_bytes=99 << 10, l2_bytes=96 << 20),
    Target("nvidia-rtx-4090", "cuda", "sm_89", ("fp8",), sms=128, shared_memory_bytes=99 << 10, l2_bytes=72 << 20),
)

# What the cubins are made with: an older driver does not load them.
CUDA_VERSION = (13, 0)
DRIVER_RELEASE = 580  # the first that serves it
_RELEASE = f"release {DRIVER_RELEASE} or newer"
_REPAIR = f"restart the machine, or install {_RELEASE}"

_NEWEST_MAJOR = 9  # Hopper's compute capability; what comes after it has other matrix units
# Words in names of what came next: chips, cards, and architectures as compilers name them.
_BLACKWELL = {
    *("blackwell", "b100", "b200", "b300", "gb10", "gb200", "gb300", "thor"),
    *("5050", "5060", "5070", "5080", "5090"),
    *("sm100", "sm103", "sm110", "sm120", "sm121"),
}

_DRIVER = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_SMS, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Device:
    """An NVIDIA GPU as its driver describes it. capability: (9, 0) for sm_90. sms: multiprocessors, 0 if untold."""

    name: str
    capability: tuple[int, int]
    sms: int = 0

    @property
    def arch(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Driver:
    """The CUDA driver: the newest CUDA version it serves, as (13, 0), and the GPUs it shows. failure: the number of the
    error with which it does not start, 0 where it does."""

    version: tuple[int, int]
    devices: tuple[Device, ...]
    failure: int = 0


def this_machine() -> Target:
    """The record of the first GPU here: the one of its name, or else the first that its code runs on.

    Raises TargetError where there is no GPU, or none that is supported.
    """
    driver = find_driver()
    if driver is not None and driver.failure:
        raise TargetError(f"target cuda means this machine's GPU, and {_dead(driver)}; {_REPAIR}")
    if driver is None or not driver.devices:
        names = ", ".join(record.name for record in RECORDS)
        raise TargetError(f"target cuda means this machine's GPU and it has none; name the one to compile for: {names}")
    device = driver.devices[0]
    found = _record(device)
    if found is None:
        raise TargetError(_unsupported(device.name, device.arch, device.capability[0] > _NEWEST_MAJOR))
    return found


def refusal(name: str) -> str | None:
    """Why a GPU that people name, and that is no record, is not one."""
    plain = name.lower().replace("sm_", "sm")
    words = re.findall("[a-z0-9]+", re.sub(r"(sm\d+)[af]\b", r"\1", plain))
    return _unsupported(name, "Blackwell", newer=True) if _BLACKWELL & set(words) else None


def run_obstacle(target: Target) -> str | None:
    """Why code for `target` does not run on the first GPU here, and then what to do; None where it does."""
    driver = find_driver()
    if driver is None:
        found, remedy = "this machine has no NVIDIA driver", f"install {_RELEASE}, or compile the model for cpu"
    elif driver.failure:
        found, remedy = _dead(driver), _REPAIR
    elif not driver.devices:
        found = "this machine has no NVIDIA GPU, or hides it"
        remedy = "set CUDA_VISIBLE_DEVICES to show it, or compile the model for cpu"
    elif driver.version < CUDA_VERSION:
        has, needs = (".".join(map(str, v)) for v in (driver.version, CUDA_VERSION))
        found, remedy = f"the NVIDIA driver here serves CUDA {has} and not {needs}", f"install {_RELEASE}"
    else:
        device = driver.devices[0]
        misfit, record = _misfit(target, device), _record(device)
        if misfit is None:
            return None
        found, remedy = misfit, f"compile the model for {record.name if record else 'cpu'}"
    return f"{found}; {remedy}"


def _dead(driver: Driver) -> str:
    return f"the NVIDIA driver here does not start (error {driver.failure} of cuInit)"


def _misfit(target: Target, device: Device) -> str | None:
    """Why code for `target` does not run on `device`. Cubins may run on later capabilities too, where a block may have
    less memory than kernels were laid out for; and kernels that wait for one another want as many multiprocessors."""
    arch = target.arch.removesuffix("a")
    if device.arch != arch:
        return f"the GPU here, {device.name}, is {device.arch}, and {target.name} is {arch}"
    if device.sms and device.sms < target.sms:
        return f"the GPU here, {device.name}, has {device.sms} multiprocessors, and {target.name} has {target.sms}"
    return None


def _record(device: Device) -> Target | None:
    """The record of the device's name, or else the first whose code runs on it."""
    fitting = [record for record in RECORDS if _misfit(record, device) is None]
    named = [record for record in fitting if _named(record, device)]
    return next(iter(named or fitting), None)


def _named(record: Target, device: Device) -> bool:
    words = device.name.lower().replace("-", " ").split()
    return all(word in words for word in record.name.removeprefix("nvidia-").split("-"))


def _unsupported(name: str, kind: str, newer: bool) -> str:
    known = ", ".join(record.name for record in RECORDS)
    why = "is newer than what this version has kernels for" if newer else "is not supported"
    return f"the GPU {name} ({kind}) {why}; the supported ones are {known}"


@lru_cache(maxsize=1)
def find_driver() -> Driver | None:
    """The CUDA driver of this machine, None where there is none."""
    try:
        cuda = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    count, number = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(number)):  # the stand-in for one that compiles load
        return None
    version = (number.value // 1000, number.value % 1000 // 10)
    failure = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if failure:
        return Driver(version, (), 0 if failure == _NO_DEVICE else failure)
    return Driver(version, tuple(_device(cuda, i) for i in range(count.value)))


def _device(cuda: ctypes.CDLL, index: int) -> Device:
    handle = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), handle)
    numbers = [_attribute(cuda, handle, which) for which in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _SMS)]
    return Device(name.value.decode(errors="replace"), (numbers[0], numbers[1]), numbers[2])


def _attribute(cuda: ctypes.CDLL, device: ctypes.c_int, attribute: int) -> int:
    value = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value
