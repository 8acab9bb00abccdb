"""How a peer that starts gets into its swarm, or begins one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from peers.lan_presence import LanPresence
from peers.options import PeerOptions
from splitnet.client.links import Links
from splitnet.errors import DirectoryError, LanError
from splitnet.model.checkpoint import Checkpoint
from splitnet.net.addresses import dht_address
from splitnet.net.identity import Identity
from splitnet.net.joining import join, node_of
from splitnet.net.swarm_directory import SwarmDirectory
from splitnet.net.swarm_key import OPEN

FILE_TIMEOUT_S = 180.0
"""How long the file with the address of the first peer is waited for."""


def join_swarm(
    options: PeerOptions, checkpoint: Checkpoint, identity: Identity, report: Callable[[str, int, int], None]
) -> tuple[SwarmDirectory, LanPresence | None]:
    """Joins as `options` say; both must be closed.

    Args:
        options: of the peer.
        checkpoint: the model.
        identity: of the peer.
        report: told what is going on, see `Peer.start`; also called again and again while others are waited for.

    Raises:
        SplitnetError: see `splitnet.net.joining.join`; also if `options.join_file` does not come, or options of the DHT
            are given where none is joined.
    """
    initial_peers = list(options.initial_peers)
    if initial_peers or options.join_file:
        stage = "join the swarm"
    else:
        stage = "look for a swarm on this network" if options.lan else "start a swarm"

    def waiting() -> None:
        report(stage, 0, 0)

    waiting()
    if options.join_file is not None:
        initial_peers.append(_read_when_there(options.join_file, waiting))
    listen = options.dht_listen if options.dht_listen is not None else (dht_address(options.listen),)
    swarm = options.swarm_key or OPEN
    directory = join(initial_peers, lambda: Links(identity), listen=listen, swarm=swarm, waiting=waiting)
    try:
        node = node_of(directory)
        if node is None and (options.dht_listen is not None or options.lan):
            reason = "it joins through peers" if initial_peers else "hivemind is not installed"
            if options.dht_listen is not None:
                raise DirectoryError(f"this peer joins no DHT, as {reason}: leave --dht-listen out")
            raise LanError(f"a peer that joins no DHT, as {reason}, is not found on a network: leave --lan out")
        if node is None or not options.lan:
            return directory, None
        return directory, LanPresence.start(node, checkpoint, has_joined=bool(initial_peers), report=report)
    except BaseException:
        directory.close()
        raise


def _read_when_there(file: Path, waiting: Callable[[], None]) -> str:
    deadline = time.monotonic() + FILE_TIMEOUT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise DirectoryError(f"no peer has written its address to {file} in {FILE_TIMEOUT_S:.0f} s")
        waiting()
        time.sleep(0.05)
    return file.read_text(encoding="utf-8").strip()
