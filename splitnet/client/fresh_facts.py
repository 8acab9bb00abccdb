"""Keeps what a client knows of peers and links fresh: measures links, and looks around while the client is in use."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

from scheduler.candidates import measured_first
from scheduler.network import Link
from splitnet.client.known_peers import KnownPeers
from splitnet.client.survey import Survey
from splitnet.errors import SplitnetError
from splitnet.net.endpoints import Endpoint
from splitnet.net.fields import STRICT_VERSIONS
from splitnet.net.prober import PING_TIMEOUT_S, Prober
from splitnet.net.records import PeerRecord

log = logging.getLogger(__name__)

PINGED_AT_ONCE = 96
"""Of peers of which nothing is known, if those of a planned route do not answer: many others may not exist either."""

OTHERS_PER_MINUTE = 6
LIKELY_PER_MINUTE = 9
"""Of the peers that are measured again while sessions are open: any, and those that routes most likely go through.

Before a route is planned anew, as the present one seems slow, it is one of each block at least.
"""

PINGS_PER_MINUTE = 256
ENDS_PINGS = 32
"""Of these are for the ends of a route that is to be used: two, and up to eight that measure the bandwidth, to each."""
_PROBE_PINGS = 8
PROBE_AGAIN_S = 180.0
SUSPECTED_AGAIN_S = 25.0
"""The bandwidth of a link is measured again after so long, or so long if steps stay slow: it takes 128 KiB and more."""
IN_USE_S = 300.0
"""So long after a plan another session is expected, which should not have to wait for a look into the directory."""


class FreshFacts:
    """Thread-safe; close it when done.

    Args:
        known: the peers.
        survey: takes in what is measured.
        prober: sends the pings.
        is_needed: whether links that are known are to be measured again and again.
        in_use: peers of open sessions; what is known of their links must not grow old.
        likely: of all peers and some of them so many of the latter through which routes most likely go; True: at least
            one for each block.
        clock: seconds.
        is_busy: whether much waits on the way to a peer.

    Attributes:
        news: counts up when facts were refreshed.
    """

    def __init__(
        self,
        known: KnownPeers,
        survey: Survey,
        prober: Prober,
        is_needed: Callable[[], bool],
        in_use: Callable[[], Collection[Endpoint]],
        likely: Callable[[Sequence[PeerRecord], Sequence[PeerRecord], int, bool], Sequence[PeerRecord]],
        clock: Callable[[], float] = time.monotonic,
        is_busy: Callable[[Endpoint], bool] = lambda _: False,
    ) -> None:
        self.news = 0
        self._known = known
        self._survey = survey
        self._prober = prober
        self._is_needed = is_needed
        self._in_use = in_use
        self._likely = likely
        self._is_busy = is_busy
        self._clock = clock
        self._used_at = -math.inf
        self._pinged_at: deque[float] = deque()
        """When, once for each ping to a peer that answers: to those that do not exist nothing is sent."""
        self._counting = threading.Lock()
        self._closing = threading.Event()
        self._look = threading.Event()
        self._suspects: Sequence[PeerRecord] = ()
        self._suspects_probed_s = PROBE_AGAIN_S
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

    def look_again(self, suspects: Sequence[PeerRecord], *, probe: bool = False) -> None:
        """Refreshes the facts soon, in the background; the links to `suspects` are measured in any case.

        probe: steps stay slow, and no fact says why: the bandwidth is measured unless that was a moment ago.
        """
        self._suspects, self._suspects_probed_s = suspects, SUSPECTED_AGAIN_S if probe else PROBE_AGAIN_S
        self._look.set()

    def used(self) -> None:
        """Somebody plans with the facts, or may have to."""
        self._used_at = self._clock()

    def measure_first(self, records: Sequence[PeerRecord], exclude: Collection[str] = ()) -> None:
        """Measures links to peers that were never tried, if few links are known at all; to none of those in `exclude`.

        Some of them are any peers, which tell where the client stands; the others are those that routes most likely go
        through as seen from there.
        """
        anyone, *likely = measured_first(len(records))
        if len(self._survey.network_coordinates.links) < anyone:
            unknown = sorted(self._survey.unknown(records, exclude), key=lambda record: not record.is_proven)
            self.look_at(unknown[:anyone])
            for count in likely:
                self.look_at(self._likely(records, self._survey.unknown(records, exclude), count, False))

    def look_at(self, records: Sequence[PeerRecord]) -> None:
        """Measures the round trips to the first of these peers, as far as a minute has pings for that."""
        chosen = {record.endpoint: record for record in records[: max(0, self._pings_left() - ENDS_PINGS) // 2]}
        if chosen:
            round_trips = self._prober.round_trips(chosen, PING_TIMEOUT_S, loads=_that_tell(chosen))
            self._pinged(2 * len(round_trips))
            links = {endpoint: Link(rtt_ms / 2, 0.0) for endpoint, rtt_ms in round_trips.items()}
            self._take_in(chosen, links)

    def measure(
        self, records: Sequence[PeerRecord], others: Sequence[PeerRecord] = (), again_s: float = PROBE_AGAIN_S
    ) -> bool:
        """Measures the links to the first of these peers; of `records` the bandwidth too, but seldom more than once.

        As far as a minute has pings for that; whether it had any.
        """
        left = self._pings_left()
        chosen = {record.endpoint: record for record in records[: left // (2 + _PROBE_PINGS)]}
        due = {record.endpoint for record in self._survey.unprobed(list(chosen.values()), again_s)}
        left -= 2 * len(chosen) + _PROBE_PINGS * len(due)
        chosen |= {record.endpoint: record for record in others[: max(0, min(left // 2, PINGED_AT_ONCE))]}
        if chosen:
            links = self._prober.measure(chosen, PING_TIMEOUT_S, probed=due, loads=_that_tell(chosen))
            self._pinged(2 * len(links) + _PROBE_PINGS * len(due & links.keys()))
            self._take_in(chosen, links)
        return bool(chosen)

    def _take_in(self, tried: Mapping[Endpoint, PeerRecord], links: Mapping[Endpoint, Link]) -> None:
        """Nobody is silent because what waits on the way to it holds up a ping."""
        told = {each: record for each, record in tried.items() if each in links or not self._is_busy(each)}
        loads = {each: load for each in _that_tell(tried) & links.keys() if (load := self._prober.load(each))}
        self._survey.links_measured(told, links, loads)

    def _pings_left(self) -> int:
        """In this minute; others that measure at the same time may have overdrawn it."""
        now = self._clock()
        with self._counting:
            while self._pinged_at and now - self._pinged_at[0] > 60.0:
                self._pinged_at.popleft()
            return max(0, PINGS_PER_MINUTE - len(self._pinged_at))

    def _pinged(self, count: int) -> None:
        with self._counting:
            self._pinged_at.extend([self._clock()] * count)

    def _some_likely(
        self, records: Sequence[PeerRecord], among: Sequence[PeerRecord], *, everywhere: bool = False
    ) -> Sequence[PeerRecord]:
        """Some through which routes likely go; `everywhere`: one of each block, for a route that is to be planned."""
        count = self._at_once(LIKELY_PER_MINUTE)
        likely = self._likely(records, among, count, True)
        return likely if everywhere else random.sample(likely, min(len(likely), count))

    def _at_once(self, per_minute: int) -> int:
        return round(per_minute * self._known.look_s / 60)

    def _watch(self) -> None:
        """Keeps records fresh, and while sessions are open links: so they can tell when a better route exists."""
        while True:
            self._look.wait(self._known.look_s)
            if self._closing.is_set():
                return
            self._look.clear()
            has_sessions = self._is_needed()
            if has_sessions:
                self.used()
            if self._clock() - self._used_at > IN_USE_S:
                continue
            suspects, self._suspects = self._suspects, ()
            try:
                records = self._known.look(fresh=self._known.is_old)
                if has_sessions:
                    used = self._in_use()
                    self.look_at([record for record in self._survey.stale(records) if record.endpoint in used])
                    self.measure(suspects, again_s=self._suspects_probed_s)
                    stale = self._survey.stale(records)
                    self.look_at(stale[: self._at_once(OTHERS_PER_MINUTE)])
                    self.look_at(self._some_likely(records, self._survey.stale(stale), everywhere=bool(suspects)))
                    self.news += 1
                else:  # so that the next session need not wait for that either
                    self.look_at(self._some_likely(records, self._survey.unknown(records)))
            except SplitnetError as error:
                log.info("the facts about peers could not be refreshed: %s", error)


def _that_tell(records: Mapping[Endpoint, PeerRecord]) -> set[Endpoint]:
    """Who says how busy it is if it is asked."""
    return {endpoint for endpoint, record in records.items() if record.version not in STRICT_VERSIONS}
