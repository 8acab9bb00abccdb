"""The kernels for ARM and for Windows, under emulation: each path gives the results of the plain loops."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "native" / "compare_paths.c"
KERNELS = Path(__file__).parents[3] / "splitnet" / "native"
OPTIONS = ("-static", "-O2", "-ffp-contract=off", "-w")
ARM, ARM_EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
WINDOWS, WINDOWS_EMULATOR = "x86_64-w64-mingw32-gcc", "wine"

MICROSOFT = (
    *(
        "--target=x86_64-pc-windows-msvc",
        "-std=c11",
        "-fsyntax-only",
        "-nostdlibinc",
        "-Werror",
        "-Wvla",
        "-Wpointer-arith",
    ),
    *("-Wno-language-extension-token", "-Wno-unused-function", "-U__clang__", "-D__attribute__=none"),
)
"""Options that make clang accept what cl.exe accepts, as far as possible: no `__attribute__`, no variable-length
arrays."""

HEADERS = {
    "math.h": """
        float fabsf(float), sqrtf(float), expf(float), tanhf(float), erff(float), ldexpf(float, int);
        long lrintf(float);
        #define INFINITY ((float)1e300)
        #define NAN (-(INFINITY - INFINITY))
        #define isnan(x) ((x) != (x))
        #define isfinite(x) ((x) - (x) == 0)
    """,
    "stdlib.h": "void *malloc(unsigned long long), *calloc(unsigned long long, unsigned long long), free(void *);",
    "string.h": "void *memcpy(void *, const void *, unsigned long long), *memset(void *, int, unsigned long long);",
}
"""The parts of Microsoft's headers, which are not free, that the kernels need."""


def installed(*programs: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not all(map(shutil.which, programs)), reason=f"no {' and '.join(programs)}")


@pytest.mark.full
@installed(ARM, ARM_EMULATOR)
@pytest.mark.parametrize(("cpu", "paths"), [("max", ["neon-dotprod", "plain"]), ("cortex-a72", ["plain"])])
def test_paths_of_arm(cpu: str, paths: list[str], tmp_path: Path) -> None:
    built = tmp_path / "compare_paths"
    subprocess.run([ARM, *OPTIONS, str(PROGRAM), "-o", str(built), "-lm"], check=True)
    ran = subprocess.run([ARM_EMULATOR, "-cpu", cpu, str(built)], capture_output=True, text=True)
    assert (ran.stdout.split("\n")[:-1], ran.returncode) == (paths, 0)


@pytest.mark.full
@installed(WINDOWS, WINDOWS_EMULATOR)
@pytest.mark.timeout(300)  # wine first creates its file system
def test_paths_of_windows(tmp_path: Path) -> None:
    """On Windows `long` has 32 bits, and GCC aligns the stack less than its vector moves expect."""
    built = tmp_path / "compare_paths.exe"
    subprocess.run([WINDOWS, *OPTIONS, "-Wa,-muse-unaligned-vector-move", str(PROGRAM), "-o", str(built)], check=True)
    environment = {
        **os.environ,
        "WINEPREFIX": str(tmp_path / "wine"),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",
    }
    try:
        ran = subprocess.run([WINDOWS_EMULATOR, str(built)], capture_output=True, text=True, env=environment)
    finally:
        subprocess.run(["wineserver", "--kill"], env=environment, check=False)
    assert (ran.stdout.split()[-1:], ran.returncode) == (["plain"], 0), ran.stdout + ran.stderr


def test_sizes_have_64_bits_on_windows_too() -> None:
    found = [file.name for file in KERNELS.iterdir() if re.search(r"(?<!long )\blong\b(?! long)", file.read_text())]
    assert found == [], "long has 32 bits there: write int64_t"


@installed("clang")
def test_plain_loops_are_c_for_microsofts_compiler(tmp_path: Path) -> None:
    for name, text in HEADERS.items():
        (tmp_path / name).write_text(text)
    program = tmp_path / "all.c"
    names = ("converted.h", "paths.h", "step.h")
    program.write_text("".join(f'#include "{KERNELS / name}"\n' for name in names) + "int count = PATHS;\n")
    said = subprocess.run(["clang", *MICROSOFT, f"-I{tmp_path}", str(program)], capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")
