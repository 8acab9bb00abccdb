"""How others reach a peer: at its address, at a port of its router, or through relays; also, the relay that it runs."""

from __future__ import annotations

import ipaddress
import logging
import math
import random
import time
from collections.abc import Callable, Sequence

from peers.peer_options import PeerOptions
from splitnet.directory.announcer import find_helpers
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.record import PeerRecord
from splitnet.errors import SplitnetError
from splitnet.nat.port_mapping import MappingError, PortMapping
from splitnet.nat.relay import RelayBounds, RelayServer
from splitnet.nat.tunnel import Tunnels
from splitnet.nat.unreachable import UnreachablePeer
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.swarm.trial import PeerLinks
from splitnet.transport.addresses import Reach, is_reachable, is_wildcard, loopback_address_of, reachable_host
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Endpoint, LinkState, Relay, is_global

log = logging.getLogger(__name__)

ASKED = 2  # number of peers, and number of relays, that are asked to connect back in one check
MOVED_S = 2.0  # interval between two checks of the machine's address
REACHED_S, UNREACHED_S, UNKNOWN_S = 600.0, 180.0, 60.0  # interval until the next check, by the result of the last


class PeerPaths:
    """The ways to a running peer; close it after the transport.

    address: `tcp://IP:port` of this machine. authorized: keys that may use the relay of this peer; None: any key.
    others: looks up the other peers of the model. directory: lists relays. vouched: whether the user or a friend has
    named a relay. changed: called when the record of the peer has changed; must return at once.
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
                "others cannot connect to %s: this machine has no address for it; where there is only IPv6, give "
                "--listen tcp://[::]:PORT",
                listen,
            )
        self.endpoint = Endpoint(address, identity.public)  # at the present address of the machine
        self._reach = options.reach
        # A peer on loopback is a test or demo, which other machines never reach.
        self._asks = options.reach is Reach.auto and is_reachable(listen)
        self._others = others
        self._directory = directory
        self._ask_at = -math.inf
        self._mapping = PortMapping(transport.port) if options.port_mapping and self._asks else None
        self._mapped: str | None = None  # address of the mapped port of the router, if others reach that port
        inside = loopback_address_of(listen, transport.port)
        # The connections to relays; `hidden.relays` is empty if others reach the peer directly.
        self.hidden = UnreachablePeer(tunnels.loop, identity, inside, tunnels.behind, self._find, changed, vouched)
        self.helper: RelayServer | None = None  # the relay for others
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
        """The address to announce, `tcp://IP:port`: that of this machine, or that of a port of the router."""
        return self._mapped or self.endpoint.address

    @property
    def relay_port(self) -> int:
        """Port of the relay for others; 0: there is no relay, or others reach this peer only at a port of the
        router."""
        return self.helper.port if self.helper is not None and self._mapped is None else 0

    def start(self) -> None:
        if self.helper is not None:
            self.helper.start()
        if self._reach is Reach.helpers:
            self.hidden.start()

    def close(self) -> None:
        self.hidden.stop_relaying()
        if self._mapping is not None:
            self._mapping.close()
        if self.helper is not None:
            self.helper.close()

    def moves(self, now: float) -> bool:
        """Whether the machine has got a new address since the last call; the peer must then announce the new
        address."""
        if not self._may_move or now < self._moved_at:
            return False
        self._moved_at = now + MOVED_S
        host = reachable_host(self._listen)
        address = f"tcp://{host}:{self._transport.port}"
        # While the network is down, the peer keeps its last address.
        if address == self.endpoint.address or not is_reachable(address):
            return False
        log.warning("the address of this machine has changed to %s, from %s", address, self.endpoint.address)
        self.endpoint = Endpoint(address, self._identity.public)
        self._has_moved = True
        return True

    def check_reachability(self) -> None:
        """Asks others at intervals whether they reach this peer, and maps a port or connects to relays; may take
        seconds."""
        if self._has_moved:  # results of checks and connections to relays belong to the former network
            self._has_moved = False
            if self._mapped is not None:
                self._unmap("this machine is in another network now")
            self._ask_at = -math.inf
            if self.hidden.stop_relaying() or self._reach is Reach.helpers:
                self.hidden.start()
        if not self._asks:
            return
        if self._mapped is not None and self._mapping is not None:
            try:
                if self._mapping.renew() != self._mapped:
                    self._unmap("the router has assigned another address or port")
            except MappingError as error:
                self._unmap(str(error))
        if time.monotonic() < self._ask_at:
            return
        reached = self._is_reached(self.address)
        if reached is False and self._mapped is not None:
            self._unmap("no test connection has arrived")
        if reached is False:
            if not self.hidden.relays:
                log.warning("others cannot connect to %s: looking for helpers (relays)", self.endpoint.address)
            self.hidden.start()  # before the router is asked, because it may answer slowly
            reached = self._mapping is not None and self._map(self._mapping)
        self._ask_at = time.monotonic() + (UNKNOWN_S if reached is None else REACHED_S if reached else UNREACHED_S)
        if reached and (self._mapped is None or self._reaches_itself()):
            self.hidden.stop_relaying()
        elif reached:  # the router does not loop back, so peers of this network need relays
            self.hidden.start()

    def _map(self, mapping: PortMapping) -> bool:
        """Maps a port of the router, and keeps it if others reach it; returns whether they do."""
        try:
            address = mapping.request_port()
        except MappingError as error:
            log.info("no port is mapped: %s", error)
            return False
        # Two checks: a peer that has tried this address before may wait until it tries again, and then the first check
        # fails.
        if not is_global(address) or not any(self._is_reached(address) for _ in range(2)):
            log.info(
                "nobody reaches %s, although the router says that it forwards this port to this peer (%s)",
                address,
                mapping.by,
            )
            mapping.close()
            return False
        self._mapped = address
        text = "others reach this peer at %s, a port that the router forwards to it (%s)"
        log.warning(text, address, mapping.by, extra={"address": address})
        return True

    def _unmap(self, why: str) -> None:
        log.warning("others do not reach this peer at %s any more: %s", self._mapped, why)
        self._mapped, self._ask_at = None, -math.inf
        if self._mapping is not None:
            self._mapping.close()

    def _is_reached(self, address: str) -> bool | None:
        """Whether others on the internet reach this peer; None: no peer has tried.

        Only connections from others count, not what they answer: with false answers an attacker could keep this peer
        from using relays, or make it use the attacker's relay.
        """
        began = time.monotonic()
        try:
            said = self._asked_peers(address) + self._asked_helpers(address)
        except SplitnetError as error:
            log.info("could not ask others whether they reach this peer: %s", error)
            said = []
        if any(_is_outside(host, address) for host in self._transport.connections.hosts(began)):
            return True
        return False if said else None

    def _asked_peers(self, address: str) -> list[bool]:
        # Not peers in this local network, which may reach addresses that other networks cannot reach.
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
    """Whether a connection from `host` proves that the internet reaches `address`: both have global addresses of the
    same IP version."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:  # through a relay
        return False
    literal = str(ip) if ip.version == 4 else f"[{ip}]"
    return is_global(f"tcp://{literal}:1") and ("[" in literal) == ("[" in address)
