"""The threads of OpenMP that help a thread to compute."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache

import torch

_SOFT = 1
"""`omp_pause_soft`: what was set stays."""


def end_threads() -> None:
    """Ends the threads that help this one to compute; when it computes again, it gets new ones. Others keep theirs.

    libgomp, which torch brings for Linux, has threads for each one that computes, as long as that lives. Where all of
    them are more than the processors, they sleep whenever they have nothing to do, and a decode step, which has work
    for them every few microseconds, takes up to four times as long. So who computes no more calls this.
    """
    pause = getattr(linked_with_torch(), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)


@cache
def linked_with_torch() -> ctypes.CDLL | None:
    """What torch itself was linked with, whatever that is called, its OpenMP too; None: such a torch does not tell."""
    with suppress(AttributeError, OSError):
        return ctypes.CDLL(torch._C.__file__)
    return None
