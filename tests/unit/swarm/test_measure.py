"""Measurements of clients and peers: hops, links, load and network coordinates."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from peers.peer_links import ASKED_AT_ONCE, MEASURED_AT_ONCE, Neighbours
from peers.speed import ObservedSpeed
from scheduler import route_search
from scheduler.batching import HALF_LIFE_S, Load
from scheduler.facts import CLIENT, PASS_SIZES, UNMEASURED, Link
from scheduler.liveness import SILENT_S
from splitnet.directory.record import KEY_PREFIX_BYTES, MAX_SEEN_LINKS, PeerRecord, SeenLink, place_of
from splitnet.security.identity import Identity
from splitnet.swarm.measure import (
    MAX_AGE_S,
    REMEASURE_S,
    SETTLE_LINKS,
    SETTLE_S,
    STEPS,
    TRUST_S,
    Measurements,
    NetworkCoordinates,
)
from splitnet.transport.prober import FASTEST_PROBE_MS, PROBE_BYTES, Prober
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import LoadReport, Ping, Pong
from tests.unit.swarm.test_swarm import RECORD


def record(**facts: Any) -> PeerRecord:
    return replace(RECORD, key=Identity.generate().public, **facts)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TestMeasurements:
    def test_measured_times_of_a_hop_replace_its_published_times(self) -> None:
        clock, peer = Clock(), record(queue_ms=1.0)
        measurements = Measurements(clock)
        for _ in range(2):
            measurements.hop_seen(peer.key.text, positions=1, block_ms=5.0, wait_ms=40.0)
        (seen,) = measurements.peers([peer])
        assert seen.speed.block_ms_at(1) == pytest.approx(5.0)
        # The hop is slower by the same factor for all sizes.
        assert seen.speed.block_ms_at(256) == pytest.approx(5.0 * peer.block_ms[-1] / peer.block_ms[0])
        assert seen.queue_ms == 40.0

    def test_old_measurements_of_a_hop_expire(self) -> None:
        clock, peer = Clock(), record(queue_ms=1.0)
        measurements = Measurements(clock)
        measurements.hop_seen(peer.key.text, positions=1, block_ms=5.0, wait_ms=40.0)
        clock.now += TRUST_S + 1
        (told,) = measurements.peers([peer])
        assert (told.speed.block_ms_at(1), told.queue_ms) == (peer.block_ms[0], 1.0)

    def test_the_load_from_a_ping_counts_until_a_later_record_arrives(self) -> None:
        clock, peer = Clock(), record(queue_ms=1.0, batch=0.0)
        measurements, link = Measurements(clock), {peer.endpoint: Link(1.0, 100.0)}
        later = replace(peer, issued_at=peer.issued_at + 20)
        load = {peer.endpoint: LoadReport(30.0, 2.0, peer.issued_at + 10)}

        def told(of: PeerRecord) -> tuple[float, float]:
            [seen] = measurements.peers([of])
            assert list(measurements.corrected_peers({of.key.text: of}).values()) in ([], [seen])
            return seen.queue_ms, seen.batch

        assert told(peer) == (1.0, 0.0)
        measurements.links_measured({later.endpoint: later}, link, load)
        assert told(peer) == told(replace(peer, issued_at=peer.issued_at + 9)) == (30.0, 2.0), "published before that"
        assert told(later) == (1.0, 0.0)
        for wait_ms in (30.0, 7.0, 7.0):
            measurements.hop_seen(peer.key.text, positions=1, block_ms=peer.block_ms[0], wait_ms=wait_ms)
        assert told(peer) == (7.0, 2.0), "what steps have met says more"
        clock.now += TRUST_S + 1
        assert told(peer) == (1.0, 0.0)
        measurements.links_measured({peer.endpoint: peer}, link, load)
        measurements.links_measured({peer.endpoint: peer}, {})
        assert told(peer) == (1.0, 0.0), "it does not answer any more"

    @pytest.mark.parametrize("before", [0, 1, 2, 3])
    def test_one_slow_step_is_ignored_and_two_count(self, before: int) -> None:
        measurements, peer = Measurements(Clock()), record(queue_ms=0.0)
        told_ms = peer.block_ms[0]

        def see(block_ms: float, wait_ms: float) -> tuple[float, float]:
            measurements.hop_seen(peer.key.text, positions=1, block_ms=block_ms, wait_ms=wait_ms)
            (seen,) = measurements.peers([peer])
            return seen.speed.block_ms_at(1), seen.queue_ms

        for _ in range(before):
            see(told_ms, 0.0)
        assert see(100 * told_ms, 50.0) == pytest.approx((told_ms, 0.0))
        assert see(100 * told_ms, 50.0) == pytest.approx((100 * told_ms, 50.0))

    def test_a_link_measured_by_a_step_replaces_the_published_link(self) -> None:
        clock, there = Clock(), record()
        here = record(links=(SeenLink(there.key.raw[:KEY_PREFIX_BYTES], 10.0, 500.0),))
        measurements = Measurements(clock)
        between = (here.key.text, there.key.text)
        assert measurements.network([here, there]).link(*between) == Link(5.0, 500.0)
        measurements.link_seen(*between, rtt_ms=80.0)
        assert measurements.network([here, there]).link(*between) == Link(40.0, 500.0)
        clock.now += TRUST_S + 1
        assert measurements.network([here, there]).link(*between) == Link(5.0, 500.0)

    def test_a_peer_that_publishes_zero_times_gets_the_measured_times(self) -> None:
        liar = record(block_ms=(0.0,) * len(PASS_SIZES), queue_ms=0.0)
        measurements = Measurements(Clock())
        for _ in range(STEPS):
            measurements.hop_seen(liar.key.text, positions=1, block_ms=5.0, wait_ms=7.0)
        (seen,) = measurements.peers([liar])
        assert [seen.speed.block_ms_at(size) for size in PASS_SIZES] == [5.0] * len(PASS_SIZES)
        assert seen.queue_ms == 7.0

    def test_published_links_obey_the_triangle_inequality(self) -> None:
        near = record()
        far = record(links=(SeenLink(near.key.raw[:KEY_PREFIX_BYTES], 0.0, 1e9),))
        measurements = Measurements(Clock())
        endpoints = {near.endpoint: near, far.endpoint: far}
        measurements.links_measured(endpoints, {near.endpoint: Link(1.0, 100.0), far.endpoint: Link(80.0, 100.0)})
        network = measurements.network([near, far])
        for ends in ((near, far), (far, near)):
            assert network.link(ends[0].key.text, ends[1].key.text).latency_ms == 79.0

    def test_a_published_link_counts_for_both_directions(self) -> None:
        there = record()
        here = record(links=(SeenLink(there.key.raw[:KEY_PREFIX_BYTES], 10.0, 500.0),))
        network = Measurements(Clock()).network([here, there])
        assert network.link(there.key.text, here.key.text) == Link(5.0, 500.0)

    def test_an_unknown_link_has_the_cost_of_an_unmeasured_one(self) -> None:
        here, there = record(), record()
        network = Measurements(Clock()).network([here, there])
        assert network.link(here.key.text, there.key.text) == UNMEASURED
        assert network.link(CLIENT, here.key.text) == UNMEASURED

    def test_a_peer_counts_as_silent_until_it_answers(self) -> None:
        clock = Clock()
        measurements, here, silent = Measurements(clock), record(), record()
        tried, link = {here.endpoint: here, silent.endpoint: silent}, Link(1.0, 100.0)
        measurements.links_measured(tried, {here.endpoint: link})
        assert measurements.silent_peers() == {silent.key.text}
        assert measurements.silent_peers(lately=True) == {silent.key.text}
        clock.now += SILENT_S + 1
        assert measurements.silent_peers() == {silent.key.text}, "it may not exist"
        assert measurements.silent_peers(lately=True) == set(), "of others that says nothing any more"
        measurements.links_measured(tried, {here.endpoint: link, silent.endpoint: link})
        assert measurements.silent_peers() == set()
        measurements.links_measured(tried, {here.endpoint: link})
        assert measurements.silent_peers() == {silent.key.text}
        clock.now += SILENT_S + 1
        assert measurements.silent_peers() == set(), "it was late for one ping only, perhaps"

    def test_measured_links_become_stale(self) -> None:
        clock, peer = Clock(), record()
        measurements = Measurements(clock)
        assert measurements.unknown([peer]) == [peer] == measurements.stale([peer])
        measurements.links_measured({Endpoint(peer.address, peer.key): peer}, {})
        assert measurements.unknown([peer]) == [] == measurements.stale([peer])
        clock.now += REMEASURE_S + 1
        assert measurements.unknown([peer]) == []
        assert measurements.stale([peer]) == [peer]

    def test_memory_for_measured_peers_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(route_search, "KEPT_ASKED", 2)
        measurements, peers = Measurements(Clock()), [record() for _ in range(3)]
        for peer in (*peers[:2], peers[0], peers[2]):
            measurements.links_measured({peer.endpoint: peer}, {})
        assert measurements.unknown(peers) == [peers[1]], "the one that was tried longest ago"


class TestNetworkCoordinates:
    def test_a_coordinate_follows_the_latest_links(self) -> None:
        clock = Clock()
        coordinates = NetworkCoordinates(clock)
        rng = random.Random(1)

        def measure(count: int, x: float) -> None:
            for _ in range(count):
                other = tuple(rng.uniform(-30, 30) + (x, 0.0, 0.0)[axis] for axis in range(3))
                peer = record(coordinate=(*other, 1.0), coordinate_error=0.1)
                coordinates.measured(peer, Link((math.dist(other, (x, 0.0, 0.0)) + 2.0) / 2, 0.0))

        measure(160, 0.0)
        coordinates.settle()
        assert abs(coordinates.own_place.coordinate.vector[0]) < 10.0
        clock.now += SETTLE_S + 1
        measure(SETTLE_LINKS, 250.0)
        coordinates.settle()
        assert abs(coordinates.own_place.coordinate.vector[0] - 250.0) < 10.0
        assert coordinates.own_place.coordinate.error < 0.3

    def test_old_links_are_forgotten(self) -> None:
        clock, peer = Clock(), record()
        network_coordinates = NetworkCoordinates(clock)
        network_coordinates.measured(peer, Link(3.0, 100.0))
        assert network_coordinates.measured_links == {peer.key.text: Link(3.0, 100.0)}
        clock.now += MAX_AGE_S + 1
        assert network_coordinates.measured_links == {}

    def test_the_latest_link_is_last_and_the_highest_bandwidth_counts(self) -> None:
        first, second = record(), record()
        network_coordinates = NetworkCoordinates(Clock())
        for peer, bandwidth in ((first, 900.0), (second, 50.0), (first, 100.0)):
            network_coordinates.measured(peer, Link(3.0, bandwidth))
        assert list(network_coordinates.measured_links) == [second.key.text, first.key.text]
        assert network_coordinates.own_place.bytes_per_ms == 900.0

    def test_the_coordinate_learns_to_predict_round_trips(self) -> None:
        anchor = record(coordinate=(0.0, 0.0, 0.0, 1.0), coordinate_error=0.1)
        network_coordinates = NetworkCoordinates(Clock())
        for _ in range(60):
            network_coordinates.measured(anchor, Link(10.0, 100.0))
        place = network_coordinates.own_place
        assert place.coordinate.error < 0.5
        assert place.coordinate.rtt_ms(place_of(anchor).coordinate) == pytest.approx(20.0, rel=0.2)


class Echo:
    """A peer whose link takes no time and counts bytes; chosen endpoints stay silent."""

    def __init__(self) -> None:
        self.silent: set[Endpoint] = set()
        self.prober = Prober(self.send)
        self.sizes: list[int] = []
        self.asked: list[Endpoint] = []
        self.load = LoadReport(12.0, 3.0, 2e9)

    def send(self, endpoint: Endpoint, ping: Ping) -> None:
        self.sizes.append(len(ping.payload))
        self.asked.append(endpoint)
        if endpoint not in self.silent:
            self.prober.pong(endpoint, Pong(ping.nonce, 7.0, 100, load=(self.load,) if ping.load else ()))


class TestProber:
    @staticmethod
    def endpoint() -> Endpoint:
        return Endpoint("tcp://192.0.2.1:5", Identity.generate().public)

    def test_an_answer_has_the_round_trip_and_the_queue(self) -> None:
        echo, there = Echo(), self.endpoint()
        answer = echo.prober.ping(there).result(0)
        assert answer.queue_ms == 7.0
        assert 0 < answer.rtt_ms < 1000
        assert echo.prober.rtt_ms(there) == answer.rtt_ms

    def test_an_unexpected_pong_is_ignored(self) -> None:
        echo, there = Echo(), self.endpoint()
        echo.prober.pong(there, Pong(12345, 0.0, 0))
        assert echo.prober.rtt_ms(there) == 0.0

    def test_a_silent_peer_is_left_out(self) -> None:
        echo, there, silent = Echo(), self.endpoint(), self.endpoint()
        echo.silent = {silent}
        assert list(echo.prober.measure_links([there, silent], timeout_s=0.05)) == [there]
        assert not echo.prober.ping(silent).done()

    def test_bandwidth_is_never_infinite(self) -> None:
        echo, there = Echo(), self.endpoint()
        link = echo.prober.measure_links([there])[there]
        assert 0 < link.bytes_per_ms <= PROBE_BYTES / FASTEST_PROBE_MS
        assert PROBE_BYTES in echo.sizes


class Links:
    """Links to next hops that count how many are open."""

    def __init__(self, refused: Sequence[Endpoint] = ()) -> None:
        self.open = 0
        self.in_use: list[Endpoint] = []
        self._refused = refused

    def acquire(self, endpoint: Endpoint) -> bool:
        self.open += endpoint not in self._refused
        return endpoint not in self._refused

    def release(self, endpoint: Endpoint) -> None:
        self.open -= 1


class TestNeighbours:
    def test_all_peers_are_measured_in_several_rounds(self) -> None:
        others = [record(address=f"tcp://192.0.2.1:{port}") for port in range(1, 2 * MEASURED_AT_ONCE + 1)]
        links: Any = Links()
        neighbours = Neighbours(lambda: others, links, Echo().prober)
        neighbours.look_around()
        assert len(neighbours.network_coordinates.measured_links) == MEASURED_AT_ONCE
        neighbours.look_around()
        assert set(neighbours.network_coordinates.measured_links) == {other.key.text for other in others}
        assert links.open == 0
        assert len(neighbours.seen_links) == min(MAX_SEEN_LINKS, len(others))
        prefixes = {other.key.raw[:KEY_PREFIX_BYTES] for other in others}
        assert all(link.peer in prefixes and link.rtt_ms > 0 for link in neighbours.seen_links)

    def test_links_that_routes_need_are_measured_and_published_first(self) -> None:
        behind = {"start": 6, "end": 12, "num_blocks": 12}
        slow = tuple(100 * ms for ms in RECORD.block_ms)
        useful = [record(address=f"tcp://192.0.2.1:{port}", **behind) for port in range(1, MEASURED_AT_ONCE)]
        beside = [record(address=f"tcp://192.0.2.2:{port}", num_blocks=12) for port in range(1, 100)]
        others = [record(address=f"tcp://192.0.2.3:{port}", **behind, block_ms=slow) for port in range(1, 100)]
        echo, links = Echo(), Links()
        neighbours = Neighbours(
            lambda: [*beside, *others, *useful],
            links,  # pyright: ignore[reportArgumentType]
            echo.prober,
            lambda: record(num_blocks=12),
        )
        echo.silent |= {useful[0].endpoint}
        for _ in range(2):
            neighbours.look_around()
        best = [link.peer for link in neighbours.seen_links][: len(useful) - 1]
        assert set(best) == {peer.key.raw[:KEY_PREFIX_BYTES] for peer in useful[1:]}
        assert len(neighbours.network_coordinates.measured_links) > len(useful), "others count for the place"

    def test_round_trips_of_sessions_are_published_until_the_next_measurement(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        there, unknown = record(address="tcp://192.0.2.1:1"), record(address="tcp://192.0.2.1:2")
        links, echo = Links(), Echo()
        neighbours = Neighbours(lambda: [there], links, echo.prober)  # pyright: ignore[reportArgumentType]
        neighbours.look_around()
        (before,) = neighbours.seen_links
        monkeypatch.setattr(echo.prober, "rtt_ms", lambda endpoint: 5000.0)
        links.in_use = [there.endpoint, unknown.endpoint]
        neighbours.hear_used()
        assert neighbours.seen_links == (before,), "nothing has come back since it is used"
        echo.prober.ping(there.endpoint)
        neighbours.hear_used()
        monkeypatch.setattr(echo.prober, "rtt_ms", lambda endpoint: 1.0)
        neighbours.hear_used()
        links.in_use = []
        neighbours.hear_used()
        assert neighbours.seen_links == (SeenLink(before.peer, 5000.0, before.bytes_per_ms),)
        neighbours.look_around()
        (again,) = neighbours.seen_links
        assert again.rtt_ms < 5000.0

    def test_links_may_be_forgotten_while_they_are_published(self) -> None:
        """Another thread may make a record at the same time."""
        there = record(address="tcp://192.0.2.1:1")
        neighbours = Neighbours(lambda: [there], Links(), Echo().prober)  # pyright: ignore[reportArgumentType]
        neighbours.look_around()

        class Useful(list[str]):
            def __iter__(self) -> Iterator[str]:
                neighbours._seen = {}
                return super().__iter__()

        neighbours._useful = Useful()
        assert len(neighbours.seen_links) == 1

    def test_only_answering_peers_count_and_few_are_asked_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Prober, "answer_limit_s", lambda *_, **__: 0.0)
        monkeypatch.setattr("splitnet.transport.prober.FIRST_ANSWER_S", 0.0)
        here, echo = record(address="tcp://192.0.2.1:1"), Echo()
        fakes = [record(address=f"tcp://192.0.2.9:{port}") for port in range(1, 2 * ASKED_AT_ONCE + 1)]
        echo.silent |= {fake.endpoint for fake in fakes}
        send = echo.send

        def answer(endpoint: Endpoint, ping: Ping) -> None:
            send(endpoint, ping)
            if endpoint not in echo.silent:
                neighbours.message_received(endpoint)

        links: Any = Links()
        neighbours = Neighbours(list, links, Prober(answer))
        for _ in range(2):
            neighbours.answering([*fakes, here])
            assert len(echo.sizes) <= ASKED_AT_ONCE
            echo.sizes.clear()
        assert neighbours.answering([*fakes, here]) == [here] and links.open == 0
        monkeypatch.setattr("peers.peer_links.HEARD_S", 0.0)
        refused = Neighbours(list, Links([here.endpoint]), Prober(answer))  # pyright: ignore[reportArgumentType]
        refused.message_received(here.endpoint)
        assert refused.answering([here]) == [here], "as it cannot be asked"
        echo.silent.add(here.endpoint)
        assert neighbours.answering([here]) == [], "it does not answer any more"
        moved = replace(here, address="tcp://192.0.2.9:1")
        echo.silent.add(moved.endpoint)
        assert neighbours.answering([moved]) == [], "another address has not answered"

    def test_a_link_that_cannot_be_opened_is_not_measured(self) -> None:
        here, there = record(address="tcp://192.0.2.1:1"), record(address="tcp://192.0.2.1:2")
        links: Any = Links([Endpoint(there.address, there.key)])
        neighbours = Neighbours(lambda: [here, there], links, Echo().prober)
        neighbours.look_around()
        assert list(neighbours.network_coordinates.measured_links) == [here.key.text]
        assert links.open == 0


class TestLoad:
    def test_the_load_rises_with_queue_waits_and_decays(self) -> None:
        load = Load()
        for _ in range(30):
            load.observe(10.0, [8.0], [3])
        wait_ms, batch = load.estimate_at(10.0)
        assert wait_ms == pytest.approx(8.0, rel=0.01)
        assert batch == pytest.approx(3.0, rel=0.01)
        assert load.estimate_at(10.0 + HALF_LIFE_S) == pytest.approx((wait_ms / 2, batch / 2))
        assert load.estimate_at(10.0 + 100 * HALF_LIFE_S) == pytest.approx((0.0, 0.0))

    def test_the_load_is_zero_without_passes(self) -> None:
        assert Load().estimate_at(5.0) == (0.0, 0.0)

    def test_the_load_includes_the_wait_for_the_current_pass(self) -> None:
        """This holds when all passes are prefill, and at any time of asking."""
        load = Load()
        for number in range(1000):  # Passes of 40 ms, one every 100 ms.
            load.observe(number / 10, [], [], took_ms=40.0)
        assert load.estimate_at(99.9) == (pytest.approx(0.4 * 40.0 / 2, rel=0.02), 0.0)
        assert load.estimate_at(99.95)[0] == pytest.approx(load.estimate_at(99.9)[0], rel=0.01)


class TestObservedSpeed:
    def test_a_pass_changes_the_speed_of_its_size_only(self) -> None:
        speed = ObservedSpeed((1.0, 1.0, 2.0, 8.0, 32.0))
        for _ in range(100):
            speed.observe_pass(positions=1, blocks=4, elapsed_ms=12.0)
        assert speed.block_ms[0] == pytest.approx(3.0, rel=0.01)
        assert speed.block_ms[1:] == (1.0, 2.0, 8.0, 32.0)

    def test_a_pass_between_two_sizes_changes_both(self) -> None:
        speed = ObservedSpeed((1.0, 1.0, 2.0, 8.0, 32.0))
        for _ in range(100):
            speed.observe_pass(positions=40, blocks=1, elapsed_ms=10.0)
        assert speed.block_ms[2] > 2.0
        assert speed.block_ms[3] > 8.0
        assert speed.block_ms[0] == 1.0
        assert len(speed.block_ms) == len(PASS_SIZES)
