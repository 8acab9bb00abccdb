"""The search for a route around silent peers: which peers are pinged before use, and which peers the next plan avoids.

Peers are identified by name. Times are in seconds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from scheduler.liveness import LOST_S, SILENT_S

# Maximum number of plans per search; planning is repeated while links to the ends are unmeasured or hops are silent.
MAX_PROBED_ROUTES: Final = 4
# If at least this many peers are silent, hops without a sign of life for `LOST_S` are pinged before use.
MANY_SILENT: Final = 2

# Peers near silent peers are not planned with; this many of them are pinged, because a block may have no other peer.
ASKED_BESIDE: Final = 4
# Maximum number of unknown peers that are pinged if hops of a planned route do not answer: many records may name peers
# that do not exist.
PINGED_AT_ONCE: Final = 96
# Maximum number of peers whose last ping is remembered, so that records of ever new peers do not fill the memory.
KEPT_ASKED: Final = 4096


class PingHistory:
    """Which peers a client has pinged, when, and which of them answered. Thread-safe.

    silent_s: how long a peer that had answered before counts as silent after a ping without an answer.
    """

    def __init__(self, silent_s: float = SILENT_S) -> None:
        self._silent_s = silent_s
        self._asked_s: dict[str, float] = {}  # ordered by time, the oldest first
        self._silent: set[str] = set()  # peers that did not answer the latest ping
        self._heard: set[str] = set()  # peers that have ever answered
        self._stepped_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def record_ping(self, name: str, now_s: float, *, answered: bool) -> list[str]:
        """Records that a peer was pinged. Returns the names of the peers whose pings are forgotten to make room."""
        with self._lock:
            self._asked_s.pop(name, None)
            self._asked_s[name] = now_s
            if answered:
                self._heard.add(name)
                self._silent.discard(name)
            else:
                self._silent.add(name)
            forgotten = list(self._asked_s)[: max(0, len(self._asked_s) - KEPT_ASKED)]
            for each in forgotten:
                del self._asked_s[each]
                self._silent.discard(each)
                self._heard.discard(each)
            return forgotten

    def record_step(self, name: str, now_s: float) -> None:
        with self._lock:
            self._stepped_s[name] = now_s

    def asked_s(self) -> dict[str, float]:
        """When each peer was last pinged; the peer with the oldest ping is first."""
        with self._lock:
            return dict(self._asked_s)

    def silent_peers(self, now_s: float, *, lately: bool = False) -> set[str]:
        """Peers that did not answer the latest ping.

        lately: only peers that were pinged within `SILENT_S`; else also peers that never answered.
        """
        oldest_s = now_s - (SILENT_S if lately else self._silent_s)
        with self._lock:
            never: set[str] = set() if lately else self._silent - self._heard
            return never | {name for name in self._silent if self._asked_s[name] >= oldest_s}

    def met_since(self, since_s: float) -> tuple[set[str], set[str]]:
        """Peers that did not answer pings since `since_s`, and the other peers that answered or sent a step since
        then."""
        with self._lock:
            asked = {name for name, at_s in self._asked_s.items() if at_s >= since_s}
            stepped = {name for name, at_s in self._stepped_s.items() if at_s >= since_s}
            return asked & self._silent, (stepped | asked) - self._silent

    def unheard(self, names: Iterable[str], since_s: float) -> list[str]:
        """The peers that were not pinged and sent no step since `since_s`."""
        _, heard = self.met_since(since_s)
        with self._lock:
            return [name for name in names if name not in heard and self._asked_s.get(name, -math.inf) < since_s]


Route = TypeVar("Route")


@dataclass(frozen=True, slots=True)
class PlannedRoute(Generic[Route]):
    """A route that was planned."""

    route: Route
    # First and last hop, if their links to the client must be measured before use; no silent ones.
    unmeasured: Sequence[str]
    newcomers: Sequence[str]  # hops of the route that do not hold the session yet, and can be pinged


class Searcher(Protocol[Route]):
    """A client that searches for a route."""

    @property
    def now_s(self) -> float: ...

    @property
    def peer_names(self) -> AbstractSet[str]:
        """The names of all peers that have records."""
        ...

    def plan_route(self, left_out: frozenset[str]) -> PlannedRoute[Route] | None:
        """The best route without these peers, or None. Raises an error if there is no route even through all
        peers."""
        ...

    def measure_peers(self, ends: Sequence[str], others: Sequence[str]) -> set[str] | None:
        """Pings as many peers as the client still may; `ends` and `others` may overlap. None: the client may
        not ping any more.

        Returns those of `ends` whose links are measured afterwards.
        """
        ...

    def beside_silent(self, silent: set[str], answered: set[str]) -> set[str]:
        """See `scheduler/candidates.py:CandidateIndex.beside_silent`."""
        ...

    def choose_peers(self, among: AbstractSet[str], count: int, *, likely: bool) -> list[str]:
        """This many of the peers in `among`: the likeliest on routes (`likely`), or any."""
        ...


def searched_route(
    searcher: Searcher[Route],
    answers: PingHistory,
    *,
    excluded: Collection[str],
    given_up: AbstractSet[str],
    alive: Collection[str],
    since_s: float,
) -> Route:
    """The best route whose hops are alive, as far as pings before its use can show.

    Links that the client would use are measured before use; where other peers are silent, all hops are pinged. If hops
    are silent, too, the next plan leaves out peers near the silent hops, and many other peers are pinged at the same
    time: one after the other, the few live peers among many that do not exist would rarely be found.

    excluded: peers that no route may use. given_up: lost peers that are not used for a while. alive: peers that are
    known to be alive. since_s: only answers after this time show which region is silent now.

    Raises the errors of `Searcher.plan_route`.
    """

    def plan(beside: set[str]) -> PlannedRoute[Route]:
        """Plans through peers that have answered, if these serve all blocks. beside: peers near silent peers."""
        silent = frozenset(answers.silent_peers(searcher.now_s)).difference(excluded)
        for left_out in dict.fromkeys((silent | beside, silent, frozenset[str]())):
            if (found := searcher.plan_route(left_out)) is not None:
                return found
        raise AssertionError("plan_route raises an error if there is no route")

    def elsewhere() -> tuple[set[str], list[str]]:
        """Peers that are probably silent, because they are near silent ones, and the peers to ping with the next route.

        The peers to ping are a few of the probably silent peers, and peers that routes probably use; until a peer has
        answered, any peers.
        """
        silent, heard = answers.met_since(since_s)
        heard = heard.difference(excluded)  # a lost hop sent steps until it was lost
        beside = searcher.beside_silent(silent, heard.union(alive))
        unasked = searcher.peer_names - {*answers.silent_peers(searcher.now_s), *heard, *excluded}
        strangers = unasked - answers.asked_s().keys() - beside
        near = searcher.choose_peers(unasked & beside, ASKED_BESIDE, likely=True) if heard else []
        return beside, [*near, *searcher.choose_peers(strangers, PINGED_AT_ONCE, likely=bool(heard))]

    beside: set[str] = set()
    others: list[str] = []
    found = plan(beside)
    for _ in range(MAX_PROBED_ROUTES):
        now_s, ends = searcher.now_s, found.unmeasured
        lost = answers.silent_peers(now_s, lately=True) | given_up
        many = len(lost) >= MANY_SILENT and len(lost & searcher.peer_names) >= MANY_SILENT
        suspects = answers.unheard(found.newcomers, now_s - LOST_S) if many else []
        if not (ends or suspects):
            break
        measured = searcher.measure_peers(ends, [*dict.fromkeys((*suspects, *others))])
        if measured is None:
            break
        silent = answers.silent_peers(searcher.now_s)
        if beside or any(name in silent for name in (*ends, *suspects)):
            beside, others = elsewhere()
        elif not measured:
            break  # all hops are alive, or no link could be measured
        found = plan(beside)
    return found.route
