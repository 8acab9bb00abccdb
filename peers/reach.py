"""How others reach a peer: at its address, or through relays; and how it relays for others."""

from __future__ import annotations

import ipaddress
import logging
import math
import random
import time
from collections.abc import Callable, Sequence

from peers.options import PeerOptions
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.offers import find_helpers
from splitnet.directory.record import PeerRecord
from splitnet.errors import SplitnetError
from splitnet.nat.port_mapping import MappingError, PortMapping
from splitnet.nat.relay import RelayBounds, RelayServer
from splitnet.nat.tunnel import Tunnels
from splitnet.nat.unreachable import UnreachablePeer
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.swarm.trial import PeerLinks
from splitnet.transport.addresses import Reach, inside_of, is_reachable, is_wildcard, reachable_host
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Endpoint, LinkState, Relay, is_global

log = logging.getLogger(__name__)

ASKED = 2  # peers that try to connect, each time, and as many helpers
MOVED_S = 2.0  # how often the peer looks whether the machine has another address
REACHED_S, UNREACHED_S, UNKNOWN_S = 600.0, 180.0, 60.0  # time after which others are asked again, by their answers


class PeerWays:
    """Of a running peer; close it after the transport.

    address: `tcp://IP:port` as the peer would announce it. authorized: keys that it may relay for; None: any. others:
    looks up the other peers of the model. directory: where relays are found. vouched: whether the user, or a friend,
    has named a relay. changed: called when the record of the peer has changed; it must return at once.
    """

    def __init__(
        self,
        transport: Transport,
        tunnels: Tunnels,
        identity: Identity,
        options: PeerOptions,
        address: str,
        *,
        authorized: AuthorizedKeys | None,
        others: Callable[[], Sequence[PeerRecord]],
        directory: SwarmDirectory,
        vouched: Callable[[Relay], bool],
        changed: Callable[[], object],
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._listen = listen = options.listen
        self._may_move = options.public_host is None and is_wildcard(listen)
        self._moved_at = 0.0
        self._has_moved = False
        if self._may_move and not is_reachable(address):
            log.warning(
                "this machine has no address at which others could connect to %s: where there is IPv6 alone, give "
                "--listen tcp://[::]:PORT",
                listen,
            )
        self.endpoint = Endpoint(address, identity.public)  # at its own address, as that is now
        self._reach = options.reach
        # On loopback are tests and demos: what others reach of them is no question.
        self._asks = options.reach is Reach.auto and is_reachable(listen)
        self._others = others
        self._directory = directory
        self._ask_at = -math.inf
        self._mapping = PortMapping(transport.port) if options.port_mapping and self._asks else None
        self._mapped: str | None = None  # what the router has given, and others reach
        inside = inside_of(listen, transport.port)
        # Its connections to relays; their `relays` are empty if it is reached directly.
        self.hidden = UnreachablePeer(tunnels.loop, identity, inside, tunnels.behind, self._find, changed, vouched)
        self.helper: RelayServer | None = None  # relays for others
        if options.relay_port is not None:
            self.helper = RelayServer(
                tunnels.loop,
                identity,
                f"{listen.rpartition(':')[0].replace('*', '0.0.0.0')}:{options.relay_port}",
                authorized=authorized,
                bounds=RelayBounds(bytes_per_s=options.relay_rate or RelayBounds.bytes_per_s),
            )

    @property
    def address(self) -> str:
        """`tcp://IP:port` to announce: its own, or that of a port of the router."""
        return self._mapped or self.endpoint.address

    @property
    def relay_port(self) -> int:
        """Where it relays for others; 0: it does not, as when the port that others reach is the router's."""
        return self.helper.port if self.helper is not None and self._mapped is None else 0

    def start(self) -> None:
        if self.helper is not None:
            self.helper.start()
        if self._reach is Reach.helpers:
            self.hidden.start()

    def close(self) -> None:
        self.hidden.stop()
        if self._mapping is not None:
            self._mapping.close()
        if self.helper is not None:
            self.helper.close()

    def moves(self, now: float) -> bool:
        """Whether the machine has another address since the last look, which the peer announces from now on."""
        if not self._may_move or now < self._moved_at:
            return False
        self._moved_at = now + MOVED_S
        host = reachable_host(self._listen)
        address = f"tcp://{host}:{self._transport.port}"
        # Without a network for a moment it is still known by its last address.
        if address == self.endpoint.address or not is_reachable(address):
            return False
        log.warning("this machine has another address: %s, before %s", address, self.endpoint.address)
        self.endpoint = Endpoint(address, self._identity.public)
        self._has_moved = True
        return True

    def look(self) -> None:
        """Asks others now and then whether they reach this peer, and acts on that; may take seconds."""
        if self._has_moved:  # nothing that was found out there holds here, and streams from there are dead
            self._has_moved = False
            if self._mapped is not None:
                self._unmap("it is in another network")
            self._ask_at = -math.inf
            if self.hidden.stop() or self._reach is Reach.helpers:
                self.hidden.start()
        if not self._asks:
            return
        if self._mapped is not None and self._mapping is not None:
            try:
                if self._mapping.renew() != self._mapped:
                    self._unmap("it leads elsewhere now")
            except MappingError as error:
                self._unmap(str(error))
        if time.monotonic() < self._ask_at:
            return
        reached = self._is_reached(self.address)
        if reached is False and self._mapped is not None:
            self._unmap("they find nothing there")
        if reached is False:
            if not self.hidden.relays:
                log.warning("others cannot connect to %s: looking for helpers", self.endpoint.address)
            self.hidden.start()  # routers may take long to answer
            reached = self._mapping is not None and self._map(self._mapping)
        self._ask_at = time.monotonic() + (UNKNOWN_S if reached is None else REACHED_S if reached else UNREACHED_S)
        if reached and (self._mapped is None or self._reaches_itself()):
            self.hidden.stop()
        elif reached:  # those of this network need helpers, as the router does not lead its own back in
            self.hidden.start()

    def _map(self, mapping: PortMapping) -> bool:
        """Maps a port of the router; whether others reach it. It is announced only then."""
        try:
            address = mapping.open()
        except MappingError as error:
            log.info("no port is mapped: %s", error)
            return False
        # A peer that knows the address from before waits until it tries again; a new link is tried at once.
        if not is_global(address) or not any(self._is_reached(address) for _ in range(2)):
            log.info("nobody reaches %s, which the router says it leads here (%s)", address, mapping.by)
            mapping.close()
            return False
        self._mapped = address
        text = "others reach this peer at %s, a port that the router leads here (%s)"
        log.warning(text, address, mapping.by, extra={"address": address})
        return True

    def _unmap(self, why: str) -> None:
        log.warning("others do not reach this peer at %s any more: %s", self._mapped, why)
        self._mapped, self._ask_at = None, -math.inf
        if self._mapping is not None:
            self._mapping.close()

    def _is_reached(self, address: str) -> bool | None:
        """Whether others on the internet reach this peer; None: there are none, or they do not try.

        Connections count, not answers: a liar could leave it without relays, or have it choose the liar's.
        """
        began = time.monotonic()
        try:
            said = self._asked_peers(address) + self._asked_helpers(address)
        except SplitnetError as error:
            log.info("nobody could be asked whether this peer is reached: %s", error)
            said = []
        if any(_is_outside(host, address) for host in self._transport.connections.hosts(began)):
            return True
        return False if said else None

    def _asked_peers(self, address: str) -> list[bool]:
        # Those of this network reach what others do not.
        able = [record for record in self._others() if not record.relays and is_global(record.address)]
        asked = random.sample(able, min(ASKED, len(able)))
        if not asked:
            return []
        with PeerLinks(self._identity) as links:
            return list(links.ask_back(asked, Endpoint(address, self._identity.public)).values())

    def _asked_helpers(self, address: str) -> list[bool]:
        able = [one for one in self._find() if one.key != self._identity.public.raw and is_global(one.address)]
        asked = random.sample(able, min(ASKED, len(able)))
        return self.hidden.reached_by(address, asked) if asked else []

    def _reaches_itself(self) -> bool:
        here = Endpoint(self.address, self._identity.public)
        with PeerLinks(Identity.generate()) as links:
            answer = links.try_out([here])[here]
        return answer.rtt_ms is not None or answer.state is LinkState.REFUSED

    def _find(self) -> list[Relay]:
        of_model = [record.helper for record in self._others() if record.helper is not None]
        try:
            return [*of_model, *find_helpers(self._directory)]
        except SplitnetError:
            return of_model


def _is_outside(host: str, address: str) -> bool:
    """Whether a host that has connected shows that others reach an address: it is on the internet, as that is meant."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:  # through a helper
        return False
    literal = str(ip) if ip.version == 4 else f"[{ip}]"
    return is_global(f"tcp://{literal}:1") and ("[" in literal) == ("[" in address)
