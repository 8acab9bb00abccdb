"""Finds DHT nodes of a model's swarm on the local network by multicast DNS (RFC 6762, RFC 6763) over IPv4.

A node is a service `<node id>._splitnet._tcp.local.`; its TXT record holds the model's fingerprint and the addresses to
join the DHT with. Any machine on the network can send such records, so they are checked, bounded, and only used to
connect to addresses that the internet does not route. The records of peers that the DHT returns are signed
(`record.py`).
"""

from __future__ import annotations

import ipaddress
import logging
import math
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from zeroconf import DNSQuestionType, IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf
from zeroconf import Error as ZeroconfError

from splitnet.directory.record import FINGERPRINT
from splitnet.errors import LanError, ProtocolError
from splitnet.transport.addresses import own_hosts
from splitnet.wire.messages import PROTOCOL_VERSION

log = logging.getLogger(__name__)

SERVICE_TYPE: Final = "_splitnet._tcp.local."
SEARCH_S: Final = 2.5  # wait for a first answer, long enough for a second question if the first is lost
MORE_S: Final = 1.0  # wait for further answers after the first
MAX_NODES: Final = 64  # nodes reported in one call
MAX_WAITING: Final = 1024
"""Nodes that are not reported yet. A further node replaces a random one, so that a flood mostly displaces its own
entries."""
MAX_ADDRESSES: Final = 8  # of one node
MOST_RECORDS: Final = 4096
"""Cached records of multicast DNS, of all services. More are a flood, and the whole cache is dropped: a full cache
would drop the records that expire first, and records of a flood expire late."""
LOOK_S: Final = 1.0  # between two counts of the cached records
FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 60.0
"""Pauses without listening after a flood: first and longest. Each pause is twice as long as the
pause before, until no flood has come for `MOST_PAUSE_S`."""

_END_S = 1.0  # longest wait for the end of the watching thread
_MULTIADDR = re.compile(r"/(ip4|ip6)/([0-9A-Fa-f:.]{2,45})/tcp/([0-9]{1,5})/p2p/([1-9A-HJ-NP-Za-km-z]{40,60})")


@dataclass(frozen=True)
class LanNode:
    """A node of the DHT, as announced on the local network. Raises ProtocolError: a field is not valid.

    model: fingerprint of the checkpoint. protocol: version of the wire protocol. addresses: multiaddrs
    `/ip4/HOST/tcp/PORT/p2p/ID` to join the DHT with, at most 8, all of one node.
    """

    model: str
    protocol: int
    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        if not FINGERPRINT.fullmatch(self.model):
            raise ProtocolError("expected the fingerprint of a model")
        if not 0 <= self.protocol < 1 << 16:
            raise ProtocolError("expected a version of the protocol")
        if not 1 <= len(self.addresses) <= MAX_ADDRESSES or not all(map(is_lan_address, self.addresses)):
            raise ProtocolError(f"expected 1 to {MAX_ADDRESSES} addresses on the local network")
        if any(_node_id(address) != self.id for address in self.addresses):
            raise ProtocolError("expected addresses of one node")

    @property
    def id(self) -> str:
        """The node's id in the DHT."""
        return _node_id(self.addresses[0])

    def txt_entries(self) -> dict[str, str]:
        """The entries of the TXT record."""
        addresses = {f"dht{index}": address for index, address in enumerate(self.addresses)}
        return {"model": self.model, "protocol": str(self.protocol), **addresses}

    @classmethod
    def from_txt(cls, text: Mapping[bytes, bytes | None]) -> LanNode:
        """Reads a TXT record, which may be hostile. Raises ProtocolError: it is not valid."""
        try:
            model, protocol = ((text.get(key) or b"").decode("ascii") for key in (b"model", b"protocol"))
            found = [text.get(f"dht{index}".encode()) for index in range(MAX_ADDRESSES)]
            addresses = [address.decode("ascii") for address in found if address is not None]
        except UnicodeDecodeError as error:
            raise ProtocolError("expected ASCII text") from error
        if not re.fullmatch(r"[0-9]{1,5}", protocol):
            raise ProtocolError("expected a version of the protocol")
        # A node may also listen at addresses outside the local network, which are ignored.
        return cls(model, int(protocol), tuple(filter(is_lan_address, addresses)))


class LocalNetwork(AbstractContextManager["LocalNetwork"]):
    """The nodes of one model's swarm on the networks of this machine. Thread-safe; close it when done. Raises LanError:
    multicast DNS cannot be used on this machine.

    model: fingerprint of the checkpoint; empty, only without `announce_node`: any model. foreign_protocols: other
    versions of the wire protocol that nodes of this model use.
    """

    def __init__(self, model: str) -> None:
        self._mdns = self._opened()
        self.foreign_protocols: set[int] = set()
        self._model = model
        self._own: ServiceInfo | None = None
        self._is_lost = False  # `begin_again` has stopped listening and has not started again
        self._waiting: dict[LanNode, None] = {}
        self._changing = threading.Condition()
        self._browser: ServiceBrowser | None = None
        self._watcher: threading.Thread | None = None
        self._closing = threading.Lock()
        self._closed = False

    def announce_node(self, addresses: Iterable[str]) -> None:
        """Announces the node at these multiaddrs until `close`. Raises LanError: no other machine can reach them, or
        they cannot be announced."""
        self._own = self._service(addresses)
        self._register(self._own)

    def search(self, seconds: float = SEARCH_S) -> list[LanNode]:
        """Other nodes of this model with this protocol version. Takes `seconds` if there are none, else less."""
        self._browse()
        with self._changing:
            if self._changing.wait_for(lambda: self._waiting or self._closed, seconds):
                self._changing.wait_for(lambda: self._closed, min(MORE_S, seconds))
        return self._take_waiting()

    def watch_nodes(self, found: Callable[[Sequence[LanNode]], None]) -> None:
        """Starts a thread that calls `found` with other nodes, and again when a node announces itself again."""
        self._browse()
        self._watcher = threading.Thread(target=self._report_nodes, args=(found,), name="splitnet-lan", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Withdraws the announcement and stops. May be called more than once."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._end_browsing()
        with self._changing:
            self._changing.notify_all()
        if self._watcher is not None:
            self._watcher.join(_END_S)

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin_again(self, *, pause_s: float = 0.0, addresses: Iterable[str] = ()) -> None:
        """Forgets all nodes, and listens again after a pause, on the machine's current addresses. addresses: new
        addresses to announce; empty: the former ones. Raises LanError: as `announce_node`; the thread of `watch_nodes`
        then tries again."""
        with self._closing:
            if self._closed:
                return
            self._is_lost = True
            self._end_browsing()
            self._own = self._service(addresses) if addresses else self._own
        with self._changing:
            self._changing.wait_for(lambda: self._closed, pause_s)
        with self._closing:
            if self._closed or not self._is_lost:  # closed, or another thread has started to listen again
                return
            self._mdns = self._opened()
            if self._own is not None:
                self._register(self._own)
            self._browse()
            self._is_lost = False

    def _service(self, addresses: Iterable[str]) -> ServiceInfo:
        reachable = tuple(filter(is_lan_address, addresses))[:MAX_ADDRESSES]
        if not reachable:
            raise LanError("this node listens at no address on a local network")
        node = LanNode(self._model, PROTOCOL_VERSION, reachable)
        parts = [address.split("/") for address in reachable]
        return ServiceInfo(
            SERVICE_TYPE,
            f"{node.id}.{SERVICE_TYPE}",
            port=int(parts[0][4]),
            addresses=[socket.inet_aton(part[2]) for part in parts if part[1] == "ip4"],
            properties=node.txt_entries(),
        )

    def _opened(self) -> Zeroconf:
        used = _own_addresses()
        if not used:
            raise LanError("this machine has no address on a local network")
        try:
            return Zeroconf(interfaces=used, ip_version=IPVersion.V4Only)
        except (OSError, ZeroconfError) as error:
            raise LanError(f"multicast DNS cannot be used here ({error})") from error

    def _register(self, info: ServiceInfo) -> None:
        try:
            # The id of a node is unique, so there is no need to ask whether the name is free.
            self._mdns.register_service(info, cooperating_responders=True)
        except (OSError, ZeroconfError) as error:
            raise LanError(f"multicast DNS cannot be used here ({error})") from error

    def _end_browsing(self) -> None:
        browser, self._browser = self._browser, None
        if browser is not None:
            browser.cancel()
        self._mdns.close()

    def _browse(self) -> None:
        if self._browser is None:
            self._browser = ServiceBrowser(
                self._mdns,
                SERVICE_TYPE,
                handlers=[self._changed],
                # A unicast answer may go to another process on this machine that uses multicast DNS.
                question_type=DNSQuestionType.QM,
            )

    def _changed(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed or (self._own is not None and name == self._own.name):
            return
        try:
            info = ServiceInfo(service_type, name)
            info.load_from_cache(zeroconf)
            node = LanNode.from_txt(info.properties)
        except Exception as error:  # the record may be hostile
            log.debug("ignored an invalid node on the local network: %s", error)
            return
        if self._model and node.model != self._model:
            return
        if node.protocol != PROTOCOL_VERSION:
            self.foreign_protocols.add(node.protocol)
            return
        with self._changing:
            if len(self._waiting) >= MAX_WAITING and node not in self._waiting:
                del self._waiting[random.choice(list(self._waiting))]
            self._waiting[node] = None
            self._changing.notify_all()

    def _take_waiting(self) -> list[LanNode]:
        """At most `MAX_NODES` random nodes that are not reported yet."""
        with self._changing:
            chosen = random.sample(list(self._waiting), min(len(self._waiting), MAX_NODES))
            for node in chosen:
                del self._waiting[node]
            return chosen

    def _report_nodes(self, found: Callable[[Sequence[LanNode]], None]) -> None:
        pause_s, flooded_at = FIRST_PAUSE_S, -math.inf
        while True:
            with self._changing:
                self._changing.wait_for(lambda: self._waiting or self._closed, LOOK_S)
                if self._closed:
                    return
            if self._waiting:
                found(self._take_waiting())
            if not self._is_lost and self._records() <= MOST_RECORDS:
                continue
            is_again = self._is_lost or time.monotonic() - flooded_at < MOST_PAUSE_S
            pause_s = min(2 * pause_s, MOST_PAUSE_S) if is_again else FIRST_PAUSE_S
            if not self._is_lost:
                log.warning("the local network is flooded with multicast DNS: it is ignored for %.0f s", pause_s)
            try:
                self.begin_again(pause_s=pause_s)
            except LanError as error:
                log.info("peers of the local network are not found at the moment: %s", error)
            flooded_at = time.monotonic()

    def _records(self) -> int:
        return sum(map(len, list(self._mdns.cache.cache.values())))


def what_was_found(nodes: Sequence[LanNode]) -> str:
    return f"found {len(nodes)} peer{'s' if len(nodes) > 1 else ''} on this network"


def is_lan_address(multiaddr: str) -> bool:
    """Whether `/ip4/HOST/tcp/PORT/p2p/ID` is a valid multiaddr with an address that only a local network routes."""
    match = _MULTIADDR.fullmatch(multiaddr)
    if match is None or not 1 <= int(match[3]) <= 65535:
        return False
    try:
        host = ipaddress.IPv4Address(match[2]) if match[1] == "ip4" else ipaddress.IPv6Address(match[2])
    except ValueError:
        return False
    return _is_local(host)


def _is_local(host: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(host, ipaddress.IPv6Address) and (host.ipv4_mapped is not None or host.is_link_local):
        return False
    return not (host.is_global or host.is_loopback or host.is_multicast or host.is_reserved or host.is_unspecified)


def _own_addresses() -> list[str]:
    """IPv4 addresses of this machine on local networks. Raises LanError."""
    try:
        return [str(host) for _, host in own_hosts() if host.version == 4 and _is_local(host)]
    except OSError as error:
        raise LanError(f"the system does not give the addresses of this machine ({error})") from error


def _node_id(multiaddr: str) -> str:
    return multiaddr.rpartition("/p2p/")[2]
