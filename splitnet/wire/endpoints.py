"""Endpoints, connections and link states: the ends of links as the code outside the transport knows them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from splitnet.security.identity import PublicKey

_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:.]{2,45}\]|[0-9.]{7,15}):([0-9]{1,5})")


def is_address(text: str) -> bool:
    """Whether `text` is `tcp://IP:port` with a port from 1 to 65535; an IPv6 address is written in brackets.

    Host names are refused: remote processes send these texts, and all links wait while ZeroMQ resolves a name.
    IPv4-mapped IPv6 addresses are refused, because they would count as another host than their IPv4 address.
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
    """The IP (an IPv6 address without brackets) and port of `tcp://IP:port`."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether the IP of `tcp://IP:port` is of this machine alone."""
    return ipaddress.ip_address(host_and_port(address)[0]).is_loopback  # `is_address` refuses IPv4-mapped addresses


def address_of(name: tuple[str, int]) -> str:
    """`tcp://IP:port` for a name from `getsockname` or `getpeername`; an IPv4-mapped IPv6 address becomes IPv4."""
    host, port = name[0].partition("%")[0], name[1]
    ip = ipaddress.ip_address(host)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return f"tcp://{ip}:{port}" if ip.version == 4 else f"tcp://[{ip}]:{port}"


def is_global(address: str) -> bool:
    """Whether the IP of `tcp://IP:port` is globally routable."""
    return ipaddress.ip_address(host_and_port(address)[0]).is_global


class Relay(NamedTuple):
    """A relay through which an unreachable peer is reached."""

    address: str  # `tcp://IP:port` at which the relay accepts streams
    key: bytes  # raw Ed25519 public key, 32 bytes


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address at which a peer listens, and the key that the peer must prove."""

    address: str  # `tcp://IP:port`
    key: PublicKey
    relays: tuple[Relay, ...] = field(default=(), compare=False)
    """Relays through which the peer is reached; empty: the peer is reached directly. Not compared, because the relays
    of a peer change."""
    hidden: bool = field(init=False)  # the peer is reached through relays

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", bool(self.relays))

    # Written out for speed: both methods run several times for each message.
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
    """An incoming connection: the proven CURVE key of the other side, and the ZeroMQ routing id for answers."""

    routing_id: bytes
    curve: bytes  # raw CURVE public key, 32 bytes


Destination = Endpoint | Connection


class LinkState(Enum):
    """State of an outgoing link."""

    CONNECTING = "connecting"
    UP = "up"
    DOWN = "down"  # the link is lost, no process listens there, or the handshake timed out; ZeroMQ keeps trying
    REFUSED = "refused"  # the other side does not accept the key of this process
    WRONG_KEY = "wrong key"  # the other side ends the handshake: it has another key, or is not a peer

    @property
    def is_final(self) -> bool:
        """Whether a key was refused or is wrong, so that another attempt would fail, too."""
        return self in (LinkState.REFUSED, LinkState.WRONG_KEY)
