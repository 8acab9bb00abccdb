"""The caches of the planner change no route."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.candidates import CandidateIndex, _block_ms, _LeastOfBlocks, _sending_ms
from scheduler.cost import Encoding, block_ms, occupied_ms
from scheduler.facts import CLIENT, Coordinate, Link, Network, NetworkPlace, Peer, Speed
from scheduler.route import best_route
from splitnet.directory.record import KEY_PREFIX_BYTES, PeerRecord, SeenLink
from splitnet.swarm import measure as measure_module
from splitnet.swarm import plan as planner_module
from splitnet.swarm.measure import Latest, Measurements
from splitnet.swarm.plan import CLIENT_ENDS, PlannedHop, Planner
from tests.tiers import examples
from tests.unit.swarm.test_measure import Clock
from tests.unit.swarm.test_plan import NEEDS, record

FEW = 12
ENCODINGS = (Encoding("none", 256.0), Encoding("int8", 66.0, 0.24, 0.003))


def crowd_of(choices: random.Random, count: int) -> list[PeerRecord]:
    """Peers of blocks 0 to 5; the first two cover all blocks. Each peer has measured its links to two others."""
    peers = [record(0, 3), record(3, 6)]
    while len(peers) < count:
        start = choices.randrange(6)
        peers.append(record(start, choices.randint(start + 1, 6)))
    return [
        replace(
            peer,
            block_ms=tuple(choices.lognormvariate(0.0, 1.0) * (1 + size) for size in range(5)),
            queue_ms=choices.expovariate(0.2),
            coordinate=(choices.gauss(0, 40), choices.gauss(0, 40), 0.0, 5.0),
            coordinate_error=choices.choice((0.2, 1.0)),
            links=tuple(
                SeenLink(other.key.raw[:KEY_PREFIX_BYTES], choices.uniform(1, 200), choices.uniform(10, 1e4))
                for other in choices.sample(peers, 2)
            ),
        )
        for peer in peers
    ]


class World:
    """A client whose planner caches earlier results. A planner without them can be compared."""

    def __init__(self, seed: int) -> None:
        self.choices = random.Random(seed)
        self.clock = Clock()
        self.measurements = Measurements(self.clock)
        self.records = crowd_of(self.choices, 30)
        self.planner = Planner(self.measurements, "a-model")
        self.prompt = 0

    def any(self) -> int:
        return self.choices.randrange(len(self.records))

    def changes(self) -> dict[str, Callable[[], object]]:
        some = self.any()
        key, other = self.records[some].key.text, self.records[self.any()].key.text

        def renew() -> None:
            self.records[some] = replace(self.records[some], queue_ms=self.choices.expovariate(0.01))

        def read_again() -> None:
            self.records = [replace(each) for each in self.records]  # Equal records, but new objects.

        def wait(seconds: float) -> None:
            self.clock.now += seconds

        return {
            "a record": renew,
            "equal records": read_again,
            "another order": lambda: self.choices.shuffle(self.records),
            "a hop": lambda: self.measurements.hop_seen(
                key, 1, self.choices.expovariate(0.1), self.choices.expovariate(0.1)
            ),
            "a link between": lambda: self.measurements.link_seen(key, other, self.choices.uniform(0, 300)),
            "an own link": lambda: self.measurements.network_coordinates.measured(
                self.records[some], Link(self.choices.uniform(0, 100), self.choices.choice((0.0, 500.0)))
            ),
            "time": lambda: wait(50.0),
            "nothing": lambda: None,
        }

    def route(
        self, planner: Planner, seed: int, *, exclude: Collection[str], holders: Collection[str], inner: bool
    ) -> list[PlannedHop]:
        planner._random = random.Random(seed)
        ends = (self.records[0], None) if inner else CLIENT_ENDS
        needs, part = replace(NEEDS, prompt=self.prompt), (3, 6) if inner else (0, 6)
        return planner.plan_route(self.records, needs, part, neighbours=ends, exclude=exclude, holders=holders)

    def route_with_all_links(self, seed: int, exclude: Collection[str]) -> list[PlannedHop]:
        """The same without `holders`, planned by the functions of `scheduler` alone."""
        peers, network = self.measurements.peers(self.records), self.measurements.network(self.records)
        wanted: dict[str, Any] = {"encodings": NEEDS.encodings, "kv_needed": NEEDS.kv_positions, "prompt": self.prompt}
        outside = [network.places[CLIENT]] if CLIENT in network.places else []
        likely = CandidateIndex(peers, network).near(outside * 2, (0, 6), exclude=exclude, limit=FEW, **wanted)
        route = best_route(likely, (0, 6), network, rng=random.Random(seed), **wanted)
        by_name = {each.key.text: each for each in self.records}
        return [PlannedHop(by_name[hop.peer], hop.start, hop.end) for hop in route.hops]

    def not_needed(self, count: int) -> list[str]:
        """Some peers that routes can do without, because the first two peers serve all blocks."""
        names = [each.key.text for each in self.records if (each.start, each.end) not in ((0, 3), (3, 6))]
        return self.choices.sample(names, count)


CHANGES = tuple(World(0).changes())


@settings(max_examples=examples(60))
@given(st.integers(0, 2**32), st.lists(st.sampled_from(CHANGES), min_size=3, max_size=10))
def test_a_planner_with_caches_chooses_the_same_routes_as_a_new_one(seed: int, changes: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner_module, "EXACT_PEERS", FEW)
        world = World(seed)
        for number, change in enumerate(changes):
            world.changes()[change]()
            world.prompt = world.choices.choice((0, 100))
            exclude = world.not_needed(world.choices.choice((0, 0, 10)))
            holders = [world.records[world.any()].key.text for _ in range(world.choices.randrange(3))]
            inner = world.choices.random() < 0.3
            forgetful = copy.copy(world.measurements)
            forgetful._told = Latest(measure_module._told_network, 0)
            anew = Planner(forgetful, "a-model")
            expected = world.route(anew, number, exclude=exclude, holders=holders, inner=inner)
            assert world.route(world.planner, number, exclude=exclude, holders=holders, inner=inner) == expected
            if not holders and not inner:
                assert world.route_with_all_links(number, exclude) == expected


def test_a_cached_index_is_reused_for_the_same_records_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "EXACT_PEERS", FEW)
    world, made = World(1), list[int]()
    world.planner.crowd = Latest(lambda records: made.append(1) or planner_module._crowd_of(records), 2)

    def plan(missing: int = 0) -> int:
        world.route(world.planner, 0, exclude=world.not_needed(missing), holders=[], inner=False)
        return len(made)

    assert [plan(), plan()] == [1, 1]
    assert [plan(missing=3), plan(), plan(missing=2)] == [1, 1, 1], "some that must not be used"
    world.measurements.hop_seen(world.records[0].key.text, 1, 5.0, 5.0)
    world.prompt = 100
    assert plan() == 1, "what a session sees, and needs, costs no new crowd"
    world.records[5] = replace(world.records[5], queue_ms=77.0)
    assert plan() == 2


def test_a_cache_keeps_only_the_latest_results() -> None:
    made: list[object] = []
    latest = Latest(lambda fact: made.append(fact) or fact, 2)
    for fact in ({1: 2}, {1: 3}, {1: 2}, [4], {1: 3}):
        assert latest(fact) == fact
    assert made == [{1: 2}, {1: 3}, [4], {1: 3}]


@given(
    st.lists(st.tuples(*[st.floats(0, 1e6)] * 5), min_size=1, max_size=4),
    st.floats(0, 2000),
    st.integers(1, 600),
    st.integers(0, 5000),
)
def test_candidate_costs_equal_route_costs(
    speeds: list[tuple[float, ...]], batch: float, positions: int, prompt: int
) -> None:
    peers = [Peer(str(number), 0, 1, Speed(speed), batch=batch) for number, speed in enumerate(speeds)]
    told = _block_ms(np.array(speeds), np.full(len(speeds), batch), positions, prompt)
    assert told == pytest.approx([block_ms(peer, positions, prompt) for peer in peers], rel=1e-9)
    rates = np.array([0.5, 1e3, 1e9])
    sending = _sending_ms(rates, positions, ENCODINGS, prompt)
    expected = [occupied_ms(Link(7.0, float(rate)), positions, ENCODINGS, prompt) for rate in rates]
    assert sending == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 2**32), st.integers(0, 5))
def test_a_corrected_index_equals_an_index_of_the_corrected_peers(seed: int, count: int) -> None:
    choices = random.Random(seed)

    def facts(peer: Peer) -> Peer:
        speed = Speed(tuple(choices.lognormvariate(0, 1) * (1 + size) for size in range(5)))
        return replace(peer, speed=speed, queue_ms=choices.expovariate(0.1), kv_free=choices.choice((5, 500)))

    peers = [facts(Peer(f"p{number}", number % 5, number % 5 + 2, Speed((1.0,) * 5))) for number in range(40)]
    corrected = [facts(peer) for peer in choices.sample(peers, count)]
    by_id = {peer.id: peer for peer in (*peers, *corrected)}
    places = {
        peer.id: NetworkPlace(Coordinate((choices.gauss(0, 40), 0.0, 0.0), 1.0, 0.2), 100.0) for peer in peers[:30]
    }
    crowd, anew = (
        CandidateIndex(peers, Network(places=places)),
        CandidateIndex(list(by_id.values()), Network(places=places)),
    )

    def near(crowd: CandidateIndex) -> list[Peer]:
        return crowd.near([], (0, 6), encodings=ENCODINGS, kv_needed=100, prompt=64, limit=15)

    before = near(crowd)
    assert near(crowd.corrected(corrected)) == near(anew)
    assert near(crowd) == before, "the crowd itself stays"
    with pytest.raises(ValueError, match="other blocks"):
        crowd.corrected([replace(peers[0], end=6)])


def test_a_table_with_changed_links_equals_the_table_of_the_changed_network() -> None:
    places = {name: NetworkPlace(Coordinate((len(name), 0.0, 0.0), 1.0, 0.2), 100.0) for name in ("a", "bb", CLIENT)}
    network = Network({("a", "bb"): Link(3.0, 70.0)}, places=places)
    changed = {("a", "bb"): Link(9.0, 30.0), ("bb", "elsewhere"): Link(1.0, 1.0), (CLIENT, "a"): Link(2.0, 3.0)}
    ids = (CLIENT, "a", "bb", "unknown")
    before = network.table(ids).latency_ms.copy()
    table, anew = (
        network.with_links(changed).table(ids),
        Network({**network.measured, **changed}, places=places).table(ids),
    )
    for name in ("latency_ms", "ms_per_byte"):
        np.testing.assert_array_equal(getattr(table, name), getattr(anew, name))
    np.testing.assert_array_equal(network.table(ids).latency_ms, before)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 9)), max_size=12))
def test_the_least_value_of_spans_over_each_block(spans: list[tuple[int, int, float]]) -> None:
    starts, ends = (np.array([span[side] for span in spans], dtype=np.int64) for side in (0, 1))
    ends = np.maximum(starts, ends)
    values = np.array([value for *_, value in spans])
    expected = [min(values[(starts <= block) & (block < ends)], default=np.inf) for block in range(9)]
    assert _LeastOfBlocks(starts, ends, 9).least_of(values).tolist() == expected


@given(
    st.lists(st.tuples(*[st.integers(-9, 9)] * 3, st.sampled_from(["silent", "answered", "never asked", "no place"]))),
)
def test_peers_near_silent_peers_are_found_by_coordinates(points: list[tuple[int, int, int, str]]) -> None:
    peers = [Peer(str(number), 0, 1, Speed((1.0,) * 5)) for number in range(len(points))]
    places = {
        peer.id: NetworkPlace(Coordinate((float(x), float(y), float(z)), error=0.1), 100.0)
        for peer, (x, y, z, what) in zip(peers, points, strict=True)
        if what != "no place"
    }
    silent, answered, placeless = (
        [peer.id for peer, point in zip(peers, points, strict=True) if point[3] == what]
        for what in ("silent", "answered", "no place")
    )

    def apart(one: str, other: str) -> float:
        return math.dist(places[one].coordinate.vector, places[other].coordinate.vector)

    def stands_beside_silent(name: str) -> bool:
        to_silent = sorted(apart(name, other) for other in silent)
        return to_silent[1] < min(apart(name, other) for other in answered)

    expected = {name for name in places if stands_beside_silent(name)} if len(silent) > 1 and answered else set[str]()
    unknown = [*placeless, "a stranger"]
    crowd = CandidateIndex(peers, Network(places=places))
    assert crowd.beside_silent([*silent, *unknown], [*answered, *unknown]) == expected - {*answered}


def test_excluded_peers_do_not_change_the_choice_of_candidates() -> None:
    choices = random.Random(1)
    peers: list[Peer] = []
    places = {CLIENT: NetworkPlace(Coordinate((0.0, 0.0, 0.0), 2.0, 0.1), 5000.0)}

    def add(name: str, at: tuple[float, float, float], block_ms: float) -> None:
        start = choices.randrange(0, 40, 5)
        peers.append(Peer(name, start, start + 5, Speed((block_ms,) * 5), kv_free=100))
        places[name] = NetworkPlace(Coordinate(at, 2.0, 0.1), 5000.0)

    for index in range(600):
        add(f"near{index}", (choices.gauss(20, 10), choices.gauss(0, 10), 0.0), 12.0)
    for index in range(200):
        add(f"fast{index}", (choices.gauss(120, 5), choices.gauss(0, 5), 0.0), 0.8)
    false = [f"false{index}" for index in range(8)]
    for index, name in enumerate(false):
        add(name, ((-1) ** index * 1e8, (-1) ** (index // 2) * 1e8, (-1) ** (index // 4) * 1e8), 1e8)
    crowd = CandidateIndex(peers, Network(places=places))
    chosen = crowd.near([places[CLIENT]] * 2, (0, 40), encodings=ENCODINGS, kv_needed=10, exclude=false, limit=300)
    assert sum(peer.id.startswith("fast") for peer in chosen) > 100
