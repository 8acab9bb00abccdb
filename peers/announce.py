"""Keeps the record of a peer fresh in the DHT, and takes it out when the peer leaves."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from splitnet.errors import DirectoryError, SplitnetError
from splitnet.net.identity import Identity
from splitnet.net.records import PeerRecord
from splitnet.net.swarm_directory import SwarmDirectory

log = logging.getLogger(__name__)

REFRESH_S = 15.0

SOON = 3
"""Changes that are told at once within one `refresh_s`; more wait until the first is that old."""

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
        self._soon = threading.Event()
        self._soon_at: deque[float] = deque(maxlen=SOON)
        """When changes were told that were not waited for."""
        self._moved = False
        self._publishing = threading.Lock()
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
        self._soon.set()
        if self._thread.ident is not None:
            self._thread.join()
        record = self._describe()
        try:
            self._directory.withdraw(record, self._identity)
        except SplitnetError as error:
            log.warning("could not leave the DHT cleanly, the record expires by itself: %s", error)

    def _run(self) -> None:
        look_at = time.monotonic()  # those who are there already are measured at once
        while not self._leaving.is_set():
            self._wait(look_at)
            if self._leaving.is_set():
                return
            self._soon.clear()
            try:
                if self._moved:
                    self._moved, look_at = False, 0.0
                    self._directory.moved()
                    self.publish()
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + self._refresh_s
                    self._look_around()
                else:
                    self._soon_at.append(time.monotonic())
                self.publish()
            except SplitnetError as error:
                log.warning("announcement failed, next try in %.0f s: %s", self._refresh_s, error)

    def _wait(self, look_at: float) -> None:
        """Until then, or until something has changed, but no more often than others can stand to hear of."""
        if len(self._soon_at) == SOON:
            free_at = min(self._soon_at[0] + self._refresh_s, look_at)
            self._leaving.wait(max(0.0, free_at - time.monotonic()))
        self._soon.wait(max(0.0, look_at - time.monotonic()))

    def publish_soon(self, *, moved: bool = False) -> None:
        """The record has changed, and is published in the thread of this announcer. May be called from anywhere.

        Args:
            moved: what was found out about others is true no longer, either, and is looked at anew.
        """
        self._moved |= moved
        self._soon.set()

    def publish(self) -> None:
        """Publishes the record as of now, beside the regular refreshes."""
        with self._publishing:  # a record that was made before another and comes after it would be refused
            taken = self._directory.announce(self._describe(), self._identity)
        if not taken:
            log.warning(
                "the DHT did not take this peer's record: check that the clock of this machine is right, and give "
                "--key-file if others fill the directory"
            )
