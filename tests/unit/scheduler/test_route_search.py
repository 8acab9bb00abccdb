"""The search for a route past silent peers: which peers it pings and leaves out, for peers on a line."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from scheduler.route_search import (
    ASKED_BESIDE,
    MANY_SILENT,
    MAX_PROBED_ROUTES,
    PingHistory,
    PlannedRoute,
    searched_route,
)
from splitnet.errors import CoverageError


@dataclass
class Line:
    """Peers named by their place on a line. Each serves all blocks, and the first one is the fastest.

    budget: how many peers may be pinged. told: peers that were silent recently. stepped: peers that recently sent
    outputs of steps. answered: peers that answered recently.
    """

    peers: Sequence[str]
    dead: set[str]
    budget: int = 1000
    told: set[str] = field(default_factory=set[str])
    stepped: set[str] = field(default_factory=set[str])
    answered: set[str] = field(default_factory=set[str])
    excluded: Collection[str] = ()
    rounds: list[list[str]] = field(default_factory=list[list[str]])
    now_s: float = 1000.0

    def __post_init__(self) -> None:
        self.answers = PingHistory()
        for name in sorted(self.told | self.answered):
            self.answers.record_ping(name, self.now_s, answered=name in self.answered)
        for name in self.stepped:
            self.answers.record_step(name, self.now_s)

    def search(self, alive: Collection[str] = (), given_up: Set[str] = frozenset()) -> list[str]:
        return searched_route(
            self, self.answers, excluded=self.excluded, given_up=given_up, alive=alive, since_s=self.now_s - 1
        )

    @property
    def peer_names(self) -> set[str]:
        return set(self.peers)

    @property
    def silent(self) -> set[str]:
        return self.answers.silent_peers(self.now_s)

    @property
    def asked(self) -> set[str]:
        return {*self.answers.asked_s()}

    def plan_route(self, left_out: frozenset[str]) -> PlannedRoute[list[str]] | None:
        for name in self.peers:
            if name not in left_out and name not in self.excluded:
                return PlannedRoute([name], unmeasured=(), newcomers=[name])
        if left_out:
            return None
        raise CoverageError("nobody is left")

    def measure_peers(self, ends: Sequence[str], others: Sequence[str]) -> set[str] | None:
        chosen = others[: self.budget]
        self.budget -= len(chosen)
        self.rounds.append([*chosen])
        for name in chosen:
            self.answers.record_ping(name, self.now_s, answered=name not in self.dead)
        return set() if chosen else None

    def beside_silent(self, silent: set[str], answered: set[str]) -> set[str]:
        """Peers nearer to two silent peers than to any peer that answered."""
        places = {name: int(name) for name in self.peers}
        if len(silent) < 2 or not answered:
            return set()

        def near(name: str, others: set[str], rank: int) -> int:
            return sorted(abs(places[name] - places[other]) for other in others)[rank]

        return {name for name in self.peers if near(name, silent, 1) < near(name, answered, 0)} - answered

    def choose_peers(self, among: Set[str], count: int, *, likely: bool) -> list[str]:
        return [name for name in self.peers if name in among][:count] if likely else sorted(among)[:count]


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
def test_a_search_pings_no_peer_twice_and_uses_no_silent_peer_without_need(line: Line) -> None:
    try:
        [hop] = line.search()
    except CoverageError:
        assert set(line.peers) <= set(line.excluded)
        return
    assert not {hop, *(name for asked in line.rounds for name in asked)}.intersection(line.excluded)
    asked = [name for asked in line.rounds for name in asked]
    assert len(line.rounds) <= MAX_PROBED_ROUTES
    assert len(set(asked)) == len(asked) and not line.told.intersection(asked), "nobody is asked twice"
    everybody = set(line.peers).difference(line.excluded)
    if hop in line.silent:
        assert everybody <= line.silent, "of those that are not known to be silent somebody is left"
    if len(line.told) >= MANY_SILENT and len(line.rounds) < MAX_PROBED_ROUTES and line.budget:
        assert hop in line.answers.met_since(line.now_s)[1] or everybody <= line.silent, (
            "it was asked, or heard of, before it is used"
        )


def test_few_peers_of_a_silent_region_are_pinged() -> None:
    names = [f"{number:03}" for number in range(600)]
    line = Line(names, dead=set(names[:300]), told={"000", "001"}, answered={"320"})
    [hop] = line.search()
    assert hop not in line.dead
    assert len(line.asked & line.dead) < len(line.dead) / 2


def test_no_peer_is_pinged_if_few_are_silent() -> None:
    line = Line(["1", "2", "3"], dead={"3"}, told={"3"})
    assert line.search() == ["1"] and not line.rounds


def test_a_lost_hop_is_no_sign_that_its_neighbours_are_alive() -> None:
    """The last outputs of its steps arrived recently."""
    near, far = ([f"{number:02}" for number in range(start, start + 30)] for start in (0, 70))
    lost = {"10", "11"}
    line = Line([*near, *far], dead=set(near), told={"14", "15"}, stepped=lost, answered={"99"}, excluded=lost)
    [hop] = line.search()
    assert hop in far
    assert len(line.asked.intersection(near)) == len(line.told) + 1 + ASKED_BESIDE, "all others were left out"


def test_a_peer_known_to_be_alive_is_used_beside_silent_peers() -> None:
    peers = ["10", "12", "13", "90", "91"]
    line = Line([*peers, "11"], dead={"10", "11"}, told={"11"}, answered={"90"}, excluded={"11"})
    assert line.search({"12"}, given_up={"10", "11"}) == ["12"]
