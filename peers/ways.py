"""How others reach a peer: at its address, or through helpers; and how it helps others to be reached."""

from __future__ import annotations

import ipaddress
import logging
import math
import random
import time
from collections.abc import Callable, Sequence

from splitnet.doctor.links import PeerLinks
from splitnet.errors import SplitnetError
from splitnet.net.addresses import Reach, is_reachable
from splitnet.net.endpoints import Endpoint, Relay
from splitnet.net.identity import AuthorizedKeys, Identity
from splitnet.net.records import PeerRecord
from splitnet.net.swarm_directory import SwarmDirectory
from splitnet.net.transport import Transport
from splitnet.net.ways.helper import Helper, HelperBounds
from splitnet.net.ways.hidden import Hidden
from splitnet.net.ways.offer import find_helpers
from splitnet.net.ways.streams import host_and_port

log = logging.getLogger(__name__)

ASKED = 2
"""Others that try to connect, each time."""
REACHED_S, UNREACHED_S, UNKNOWN_S = 600.0, 180.0, 60.0
"""After which others are asked again, by what they said."""


class PeerWays:
    """Of a running peer; close it after the transport, whose loop runs it.

    Args:
        transport: of the peer.
        identity: of the peer.
        endpoint: as the peer would announce itself.
        listen: `tcp://host:port`, what the peer was told.
        reach: how others are to reach it.
        relay_port: where it helps others, 0 for any; None: it does not.
        authorized: who may use its help; None: anyone.
        bytes_per_s: that it passes on; None: as `HelperBounds` has it.
        others: looks up the other peers of the model.
        directory: where helpers are found.
        changed: called when the record of the peer has changed.
    """

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        endpoint: Endpoint,
        *,
        listen: str,
        reach: Reach,
        relay_port: int | None,
        authorized: AuthorizedKeys | None,
        bytes_per_s: float | None,
        others: Callable[[], Sequence[PeerRecord]],
        directory: SwarmDirectory,
        changed: Callable[[], object],
    ) -> None:
        self._identity = identity
        self._endpoint = endpoint
        self._reach = reach
        # On loopback are tests and demos: what others reach of them is no question.
        self._asks = reach is Reach.auto and is_reachable(listen)
        self._others = others
        self._directory = directory
        self._ask_at = -math.inf
        inside = f"{listen.rpartition(':')[0]}:{transport.port}"
        inside = inside.replace("//*:", "//127.0.0.1:").replace("//0.0.0.0:", "//127.0.0.1:").replace("[::]", "[::1]")
        self._hidden = Hidden(transport.loop, identity, inside, transport.behind, self._find, changed)
        self.helper: Helper | None = None
        if relay_port is not None:
            self.helper = Helper(
                transport.loop,
                identity,
                f"{listen.rpartition(':')[0].replace('*', '0.0.0.0')}:{relay_port}",
                authorized=authorized,
                bounds=HelperBounds(bytes_per_s=bytes_per_s or HelperBounds.bytes_per_s),
            )

    @property
    def relays(self) -> tuple[Relay, ...]:
        """Through whom it is reached; empty: directly."""
        return self._hidden.relays

    @property
    def relay_port(self) -> int:
        """Where it helps others; 0: it does not."""
        return self.helper.port if self.helper is not None else 0

    @property
    def tunnelled(self) -> int:
        """Connections that come through helpers, or came so at first."""
        return self._hidden.streams

    def start(self) -> None:
        """Begins to help, and to look for help if that is sure to be needed."""
        if self.helper is not None:
            self.helper.start()
        if self._reach is Reach.helpers:
            self._hidden.start()

    def close(self) -> None:
        """Ends what goes through helpers, and through here."""
        self._hidden.stop()
        if self.helper is not None:
            self.helper.close()

    def look(self) -> None:
        """Asks others now and then whether they reach this peer, and acts on that; may take seconds."""
        if not self._asks or time.monotonic() < self._ask_at:
            return
        try:
            reached = self._is_reached()
        except SplitnetError as error:
            log.info("nobody could be asked whether this peer is reached: %s", error)
            reached = None
        self._ask_at = time.monotonic() + (UNKNOWN_S if reached is None else REACHED_S if reached else UNREACHED_S)
        if reached:
            self._hidden.stop()
        elif reached is False:
            if not self.relays:
                log.warning("others cannot connect to %s: looking for helpers", self._endpoint.address)
            self._hidden.start()

    def _is_reached(self) -> bool | None:
        """What others on the internet say; None: there are none, or they cannot tell."""
        # Those of this network reach what others do not.
        able = [record for record in self._others() if not record.relays and _is_global(record.address)]
        asked = random.sample(able, min(ASKED, len(able)))
        if not asked:
            return None
        with PeerLinks(self._identity) as links:
            answers = links.ask_back(asked, self._endpoint)
        return any(answers.values()) if answers else None

    def _find(self) -> list[Relay]:
        of_model = [record.helper for record in self._others() if record.helper is not None]
        try:
            return [*of_model, *find_helpers(self._directory)]
        except SplitnetError:
            return of_model


def _is_global(address: str) -> bool:
    return ipaddress.ip_address(host_and_port(address)[0]).is_global
