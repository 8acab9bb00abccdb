"""Addresses to listen at, to announce to other machines, and to join a swarm with."""

from __future__ import annotations

import ipaddress
import logging
import queue
import re
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

import ifaddr

from splitnet.errors import DirectoryError, KeyFileError, SplitnetError, explain_listen_errors
from splitnet.security.identity import PublicKey
from splitnet.wire.endpoints import Endpoint, is_address

RESOLVE_S = 5.0  # longest wait for the name server
_SCHEME, _KEY = "tcp://", "?key="
_INTERFACES = Path("/sys/class/net")
_INSIDE = "docker|br-|virbr|veth|cni|podman|lxcbr|lxdbr"  # prefixes of names that container programs give interfaces

log = logging.getLogger(__name__)


class Reach(StrEnum):
    """How other machines reach a peer."""

    auto = "auto"  # at the address of the peer; through relays if other peers cannot connect to this address
    direct = "direct"
    helpers = "helpers"


def with_literal_host(text: str) -> str:
    """Replaces the host in `HOST` or `HOST:PORT` by its IP address, as records and messages need it.

    Raises SplitnetError: the name has no address, or no address was found within `RESOLVE_S`.
    """
    match = re.fullmatch(r"(\[[^\]]+\]|[^:]+)(:\d+)?", text)
    if match is None:
        raise SplitnetError(f"{text!r} is not a host: write HOST or HOST:PORT, with an IPv6 address in brackets")
    host = match[1].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = ipaddress.ip_address(_look_up(host))
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return (str(address) if address.version == 4 else f"[{address}]") + (match[2] or "")


def _look_up(host: str) -> str:
    answers: queue.SimpleQueue[str | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            answers.put(OSError(str(error)))
        else:
            answers.put(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])  # pyright: ignore[reportArgumentType]

    threading.Thread(target=ask, name="splitnet-resolver", daemon=True).start()
    try:
        answer = answers.get(timeout=RESOLVE_S)
    except queue.Empty:
        answer = OSError(f"no name server answered within {RESOLVE_S:g} s")
    if isinstance(answer, OSError):
        raise SplitnetError(f"no address was found for {host} ({answer}): check the name, or give the IP address")
    return answer


def public_address(listen: str, port: int, public_host: str | None) -> str:
    """`tcp://IP:port` to announce.

    listen, port: the address at which the peer listens, and the port that the system assigned. public_host: `HOST` or
    `HOST:PORT` from the user. Raises SplitnetError: the host is a name without an address.
    """
    host = with_literal_host(public_host or reachable_host(listen))
    if not public_host and is_wildcard(listen) and host == "127.0.0.1":
        log.warning("No other machine reaches 127.0.0.1: give --public-host, or --listen tcp://[::]:0 for IPv6.")
    has_port = host.rpartition(":")[2].isdecimal() and not host.endswith("]")
    return f"tcp://{host}" if has_port else f"tcp://{host}:{port}"


def reachable_host(listen: str) -> str:
    """The host of `listen`. For a wildcard: this machine's address on its default route, or else on a network with
    other machines, or else 127.0.0.1. IPv4 is preferred, because more machines can connect to it."""
    if not is_wildcard(listen):
        return _host_of(listen)
    families = [socket.AF_INET, socket.AF_INET6] if "[::]" in listen else [socket.AF_INET]
    for look in (_on_default_route, _on_any_network):
        for family in families:
            if host := look(family):
                return host if family == socket.AF_INET else f"[{host}]"
    return "127.0.0.1"


def is_wildcard(listen: str) -> bool:
    """Whether `tcp://host:port` stands for all addresses of this machine, which may change."""
    return _host_of(listen) in ("0.0.0.0", "*", "[::]", "")


def _host_of(listen: str) -> str:
    return listen.removeprefix(_SCHEME).rpartition(":")[0]


def _on_default_route(family: socket.AddressFamily) -> str:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # `connect` on a UDP socket sends no packet; the kernel only chooses a route.
            probe.connect(("192.0.2.1" if family == socket.AF_INET else "2001:db8::1", 9))
            return probe.getsockname()[0]
    except OSError:
        return ""


def own_hosts() -> list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """Addresses of this machine, as pairs of interface name and address. Raises OSError: the system does not give
    these addresses to programs (Android)."""
    ips = [(str(adapter.name), ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    return [(name, ipaddress.ip_address(ip if isinstance(ip, str) else ip[0])) for name, ip in ips]


def _on_any_network(family: socket.AddressFamily) -> str:
    """An address of this machine, preferably a global address of an interface with a carrier; "" if there is none."""
    with suppress(OSError):
        found = [each for each in own_hosts() if (each[1].version == 4) == (family == socket.AF_INET)]
        usable = [one for one in found if not (one[1].is_loopback or one[1].is_link_local or _leads_inside(one[0]))]
        if usable:
            return str(min(usable, key=lambda each: (not _has_carrier(each[0]), not each[1].is_global))[1])
    return ""


def _has_carrier(name: str) -> bool:
    with suppress(OSError):  # the interface is down, or the system has no such file
        return (_INTERFACES / name / "carrier").read_text(encoding="ascii").strip() == "1"
    return False


def _leads_inside(name: str) -> bool:
    """Whether an interface leads only to containers and virtual machines: a bridge without a physical network card."""
    interface = _INTERFACES / name
    is_made = (interface / "bridge").exists() or re.match(_INSIDE, name) is not None
    return is_made and not any(interface.glob("brif/*/device"))


def dht_addresses(listen: str) -> tuple[str, ...]:
    """The multiaddrs at which the DHT listens: the host of `listen`, any free port."""
    host = _ip_of(listen)
    found = f"/ip{host.version}/{host}/tcp/0"
    return (found,) if host != ipaddress.IPv6Address("::") else ("/ip4/0.0.0.0/tcp/0", found)


def is_reachable(listen: str) -> bool:
    """Whether other machines can reach a listener at `listen`: false only for loopback addresses."""
    return not _ip_of(listen).is_loopback


def loopback_address_of(listen: str, port: int) -> str:
    """`tcp://IP:port` at which this machine itself can connect to its listener at `listen` with this port."""
    host = _host_of(listen)
    host = "127.0.0.1" if host in ("", "*", "0.0.0.0") else "[::1]" if host == "[::]" else host
    return f"tcp://{host}:{port}"


def _ip_of(listen: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    host = _host_of(listen)
    with suppress(SplitnetError):
        return ipaddress.ip_address(with_literal_host("0.0.0.0" if host in ("*", "") else host).strip("[]"))
    return ipaddress.IPv4Address("0.0.0.0")


def check_listen_address(listen: str) -> None:
    """Checks that this process can listen at an address such as `tcp://0.0.0.0:31331`, before it loads blocks.

    Raises AddressInUse: another listener has the port; SplitnetError: `listen` is not an address of this machine.
    """
    match = re.fullmatch(r"tcp://(.+):(\d+)", listen)
    if match is None or int(match[2]) > 65535:
        raise SplitnetError(
            f"{listen!r} is not an address to listen on: write tcp://HOST:PORT, with port 0 for any free port"
        )
    host = "0.0.0.0" if match[1] == "*" else match[1].strip("[]")
    with explain_listen_errors(listen, "port with --listen", "give an address of this machine, or tcp://0.0.0.0:0"):
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(match[2]), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if sys.platform != "win32":  # on Windows, SO_REUSEADDR would bind a port that is in use
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)


def listen_at(host: str, port: int) -> socket.socket:
    """Opens a listening socket for HTTP. Raises AddressInUse: another listener has the port; SplitnetError: `host`
    is not an address of this machine."""
    with explain_listen_errors(f"{host}:{port}", "--port", "give an address of this machine as --host"):
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)  # pyright: ignore[reportArgumentType]


def peer_address(endpoint: Endpoint) -> str:
    """The address with which others join a swarm through this peer, `tcp://IP:PORT?key=KEY`."""
    return f"{endpoint.address}{_KEY}{endpoint.key.text}"


def is_peer_address(address: str) -> bool:
    """Whether an address to join with is the address of a peer, not a multiaddr."""
    return address.startswith(_SCHEME)


def split_addresses(addresses: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits addresses to join with into multiaddrs and addresses of peers."""
    return [one for one in addresses if not is_peer_address(one)], [one for one in addresses if is_peer_address(one)]


def check_peer_address(address: str) -> PublicKey:
    """Returns the key in the address of a peer, without a look-up of the host. Raises DirectoryError: `address` is not
    the address of a peer."""
    place, separator, key = address.removeprefix(_SCHEME).partition(_KEY)
    host, _, port = place.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise DirectoryError(
            f"{address!r} is not the address of a peer: copy the whole address that `splitnet peer` prints, "
            "tcp://HOST:PORT?key=..."
        )
    try:
        return PublicKey.parse(key)
    except KeyFileError as error:
        raise DirectoryError(f"the key in {address!r} is not valid: {error}") from None


def endpoint_of(address: str) -> Endpoint:
    """The endpoint of a peer's address; a host name is looked up. Raises DirectoryError: `address` is not the
    address of a peer; SplitnetError: the name has no address."""
    key = check_peer_address(address)
    endpoint = Endpoint(_SCHEME + with_literal_host(address.removeprefix(_SCHEME).partition(_KEY)[0]), key)
    if not is_address(endpoint.address):
        raise DirectoryError(f"no peer can be reached at {endpoint.address}: give the host of the peer")
    return endpoint


def hosts_of(addresses: Sequence[str]) -> frozenset[str]:
    """The IP addresses of the hosts in addresses to join with. IPv6 addresses are in brackets, host names are looked
    up, and hosts without an address are omitted."""
    found: set[str] = set()
    for address in addresses:
        parts = address.split("/")  # /ip4/HOST/tcp/PORT/p2p/ID
        host = address.removeprefix(_SCHEME).partition(_KEY)[0] if is_peer_address(address) else parts[2]
        with suppress(SplitnetError):
            literal = with_literal_host(f"[{host}]" if parts[1] == "ip6" else host)
            found.add(literal if literal.endswith("]") else literal.rpartition(":")[0] or literal)
    return frozenset(found)
