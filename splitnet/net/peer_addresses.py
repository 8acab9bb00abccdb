"""How a peer's own port is written as an address to join with: `tcp://HOST:PORT?key=` and its public key."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from splitnet.errors import DirectoryError, KeyFileError, SplitnetError
from splitnet.net.addresses import with_literal_host
from splitnet.net.endpoints import Endpoint, is_address
from splitnet.net.identity import PublicKey

_SCHEME, _KEY = "tcp://", "?key="


def peer_address(endpoint: Endpoint) -> str:
    """The address to join through a peer with."""
    return f"{endpoint.address}{_KEY}{endpoint.key.text}"


def is_peer_address(address: str) -> bool:
    """Whether an address to join with is meant as that of a peer, not as a multiaddr."""
    return address.startswith(_SCHEME)


def split_addresses(addresses: Sequence[str]) -> tuple[list[str], list[str]]:
    """The multiaddrs among addresses to join with, and those of peers."""
    return [one for one in addresses if not is_peer_address(one)], [one for one in addresses if is_peer_address(one)]


def check_peer_address(address: str) -> PublicKey:
    """The key of an address, which is not looked up.

    Raises:
        DirectoryError: it is not written as one.
    """
    place, separator, key = address.removeprefix(_SCHEME).partition(_KEY)
    host, _, port = place.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise DirectoryError(
            f"{address!r} is no address of a peer: copy a whole one that `splitnet peer` prints, tcp://HOST:PORT?key=..."
        )
    try:
        return PublicKey.parse(key)
    except KeyFileError as error:
        raise DirectoryError(f"the key in {address!r} is none: {error}") from None


def endpoint_of(address: str) -> Endpoint:
    """Where a peer is, of an address to join with; a host name is looked up.

    Raises:
        DirectoryError: it is not written as one.
        SplitnetError: the name has no address.
    """
    key = check_peer_address(address)
    endpoint = Endpoint(_SCHEME + with_literal_host(address.removeprefix(_SCHEME).partition(_KEY)[0]), key)
    if not is_address(endpoint.address):
        raise DirectoryError(f"nobody can be reached at {endpoint.address}: give the host of the peer")
    return endpoint


def hosts_of(addresses: Sequence[str]) -> frozenset[str]:
    """The IP addresses of hosts that addresses to join with name, IPv6 ones in brackets; names are looked up."""
    found: set[str] = set()
    for address in addresses:
        parts = address.split("/")  # /ip4/HOST/tcp/PORT/p2p/ID
        host = address.removeprefix(_SCHEME).partition(_KEY)[0] if is_peer_address(address) else parts[2]
        with suppress(SplitnetError):
            literal = with_literal_host(f"[{host}]" if parts[1] == "ip6" else host)
            found.add(literal if literal.endswith("]") else literal.rpartition(":")[0] or literal)
    return frozenset(found)
