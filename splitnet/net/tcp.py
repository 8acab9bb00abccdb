"""What the kernel knows of a TCP connection whose descriptor belongs to ZeroMQ.

ZeroMQ may close a descriptor at any moment, and the kernel gives its number to another connection or file: whoever uses
one compares `cookie`, which no two sockets share.
"""

from __future__ import annotations

import array
import errno
import socket
import struct
import sys
from typing import NamedTuple

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
    handle = _borrow(descriptor)
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
