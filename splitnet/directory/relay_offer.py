"""Tells the DHT of a helper that serves no blocks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator
from contextlib import closing, contextmanager

from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.record import HELPERS, PeerRecord
from splitnet.errors import SplitnetError
from splitnet.nat.loop import WaysLoop
from splitnet.nat.relay import RelayBounds, RelayServer
from splitnet.nat.stream import host_and_port
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.transport.addresses import reachable_host, with_literal_host
from splitnet.version import __version__
from splitnet.wire.endpoints import Relay

log = logging.getLogger(__name__)

REFRESH_S = 15.0


def find_helpers(directory: SwarmDirectory) -> list[Relay]:
    """Helpers that serve no blocks. Raises DirectoryError."""
    return [record.helper for record in directory.peers(HELPERS) if record.helper is not None]


@contextmanager
def relaying(
    directory: SwarmDirectory,
    identity: Identity,
    host: str,
    port: int,
    public_host: str | None,
    *,
    authorized: AuthorizedKeys | None = None,
    bytes_per_s: float | None = None,
) -> Generator[Relay]:
    """Helps, and says so in the DHT; gives how others reach the helper.

    Args:
        host, port: where it listens.
        public_host: `HOST` or `HOST:PORT` by which others reach this machine, its port does not count; None: found out.

    Raises:
        SplitnetError: it cannot listen there, or the host has no address.
    """
    listen = f"tcp://{host}:{port}"
    name = with_literal_host(public_host or reachable_host(listen))
    if name.rpartition(":")[2].isdecimal() and not name.endswith("]"):
        name = name.rpartition(":")[0]
    bounds = RelayBounds(bytes_per_s=bytes_per_s or RelayBounds.bytes_per_s)
    with (
        closing(WaysLoop()) as loop,
        closing(RelayServer(loop, identity, listen, authorized=authorized, bounds=bounds)) as helper,
    ):
        helper.start()
        relay = helper.relay_at(name.strip("[]"))
        with closing(RelayOffer(directory, identity, relay)) as offer:
            offer.start()
            yield relay


class RelayOffer:
    """Publishes a record now and every 15 s, until closed.

    Args:
        directory: the DHT.
        identity: of the helper.
        relay: how others reach it.
    """

    def __init__(self, directory: SwarmDirectory, identity: Identity, relay: Relay) -> None:
        self._directory = directory
        self._identity = identity
        self._relay = relay
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="splitnet-offer", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def close(self) -> None:
        """Withdraws the record."""
        self._leaving.set()
        self._thread.join()
        try:
            self._directory.withdraw(self._record(), self._identity)
        except SplitnetError as error:
            log.info("the record of this helper expires by itself: %s", error)

    def _run(self) -> None:
        pause_s = 0.0
        while not self._leaving.wait(pause_s):
            pause_s = REFRESH_S
            try:
                self._directory.announce(self._record(), self._identity)
            except SplitnetError as error:
                log.warning("the DHT was not told of this helper, next try in %.0f s: %s", REFRESH_S, error)

    def _record(self) -> PeerRecord:
        return PeerRecord.idle(
            key=self._identity.public,
            model=HELPERS,
            model_name="helpers",
            address=self._relay.address,
            num_blocks=1,
            version=__version__,
            issued_at=time.time(),
            relay_port=host_and_port(self._relay.address)[1],
        )
