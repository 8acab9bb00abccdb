"""The ends of links, as everything but the transport sees them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from splitnet.security.identity import PublicKey

_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:.]{2,45}\]|[0-9.]{7,15}):([0-9]{1,5})")


def is_address(text: str) -> bool:
    """Whether `text` is `tcp://IP:port` with a port that can be connected to; an IPv6 address stands in brackets.

    Host names are none: others give these texts, and ZeroMQ would have all links wait while it looks a name up. Nor is
    an IPv4 address within an IPv6 one: it would pass for another host than it is.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or not 1 <= int(match[2]) <= 65535:
        return False
    host = match[1]
    try:
        if host.startswith("["):
            ip = ipaddress.IPv6Address(host[1:-1])
            return not ip.is_unspecified and ip.ipv4_mapped is None
        return not ipaddress.IPv4Address(host).is_unspecified
    except ValueError:
        return False


def host_and_port(address: str) -> tuple[str, int]:
    """Of `tcp://IP:port`."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def address_of(name: tuple[str, int]) -> str:
    """`tcp://IP:port` of what `getsockname` and `getpeername` tell; IPv4 addresses within IPv6 are IPv4 addresses."""
    host, port = name[0].partition("%")[0], name[1]
    ip = ipaddress.ip_address(host)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return f"tcp://{ip}:{port}" if ip.version == 4 else f"tcp://[{ip}]:{port}"


def is_global(address: str) -> bool:
    """Whether the IP of `tcp://IP:port` is one of the internet."""
    return ipaddress.ip_address(host_and_port(address)[0]).is_global


class Relay(NamedTuple):
    """A helper through which a hidden peer is reached."""

    address: str  # `tcp://IP:port` of its streams
    key: bytes  # raw Ed25519 public key, 32 bytes


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a peer listens, and the key that it must prove to have."""

    address: str  # `tcp://IP:port`
    key: PublicKey
    relays: tuple[Relay, ...] = field(default=(), compare=False)
    """Through whom it is reached; empty: directly. They come and go, and it stays the same peer."""
    hidden: bool = field(init=False)  # it is not reached directly

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", bool(self.relays))

    # Both several times for each message.
    def __hash__(self) -> int:
        return hash(self.address)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Endpoint)
            and self.address == other.address
            and self.key.raw == other.key.raw
            and self.hidden == other.hidden
        )


@dataclass(frozen=True, slots=True)
class Connection:
    """An incoming connection: the proven CURVE key of the other side and where answers go."""

    routing_id: bytes
    curve: bytes  # raw CURVE public key, 32 bytes


Destination = Endpoint | Connection


class LinkState(Enum):
    """State of an outgoing link."""

    CONNECTING = "connecting"
    UP = "up"
    DOWN = "down"  # the link is lost, no process listens there, or the handshake timed out; ZeroMQ keeps trying
    REFUSED = "refused"  # the other side does not accept our key
    WRONG_KEY = "wrong key"  # what answers there ends the handshake: it has another key, or is no peer

    @property
    def is_final(self) -> bool:
        """Whether the keys do not fit, so that trying again changes nothing."""
        return self in (LinkState.REFUSED, LinkState.WRONG_KEY)
