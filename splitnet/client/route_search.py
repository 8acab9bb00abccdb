"""The search for a route past silent peers: who is asked before it is used, and who is left out of the next.

Real clients and simulated ones search by this; how they plan, and how they ask, is theirs. Peers go by their names.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import Final, Protocol, TypeVar

from splitnet.client.fresh_facts import PINGED_AT_ONCE
from splitnet.errors import CoverageError, PeerBusy

MAX_PROBED_ROUTES: Final = 4
"""How often a route is planned again because the links to its ends were not measured yet, or hops were silent."""
MANY_SILENT: Final = 2
HEARD_S: Final = 3.0
"""If so many peers do not answer, others may not either: all hops of a route that were not heard for so long are asked
before it is opened, which takes a round trip instead of the time in which they should have opened it. After 3 s a hop
counts as lost: who answered before may be lost with it.
"""
ASKED_BESIDE: Final = 4
"""Of those that stand beside silent peers, and so are left out, that are asked all the same: it may be they alone."""

Route = TypeVar("Route")


class Grounds(Protocol[Route]):
    """What a client knows of the peers, and how it learns more.

    excluded: through whom no route may go.
    """

    excluded: Collection[str]

    def route(self, left_out: frozenset[str]) -> Route:
        """The best one without these and without `excluded`. Raises CoverageError, PeerBusy."""
        ...

    def unmeasured(self, route: Route) -> list[str]:
        """Who stands at an end of the route with a link to the client that was not measured, unless it is silent."""
        ...

    def unheard(self, route: Route) -> list[str]:
        """Hops from which nothing came for `HEARD_S`, of those that can be asked and do not hold the session."""
        ...

    def measure(self, ends: Collection[str], others: Collection[str]) -> bool:
        """Measures links, as many as the client still may; whether it measured any. Some may be in both."""
        ...

    def lost(self) -> Collection[str]:
        """Who of those that have records was silent lately, or has been given up."""
        ...

    def silent(self) -> Collection[str]:
        """Who did not answer when it was asked last, and may not exist."""
        ...

    def met(self) -> tuple[set[str], set[str]]:
        """Who was silent in this search and a moment before, and from whom something came."""
        ...

    def beside_silent(self, silent: set[str], answered: set[str]) -> set[str]:
        """See `scheduler/candidates.py:Crowd.beside_silent`."""
        ...

    def unasked(self, met: set[str]) -> tuple[set[str], set[str]]:
        """Who has a record and is not in `met`: all of them, and those that were never asked."""
        ...

    def likely(self, among: set[str], count: int) -> list[str]:
        """So many of these through which routes most likely go."""
        ...

    def drawn(self, among: set[str], count: int) -> list[str]:
        """So many of these at random."""
        ...


def searched_route(grounds: Grounds[Route], alive: Collection[str]) -> Route:
    """The best route whose hops live, as far as that can be known before it is used.

    Of many peers only some links are measured. Those that the client would use are, before it does; and where others
    are silent, all hops are asked. If these are silent, too, those that stand near are left out of the next plan, and
    others are measured with it: among many that do not exist few are found one by one.

    alive: peers that are known to live.

    Raises:
        CoverageError, PeerBusy: as `Grounds.route` does.
    """
    beside: set[str] = set()
    others: list[str] = []
    route = _route_past(grounds, beside)
    for _ in range(MAX_PROBED_ROUTES):
        ends = grounds.unmeasured(route)
        doubted = grounds.unheard(route) if len(grounds.lost()) >= MANY_SILENT else []
        if not (ends or doubted) or not grounds.measure(ends, [*dict.fromkeys((*doubted, *others))]):
            break
        silent = grounds.silent()
        if beside or any(name in silent for name in (*ends, *doubted)):
            beside, others = _elsewhere(grounds, alive)
        elif grounds.unmeasured(route) == ends:
            break  # all live, or nothing could be learnt
        route = _route_past(grounds, beside)
    return route


def _route_past(grounds: Grounds[Route], beside: set[str]) -> Route:
    """Through peers that have answered, if there are enough of them. beside: who stands beside silent ones."""
    silent = frozenset(grounds.silent()).difference(grounds.excluded)
    *doubted, nobody = dict.fromkeys((silent | beside, silent, frozenset[str]()))
    for left_out in doubted:
        with suppress(CoverageError, PeerBusy):
            return grounds.route(left_out)
    return grounds.route(nobody)


def _elsewhere(grounds: Grounds[Route], alive: Collection[str]) -> tuple[set[str], list[str]]:
    """Who is likely silent, as those are that stand near, and whom to ask with the next route.

    These are a few of the former, and others that routes likely go through; any others as long as nobody has answered.
    """
    silent, heard = grounds.met()
    heard = heard.difference(grounds.excluded)  # steps came from a hop until it was lost
    beside = grounds.beside_silent(silent, heard.union(alive))
    unasked, strangers = grounds.unasked({*grounds.silent(), *heard, *grounds.excluded})
    near = grounds.likely(unasked & beside, ASKED_BESIDE)
    if heard:
        return beside, [*near, *grounds.likely(strangers - beside, PINGED_AT_ONCE)]
    return beside, grounds.drawn(strangers - beside, PINGED_AT_ONCE)
