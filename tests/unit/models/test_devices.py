from __future__ import annotations

import pytest

from tutelage import processes
from tutelage.models import devices
from tutelage.models.devices import DEVICES, Hardware, recognise_device


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4080", None),
        ("Tesla T4", None),
    ],
)
def test_a_device_is_recognised_by_the_name_its_driver_gives_it(name, key):
    assert recognise_device(name) is (None if key is None else DEVICES[key])


MIB = 2.0**20
VERSIONS = {
    2: ("0::/", "", "memory.max", "memory.current", "inactive_file"),
    1: (
        "9:cpu,cpuacct:/\n4:memory:/",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GiB free and 1 GiB of swap, whose control groups a test lays out."""
    (tmp_path / "meminfo").write_text(
        "MemTotal: 9999999 kB\nMemAvailable: 8388608 kB\nSwapFree: 1048576 kB\n"
    )
    monkeypatch.setattr(devices, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(processes, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(processes, "_MOUNT", tmp_path / "mount")
    return tmp_path


def limited(machine, version, path, limits):
    """Put this process into the group of a path; limits by group: most, used and cached MiB."""
    prefix, controller, most, used, cached = VERSIONS[version]
    (machine / "groups").write_text(f"{prefix}{path}\n")
    for name, (limit, usage, files) in limits.items():
        group = machine / "mount" / controller / name
        group.mkdir(parents=True, exist_ok=True)
        (group / most).write_text("max\n" if limit is None else f"{int(limit * MIB)}\n")
        (group / used).write_text(f"{int(usage * MIB)}\n")
        (group / "memory.stat").write_text(f"anon 5\n{cached} {int(files * MIB)}\nrest 7\n")


def free(processes=1):
    return Hardware.here("cpu", processes, processes).memory / MIB


@pytest.mark.parametrize("version", VERSIONS)
def test_a_control_group_bounds_the_memory_that_a_run_may_take(machine, version):
    limited(machine, version, "job_7/step_0", {})
    assert free() == 9 * 1024  # no group says anything
    limited(machine, version, "job_7/step_0", {"job_7/step_0": (None, 50, 0), "job_7": (3000, 500, 200)})
    assert free() == 2700 + 1024  # of the job; pages of files give way, and swap is the machine's
    assert free(2) == (2700 + 1024) / 2
    limited(machine, version, "job_7/step_0", {"job_7/step_0": (600, 100, 0)})
    assert free() == 500 + 1024
    limited(machine, version, "job_7/step_0", {"job_7/step_0": (600, 900, 0)})
    assert free() == 1024
    limited(machine, version, "job_7/step_0", {"job_7/step_0": (90_000, 100, 0), "job_7": (90_000, 100, 0)})
    assert free() == 9 * 1024  # more than the machine has


@pytest.mark.parametrize("version", VERSIONS)
def test_a_container_has_its_limit_at_the_root_that_it_sees(machine, version):
    limited(machine, version, "docker/0123abcd", {"": (2000, 300, 0)})
    assert free() == 1700 + 1024


def test_where_nothing_is_known_memory_has_no_end(machine):
    (machine / "meminfo").unlink()
    assert free() == float("inf")
