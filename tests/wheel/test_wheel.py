"""Any installation, from a wheel or not, has its kernels, and they share torch's threads. `cibuildwheel` runs only this
file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitnet.quant import native
from splitnet.quant.choose import INT4_TILES

LARGE = 4096
"""Enough outputs for every thread to compute a part."""


def run(code: str) -> list[str]:
    """The lines that a new Python process prints."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_the_kernels_are_present_and_have_threads() -> None:
    assert native.paths_here()
    assert not native.load_error
    assert native.have_threads()


def test_the_version_is_that_of_the_installed_package() -> None:
    import splitnet

    assert splitnet.__version__ == metadata.version("splitnet")


@pytest.mark.parametrize("path", native.paths_here())
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_products_are_equal_for_any_number_of_threads(path: str, threads: int) -> None:
    before, many = native.path_in_use(), torch.get_num_threads()
    assert before is not None
    weight, rows = torch.randn(77, 160), torch.randn(3, 160)
    native.use_path(path)
    try:
        held = INT4_TILES.of(weight)
        assert held is not None
        torch.set_num_threads(1)
        alone = held.multiply(rows)
        torch.set_num_threads(threads)
        assert torch.equal(held.multiply(rows), alone)
        wanted = rows @ held.dequantised(torch.float32).T
        assert (alone - wanted).norm() < 1e-3 * wanted.norm()  # Rows are rounded.
    finally:
        torch.set_num_threads(many)
        native.use_path(before)


def raising(error: Exception) -> Callable[[str], Any]:
    def load(name: str) -> Any:
        raise error

    return load


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (raising(ModuleNotFoundError("no such module")), "not compiled"),
        (raising(ImportError("undefined symbol")), "compiled, but not loaded (undefined symbol)"),
        (lambda name: SimpleNamespace(__file__="old.so"), "compiled, but from older sources (old.so)"),
    ],
)
def test_the_reason_for_missing_kernels_is_named(
    load: Callable[[str], Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "import_module", load)
    assert native._load() == (None, why)


LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")


@LINUX
def test_a_process_has_one_openmp() -> None:
    code = """
from splitnet.quant import native as kernels
kernels.multiply_floats
names = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if "/" in line}
print(*(name for name in names if name.startswith(("libgomp", "libomp", "libiomp"))), sep="\\n")
"""
    assert len(run(code)) == 1


@LINUX
def test_kernels_share_the_threads_of_torch() -> None:
    """A kernel starts the threads that torch uses afterwards, or uses the threads that torch has started."""
    code = f"""
import os, torch
from splitnet.quant.choose import INT4_TILES
torch.set_num_threads(1)
held, row = INT4_TILES.of(torch.randn({LARGE}, 64)), torch.randn(1, 64)
numbers = torch.randn(2_000_000)
held.multiply(row), numbers.mul_(2)
torch.set_num_threads(3)
counts = [len(os.listdir("/proc/self/task"))]
for call in (lambda: held.multiply(row), lambda: numbers.mul_(2), lambda: held.multiply(row)):
    call()
    counts.append(len(os.listdir("/proc/self/task")) - counts[0])
print(*counts[1:], sep="\\n")
"""
    assert run(code) == ["2", "2", "2"]


@pytest.mark.full
def test_without_openmp_kernels_have_one_thread_and_doctor_warns() -> None:
    code = f"""
import ctypes
real = ctypes.CDLL
def without(*given, **named):
    found = real(*given, **named)
    return object() if "_C" in str(given[0]) else found
import torch
ctypes.CDLL = without
from splitnet.tools.doctor import machine_checks
from splitnet.quant import native as kernels
from splitnet.quant.choose import INT4_TILES
torch.set_num_threads(3)
held, row = INT4_TILES.of(torch.randn({LARGE}, 64)), torch.randn(1, 64)
print(kernels.have_threads())
print(torch.allclose(held.multiply(row), row @ held.dequantised(torch.float32).T, atol=1e-3, rtol=1e-3))
found = machine_checks.kernels()
print(found.status.name, "with one thread" in found.text)
"""
    assert run(code) == ["False", "True", "warned True"]
