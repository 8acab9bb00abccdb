"""The tests of GPUs on a CPU that stands in for a GPU: no tensor is made, or left, on the wrong device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.swarm
@pytest.mark.timeout(300)  # this runs a whole suite
@pytest.mark.full
def test_the_tests_of_gpus_pass_on_the_stand_in() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--tier=all", "tests/gpu"]
    environment = {**os.environ, "GPU_TESTS_ON": "stand-in"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-4000:]
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed is not None and int(passed[1]) > 65
