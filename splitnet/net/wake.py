"""Waking a thread that polls file descriptors from another thread."""

from __future__ import annotations

import contextlib
import os


class Wake:
    """A flag with a file descriptor that is readable while the flag is set; an eventfd where the system has them."""

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self._read = self._write = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._read, self._write = os.pipe()
            os.set_blocking(self._read, False)
            os.set_blocking(self._write, False)

    def fileno(self) -> int:
        return self._read

    def set(self) -> None:
        """Makes the descriptor readable. May be called from any thread."""
        with contextlib.suppress(BlockingIOError):  # it is readable already
            os.write(self._write, b"\1\0\0\0\0\0\0\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._read, 4096)) == 4096:
                pass

    def close(self) -> None:
        for descriptor in {self._read, self._write}:
            os.close(descriptor)
