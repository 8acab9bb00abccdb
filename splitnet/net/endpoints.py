"""The ends of links, as everything but the transport sees them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from splitnet.net.identity import PublicKey

_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?):([0-9]{1,5})")


def is_address(text: str) -> bool:
    """Whether `text` is `tcp://host:port` with one host and a port that can be connected to."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and 1 <= int(match[2]) <= 65535


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a peer listens, and the key that it must prove to have."""

    address: str
    """`tcp://host:port`"""
    key: PublicKey


@dataclass(frozen=True, slots=True)
class Connection:
    """An incoming connection: the proven CURVE key of the other side and where answers go."""

    routing_id: bytes
    curve: bytes
    """Raw CURVE public key, 32 bytes."""


Destination = Endpoint | Connection


class LinkState(Enum):
    """State of an outgoing link."""

    CONNECTING = "connecting"
    UP = "up"
    DOWN = "down"
    """It was up and is lost, or nobody listens there; ZeroMQ keeps trying."""
    REFUSED = "refused"
    """The other side proved another key, or does not accept ours."""
