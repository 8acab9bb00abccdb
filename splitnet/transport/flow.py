"""Bytes that wait to be sent to each receiver, so that a receiver that does not read cannot fill this process's memory;
and the kernel's counts of bytes on TCP connections."""

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

LARGE_BYTES = 64 * 1024  # messages above this size are always tracked, and are sent without a copy
TRACKED_BYTES = 256 * 1024
"""After this many untracked bytes for a receiver, the next message is tracked. To track every message would be slow."""

MAX_BACKLOG_BYTES = 1 << 30  # bytes that wait to be sent, over all receivers


class Tracker(Protocol):
    """ZeroMQ's handle of a tracked message: whether the message was sent or dropped."""

    @property
    def done(self) -> bool: ...


class Backlog:
    """Messages that ZeroMQ still holds. ZeroMQ sends the messages of a receiver in order, so when a tracked message is
    done, the untracked messages before this message are done, too.

    One thread sends; any thread may call `held_bytes`. `budget` accounts for messages by the key of an incoming
    connection, or by endpoint.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._waiting: deque[tuple[Hashable, int, Tracker]] = deque()
        self._lock = threading.Lock()
        self._small: dict[bytes | Endpoint, int] = {}
        """Bytes sent to a receiver since its last tracked message, at most `TRACKED_BYTES`."""

    def untracked(self, receiver: Destination, size: int) -> bool:
        """Whether a message of `size` bytes may be sent without being tracked."""
        name = _name(receiver)
        waiting = self._small.get(name, 0) + size
        if size > LARGE_BYTES or waiting > TRACKED_BYTES:
            return False
        self._small[name] = waiting
        return True

    def reserve_room(self, receiver: Destination, size: int) -> int:
        """Reserves room for a tracked message and the untracked messages before it. Returns the reserved bytes; 0: no
        room."""
        size += self._small.get(_name(receiver), 0)
        account = _account(receiver)
        if not self._budget.has_room(size, account):
            self._forget_sent()
        if not self._budget.reserve(size, account):
            return 0
        self._small.pop(_name(receiver), None)
        return size

    def add_message(self, receiver: Destination, size: int, tracker: Tracker | None) -> None:
        """Keeps `size` reserved bytes until `tracker` is done; None: the message was not sent."""
        if tracker is None:
            self._budget.release(size, _account(receiver))
            return
        with self._lock:
            self._waiting.append((_account(receiver), size, tracker))
            # Most messages are sent before the next one is added, so a check of the first ones keeps the queue short.
            while self._waiting and self._waiting[0][2].done:
                account, size, _ = self._waiting.popleft()
                self._budget.release(size, account)

    def held_bytes(self, receiver: Destination) -> int:
        """Tracked bytes for a receiver that are not sent yet."""
        if self._budget.held_bytes(_account(receiver)):
            self._forget_sent()
        return self._budget.held_bytes(_account(receiver))

    def forget_receiver(self, receiver: Destination) -> None:
        """Forgets the count of untracked bytes of a receiver to which no more messages are sent."""
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
    """A flag with a file descriptor that is readable while the flag is set: an eventfd where the system has eventfds,
    else a socket pair."""

    def __init__(self) -> None:
        self._read: Callable[[int], bytes]
        self._write: Callable[[bytes], int]
        self._open = contextlib.ExitStack()
        if hasattr(os, "eventfd"):
            event = self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._read, self._write = partial(os.read, event), partial(os.write, event)
            self._open.callback(os.close, event)
        else:  # not a pipe: on Windows ZeroMQ polls only sockets
            reading, writing = map(self._open.enter_context, socket.socketpair())
            reading.setblocking(False)
            writing.setblocking(False)
            self._descriptor = reading.fileno()
            self._read, self._write = reading.recv, writing.send

    def fileno(self) -> int:
        return self._descriptor

    def set(self) -> None:
        """Makes the descriptor readable. Thread-safe."""
        with contextlib.suppress(BlockingIOError):  # the flag is set already
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
"""Family, type and protocol for a borrowed descriptor. The calls here do not need the real family, and a query for it
takes time."""
_SO_COOKIE = 57  # a socket option of Linux, which `socket` does not name
_UNREAD, _UNSENT = 0x541B, 0x5411  # the ioctls SIOCINQ and SIOCOUTQ of Linux
_TCP_INFO_BYTES = 256
MOVED_BYTES = 1024  # more than the heartbeats of a link take within a few seconds

_ACKED_AND_RECEIVED = struct.Struct("QQ")
_ACKED_AT = 120  # offset of `tcpi_bytes_acked` and `tcpi_bytes_received` in `struct tcp_info` (Linux 4.2 and later)


QUEUE_BYTES = 8 * 1024  # more waiting bytes on a link count as a queue; a decode step has fewer in flight


class LinkTraffic(NamedTuple):
    """Bytes of one connection, as the kernel counts them."""

    acked: int  # sent and confirmed by the other side
    unsent: int  # written by this process and not confirmed
    read: int  # received and read by this process
    received: int

    def has_sent(self, before: LinkTraffic) -> bool:
        """Whether the link has moved a queue: the other side has confirmed bytes while later bytes waited."""
        waited = self.unsent > 0 or before.unsent >= QUEUE_BYTES
        return waited and self.acked - before.acked >= MOVED_BYTES

    def has_received(self, before: LinkTraffic) -> bool:
        """Whether more bytes have arrived than heartbeats take."""
        return self.received - before.received >= MOVED_BYTES


def cookie(descriptor: int) -> bytes:
    """Identifies a connected socket among all open sockets. Where the kernel has no socket cookies (before Linux 4.12,
    as in many phones, and on other systems), the result is made of the two addresses of the socket. Raises OSError:
    the descriptor is not a connected socket."""
    if _LINUX:
        with _Borrowed(*_ANY_TCP, descriptor) as handle:
            try:
                return handle.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
            except OSError as error:
                if error.errno != errno.ENOPROTOOPT:
                    raise
    return repr(addresses_of(descriptor)).encode()


def addresses_of(descriptor: int) -> tuple[Any, Any]:
    """Addresses of this side and of the other side, in the format of the module `socket`. Raises OSError: the
    connection has ended."""
    with _Borrowed(fileno=descriptor) as handle:
        return handle.getsockname(), handle.getpeername()


def is_own_address(host: str) -> bool:
    """Whether `host` is an address of this machine; `host` may be an IPv4-mapped IPv6 address."""
    host = host.removeprefix("::ffff:")  # not every system binds an IPv4-mapped address
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True


def traffic(descriptor: int) -> LinkTraffic | None:
    """Byte counts of a connection; None where the kernel has none. Raises OSError: the descriptor is not a TCP
    socket."""
    if not _LINUX:
        return None
    with _Borrowed(*_ANY_TCP, descriptor) as handle:
        info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _ACKED_AT + _ACKED_AND_RECEIVED.size:
        return None
    acked, received = _ACKED_AND_RECEIVED.unpack_from(info, _ACKED_AT)
    return LinkTraffic(acked, _queued(descriptor, _UNSENT), received - _queued(descriptor, _UNREAD), received)


def shut_down(descriptor: int, expected: bytes) -> None:
    """Ends the connection with this cookie, if it is open. To ZeroMQ, the other side seems to have closed it."""
    with (
        contextlib.suppress(OSError),  # ZeroMQ has closed it
        _Borrowed(*_ANY_TCP, descriptor) as handle,
        contextlib.closing(handle.dup()) as copy,  # meanwhile the descriptor's number may go to another connection
    ):
        if cookie(copy.fileno()) == expected:
            copy.shutdown(socket.SHUT_RDWR)


class _Borrowed(socket.socket):
    """A socket object over a descriptor that it does not own, and does not close."""

    def __exit__(self, *_: object) -> None:
        self.detach()


def _queued(descriptor: int, which: int) -> int:
    size = array.array("i", [0])
    fcntl.ioctl(descriptor, which, size)
    return size[0]
