"""Free memory on Linux: the least of the machine's and of the control groups' free memory, in simulated file trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitnet.quant.device import _available_on_linux

MIB = 2**20
V2 = "35 24 0:30 {top} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "36 24 0:31 {top} {point} rw,nosuid shared:10 - cgroup cgroup rw,memory"
V1_CPU = "37 24 0:32 / /sys/fs/cgroup/cpu rw,nosuid shared:11 - cgroup cgroup rw,cpu,cpuacct"
DISK = "24 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw"


def plant(root: Path, own: str, *mounts: str) -> None:
    """A machine with 8 GiB available, and the kernel's files about the groups of a process."""
    files = {"meminfo": "MemTotal: 9999999 kB\nMemAvailable: 8388608 kB\n", "self/cgroup": own}
    for name, text in {**files, "self/mountinfo": "\n".join([DISK, *mounts]) + "\n"}.items():
        (root / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "proc" / name).write_text(text)


def plant_v2(folder: Path, most: int | str, used: int, cached: int = 0, high: int | str = "max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\nactive_file 4096\ninactive_file {cached}\n")


def plant_v1(folder: Path, most: int, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{most}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 0\ntotal_inactive_file {cached}\n")


def v2(top: str = "/", point: str = "/sys/fs/cgroup") -> str:
    return V2.format(top=top, point=point)


def v1(top: str = "/", point: str = "/sys/fs/cgroup/memory") -> str:
    return V1.format(top=top, point=point)


def left(root: Path) -> float | None:
    found = _available_on_linux(root)
    return found if found is None else found / MIB


def test_a_unit_with_a_limit_of_version_2(tmp_path: Path) -> None:
    plant(tmp_path, "0::/system.slice/peer.service\n", v2())
    plant_v2(tmp_path / "sys/fs/cgroup/system.slice", "max", 700 * MIB)
    plant_v2(tmp_path / "sys/fs/cgroup/system.slice/peer.service", 900 * MIB, 300 * MIB, cached=50 * MIB)
    assert left(tmp_path) == 650


def test_a_unit_with_a_limit_of_version_1(tmp_path: Path) -> None:
    plant(tmp_path, "7:cpu,cpuacct:/else\n4:memory:/system.slice/peer.service\n1:name=systemd:/x\n", V1_CPU, v1())
    plant_v1(tmp_path / "sys/fs/cgroup/memory", 9223372036854771712, 5000 * MIB)
    plant_v1(tmp_path / "sys/fs/cgroup/memory/system.slice/peer.service", 900 * MIB, 300 * MIB, cached=50 * MIB)
    assert left(tmp_path) == 650


@pytest.mark.parametrize("bounded", ["user.slice", "user.slice/user-0.slice", "user.slice/user-0.slice/a b.scope"])
def test_the_group_that_leaves_least_counts(bounded: str, tmp_path: Path) -> None:
    plant(tmp_path, "0::/user.slice/user-0.slice/a b.scope\n", v2())
    folder = tmp_path / "sys/fs/cgroup"
    for name in ("user.slice", "user-0.slice", "a b.scope"):
        folder /= name
        most = 500 if folder == tmp_path / "sys/fs/cgroup" / bounded else 4000
        plant_v2(folder, most * MIB, 100 * MIB)
    assert left(tmp_path) == 400


def test_both_versions_beside_each_other(tmp_path: Path) -> None:
    plant(tmp_path, "4:memory:/a\n0::/b\n", v1(), v2(point="/sys/fs/cgroup/unified"))
    (tmp_path / "sys/fs/cgroup/unified/b").mkdir(parents=True)
    plant_v1(tmp_path / "sys/fs/cgroup/memory/a", 900 * MIB, 100 * MIB)
    plant_v1(tmp_path / "sys/fs/cgroup/memory/b", 300 * MIB, 100 * MIB)  # a group of another process
    assert left(tmp_path) == 800
    plant_v2(tmp_path / "sys/fs/cgroup/unified/b", 600 * MIB, 100 * MIB)
    assert left(tmp_path) == 500


@pytest.mark.parametrize(
    ("own", "top"),
    [
        ("0::/\n", "/"),  # a container with a namespace
        ("0::/docker/0f/peer\n", "/docker/0f"),  # a container without a namespace
        ("0::/docker/0f\n", "/docker/0f"),
        ("0::/\n", "/../.."),  # the mount is above the namespace
        ("0::/../else\n", "/"),  # the process has left the namespace
        ("0::/docker/else\n", "/docker/0f"),
    ],
)
def test_a_container(own: str, top: str, tmp_path: Path) -> None:
    plant(tmp_path, own, v2(top))
    plant_v2(tmp_path / "sys/fs/cgroup", 900 * MIB, 300 * MIB)
    plant_v2(tmp_path / "sys/fs/else", 100 * MIB, 50 * MIB)
    assert left(tmp_path) == 600


def test_a_group_below_what_a_container_has_mounted(tmp_path: Path) -> None:
    plant(tmp_path, "4:memory:/docker/0f/peer\n", v1("/docker/0f"))
    plant_v1(tmp_path / "sys/fs/cgroup/memory", 900 * MIB, 300 * MIB)
    plant_v1(tmp_path / "sys/fs/cgroup/memory/peer", 400 * MIB, 300 * MIB)
    assert left(tmp_path) == 100


def test_names_that_mountinfo_escapes(tmp_path: Path) -> None:
    plant(tmp_path, "0::/a\\x2db/peer\n", v2("/a\\134x2db", "/mnt/of\\040groups"))
    plant_v2(tmp_path / "mnt/of groups/peer", 900 * MIB, 300 * MIB)
    assert left(tmp_path) == 600


def test_a_group_that_is_slowed_down_beyond_some_memory(tmp_path: Path) -> None:
    plant(tmp_path, "0::/peer\n", v2())
    plant_v2(tmp_path / "sys/fs/cgroup/peer", "max", 300 * MIB, high=800 * MIB)
    assert left(tmp_path) == 500


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    plant(tmp_path, "0::/peer\n", v2())
    plant_v2(tmp_path / "sys/fs/cgroup/peer", 300 * MIB, 301 * MIB)
    assert left(tmp_path) == 0


@pytest.mark.parametrize("own", ["0::/peer\n", "4:memory:/peer\n", "", "nonsense\n"])
def test_without_a_limit_the_machine_counts(own: str, tmp_path: Path) -> None:
    plant(tmp_path, own, v1(), v2())
    assert left(tmp_path) == 8192
    plant_v2(tmp_path / "sys/fs/cgroup/peer", "max", 300 * MIB)
    plant_v1(tmp_path / "sys/fs/cgroup/memory/peer", 9223372036854771712, 300 * MIB)
    assert left(tmp_path) == 8192


def test_a_machine_without_files_about_groups(tmp_path: Path) -> None:
    assert left(tmp_path) is None
    plant(tmp_path, "0::/\n")
    (tmp_path / "proc/self/mountinfo").unlink()
    assert left(tmp_path) == 8192
