"""The contents of the packages, and an installation without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = "splitnet/native"
PACKAGES = ("peers", "scheduler", "simulator", "splitnet")
EXTENSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]

CLANG = next(filter(shutil.which, ("clang", "clang-19", "clang-14")), None)


def build(kind: str, source: Path, to: Path) -> Path:
    """Builds an sdist or a wheel as pip does, with no working compiler."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    environment = {**os.environ, "CC": "/bin/false"}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(to)], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (built,) = to.iterdir()
    return built


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the contents of the sdist."""
    tree, packed, unpacked = (tmp_path_factory.mktemp(name) for name in ("tree", "packed", "unpacked"))
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    with tarfile.open(build("sdist", tree, packed)) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_sdist_has_all_sources_of_the_kernels_and_the_licence(unpacked: Path) -> None:
    packed = files_of(unpacked)
    assert {f"{NATIVE}/{name}" for name in files_of(ROOT / NATIVE)} <= packed
    assert {"LICENSE", "README.md", "pyproject.toml"} <= packed
    assert not [name for name in packed if name.startswith("tests/")]


def test_the_extension_names_all_its_source_files() -> None:
    named = {*EXTENSION["sources"], *EXTENSION["depends"]}
    assert named == {f"{NATIVE}/{name}" for name in files_of(ROOT / NATIVE)}


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    wanted = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    wanted |= {f"splitnet/serve/page/{name}" for name in files_of(ROOT / "splitnet/serve/page")}
    assert packed == wanted
    assert len(licences) == 1


def test_the_wheel_fits_all_versions_of_python(wheel: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["cp311", "abi3"]


@pytest.mark.full
def test_an_installation_without_a_compiler_works_and_doctor_gives_advice(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import splitnet
from splitnet.tools.doctor import machine_checks
print(splitnet.__file__)
found = machine_checks.kernels()
print(found.status.name)
print(found.text)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    file, status, text = ran.stdout.splitlines()
    assert file.startswith(str(tmp_path))
    assert status == "warned"
    assert text.startswith("not compiled, so CPUs decode more slowly")
    assert "install a wheel" in text and "C compiler" in text


def test_the_kernels_link_no_openmp() -> None:
    """With `-fopenmp`, Apple's compiler fails, and with other compilers a second OpenMP besides torch's may be
    loaded."""
    assert not [flag for flag in EXTENSION["extra-compile-args"] if "openmp" in flag]
    assert not EXTENSION.get("extra-link-args")
    for path in (ROOT / NATIVE).iterdir():
        assert "pragma omp" not in path.read_text()


@pytest.mark.full
@pytest.mark.skipif(CLANG is None, reason="there is no clang here")
def test_clang_compiles_the_kernels(tmp_path: Path) -> None:
    """Macs use clang. Optimisation is off, which saves two thirds of the time."""
    assert CLANG
    flags = [*EXTENSION["extra-compile-args"], "-Wall", "-Werror", f"-I{sysconfig.get_path('include')}", "-O0"]
    to_object = ["-c", str(ROOT / NATIVE / "module.c"), "-o", str(tmp_path / "module.o")]
    ran = subprocess.run([CLANG, *flags, *to_object], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
