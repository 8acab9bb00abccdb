"""A router's address translation for the hosts behind it, in the terms of RFC 4787."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.netlab.errors import LabError

Kind = Literal["independent", "address", "address-and-port"]
KINDS: tuple[Kind, ...] = ("independent", "address", "address-and-port")
TRANSPORTS = {"tcp": 6, "udp": 17}
PROTOCOLS = ("nat-pmp", "upnp")


@dataclass(frozen=True)
class Router:
    """A router with address translation of TCP and UDP. It drops fragments and packets of other protocols.

    An outgoing SYN makes a TCP mapping. Packets in both directions keep mappings alive.

    Args:
        mapping: whether a socket has one public port for all remotes, one for each address, or one for each address
            and port (such a router is called symmetric).
        filtering: whether all remotes may send to a public port, or only the addresses to which the host has sent from
            this port, or only the addresses and ports to which the host has sent.
        random_ports: whether public ports are random; otherwise the public port equals the private port if it is free.
        hairpin: whether hosts behind the router reach each other at the router's public address.
        reset: whether the router answers a filtered SYN with RST, instead of dropping the SYN.
        udp_idle_s, tcp_idle_s: seconds without packets after which a mapping ends.
        protocols: the protocols with which hosts may request forwarded ports: `nat-pmp`, `upnp`, or both.

    Raises:
        LabError: a value is invalid.
    """

    mapping: Kind = "independent"
    filtering: Kind = "address-and-port"
    random_ports: bool = False
    hairpin: bool = False
    reset: bool = False
    udp_idle_s: float = 120.0
    tcp_idle_s: float = 7440.0
    protocols: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind in (self.mapping, self.filtering):
            if kind not in KINDS:
                raise LabError(f"no mapping or filtering is called {kind}: there are {', '.join(KINDS)}")
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise LabError(f"a router does not speak {protocol}: it speaks {' and '.join(PROTOCOLS)}")

    @property
    def command(self) -> str:
        """The hub's command for this router."""
        kinds = f"{KINDS.index(self.mapping)} {KINDS.index(self.filtering)}"
        switches = f"{self.random_ports:d} {self.hairpin:d} {self.reset:d}"
        return f"{kinds} {switches} {float(self.udp_idle_s)} {float(self.tcp_idle_s)}"


NAMED = {
    "full-cone": Router(filtering="independent"),
    "restricted": Router(filtering="address"),
    "port-restricted": Router(),
    "address-mapped": Router(mapping="address"),
    "symmetric": Router(mapping="address-and-port"),
}
"""The kinds of routers, by name."""


def named(kind: str) -> Router:
    """The kind of router with this name.

    Raises:
        LabError: there is no kind with this name.
    """
    if kind not in NAMED:
        raise LabError(f"no kind of router is called {kind}: there are {', '.join(NAMED)}")
    return NAMED[kind]
