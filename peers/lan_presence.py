"""A peer on the local network: it finds the nodes of its model's DHT there, and they find it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from splitnet.errors import DirectoryError, LanError
from splitnet.model.checkpoint import Checkpoint
from splitnet.net.directory import Directory
from splitnet.net.lan import LanNode, LocalNetwork, is_lan_address, what_was_found

log = logging.getLogger(__name__)


class LanPresence:
    """Announces a node of the DHT, and brings its DHT together with those of others that are or come there.

    Peers that start at the same time each begin a DHT, so they go on looking. Close it when done.

    Args:
        directory: the node.
        checkpoint: the model.
    """

    def __init__(self, directory: Directory, checkpoint: Checkpoint) -> None:
        self._directory = directory
        self._network = LocalNetwork(checkpoint.fingerprint)
        self._announced = frozenset[str]()

    @classmethod
    def start(
        cls, directory: Directory, checkpoint: Checkpoint, *, has_joined: bool, report: Callable[[str, int, int], None]
    ) -> LanPresence | None:
        """Announces the node and joins what is there; None if this machine has no local network to do that on.

        Args:
            directory: the node.
            checkpoint: the model.
            has_joined: the node is in a swarm already, so that nothing waits for others.
            report: told what was found, see `Peer.start`.
        """
        with ExitStack() as on_failure:
            try:
                presence = cls(directory, checkpoint)
                on_failure.callback(presence.close)
                presence._announce_and_join(checkpoint.name, has_joined, report)
            except LanError as error:
                log.warning("others find this peer by --join only: %s", error)
                return None
            on_failure.pop_all()
        return presence

    def look(self) -> None:
        """If the node has other addresses than before, announces those, where the machine is now; may take seconds."""
        addresses = self._directory.addresses
        now = frozenset(filter(is_lan_address, addresses))
        if not now or now == self._announced:  # without a network for a moment it is still known by its last ones
            return
        self._announced = now
        try:
            self._network.begin_again(addresses=addresses)
        except LanError as error:
            log.warning("others find this peer by --join only: %s", error)

    def close(self) -> None:
        """Withdraws the announcement. May be called more than once."""
        self._network.close()

    def _announce_and_join(self, model: str, has_joined: bool, report: Callable[[str, int, int], None]) -> None:
        # Before the search, so that of two that start together at least one finds the other.
        addresses = self._directory.addresses
        self._network.announce(addresses)
        self._announced = frozenset(filter(is_lan_address, addresses))
        if not has_joined:
            nodes = self._network.search()
            if nodes:
                report(f"{what_was_found(nodes)}: joining", 0, 0)
                if not self._directory.meet([address for node in nodes for address in node.addresses]):
                    log.warning("none of the peers that were found on this network answers: starting a swarm")
            else:
                report(f"no swarm for {model} on this network: starting one", 0, 0)
        self._network.watch(self._meet)

    def _meet(self, nodes: Sequence[LanNode]) -> None:
        try:
            if met := self._directory.meet([address for node in nodes for address in node.addresses]):
                log.info("met %d of %d peers on the local network", met, len(nodes))
        except DirectoryError as error:
            log.info("could not meet a peer on the local network: %s", error)
