"""Where a peer listens, and how others reach this machine if the user does not say."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket

from splitnet.errors import AddressInUse, SplitnetError


def public_address(listen: str, port: int, public_host: str | None) -> str:
    """`tcp://host:port` to announce.

    Args:
        listen: what the peer listens on.
        port: the one that it got.
        public_host: `HOST` or `HOST:PORT` that the user gave.
    """
    host = public_host or reachable_host(listen)
    has_port = host.rpartition(":")[2].isdecimal() and not host.endswith("]")
    return f"tcp://{host}" if has_port else f"tcp://{host}:{port}"


def reachable_host(listen: str) -> str:
    """The host of `listen`; for a wildcard, this machine's address on its default route."""
    host = listen.removeprefix("tcp://").rpartition(":")[0]
    if host not in ("0.0.0.0", "*", "[::]", ""):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # no packet is sent: this only asks the kernel for a route
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def dht_address(listen: str) -> str:
    """The multiaddr for the DHT on the host of `listen`, any port."""
    return f"/ip4/{_ip_of(listen)}/tcp/0"


def is_reachable(listen: str) -> bool:
    """Whether other machines can reach what listens there: anywhere but on loopback."""
    return not ipaddress.ip_address(_ip_of(listen)).is_loopback


def _ip_of(listen: str) -> str:
    host = listen.removeprefix("tcp://").rpartition(":")[0]
    if host in ("*", ""):
        host = "0.0.0.0"
    try:
        return socket.gethostbyname(host)
    except OSError:
        return "0.0.0.0"


def refuse_taken(listen: str) -> None:
    """Checks an address such as `tcp://0.0.0.0:31331`, so that one that cannot be used is told before blocks load.

    Raises:
        AddressInUse: something listens there.
        SplitnetError: it is not an address of this machine.
    """
    match = re.fullmatch(r"tcp://(.+):(\d+)", listen)
    if match is None or int(match[2]) > 65535:
        raise SplitnetError(
            f"{listen!r} is no address to listen on: write tcp://HOST:PORT, with port 0 for any free one"
        )
    host = "0.0.0.0" if match[1] == "*" else match[1].strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(match[2]), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{listen} is taken: choose another port with --listen, or 0 for any free one") from None
        raise SplitnetError(
            f"cannot listen on {listen} ({error.strerror}): give an address of this machine, or tcp://0.0.0.0:0"
        ) from None
