"""Publishes the record of this process in the directory. The process is a peer, or another process such as a relay
without blocks."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from splitnet.directory.ask import PeerDirectory
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.joining import part_of
from splitnet.directory.record import HELPERS, MAX_CLOCK_SKEW_S, PeerRecord
from splitnet.errors import DirectoryError, SplitnetError
from splitnet.nat.relay import RelayBounds, RelayServer
from splitnet.nat.stream import StreamLoop
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.transport.addresses import public_address
from splitnet.version import __version__
from splitnet.wire.endpoints import Relay, host_and_port

log = logging.getLogger(__name__)

REFRESH_S: Final = 15.0  # between two announcements
SOON: Final = 3  # changes that are published at once within `refresh_s`; a further one waits for the end of this time
WARN_AGAIN_S: Final = 3600.0  # between two warnings while the record is refused
FIRST_TRIES: Final = 3  # attempts at the first announcement; a DHT that has just lost nodes answers late


def find_helpers(directory: SwarmDirectory) -> list[Relay]:
    """The relays in the directory that serve no blocks. Raises DirectoryError."""
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
    """Runs a relay at this host and port, and publishes it in the directory; yields its public address and key.

    public_host: `HOST` or `HOST:PORT` by which others reach this machine; the port is ignored; None: it is detected.
    Raises SplitnetError: the relay cannot listen there, or the host has no address.
    """
    listen = f"tcp://{host}:{port}"
    name, _ = host_and_port(public_address(listen, port, public_host))
    bounds = RelayBounds(bytes_per_s=bytes_per_s or RelayBounds.bytes_per_s)
    with (
        closing(StreamLoop()) as loop,
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
    """Publishes a record of a process that is not a peer, signed by `identity`, and withdraws it at the end. about:
    fields of the record."""
    announcer = Announcer(directory, identity, lambda: record_of(identity, about))
    announcer.begin()
    with closing(announcer):
        yield


def record_of(identity: Identity, about: Mapping[str, Any]) -> PeerRecord:
    """A record, issued now, of a process that is not a peer. about: fields of the record."""
    facts = {"key": identity.public, "num_blocks": 1, "version": __version__, "issued_at": time.time()}
    return PeerRecord.idle(**facts | dict(about))


@dataclass(eq=False)
class Announcer:
    """Publishes the record that `describe` returns, at the start and every `refresh_s` seconds, until closed. If it
    returns None, nothing is published."""

    directory: SwarmDirectory
    identity: Identity
    describe: Callable[[], PeerRecord | None]
    look_around: Callable[[], None] = lambda: None
    """Called before each refresh, to update the facts about other peers in the record."""
    refresh_s: float = REFRESH_S

    def __post_init__(self) -> None:
        self._leaving = threading.Event()
        self._soon = threading.Event()
        self._soon_at: deque[float] = deque(maxlen=SOON)  # times of the latest publications between two refreshes
        self._moved = False
        self._publishing = threading.Lock()
        self._last: PeerRecord | None = None
        self._withdrawn = False
        self._warn_at = 0.0
        self._thread = threading.Thread(target=self._publish_records, name="splitnet-announce", daemon=True)
        self.begin = self._thread.start

    def start(self) -> None:
        """Publishes the first record, then starts the thread that refreshes it. Raises DirectoryError: the directory
        does not answer."""
        for tries_left in reversed(range(FIRST_TRIES)):
            try:
                self.publish()
                break
            except DirectoryError as error:
                if not tries_left or self._leaving.is_set():
                    raise
                log.warning("the first announcement failed, trying again: %s", error)
        self.begin()

    def close(self) -> None:
        """Withdraws the record. May be called more than once."""
        if self._withdrawn:
            return
        self._withdrawn = True
        self._leaving.set()
        self._soon.set()
        if self._thread.ident is not None:
            self._thread.join()
        try:
            if self._last is not None:
                self.directory.withdraw(self._last, self.identity)
        except SplitnetError as error:
            log.warning("could not leave the DHT cleanly, the record expires by itself: %s", error)

    def _publish_records(self) -> None:
        look_at = time.monotonic()  # the first refresh is due at once, so that other peers are measured
        while not self._leaving.is_set():
            self._wait_for_change(look_at)
            if self._leaving.is_set():
                return
            self._soon.clear()
            try:
                if self._moved:
                    self._moved, look_at = False, 0.0
                    self.directory.address_changed()
                    self.publish()
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + self.refresh_s
                    self.look_around()
                else:
                    self._soon_at.append(time.monotonic())
                self.publish()
            except SplitnetError as error:
                log.warning("announcement failed, next try in %.0f s: %s", self.refresh_s, error)

    def _wait_for_change(self, look_at: float) -> None:
        """Waits until `look_at` or until a change, but allows at most `SOON` changes per refresh."""
        if len(self._soon_at) == SOON:
            free_at = min(self._soon_at[0] + self.refresh_s, look_at)
            self._leaving.wait(max(0.0, free_at - time.monotonic()))
        self._soon.wait(max(0.0, look_at - time.monotonic()))

    def publish_soon(self, *, moved: bool = False) -> None:
        """Publishes a changed record in the thread of this announcer. May be called from any thread.

        moved: the machine has a new address, so that other peers are measured again, too.
        """
        self._moved |= moved
        self._soon.set()

    def publish(self) -> None:
        with self._publishing:  # a record that is made before another and published after it would be refused
            record = self.describe()
            if record is None:
                return
            self._last = record
            taken = self.directory.announce(record, self.identity)
        if not taken and time.monotonic() >= self._warn_at:
            self._warn_at = time.monotonic() + WARN_AGAIN_S
            asked = part_of(self.directory, PeerDirectory)
            ahead_s = asked.clocks() if asked is not None else {}
            log.warning("the directory did not take the record of this process: %s", why_refused(ahead_s))


def why_refused(ahead_s: Mapping[str, float]) -> str:
    """Text for users: why a directory may have refused a record, and what to do. ahead_s: from
    `PeerDirectory.clocks`."""
    off = {address: seconds for address, seconds in ahead_s.items() if abs(seconds) > MAX_CLOCK_SKEW_S}
    if not off:
        return "compare the clocks with `splitnet doctor --join ADDR`, and give --key-file if others fill the directory"
    address, seconds = max(off.items(), key=lambda each: abs(each[1]))
    differs = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the clock of this machine"
    if 1 < len(off) == len(ahead_s) and max(off.values()) - min(off.values()) < MAX_CLOCK_SKEW_S:
        return f"the clocks of {len(off)} other peers are {differs}: set the clock of this machine (NTP)"
    advice = "that clock, as others agree with this machine" if len(ahead_s) > len(off) else "the one that is wrong"
    return f"the clock of the peer at {address} is {differs}: set {advice} (NTP)"
