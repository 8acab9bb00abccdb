"""Keeps what a client knows of peers and links fresh: measures links, and looks around while sessions are open."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from splitnet.client.known_peers import RECORDS_MAX_AGE_S, KnownPeers
from splitnet.client.survey import Survey
from splitnet.errors import SplitnetError
from splitnet.net.prober import PING_TIMEOUT_S, Prober
from splitnet.net.records import PeerRecord

log = logging.getLogger(__name__)

MEASURED_AT_ONCE = 32


class FreshFacts:
    """Thread-safe; close it when done.

    Args:
        known: the peers.
        survey: takes in what is measured.
        prober: sends the pings.
        is_needed: whether facts are to be kept fresh in the background.

    Attributes:
        news: counts up when facts were refreshed.
    """

    def __init__(self, known: KnownPeers, survey: Survey, prober: Prober, is_needed: Callable[[], bool]) -> None:
        self.news = 0
        self._known = known
        self._survey = survey
        self._prober = prober
        self._is_needed = is_needed
        self._closing = threading.Event()
        self._look = threading.Event()
        self._suspects: Sequence[PeerRecord] = ()
        self._watcher = threading.Thread(target=self._watch, name="splitnet-watch", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Begins nothing in the background any more."""
        self._closing.set()
        self._look.set()

    def close(self) -> None:
        """Ends the thread, as soon as what it waits for has come."""
        self.stop()
        self._watcher.join(PING_TIMEOUT_S)

    def look_again(self, suspects: Sequence[PeerRecord]) -> None:
        """Refreshes the facts soon, in the background; the links to `suspects` are measured in any case."""
        self._suspects = suspects
        self._look.set()

    def measure_first(self, records: Sequence[PeerRecord]) -> None:
        """Measures links to peers that were never tried, if few links are known at all."""
        if len(self._survey.network_coordinates.links) < MEASURED_AT_ONCE:
            self.measure(sorted(self._survey.unknown(records), key=lambda record: not record.is_proven))

    def measure(self, records: Sequence[PeerRecord]) -> bool:
        """Measures the links to the first of these peers; False if there are none."""
        chosen = {record.endpoint: record for record in records[:MEASURED_AT_ONCE]}
        if chosen:
            self._survey.links_measured(chosen, self._prober.measure(chosen, PING_TIMEOUT_S))
        return bool(chosen)

    def _watch(self) -> None:
        """While sessions are open: keeps records and links fresh, so that they can tell when a better route exists."""
        while True:
            self._look.wait(RECORDS_MAX_AGE_S)
            if self._closing.is_set():
                return
            self._look.clear()
            if not self._is_needed():
                continue
            suspects, self._suspects = self._suspects, ()
            try:
                stale = self._survey.stale(self._known.look(fresh=True))
                self.measure([*suspects, *(record for record in stale if record not in suspects)])
                self.news += 1
            except SplitnetError as error:
                log.info("the facts about peers could not be refreshed: %s", error)
