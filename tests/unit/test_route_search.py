"""Past silent peers: swarms on a line in which some are dead, and who is asked and left out until there is a route."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from splitnet.errors import CoverageError
from splitnet.swarm.plan import ASKED_BESIDE, MANY_SILENT, MAX_PROBED_ROUTES, searched_route


@dataclass
class Line:
    """Peers by the places where they stand, numbers; each serves all blocks, and the first of them is the fastest.

    budget: how many may be asked. told: who was silent a moment ago. stepped: from whom steps came a moment ago.
    """

    peers: Sequence[str]
    dead: set[str]
    budget: int = 1000
    told: set[str] = field(default_factory=set[str])
    stepped: set[str] = field(default_factory=set[str])
    excluded: Collection[str] = ()
    rounds: list[list[str]] = field(default_factory=list[list[str]])

    def __post_init__(self) -> None:
        self.asked = set(self.told)

    def route(self, left_out: frozenset[str]) -> list[str]:
        for name in self.peers:
            if name not in left_out and name not in self.excluded:
                return [name]
        raise CoverageError("nobody is left")

    def unmeasured(self, route: list[str]) -> list[str]:
        return []

    def unheard(self, route: list[str]) -> list[str]:
        return [name for name in route if name not in self.asked | self.stepped]

    def measure(self, ends: Collection[str], others: Collection[str]) -> bool:
        chosen = list(others)[: self.budget]
        self.budget -= len(chosen)
        self.rounds.append(chosen)
        self.asked.update(chosen)
        return bool(chosen)

    def lost(self) -> set[str]:
        return self.silent()

    def silent(self) -> set[str]:
        return self.asked & (self.dead | self.told)

    def met(self) -> tuple[set[str], set[str]]:
        return self.silent(), (self.asked | self.stepped) - self.silent()

    def beside_silent(self, silent: set[str], answered: set[str]) -> set[str]:
        """Who stands nearer to two silent ones than to any that answered."""
        places = {name: int(name) for name in self.peers}
        if len(silent) < 2 or not answered:
            return set()

        def near(name: str, others: set[str], rank: int) -> int:
            return sorted(abs(places[name] - places[other]) for other in others)[rank]

        return {name for name in self.peers if near(name, silent, 1) < near(name, answered, 0)} - answered

    def unasked(self, met: set[str]) -> tuple[set[str], set[str]]:
        unasked = set(self.peers) - met
        return unasked, unasked - self.asked

    def likely(self, among: set[str], count: int) -> list[str]:
        return [name for name in self.peers if name in among][:count]

    def drawn(self, among: set[str], count: int) -> list[str]:
        return sorted(among)[:count]


@st.composite
def lines(draw: st.DrawFn) -> Line:
    names = [f"{number:02}" for number in range(draw(st.integers(1, 40)))]
    some = st.sets(st.sampled_from(names))
    dead = draw(some)
    told = draw(st.sets(st.sampled_from(sorted(dead)))) if dead else set[str]()
    return Line(
        draw(st.permutations(names)),
        dead,
        budget=draw(st.integers(0, 60)),
        told=told,
        stepped=draw(some) - dead,
        excluded=draw(some),
    )


@given(lines())
def test_of_any_swarm(line: Line) -> None:
    try:
        [hop] = searched_route(line, ())
    except CoverageError:
        assert set(line.peers) <= set(line.excluded)
        return
    assert not {hop, *(name for asked in line.rounds for name in asked)}.intersection(line.excluded)
    asked = [name for asked in line.rounds for name in asked]
    assert len(line.rounds) <= MAX_PROBED_ROUTES
    assert len(set(asked)) == len(asked) and not line.told.intersection(asked), "nobody is asked twice"
    everybody = set(line.peers).difference(line.excluded)
    if hop in line.silent():
        assert everybody <= line.silent(), "of those that are not known to be silent somebody is left"
    if len(line.told) >= MANY_SILENT and len(line.rounds) < MAX_PROBED_ROUTES and line.budget:
        assert hop in line.met()[1] or everybody <= line.silent(), "it was asked, or heard of, before it is used"


def test_of_a_silent_region_few_are_asked() -> None:
    names = [f"{number:03}" for number in range(600)]
    line = Line(names, dead=set(names[:300]), told={"000", "001"})
    line.asked.add("320")
    [hop] = searched_route(line, ())
    assert hop not in line.dead
    assert len(line.asked & line.dead) < len(line.dead) / 2


def test_where_few_are_silent_nobody_is_asked() -> None:
    line = Line(["1", "2", "3"], dead={"3"}, told={"3"})
    assert searched_route(line, ()) == ["1"] and not line.rounds


def test_a_hop_that_was_lost_says_nothing_for_those_beside_it() -> None:
    """Its last steps came a moment ago."""
    near, far = ([f"{number:02}" for number in range(start, start + 30)] for start in (0, 70))
    lost = {"10", "11"}
    line = Line([*near, *far], dead=set(near), told={"14", "15"}, stepped=lost, excluded=lost)
    line.asked.add("99")
    [hop] = searched_route(line, ())
    assert hop in far
    assert len(line.asked.intersection(near)) == len(line.told) + 1 + ASKED_BESIDE, "all others were left out"


def test_who_is_known_to_live_speaks_for_those_beside_it() -> None:
    peers = ["10", "12", "13", "90", "91"]
    line = Line(peers, dead={"10", "11"}, told={"11"}, excluded={"11"})
    line.peers, line.asked = [*peers, "11"], {"11", "90"}
    line.lost = lambda: {"10", "11"}  # pyright: ignore
    assert searched_route(line, {"12"}) == ["12"]
