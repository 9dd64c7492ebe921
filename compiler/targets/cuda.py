"""NVIDIA targets: one frozen record for each device, and what the driver says of the devices here."""

import ctypes
from dataclasses import dataclass
from functools import lru_cache

from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets.base import Target

_HOPPER = ("tma", "wgmma", "fp8")

RECORDS = (
    # Ceilings measured on an H100 80GB HBM3 (SXM): a read of 2 GiB, and bf16 8192^3 in cuBLAS.
    Target("nvidia-h100", "cuda", "sm_90a", _HOPPER, bandwidth_gbs=3060.0, matrix_tops=750.0),
    Target("nvidia-h200", "cuda", "sm_90a", _HOPPER),
)

_DRIVER = "libcuda.so.1"
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Device:
    """An NVIDIA GPU as its driver describes it. capability: (9, 0) for sm_90."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Driver:
    """The CUDA driver: the newest CUDA version it serves, as (13, 0), and the GPUs it shows."""

    version: tuple[int, int]
    devices: tuple[Device, ...]


def this_machine() -> Target:
    """The record of the first GPU here. Raises TargetError where there is none, or none that is known."""
    driver = find_driver()
    if driver is None or not driver.devices:
        names = ", ".join(record.name for record in RECORDS)
        raise TargetError(f"target cuda means this machine's GPU and it has none; name the one to compile for: {names}")
    device = driver.devices[0]
    for record in RECORDS:
        if record.name.removeprefix("nvidia-") in device.name.lower().split():
            return record
    known = ", ".join(record.name for record in RECORDS)
    raise TargetError(f"the GPU {device.name} is not supported; the supported ones are {known}")


@lru_cache(maxsize=1)
def find_driver() -> Driver | None:
    """The CUDA driver of this machine, None where it is absent or does not start."""
    try:
        cuda = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    count, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return None
    major, minor = divmod(version.value, 1000)
    return Driver((major, minor // 10), tuple(_device(cuda, i) for i in range(count.value)))


def _device(cuda: ctypes.CDLL, index: int) -> Device:
    handle = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), handle)
    return Device(
        name.value.decode(errors="replace"),
        (_attribute(cuda, handle, _COMPUTE_CAPABILITY_MAJOR), _attribute(cuda, handle, _COMPUTE_CAPABILITY_MINOR)),
    )


def _attribute(cuda: ctypes.CDLL, device: ctypes.c_int, attribute: int) -> int:
    value = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value
