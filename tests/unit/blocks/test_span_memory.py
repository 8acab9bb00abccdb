"""The C library keeps memory that a pass frees, so that the next pass need not get it from the system page by page."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys, threading
from splitnet.quant.device import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def one_pass():
    pieces = [bytearray(3 << 20) for _ in range(6)]  # each of which is far smaller than all

def passes():
    for _ in range(3):
        one_pass()
    before = faults()
    one_pass()
    print(faults() - before)

if sys.argv[1] == "kept":
    keep_freed_memory()
thread = threading.Thread(target=passes)
thread.start()
thread.join()
"""

PIECE_PAGES = (3 << 20) // 4096


def faults(how: str, **environment: str) -> int:
    """Pages that a pass requests from the system."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, how], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.full
@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc alone is told to keep memory")
def test_a_pass_uses_the_memory_of_the_one_before_unless_the_environment_says_otherwise() -> None:
    assert faults("not") > PIECE_PAGES
    assert faults("kept") < PIECE_PAGES
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="100000") > PIECE_PAGES
