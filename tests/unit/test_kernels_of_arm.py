"""The kernels for ARM, under emulation: each path gives what plain loops give."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "native" / "compare_paths.c"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"


@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"no {COMPILER} and {EMULATOR}")
@pytest.mark.parametrize(("cpu", "paths"), [("max", ["neon-dotprod", "plain"]), ("cortex-a72", ["plain"])])
def test_paths_of_arm(cpu: str, paths: list[str], tmp_path: Path) -> None:
    built = tmp_path / "compare_paths"
    options = ["-static", "-O2", "-ffp-contract=off", "-w"]
    subprocess.run([COMPILER, *options, str(PROGRAM), "-o", str(built), "-lm"], check=True)
    ran = subprocess.run([EMULATOR, "-cpu", cpu, str(built)], capture_output=True, text=True)
    assert (ran.stdout.split("\n")[:-1], ran.returncode) == (paths, 0)
