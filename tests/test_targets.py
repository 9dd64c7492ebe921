"""Targets: records, what a name resolves to, detection from processor flags, the grant of AMX."""

import dataclasses

import pytest

from tilewright.compiler import targets
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
def test_gpu_records_stand_but_are_not_compiled_for(name):
    assert targets.find_target(name).arch == "sm_90a"
    with pytest.raises(TargetError, match=f"compiling for {name} is not possible: .*use a CPU target"):
        targets.resolve_target(name)


@pytest.mark.parametrize(
    ("device", "record"),
    [("NVIDIA H100 80GB HBM3", "nvidia-h100"), ("NVIDIA H200", "nvidia-h200"), ("NVIDIA GH200 480GB", None)],
)
def test_cuda_is_this_machines_gpu(monkeypatch, device, record):
    driver = cuda.Driver((13, 0), (cuda.Device(device, (9, 0)),))
    monkeypatch.setattr(cuda, "find_driver", lambda: driver)
    if record is None:
        with pytest.raises(TargetError, match=f"the GPU {device} is not supported"):
            targets.find_target("cuda")
    else:
        assert targets.find_target("cuda").name == record


def test_cuda_without_a_gpu(monkeypatch):
    for driver in (None, cuda.Driver((13, 0), ())):
        monkeypatch.setattr(cuda, "find_driver", lambda driver=driver: driver)
        with pytest.raises(TargetError, match="it has none; name the one to compile for: nvidia-h100, nvidia-h200"):
            targets.find_target("cuda")


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


def test_what_runs_here(machine):
    machine("x86_64", ("avx2", "f16c", "fma", "avx512"))
    obstacles = {name: targets.run_obstacle(record) for name, record in targets.RECORDS.items()}
    assert obstacles == {
        "cpu-x86-64-v3": None,
        "cpu-x86-64-v4": None,
        "cpu-x86-64-v4-vnni": "this processor lacks avx512vnni",
        "cpu-x86-64-v4-vnni-amx": "this processor lacks avx512vnni, amx_int8",
        "cpu-aarch64": "this machine is x86_64",
        "nvidia-h100": "this version has no CUDA runtime",
        "nvidia-h200": "this version has no CUDA runtime",
    }
