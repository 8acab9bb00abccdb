"""How many bytes wait to be sent to each receiver: one that does not read must not fill this process's memory."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple, Protocol

from splitnet.limits import Budget
from splitnet.wire.endpoints import Connection, Destination, Endpoint

LARGE_BYTES = 64 * 1024
TRACKED_BYTES = 256 * 1024
"""ZeroMQ is asked when it is done with a message only after so many bytes for a receiver, as asking takes time."""

MAX_BACKLOG_BYTES = 1 << 30


class Tracker(Protocol):
    """What ZeroMQ gives for a message: whether it is done with it."""

    @property
    def done(self) -> bool: ...


class Backlog:
    """Messages that ZeroMQ still holds. It sends those for a receiver in order, so the last of some tells of them all.

    One thread sends; `held` may be called from any. `budget` accounts for them by key that has connected, or endpoint.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._waiting: deque[tuple[Hashable, int, Tracker]] = deque()
        self._lock = threading.Lock()
        self._small: dict[bytes | Endpoint, int] = {}
        """Bytes that were sent to a receiver since something was tracked, at most `TRACKED_BYTES`."""

    def untracked(self, receiver: Destination, size: int) -> bool:
        """Whether a message of `size` bytes may be sent without being tracked."""
        name = _name(receiver)
        waiting = self._small.get(name, 0) + size
        if size > LARGE_BYTES or waiting > TRACKED_BYTES:
            return False
        self._small[name] = waiting
        return True

    def reserve(self, receiver: Destination, size: int) -> int:
        """Reserves room for a tracked message and the untracked ones before it; returns their bytes, 0: no room."""
        size += self._small.get(_name(receiver), 0)
        account = _account(receiver)
        if not self._budget.has_room(size, account):
            self._forget_sent()
        if not self._budget.reserve(size, account):
            return 0
        self._small.pop(_name(receiver), None)
        return size

    def add(self, receiver: Destination, size: int, tracker: Tracker | None) -> None:
        """Counts what was reserved until `tracker` is done; None: it is not sent at all."""
        if tracker is None:
            self._budget.release(size, _account(receiver))
            return
        with self._lock:
            self._waiting.append((_account(receiver), size, tracker))
            # Most are sent by the time the next is: the queue stays short without a look at all of it.
            while self._waiting and self._waiting[0][2].done:
                account, size, _ = self._waiting.popleft()
                self._budget.release(size, account)

    def held(self, receiver: Destination) -> int:
        """Bytes for a receiver that are tracked and not sent yet."""
        if self._budget.held(_account(receiver)):
            self._forget_sent()
        return self._budget.held(_account(receiver))

    def forget(self, receiver: Destination) -> None:
        """Nothing more is sent to a receiver."""
        self._small.pop(_name(receiver), None)

    def _forget_sent(self) -> None:
        with self._lock:
            for _ in range(len(self._waiting)):
                waiting = self._waiting.popleft()
                if waiting[2].done:
                    self._budget.release(waiting[1], waiting[0])
                else:
                    self._waiting.append(waiting)


def _name(receiver: Destination) -> bytes | Endpoint:
    return receiver.routing_id if isinstance(receiver, Connection) else receiver


def _account(receiver: Destination) -> Hashable:
    return receiver.curve if isinstance(receiver, Connection) else receiver


class Wake:
    """A flag with a file descriptor that is readable while the flag is set; an eventfd where the system has them."""

    def __init__(self) -> None:
        self._read: Callable[[int], bytes]
        self._write: Callable[[bytes], int]
        self._open = contextlib.ExitStack()
        if hasattr(os, "eventfd"):
            event = self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._read, self._write = partial(os.read, event), partial(os.write, event)
            self._open.callback(os.close, event)
        else:  # no pipe: on Windows ZeroMQ polls nothing but sockets
            reading, writing = map(self._open.enter_context, socket.socketpair())
            reading.setblocking(False)
            writing.setblocking(False)
            self._descriptor = reading.fileno()
            self._read, self._write = reading.recv, writing.send

    def fileno(self) -> int:
        return self._descriptor

    def set(self) -> None:
        """Makes the descriptor readable. Thread-safe."""
        with contextlib.suppress(BlockingIOError):  # it is readable already
            self._write(b"\1\0\0\0\0\0\0\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(self._read(4096)) == 4096:
                pass

    def close(self) -> None:
        self._open.close()


if sys.platform != "win32":
    import fcntl

_LINUX = sys.platform in ("linux", "android")
_ANY_TCP = socket.AF_INET, socket.SOCK_STREAM, 0
"""Of a borrowed descriptor; its true family is not needed where this is used, and takes time to ask for."""
_SO_COOKIE = 57
_UNREAD, _UNSENT = 0x541B, 0x5411
_TCP_INFO_BYTES = 256
MOVED_BYTES = 1024  # heartbeats of a link carry less within seconds

_ACKED_AND_RECEIVED = struct.Struct("QQ")
_ACKED_AT = 120  # where `tcpi_bytes_acked` and `tcpi_bytes_received` stand in `struct tcp_info` (Linux 4.2 and later)


QUEUE_BYTES = 8 * 1024  # bytes that wait on a link count as a queue from here on: any step has less under way


class Traffic(NamedTuple):
    """Of one connection, in bytes."""

    acked: int  # sent, and confirmed by the other side
    unsent: int  # written by this process, and not confirmed
    read: int  # received and read by this process
    received: int

    def has_sent(self, before: Traffic) -> bool:
        """Whether the other side has confirmed bytes that others had to wait for, or still have to."""
        waited = self.unsent > 0 or before.unsent >= QUEUE_BYTES
        return waited and self.acked - before.acked >= MOVED_BYTES

    def has_received(self, before: Traffic) -> bool:
        """Whether more than heartbeats has arrived."""
        return self.received - before.received >= MOVED_BYTES


def cookie(descriptor: int) -> bytes:
    """Identifies a connected socket among all that are open. Raises OSError if it is none. Where the kernel has no
    cookies (before Linux 4.12, as in many phones, and elsewhere), these are its two addresses."""
    if _LINUX:
        with _Borrowed(*_ANY_TCP, descriptor) as handle:
            try:
                return handle.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
            except OSError as error:
                if error.errno != errno.ENOPROTOOPT:
                    raise
    return repr(ends(descriptor)).encode()


def ends(descriptor: int) -> tuple[Any, Any]:
    """Addresses of this side and of the other, as `socket` has them. Raises OSError if it is gone."""
    with _Borrowed(fileno=descriptor) as handle:
        return handle.getsockname(), handle.getpeername()


def has_address(host: str) -> bool:
    """Whether this machine has an address, an IPv4 one within IPv6 too."""
    host = host.removeprefix("::ffff:")  # an IPv4 one, which not every system binds as an IPv6 one
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True


def traffic(descriptor: int) -> Traffic | None:
    """What has passed; None where the kernel does not tell. Raises OSError if it is no TCP socket any more."""
    if not _LINUX:
        return None
    with _Borrowed(*_ANY_TCP, descriptor) as handle:
        info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _ACKED_AT + _ACKED_AND_RECEIVED.size:
        return None
    acked, received = _ACKED_AND_RECEIVED.unpack_from(info, _ACKED_AT)
    return Traffic(acked, _queued(descriptor, _UNSENT), received - _queued(descriptor, _UNREAD), received)


def hang_up(descriptor: int, expected: bytes) -> None:
    """Ends the connection with this cookie, if it has not ended: ZeroMQ finds it closed by the other side."""
    with (
        contextlib.suppress(OSError),  # ZeroMQ has closed it
        _Borrowed(*_ANY_TCP, descriptor) as handle,
        contextlib.closing(handle.dup()) as copy,  # the number may be given to another connection meanwhile
    ):
        if cookie(copy.fileno()) == expected:
            copy.shutdown(socket.SHUT_RDWR)


class _Borrowed(socket.socket):
    """A descriptor that stays open at the end."""

    def __exit__(self, *_: object) -> None:
        self.detach()


def _queued(descriptor: int, which: int) -> int:
    size = array.array("i", [0])
    fcntl.ioctl(descriptor, which, size)
    return size[0]
