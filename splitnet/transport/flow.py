"""How many bytes wait to be sent, and to whom: a receiver that does not read must not fill this process's memory."""

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
from typing import NamedTuple, Protocol

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

    One thread sends; `held` may be called from any.

    Args:
        budget: accounts for them by receiver: a key that has connected, or an endpoint.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._waiting: deque[tuple[Hashable, int, Tracker]] = deque()
        self._lock = threading.Lock()
        self._small: dict[bytes | Endpoint, int] = {}
        """Bytes that were sent to a receiver since something was tracked, at most `TRACKED_BYTES`."""

    def untracked(self, receiver: Destination, size: int) -> bool:
        """Whether a message of `size` bytes goes out as it is; otherwise it must be tracked."""
        name = _name(receiver)
        waiting = self._small.get(name, 0) + size
        if size > LARGE_BYTES or waiting > TRACKED_BYTES:
            return False
        self._small[name] = waiting
        return True

    def reserve(self, receiver: Destination, size: int) -> int:
        """Makes room for a message that is tracked, and what went before it; returns their bytes, 0: there is none."""
        size += self._small.get(_name(receiver), 0)
        account = _account(receiver)
        if not self._budget.has_room(size, account):
            self._forget_sent()
        if not self._budget.reserve(size, account):
            return 0
        self._small.pop(_name(receiver), None)
        return size

    def add(self, receiver: Destination, size: int, tracker: Tracker | None) -> None:
        """Counts what was reserved until `tracker` says that it is sent or dropped; None: it is not sent at all."""
        if tracker is None:
            self._budget.release(size, _account(receiver))
            return
        with self._lock:
            self._waiting.append((_account(receiver), size, tracker))
            # Most are sent by the time the next is: what is known here stays short without looking at all of it.
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


if sys.platform != "win32":
    import fcntl

_LINUX = sys.platform in ("linux", "android")
_SO_COOKIE = 57
_UNREAD, _UNSENT = 0x541B, 0x5411
_TCP_INFO_BYTES = 256
MOVED_BYTES = 1024
"""What keeps a link open does not carry so much within seconds."""

_ACKED_AND_RECEIVED = struct.Struct("QQ")
_ACKED_AT = 120
"""Where `tcpi_bytes_acked` and `tcpi_bytes_received` stand in `struct tcp_info` (Linux 4.2 and later)."""


QUEUE_BYTES = 8 * 1024
"""What waits on a link counts as a queue from here on: less is what any step has under way."""


class Traffic(NamedTuple):
    """Of one connection, in bytes."""

    acked: int
    """Sent, and confirmed by the other side."""
    unsent: int
    """Written by this process, and not confirmed."""
    read: int
    """Received and read by this process."""
    received: int

    def has_sent(self, before: Traffic) -> bool:
        """Whether the other side has confirmed something for which others had to wait, or still have to."""
        waited = self.unsent > 0 or before.unsent >= QUEUE_BYTES
        return waited and self.acked - before.acked >= MOVED_BYTES

    def has_received(self, before: Traffic) -> bool:
        """Whether more has come than what keeps it open."""
        return self.received - before.received >= MOVED_BYTES


def cookie(descriptor: int) -> bytes:
    """What tells a connected socket from every other one that is open. Raises OSError if it is none.

    Where the kernel has no cookies (before Linux 4.12, as in many phones, and elsewhere), these are its two addresses.
    """
    if _LINUX:
        handle = _borrow(descriptor)
        try:
            return handle.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
        finally:
            handle.detach()
    handle = socket.socket(fileno=descriptor)
    try:
        return repr((handle.getsockname(), handle.getpeername())).encode()
    finally:
        handle.detach()


def other_end(descriptor: int) -> tuple[str, int]:
    """Host and port of the other side. Raises OSError if it is gone."""
    handle = socket.socket(fileno=descriptor)
    try:
        host, port = handle.getpeername()[:2]
        return host.removeprefix("::ffff:"), port
    finally:
        handle.detach()


def own_host(descriptor: int) -> str:
    """Host of this side. Raises OSError if it is gone."""
    handle = socket.socket(fileno=descriptor)
    try:
        return handle.getsockname()[0]
    finally:
        handle.detach()


def has_address(host: str) -> bool:
    """Whether this machine has an address, as `own_host` tells it."""
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
    handle = _borrow(descriptor)
    try:
        info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    finally:
        handle.detach()
    if len(info) < _ACKED_AT + _ACKED_AND_RECEIVED.size:
        return None
    acked, received = _ACKED_AND_RECEIVED.unpack_from(info, _ACKED_AT)
    return Traffic(acked, _queued(descriptor, _UNSENT), received - _queued(descriptor, _UNREAD), received)


def hang_up(descriptor: int, expected: bytes) -> None:
    """Ends the connection with this cookie, if it has not ended: ZeroMQ finds it closed by the other side."""
    try:
        handle = _borrow(descriptor)
    except OSError:  # ZeroMQ has closed it
        return
    try:
        copy = handle.dup()  # the number may be given to another meanwhile
    except OSError:
        return
    finally:
        handle.detach()
    with copy:
        try:
            if cookie(copy.fileno()) == expected:
                copy.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def _borrow(descriptor: int) -> socket.socket:
    """A handle to be detached; its family, which nothing here needs, is not asked for."""
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, descriptor)


def _queued(descriptor: int, which: int) -> int:
    size = array.array("i", [0])
    fcntl.ioctl(descriptor, which, size)
    return size[0]
