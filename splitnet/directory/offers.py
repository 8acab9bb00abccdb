"""Tells the directory of what is no peer, such as a relay that serves no blocks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.record import HELPERS, PeerRecord
from splitnet.errors import SplitnetError
from splitnet.nat.relay import RelayBounds, RelayServer
from splitnet.nat.stream import WaysLoop
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.transport.addresses import public_address
from splitnet.version import __version__
from splitnet.wire.endpoints import Relay, host_and_port

log = logging.getLogger(__name__)

REFRESH_S = 15.0


def find_helpers(directory: SwarmDirectory) -> list[Relay]:
    """Relays that serve no blocks. Raises DirectoryError."""
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
    """Runs a relay at this host and port, and offers it in the directory; gives how others reach it. public_host:
    `HOST` or `HOST:PORT` by which others reach this machine, its port does not count; None: found out. Raises
    SplitnetError if it cannot listen there, or the host has no address."""
    listen = f"tcp://{host}:{port}"
    name, _ = host_and_port(public_address(listen, port, public_host))
    bounds = RelayBounds(bytes_per_s=bytes_per_s or RelayBounds.bytes_per_s)
    with (
        closing(WaysLoop()) as loop,
        closing(RelayServer(loop, identity, listen, authorized=authorized, bounds=bounds)) as server,
    ):
        server.start()
        relay = server.relay_at(name)
        with offered(directory, identity, relay):
            yield relay


def offered(directory: SwarmDirectory, identity: Identity, relay: Relay) -> AbstractContextManager[None]:
    """Publishes a record of a relay, see `announced`."""
    port = host_and_port(relay.address)[1]
    return announced(directory, identity, model=HELPERS, model_name="helpers", address=relay.address, relay_port=port)


@contextmanager
def announced(directory: SwarmDirectory, identity: Identity, **about: Any) -> Generator[None]:
    """Publishes a record of something that is no peer with this identity now and every 15 s, and withdraws it at the
    end. about: fields of the record."""
    leaving = threading.Event()

    def record() -> PeerRecord:
        facts = {"key": identity.public, "num_blocks": 1, "version": __version__, "issued_at": time.time()}
        return PeerRecord.idle(**facts, **about)

    def publish() -> None:
        pause_s = 0.0
        while not leaving.wait(pause_s):
            pause_s = REFRESH_S
            try:
                directory.announce(record(), identity)
            except SplitnetError as error:
                log.warning("the directory was not told of this process, next try in %.0f s: %s", REFRESH_S, error)

    thread = threading.Thread(target=publish, name="splitnet-offer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leaving.set()
        thread.join()
        try:
            directory.withdraw(record(), identity)
        except SplitnetError as error:
            log.info("the record of this process expires by itself: %s", error)
