"""The threads of OpenMP that help a thread to compute."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from pathlib import Path

_SOFT = 1
"""`omp_pause_soft`: what was set stays."""


def end_threads() -> None:
    """Ends the threads that help this one to compute; when it computes again, it gets new ones. Others keep theirs.

    libgomp, which torch brings for Linux, has threads for each one that computes, as long as that lives. Where all of
    them are more than the processors, they sleep whenever they have nothing to do, and a decode step, which has work
    for them every few microseconds, takes up to twice as long. So who computes no more calls this.
    """
    for library in _libraries():
        library.omp_pause_resource_all(_SOFT)


@cache
def _libraries() -> list[ctypes.CDLL]:
    """Those that are loaded: torch's, and another if the kernels were not given that one."""
    with suppress(OSError):  # there is no such file but on Linux
        files = {line[line.find("/") :] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line}
        return [library for library in map(ctypes.CDLL, files) if hasattr(library, "omp_pause_resource_all")]
    return []
