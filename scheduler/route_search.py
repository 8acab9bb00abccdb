"""The search for a route past silent peers: which peers are asked before they are used, and which the next plan avoids.

Peers go by their names, times are in seconds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from scheduler.liveness import LOST_S, SILENT_S

MAX_PROBED_ROUTES: Final = 4  # plans, as links to the ends were not measured yet or hops were silent
MANY_SILENT: Final = 2  # if so many do not answer, hops without a sign of life for `LOST_S` are asked before use

ASKED_BESIDE: Final = 4  # peers beside silent ones are left out; so many are asked, as only they may serve a block
PINGED_AT_ONCE: Final = 96  # unknown peers, if those of a planned route do not answer: many may not exist
KEPT_ASKED: Final = 4096  # of so many peers it is known when they were asked; records of ever new peers cost no memory


class Answers:
    """Which peers a client has asked for a sign of life, when, and which of them answered. Thread-safe.

    silent_s: for how long a peer that has answered before counts as silent.
    """

    def __init__(self, silent_s: float = SILENT_S) -> None:
        self._silent_s = silent_s
        self._asked_s: dict[str, float] = {}  # the one that was asked longest ago comes first
        self._silent: set[str] = set()  # peers that did not answer the last time
        self._heard: set[str] = set()  # peers that have ever answered
        self._stepped_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def asked(self, name: str, now_s: float, *, answered: bool) -> list[str]:
        """Takes in that a peer was asked. Returns the names of peers that are forgotten for it."""
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

    def stepped(self, name: str, now_s: float) -> None:
        with self._lock:
            self._stepped_s[name] = now_s

    def asked_s(self) -> dict[str, float]:
        """When each peer was asked last, the one that was asked longest ago first."""
        with self._lock:
            return dict(self._asked_s)

    def silent(self, now_s: float, *, lately: bool = False) -> set[str]:
        """Peers that did not answer when they were asked last: perhaps there are none such.

        lately: only those that were asked within `SILENT_S`; else also those that never answered.
        """
        oldest_s = now_s - (SILENT_S if lately else self._silent_s)
        with self._lock:
            never: set[str] = set() if lately else self._silent - self._heard
            return never | {name for name in self._silent if self._asked_s[name] >= oldest_s}

    def met_since(self, since_s: float) -> tuple[set[str], set[str]]:
        """Peers that were silent when they were asked since then, and others from which something came since then."""
        with self._lock:
            asked = {name for name, at_s in self._asked_s.items() if at_s >= since_s}
            stepped = {name for name, at_s in self._stepped_s.items() if at_s >= since_s}
            return asked & self._silent, (stepped | asked) - self._silent

    def unheard(self, names: Iterable[str], since_s: float) -> list[str]:
        """Those of the peers that were not asked since then, and through which no step came."""
        _, heard = self.met_since(since_s)
        with self._lock:
            return [name for name in names if name not in heard and self._asked_s.get(name, -math.inf) < since_s]


Route = TypeVar("Route")


@dataclass(frozen=True, slots=True)
class Found(Generic[Route]):
    """A route that was planned."""

    route: Route
    unmeasured: Sequence[str]  # ends whose link to the client is to be measured before use, unless they are silent
    newcomers: Sequence[str]  # its hops that can be asked, and do not hold the session


class Searcher(Protocol[Route]):
    """A client that searches."""

    @property
    def now_s(self) -> float: ...

    @property
    def names(self) -> AbstractSet[str]:
        """Of all peers that have records."""
        ...

    def plan(self, left_out: frozenset[str]) -> Found[Route] | None:
        """The best route without these peers, or None. Raises the reason if there is none although all may be used."""
        ...

    def measure(self, ends: Sequence[str], others: Sequence[str]) -> set[str] | None:
        """Asks peers, as many as the client still may; some may be in both. None: it may ask no more.

        Returns those of the ends whose links are known now.
        """
        ...

    def beside_silent(self, silent: set[str], answered: set[str]) -> set[str]:
        """See `scheduler/candidates.py:CandidateIndex.beside_silent`."""
        ...

    def chosen(self, among: AbstractSet[str], count: int, *, likely: bool) -> list[str]:
        """So many of these peers: those through which routes most likely go, or any."""
        ...


def searched_route(
    searcher: Searcher[Route],
    answers: Answers,
    *,
    excluded: Collection[str],
    given_up: AbstractSet[str],
    alive: Collection[str],
    since_s: float,
) -> Route:
    """The best route whose hops live, as far as that can be known before it is used.

    Links that the client would use are measured before it does; and where other peers are silent, all hops are asked.
    If these are silent, too, peers that stand near are left out of the next plan, and others are measured with it:
    among many that do not exist few are found one by one.

    excluded: peers that no route may go through. given_up: peers that are not used for a while, as they were lost.
    alive: peers that are known to live. since_s: answers since then tell of a region that is silent now.

    Raises what `Searcher.plan` does.
    """

    def plan(beside: set[str]) -> Found[Route]:
        """Through peers that have answered, if there are enough of them. beside: peers that stand near silent ones."""
        silent = frozenset(answers.silent(searcher.now_s)).difference(excluded)
        for left_out in dict.fromkeys((silent | beside, silent, frozenset[str]())):
            if (found := searcher.plan(left_out)) is not None:
                return found
        raise AssertionError("a plan without a route says why")

    def elsewhere() -> tuple[set[str], list[str]]:
        """Peers that are likely silent, as those are that stand near, and the peers to ask with the next route.

        These are a few of the former, and others that routes likely go through; any others until one has answered.
        """
        silent, heard = answers.met_since(since_s)
        heard = heard.difference(excluded)  # steps came from a hop until it was lost
        beside = searcher.beside_silent(silent, heard.union(alive))
        unasked = searcher.names - {*answers.silent(searcher.now_s), *heard, *excluded}
        strangers = unasked - answers.asked_s().keys() - beside
        near = searcher.chosen(unasked & beside, ASKED_BESIDE, likely=True) if heard else []
        return beside, [*near, *searcher.chosen(strangers, PINGED_AT_ONCE, likely=bool(heard))]

    beside: set[str] = set()
    others: list[str] = []
    found = plan(beside)
    for _ in range(MAX_PROBED_ROUTES):
        now_s, ends = searcher.now_s, found.unmeasured
        lost = answers.silent(now_s, lately=True) | given_up
        many = len(lost) >= MANY_SILENT and len(lost & searcher.names) >= MANY_SILENT
        suspects = answers.unheard(found.newcomers, now_s - LOST_S) if many else []
        if not (ends or suspects):
            break
        measured = searcher.measure(ends, [*dict.fromkeys((*suspects, *others))])
        if measured is None:
            break
        silent = answers.silent(searcher.now_s)
        if beside or any(name in silent for name in (*ends, *suspects)):
            beside, others = elsewhere()
        elif not measured:
            break  # all live, or nothing could be learnt
        found = plan(beside)
    return found.route
