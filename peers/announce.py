"""Keeps the record of a peer fresh in the DHT, and takes it out when the peer leaves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from splitnet.errors import DirectoryError, SplitnetError
from splitnet.net.identity import Identity
from splitnet.net.records import PeerRecord
from splitnet.net.swarm_directory import SwarmDirectory

log = logging.getLogger(__name__)

REFRESH_S = 15.0

FIRST_TRIES = 3
"""Of the first record, before the peer gives up: where nodes of the DHT were lost a moment ago, it answers late."""


class Announcer:
    """Publishes `describe()` now and every `refresh_s` seconds, until closed.

    Args:
        directory: the DHT.
        identity: signs the records.
        describe: the record as of now.
        look_around: called before each refresh; brings up to date what `describe` tells of others.
    """

    def __init__(
        self,
        directory: SwarmDirectory,
        identity: Identity,
        describe: Callable[[], PeerRecord],
        look_around: Callable[[], None],
        *,
        refresh_s: float = REFRESH_S,
    ) -> None:
        self._directory = directory
        self._identity = identity
        self._describe = describe
        self._look_around = look_around
        self._refresh_s = refresh_s
        self._leaving = threading.Event()
        self._withdrawn = False
        self._thread = threading.Thread(target=self._run, name="splitnet-announce", daemon=True)

    def start(self) -> None:
        """Publishes the first record before returning, then keeps it fresh.

        Raises:
            DirectoryError: the directory does not answer.
        """
        for tries_left in reversed(range(FIRST_TRIES)):
            try:
                self.publish()
                break
            except DirectoryError as error:
                if not tries_left or self._leaving.is_set():
                    raise
                log.warning("the first announcement failed, trying again: %s", error)
        self._thread.start()

    def close(self) -> None:
        """Withdraws the record. May be called more than once."""
        if self._withdrawn:
            return
        self._withdrawn = True
        self._leaving.set()
        if self._thread.ident is not None:
            self._thread.join()
        record = self._describe()
        try:
            self._directory.withdraw(record, self._identity)
        except SplitnetError as error:
            log.warning("could not leave the DHT cleanly, the record expires by itself: %s", error)

    def _run(self) -> None:
        pause_s = 0.0  # those who are there already are measured at once
        while not self._leaving.wait(pause_s):
            pause_s = self._refresh_s
            try:
                self._look_around()
                self.publish()
            except SplitnetError as error:
                log.warning("announcement failed, next try in %.0f s: %s", self._refresh_s, error)

    def publish(self) -> None:
        """Publishes the record as of now, beside the regular refreshes."""
        if not self._directory.announce(self._describe(), self._identity):
            log.warning(
                "the DHT did not take this peer's record: check that the clock of this machine is right, and give "
                "--key-file if others fill the directory"
            )
