"""How a process joins a swarm: through nodes of its DHT, through peers that it asks, or both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from splitnet.directory.ask import AskingLinks, PeerDirectory
from splitnet.directory.dht import Directory
from splitnet.directory.hivemind_node import have_hivemind
from splitnet.directory.interface import JoinedDirectories, SwarmDirectory
from splitnet.errors import DirectoryError
from splitnet.security.swarm_key import OPEN, OpenSwarm
from splitnet.transport.addresses import endpoint_of, split_addresses

log = logging.getLogger(__name__)


Kind = TypeVar("Kind", Directory, PeerDirectory)


def part_of(directory: SwarmDirectory, kind: type[Kind]) -> Kind | None:
    """The node of the DHT in a directory, or the part that asks peers, if there is one."""
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

    A DHT, and with it hivemind, is only begun or joined if there is a multiaddr, or no address. A peer without hivemind
    and without addresses begins a swarm that has no DHT: others join through it.

    Args:
        links: gives the links over which peers are asked; a peer's are closed with its directory.
        listen: multiaddrs where a peer listens as a node; None: for a client.
        swarm: the key of a closed one, which has no DHT: its members ask each other alone.
        waiting: called again and again while a DHT is begun or joined; an error that it raises ends that.

    Raises:
        DirectoryError: none of the addresses answers, or one is not written as an address.
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
        return Directory.start(initial_peers=multiaddrs, listen=listen, waiting=waiting)
    endpoints = [endpoint_of(address) for address in peers]
    asked: PeerDirectory | None = None
    errors = list[DirectoryError]()
    try:
        asked = PeerDirectory.join(endpoints, links(), serving=listen is not None, swarm=swarm)
    except DirectoryError as error:
        errors.append(error)
    node: Directory | None = None
    if multiaddrs:
        try:
            node = Directory.start(initial_peers=multiaddrs, listen=listen, waiting=waiting)
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
