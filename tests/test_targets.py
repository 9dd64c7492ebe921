"""Targets: records, what a name resolves to, detection from processor flags, the grant of AMX."""

import dataclasses
from typing import ClassVar

import pytest

from tilewright.compiler import targets
from tilewright.compiler.codegen import cuda_toolchain
from tilewright.compiler.errors import TargetError
from tilewright.compiler.targets import cpu, cuda, host
from tilewright.compiler.targets.base import Target

HASWELL = {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
ZEN5 = HASWELL | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"}
SAPPHIRE_RAPIDS = ZEN5 | {"amx_bf16", "amx_tile", "amx_int8"}
MACOS_SKYLAKE = {f.upper() for f in (ZEN5 - {"abm", "avx512_vnni"}) | {"lzcnt"}}


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine another one: machine(arch, features)."""

    def become(arch: str, features: tuple[str, ...]) -> None:
        monkeypatch.setattr(host, "arch", lambda: arch)
        monkeypatch.setattr(host, "features", lambda: features)

    return become


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        pytest.param([], (), id="none"),
        pytest.param(HASWELL, ("avx2", "f16c", "fma"), id="haswell"),
        pytest.param(ZEN5, ("avx2", "f16c", "fma", "avx512", "avx512vnni"), id="zen5"),
        pytest.param(
            SAPPHIRE_RAPIDS, ("avx2", "f16c", "fma", "avx512", "avx512vnni", "amx_int8"), id="sapphire_rapids"
        ),
        pytest.param(MACOS_SKYLAKE, ("avx2", "f16c", "fma", "avx512"), id="macos"),
        pytest.param(HASWELL - {"bmi2"}, ("f16c", "fma"), id="avx2_without_its_level"),
        pytest.param(ZEN5 - {"avx512bw"}, ("avx2", "f16c", "fma", "avx512vnni"), id="partial_avx512"),
    ],
)
def test_features_of_flags(flags, expected):
    assert host.features_of(flags) == expected


@pytest.mark.parametrize("granted", [True, False])
def test_amx_needs_the_kernels_permission(monkeypatch, granted):
    monkeypatch.setattr(host, "arch", lambda: "x86_64")
    monkeypatch.setattr(host, "_flags", lambda: SAPPHIRE_RAPIDS)
    monkeypatch.setattr(host, "_grant_amx", lambda: granted)
    assert ("amx_int8" in host.features.__wrapped__()) is granted


def test_other_architectures_have_no_x86_features(monkeypatch):
    monkeypatch.setattr(host, "arch", lambda: "aarch64")
    assert host.features.__wrapped__() == ()


def test_cpuinfo_is_read(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: A CPU @ 2: GHz\nflags\t\t: fma f16c\n\nprocessor\t: 1\nflags\t: x\n")
    monkeypatch.setattr(host, "_CPUINFO", file)
    assert host._cpuinfo_field("flags") == "fma f16c"
    assert host._cpuinfo_field("model name") == "A CPU @ 2: GHz"
    assert host._cpuinfo_field("absent") == ""
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "absent")
    assert host._cpuinfo_field("flags") == ""


def test_this_machine_resolves():
    target = targets.resolve_target("cpu")
    assert (target.name, target.kind, target.arch) == ("cpu", "cpu", host.arch())
    assert host.missing(target.features) == ()
    assert host.cores() >= 1
    assert (host.memory_bytes() or 1) > 0
    assert targets.resolve_target("auto") == targets.resolve_target() == target


@pytest.mark.parametrize(
    ("record", "level", "attributes"),
    [
        ("cpu-x86-64-v3", "x86-64-v3", ()),
        ("cpu-x86-64-v4", "x86-64-v4", ()),
        ("cpu-x86-64-v4-vnni", "x86-64-v4", ("+avx512vnni",)),
        ("cpu-x86-64-v4-vnni-amx", "x86-64-v4", ("+avx512vnni", "+amx-tile", "+amx-int8")),
    ],
)
def test_portable_records(record, level, attributes, machine):
    target = targets.resolve_target(record)
    assert (target.mcpu, target.mattr, target.arch) == (level, attributes, "x86_64")
    # The same machine compiled for as `cpu` gives the same code.
    machine("x86_64", target.features)
    assert dataclasses.replace(cpu.this_machine(), name=record) == target


def test_cpu_stops_at_the_widest_complete_level(machine):
    machine("x86_64", ("avx2", "f16c", "fma", "avx512vnni"))  # no avx512 beneath
    assert cpu.this_machine().features == ("avx2", "f16c", "fma")


def test_cpu_on_aarch64(machine):
    machine("aarch64", ())
    target = targets.resolve_target("cpu")
    assert (target.arch, target.mcpu, target.features) == ("aarch64", "generic", ())


def test_no_record_means_whatever_machine_compiles_it():
    assert all(record.mcpu != "native" for record in targets.RECORDS.values())
    assert all(name == record.name for name, record in targets.RECORDS.items())


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        targets.find_target("nvidia-h100").name = "other"  # type: ignore[misc]


def test_a_target_of_no_kind_is_refused():
    with pytest.raises(ValueError, match="neither cpu nor cuda"):
        Target("x", "tpu", "v5")


@pytest.mark.parametrize("name", ["nvidia-h100", "nvidia-h200"])
def test_hopper_records(name):
    record = targets.resolve_target(name)
    assert (record.arch, record.sms, record.shared_memory_bytes) == ("sm_90a", 132, 232448)
    assert record.has("wgmma")
    assert record.has("tma")


@pytest.mark.parametrize(
    ("name", "arch"), [("nvidia-a100", "sm_80"), ("nvidia-l40s", "sm_89"), ("nvidia-rtx-4090", "sm_89")]
)
def test_older_gpus_have_no_hopper_instructions(name, arch):
    record = targets.find_target(name)
    assert record.arch == arch
    assert not record.has("wgmma")
    assert not record.has("tma")


def gpu(monkeypatch, name: str, capability: tuple[int, int], sms: int, version: tuple[int, int] = (13, 0)) -> None:
    driver = cuda.Driver(version, (cuda.Device(name, capability, sms),))
    monkeypatch.setattr(cuda, "find_driver", lambda: driver)


@pytest.mark.parametrize(
    ("device", "capability", "sms", "record"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, "nvidia-h100"),
        ("NVIDIA H200", (9, 0), 132, "nvidia-h200"),
        ("NVIDIA GH200 480GB", (9, 0), 132, "nvidia-h100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, "nvidia-a100"),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, "nvidia-rtx-4090"),
        ("NVIDIA RTX 6000 Ada Generation", (8, 9), 142, "nvidia-l40s"),
    ],
)
def test_cuda_is_this_machines_gpu(monkeypatch, device, capability, sms, record):
    gpu(monkeypatch, device, capability, sms)
    assert targets.find_target("cuda").name == record
    assert targets.run_obstacle(targets.RECORDS[record]) is None


@pytest.mark.parametrize(
    ("device", "capability", "sms", "sentence"),
    [
        (
            "NVIDIA B200",
            (10, 0),
            148,
            r"the GPU NVIDIA B200 \(sm_100\) is newer than what this version has kernels for; the",
        ),
        (
            "Tesla V100-SXM2-16GB",
            (7, 0),
            80,
            r"the GPU Tesla V100-SXM2-16GB \(sm_70\) is not supported; the supported ones",
        ),
        ("NVIDIA H100 PCIe", (9, 0), 114, r"the GPU NVIDIA H100 PCIe \(sm_90\) is not supported"),
    ],
)
def test_cuda_on_a_gpu_without_a_record(monkeypatch, device, capability, sms, sentence):
    gpu(monkeypatch, device, capability, sms)
    with pytest.raises(TargetError, match=sentence):
        targets.find_target("cuda")


@pytest.mark.parametrize("name", ["nvidia-b200", "nvidia-rtx-5090"])
def test_blackwell_is_refused_by_name(name):
    with pytest.raises(TargetError, match=rf"the GPU {name} \(Blackwell\) is newer than what this version has kernels"):
        targets.resolve_target(name)


def test_cuda_without_a_gpu(monkeypatch):
    for driver in (None, cuda.Driver((13, 0), ())):
        monkeypatch.setattr(cuda, "find_driver", lambda driver=driver: driver)
        with pytest.raises(TargetError, match="it has none; name the one to compile for: nvidia-h100, nvidia-h200"):
            targets.find_target("cuda")
    monkeypatch.setattr(cuda, "find_driver", lambda: cuda.Driver((13, 0), (), 999))
    with pytest.raises(TargetError, match=r"the NVIDIA driver here does not start \(error 999 of cuInit\); restart"):
        targets.find_target("cuda")


@pytest.mark.parametrize(
    ("driver", "sentence"),
    [
        (
            None,
            "this machine has no NVIDIA driver; install release 580 or newer, or compile the model for cpu",
        ),
        (
            cuda.Driver((13, 0), ()),
            "this machine has no NVIDIA GPU, or hides it; "
            "set CUDA_VISIBLE_DEVICES to show it, or compile the model for cpu",
        ),
        (
            cuda.Driver((13, 0), (), 803),
            "the NVIDIA driver here does not start (error 803 of cuInit); "
            "restart the machine, or install release 580 or newer",
        ),
        (
            cuda.Driver((12, 8), (cuda.Device("NVIDIA H100", (9, 0), 132),)),
            "the NVIDIA driver here serves CUDA 12.8 and not 13.0; install release 580 or newer",
        ),
        (
            cuda.Driver((13, 1), (cuda.Device("NVIDIA A100-SXM4-80GB", (8, 0), 108),)),
            "the GPU here, NVIDIA A100-SXM4-80GB, is sm_80, and nvidia-h100 is sm_90; "
            "compile the model for nvidia-a100",
        ),
        (
            cuda.Driver((13, 0), (cuda.Device("NVIDIA B200", (10, 0), 148),)),
            "the GPU here, NVIDIA B200, is sm_100, and nvidia-h100 is sm_90; compile the model for cpu",
        ),
        (
            cuda.Driver((13, 0), (cuda.Device("NVIDIA H100 PCIe", (9, 0), 114),)),
            "the GPU here, NVIDIA H100 PCIe, has 114 multiprocessors, and nvidia-h100 has 132; "
            "compile the model for cpu",
        ),
        (cuda.Driver((13, 2), (cuda.Device("NVIDIA H100 80GB HBM3", (9, 0), 132),)), None),
    ],
    ids=["no_driver", "no_device", "dead_driver", "old_driver", "older_gpu", "newer_gpu", "fewer_sms", "runs"],
)
def test_what_keeps_gpu_code_from_running(monkeypatch, driver, sentence):
    monkeypatch.setattr(cuda, "find_driver", lambda: driver)
    assert targets.run_obstacle(targets.RECORDS["nvidia-h100"]) == sentence


class FakeDriver:
    """What ctypes would make of libcuda.so.1: one H100."""

    status = 0
    attributes: ClassVar = {16: 132, 75: 9, 76: 0}

    def cuInit(self, flags):
        return self.status

    def cuDriverGetVersion(self, version):
        version._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, handle, index):
        return 0

    def cuDeviceGetName(self, name, size, handle):
        name.value = b"NVIDIA H100 80GB HBM3"
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.attributes[attribute]
        return 0


def test_the_driver_is_asked(monkeypatch):
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: FakeDriver())
    device = cuda.Device("NVIDIA H100 80GB HBM3", (9, 0), 132)
    assert cuda.find_driver.__wrapped__() == cuda.Driver((13, 1), (device,))
    monkeypatch.setattr(FakeDriver, "status", 100)  # CUDA_ERROR_NO_DEVICE
    assert cuda.find_driver.__wrapped__() == cuda.Driver((13, 1), ())
    monkeypatch.setattr(FakeDriver, "status", 803)  # CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
    assert cuda.find_driver.__wrapped__() == cuda.Driver((13, 1), (), 803)


def test_the_stand_in_that_compiles_load_is_no_driver(monkeypatch):
    stub = cuda_toolchain._driver_stub()
    monkeypatch.setattr(cuda, "_DRIVER", str(stub))
    assert cuda.find_driver.__wrapped__() is None


def test_no_driver(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", absent)
    assert cuda.find_driver.__wrapped__() is None


def test_compiling_for_a_gpu_needs_its_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_toolchain, "_wheel_roots", lambda: [tmp_path])
    monkeypatch.setattr(cuda_toolchain, "TOOLKIT", tmp_path)
    monkeypatch.setattr(cuda_toolchain, "find_toolchain", cuda_toolchain.find_toolchain.__wrapped__)
    with pytest.raises(TargetError) as raised:
        targets.resolve_target("nvidia-h100")
    assert str(raised.value) == (
        "compiling for nvidia-h100 is not possible: CUDA code is compiled by nvidia-cuda-crt, nvidia-cuda-nvrtc, "
        "nvidia-cuda-runtime of CUDA 13, not found; pip install 'tilewright[cuda]'"
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nvidia-h10", "did you mean nvidia-h100"),
        ("CPU", "did you mean cpu"),
        ("cpu-x86-64-v5", "did you mean cpu-x86-64-v"),
        ("toaster!", "known are auto, cpu, cuda, cpu-x86-64-v3"),
        ("", "known are auto"),
    ],
)
def test_unknown_names_get_the_nearest(name, hint):
    with pytest.raises(TargetError) as raised:
        targets.resolve_target(name)
    assert hint in str(raised.value)
    assert repr(name) in str(raised.value)


def test_processors_that_are_too_old_or_unknown(machine):
    machine("x86_64", ("f16c",))
    with pytest.raises(TargetError, match="lacks avx2, fma"):
        targets.resolve_target("cpu")
    machine("riscv64", ())
    with pytest.raises(TargetError, match="architecture riscv64 is not supported"):
        targets.resolve_target("cpu")


def test_another_architecture_is_not_linked_for_here(machine):
    machine("x86_64", ("avx2", "f16c", "fma"))
    with pytest.raises(TargetError, match="cpu-aarch64 is not possible: linking for aarch64 needs a machine of that"):
        targets.resolve_target("cpu-aarch64")


def test_what_runs_here(machine, monkeypatch):
    machine("x86_64", ("avx2", "f16c", "fma", "avx512"))
    monkeypatch.setattr(cuda, "find_driver", lambda: None)
    obstacles = {name: targets.run_obstacle(record) for name, record in targets.RECORDS.items()}
    assert obstacles == {
        "cpu-x86-64-v3": None,
        "cpu-x86-64-v4": None,
        "cpu-x86-64-v4-vnni": "this processor lacks avx512vnni",
        "cpu-x86-64-v4-vnni-amx": "this processor lacks avx512vnni, amx_int8",
        "cpu-aarch64": "this machine is x86_64",
        **{
            record.name: "this machine has no NVIDIA driver; install release 580 or newer, or compile the model for cpu"
            for record in cuda.RECORDS
        },
    }
