"""Waking a thread that polls file descriptors from another thread."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from functools import partial


class Wake:
    """A flag with a file descriptor that is readable while the flag is set; an eventfd where the system has them."""

    def __init__(self) -> None:
        self._read: Callable[[int], bytes]
        self._write: Callable[[bytes], int]
        self._close: Callable[[], None]
        if hasattr(os, "eventfd"):
            event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._descriptor = event
            self._read, self._write = partial(os.read, event), partial(os.write, event)
            self._close = partial(os.close, event)
        else:  # no pipe: on Windows ZeroMQ polls nothing but sockets
            reading, writing = socket.socketpair()
            reading.setblocking(False)
            writing.setblocking(False)
            self._descriptor = reading.fileno()
            self._read, self._write = reading.recv, writing.send

            def close() -> None:
                reading.close()
                writing.close()

            self._close = close

    def fileno(self) -> int:
        return self._descriptor

    def set(self) -> None:
        """Makes the descriptor readable. May be called from any thread."""
        with contextlib.suppress(BlockingIOError):  # it is readable already
            self._write(b"\1\0\0\0\0\0\0\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(self._read(4096)) == 4096:
                pass

    def close(self) -> None:
        self._close()
