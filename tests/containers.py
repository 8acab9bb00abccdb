"""Podman with separate storage, and a base image with this Python.

`deploy/Dockerfile` is built without a registry or a package index: wheels come from the installed packages."""

from __future__ import annotations

import csv
import io
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import parse_tag, sys_tags
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROGRAMS = ("podman", "podman-compose", "mmdebstrap", "unshare", "nsenter")
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]
NEEDS_PODMAN = pytest.mark.skipif(
    bool(MISSING) or os.geteuid() != 0, reason=f"needs root and {', '.join(MISSING or PROGRAMS)}"
)
BASE = "localhost/base"
BUILD_TIMEOUT_S = 1000.0

# By default podman asks for higher limits than a process in a container may have.
LIMITS: Mapping[str, int] = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
# Debian packages of the base: the libraries that a Python needs, and the programs that `deploy/Dockerfile` uses.
PACKAGES = ("libpython3-stdlib", "libstdc++6", "passwd")
# Some systems mount both versions of cgroups, which crun does not support. The state of networks has a fixed folder.
MOUNTS = """
! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
mkdir -p /run/containers && mount -t tmpfs tmpfs /run/containers && echo ready && read end
"""


class Podman:
    """Podman as root, whose images, containers, locks and networks are in one folder, and whose mounts are in a mount
    namespace. Close it before the folder is removed.

    Skips the test if the system allows no mount namespace, or podman does not run.
    """

    def __init__(self, folder: Path) -> None:
        self._namespace = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", MOUNTS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._namespace.stdout is not None
        line = self._namespace.stdout.readline()
        if line != "ready\n":
            self._end_namespace()
            pytest.skip(f"this system allows no mount namespace: {line}")
        limits = [f'"{name}={resource.getrlimit(number)[1]}"' for name, number in LIMITS.items()]
        (folder / "containers.conf").write_text(
            f'[containers]\ndefault_ulimits = [{", ".join(limits)}]\n[engine]\nlock_type = "file"\n'
        )
        self.program = folder / "podman"
        """A program with the arguments of podman."""
        folders = {"root": "storage", "runroot": "run", "tmpdir": "state", "network-config-dir": "networks"}
        options = " ".join(f"--{name} {folder / part}" for name, part in folders.items())
        self.program.write_text(
            f"#!/bin/sh\nexport CONTAINERS_CONF={folder}/containers.conf TMPDIR={folder}\n"
            "export PODMAN_IGNORE_CGROUPSV1_WARNING=1\n"
            f'exec nsenter --target {self._namespace.pid} --mount --wdns="$PWD" -- podman {options} "$@"\n'
        )
        self.program.chmod(0o755)
        try:
            self("info")
        except AssertionError as error:
            self._end_namespace()
            pytest.skip(f"podman does not run here: {str(error).splitlines()[-1]}")

    def __call__(self, *arguments: str | Path, timeout: float = 300.0) -> str:
        """Runs podman; returns its output.

        Raises:
            AssertionError: podman has failed.
        """
        return run([self.program, *arguments], timeout=timeout)

    def close(self) -> None:
        """Ends and removes all containers and networks."""
        # `rm` alone would race with the restart policy of the containers.
        self("stop", "--all", "--time", "0")
        self("rm", "--all", "--force", "--time", "0")
        self("network", "prune", "--force")
        self._end_namespace()

    def _end_namespace(self) -> None:
        self._namespace.communicate("end\n")


def run(command: list[str | Path], *, timeout: float, env: Mapping[str, str] | None = None) -> str:
    """Runs a command from the root of the repository; returns its output. env: additional variables.

    Raises:
        AssertionError: the command has failed.
    """
    told = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )
    assert told.returncode == 0, f"{command}:\n{told.stdout[-4000:]}\n{told.stderr[-4000:]}"
    return told.stdout


def make_base(podman: Podman, folder: Path) -> None:
    """Makes the image BASE: this system's release of Debian or Ubuntu with this Python in /usr/local.

    Skips the test if the archive cannot be reached or containers do not run here.
    """
    if sys.base_prefix == "/usr":
        pytest.skip("the base needs a Python outside of /usr, as pyenv or uv installs it")
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    include = f"--include={','.join(PACKAGES)}"
    try:
        run(["mmdebstrap", "--variant=minbase", include, release, folder / "base.tar"], timeout=BUILD_TIMEOUT_S)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"mmdebstrap makes no base of {release or 'this system'}: {str(error).splitlines()[-1]}")
    ignored = shutil.ignore_patterns("site-packages", "test", "config-*", "share")
    shutil.copytree(sys.base_prefix, folder / "python", symlinks=True, ignore=ignored)
    (folder / "Dockerfile").write_text("FROM scratch\nADD base.tar /\nCOPY python /usr/local\nRUN ldconfig\n")
    try:
        podman("build", "--tag", BASE, folder, timeout=BUILD_TIMEOUT_S)
    except AssertionError as error:
        pytest.skip(f"containers do not run here: {str(error).splitlines()[-1]}")


def make_wheels(folder: Path) -> None:
    """Writes wheels of the installed packages that `pip install ".[serve]"` needs, without compression."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["serve"]
    for package in _with_dependencies(map(Requirement, wanted + project["build-system"]["requires"])):
        _write_wheel(package, folder)


def _with_dependencies(requirements: Iterable[Requirement]) -> Iterable[Distribution]:
    wanted = [(requirement, "") for requirement in requirements]
    found: dict[tuple[str, str], Distribution] = {}
    while wanted:
        requirement, extra_of_parent = wanted.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra_of_parent}):
            continue
        package = distribution(requirement.name)
        for extra in {"", *requirement.extras}:
            if (key := (canonicalize_name(requirement.name), extra)) not in found:
                found[key] = package
                wanted += [(Requirement(text), extra) for text in package.requires or ()]
    return {name: package for (name, _), package in found.items()}.values()


def _write_wheel(package: Distribution, folder: Path) -> None:
    tags = re.findall(r"^Tag: (.+)$", package.read_text("WHEEL") or "", re.MULTILINE)
    tag = next(tag for tag in tags if not parse_tag(tag).isdisjoint(sys_tags()))
    name = re.sub(r"[-_.]+", "_", package.name)
    files = [file for file in package.files or () if ".." not in file.parts and file.suffix != ".pyc"]
    (info,) = {file.parent for file in files if file.name == "METADATA" and len(file.parts) == 2}
    record = io.StringIO()
    rows = csv.writer(record)
    with zipfile.ZipFile(folder / f"{name}-{package.version}-{tag}.whl", "w", strict_timestamps=False) as wheel:
        for file in files:
            if file.parent != info or file.name not in _OF_INSTALLATION:
                wheel.write(str(file.locate()), str(file))
                rows.writerow([file, "", ""])
        rows.writerow([info / "RECORD", "", ""])
        wheel.writestr(str(info / "RECORD"), record.getvalue())


# Files that pip writes when it installs a wheel
_OF_INSTALLATION = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
