"""Tells the directory of what is no peer, such as a relay that serves no blocks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping
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


def announced(directory: SwarmDirectory, identity: Identity, **about: Any) -> AbstractContextManager[None]:
    """Publishes a record of something that is no peer with this identity now and every 15 s, and withdraws it at the
    end. about: fields of the record."""
    return published(directory, identity, lambda: about)


@contextmanager
def published(
    directory: SwarmDirectory,
    identity: Identity,
    about: Callable[[], Mapping[str, Any] | None],
    changed: threading.Event | None = None,
) -> Generator[None]:
    """The same with fields that change; None: there is nothing to tell. changed: set where that cannot wait."""
    leaving = threading.Event()
    soon = changed or threading.Event()
    last: PeerRecord | None = None

    def publish() -> None:
        nonlocal last
        pause_s = 0.0
        while not (soon.wait(pause_s) and leaving.is_set()):
            soon.clear()
            pause_s = REFRESH_S
            if (told := about()) is None:
                continue
            facts = {"key": identity.public, "num_blocks": 1, "version": __version__, "issued_at": time.time()}
            last = PeerRecord.idle(**facts | dict(told))
            try:
                directory.announce(last, identity)
            except SplitnetError as error:
                log.warning("the directory was not told of this process, next try in %.0f s: %s", REFRESH_S, error)

    thread = threading.Thread(target=publish, name="splitnet-offer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leaving.set()
        soon.set()
        thread.join()
        try:
            if last is not None:
                directory.withdraw(last, identity)
        except SplitnetError as error:
            log.info("the record of this process expires by itself: %s", error)
