"""Joins a swarm: through nodes of its DHT, through peers that the process asks, or both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from splitnet.directory.ask import AskingLinks, PeerDirectory
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.hivemind_node import have_hivemind
from splitnet.directory.interface import JoinedDirectories, SwarmDirectory
from splitnet.errors import DirectoryError
from splitnet.security.swarm_key import OPEN, OpenSwarm
from splitnet.transport.addresses import endpoint_of, split_addresses

log = logging.getLogger(__name__)


Kind = TypeVar("Kind", DhtDirectory, PeerDirectory)


def part_of(directory: SwarmDirectory, kind: type[Kind]) -> Kind | None:
    """The part of a directory that is of `kind`: the node of the DHT, or the part that asks peers; None: there is no
    such part."""
    parts = directory.directories if isinstance(directory, JoinedDirectories) else [directory]
    return next((part for part in parts if isinstance(part, kind)), None)


def join(
    addresses: Sequence[str],
    links: Callable[[], AskingLinks],
    *,
    listen: Sequence[str] | None = None,
    swarm: OpenSwarm = OPEN,
    waiting: Callable[[], None] = lambda: None,
) -> SwarmDirectory:
    """The directory of the swarm at `addresses`: multiaddrs of nodes, and `tcp://HOST:PORT?key=...` of peers.

    A DHT, which needs hivemind, is only joined if there is a multiaddr, and only begun if there is no address. A peer
    without hivemind and without addresses begins a swarm without a DHT, which others join through this peer.

    Args:
        links: makes the links over which peers are asked; a peer's directory closes these links at its end.
        listen: multiaddrs at which a peer listens as a node of the DHT; None: for a client.
        swarm: the key of a closed swarm, which has no DHT: its members only ask each other.
        waiting: called repeatedly while a DHT is begun or joined; an error that it raises ends the attempt.

    Raises:
        DirectoryError: none of the addresses answers, or one is malformed.
        SplitnetError: a host name has no address.
        AddressInUse: `listen` is taken.
    """
    multiaddrs, peers = split_addresses(addresses)
    if swarm.is_closed and multiaddrs:
        raise DirectoryError(f"a closed swarm has no DHT: join through a peer, tcp://..., instead of {multiaddrs[0]}")
    if not peers and listen is not None and (swarm.is_closed or (not multiaddrs and not have_hivemind())):
        return PeerDirectory([], links(), serving=True, swarm=swarm)
    if not peers and swarm.is_closed:
        raise DirectoryError("a closed swarm is joined through a peer: give --join tcp://HOST:PORT?key=...")
    if not peers:
        return DhtDirectory.start(initial_peers=multiaddrs, listen=listen, waiting=waiting)
    endpoints = [endpoint_of(address) for address in peers]
    asked: PeerDirectory | None = None
    errors = list[DirectoryError]()
    try:
        asked = PeerDirectory.join_peers(endpoints, links(), serving=listen is not None, swarm=swarm)
    except DirectoryError as error:
        errors.append(error)
    node: DhtDirectory | None = None
    if multiaddrs:
        try:
            node = DhtDirectory.start(initial_peers=multiaddrs, listen=listen, waiting=waiting)
        except DirectoryError as error:
            errors.append(error)
        except BaseException:
            if asked is not None:
                asked.close()
            raise
    found = [one for one in (node, asked) if one is not None]
    if not found:
        raise DirectoryError(" ".join(map(str, errors)))
    for error in errors:
        log.warning("joined, but not through all addresses: %s", error)
    return found[0] if len(found) == 1 else JoinedDirectories(found)
