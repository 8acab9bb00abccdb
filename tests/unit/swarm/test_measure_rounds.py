"""The links that a client measures, and their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.candidates import measurement_rounds
from scheduler.facts import CLIENT, Link
from scheduler.liveness import LOST_S, SILENT_S
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.record import PeerRecord
from splitnet.swarm.measure import ENDS_PINGS, PINGS_PER_MINUTE, PROBE_AGAIN_S, TRUST_S, Measurements, Measurer
from splitnet.swarm.swarm import Swarm
from splitnet.transport.prober import PROBE_BYTES
from splitnet.wire.endpoints import Endpoint
from tests.unit.swarm.test_measure import Clock, Echo, record
from tests.unit.swarm.test_swarm import FACTS, NEEDS, FakeDirectory


def links_of(echo: Echo) -> SimpleNamespace:
    """Replaces `Links`; no session uses them."""
    return SimpleNamespace(prober=echo.prober, has_sessions=False, in_use=[], is_busy=lambda _: False)


def facts_with(clock: Clock, echo: Echo, likely: Sequence[PeerRecord]) -> tuple[Measurements, Measurer]:
    measurements, known = Measurements(clock), SimpleNamespace(look_s=60.0)
    chosen = {peer.key.text for peer in likely}

    def among(_: Sequence[PeerRecord], records: Sequence[PeerRecord], *__: object) -> list[PeerRecord]:
        return [peer for peer in records if peer.key.text in chosen]

    return measurements, Measurer(known, measurements, links_of(echo), among, clock)  # pyright: ignore


def region(host: str, far_ms: float, block_ms: float, count: int) -> list[PeerRecord]:
    """Peers at one place; a third of them serves each third of the blocks."""
    return [
        record(
            address=f"tcp://{host}:{port}",
            start=port % 3 * 2,
            end=port % 3 * 2 + 2,
            block_ms=(block_ms,) * 5,
            coordinate=(far_ms, float(port % 7), 0.0, 1.0),
            coordinate_error=0.1,
        )
        for port in range(1, count + 1)
    ]


def endpoints(peers: Sequence[PeerRecord]) -> set[Endpoint]:
    return {peer.endpoint for peer in peers}


@contextmanager
def client_of(peers: list[PeerRecord], clock: Clock, echo: Echo) -> Iterator[Swarm]:
    """A client of these peers. Their coordinates give their distance; pings take no time."""
    directory = FakeDirectory()
    directory.records = peers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DhtDirectory, "start", lambda **_: directory)
        with Swarm(FACTS, ["/an/address"]) as swarm:
            for owner, what, stand_in in (
                (swarm.links, "prober", echo.prober),
                (swarm.measurer, "clock", clock),
                (swarm.measurements, "_clock", clock),
                (swarm, "_peers_to_plan_with", lambda *_, **__: (peers, set[str]())),
            ):
                patch.setattr(owner, what, stand_in)
            yield swarm


def test_pings_per_minute_are_bounded() -> None:
    clock, echo = Clock(), Echo()
    peers = [record() for _ in range(PINGS_PER_MINUTE)]
    _, facts = facts_with(clock, echo, peers)
    for _ in range(3):
        facts.look_at(peers)
        facts.measure_first(peers)
    assert len(echo.sizes) == PINGS_PER_MINUTE - ENDS_PINGS
    facts.measure_peers(peers[:2], peers[2:])
    assert sum(size > 0 for size in echo.sizes) >= 4, "the ends of a route are probed in any case"
    for _ in range(10):
        facts.measure_peers(peers[4:6], peers)
    assert PINGS_PER_MINUTE - ENDS_PINGS < len(echo.sizes) <= PINGS_PER_MINUTE
    clock.now += 61.0
    sent = len(echo.sizes)
    facts.look_at(peers[:10])
    assert len(echo.sizes) == sent + 20
    facts.close()


@pytest.mark.parametrize(("count", "measured"), [(100, 64), (1000, 80), (10_000, 100)])
def test_among_more_peers_more_links_are_measured_first(count: int, measured: int) -> None:
    clock, echo = Clock(), Echo()
    peers = [record() for _ in range(150)]
    known = peers + [peers[0]] * (count - len(peers)) if count > len(peers) else peers[:count]
    measurements = Measurements(clock)

    def some(_: Sequence[PeerRecord], records: Sequence[PeerRecord], count: int, __: bool) -> Sequence[PeerRecord]:
        return records[:count]

    facts = Measurer(SimpleNamespace(look_s=60.0), measurements, links_of(echo), some, clock)  # pyright: ignore
    facts.measure_first(known)
    assert len(measurements.network_coordinates.measured_links) == measured
    facts.close()


def test_the_first_round_measures_random_peers_and_likely_hops() -> None:
    clock, echo = Clock(), Echo()
    peers = [record() for _ in range(100)]
    measurements, facts = facts_with(clock, echo, peers[90:])
    facts.measure_first(peers)
    measured = measurements.network_coordinates.measured_links
    assert {peer.key.text for peer in peers[90:]} < measured.keys()
    assert len(measured) == measurement_rounds(100)[0] + 10
    assert not any(echo.sizes), "no bandwidth is measured"
    facts.close()


def test_a_link_of_unknown_bandwidth_gets_the_bandwidth_of_its_ends() -> None:
    measurements, peer = Measurements(Clock()), record(bytes_per_ms=300.0)
    measurements.links_measured({peer.endpoint: peer}, {peer.endpoint: Link(5.0, 0.0)})
    assert measurements.network([peer]).link(CLIENT, peer.key.text) == Link(5.0, 300.0)
    assert measurements.unprobed([peer]) == [peer] and measurements.unknown([peer]) == []
    measurements.links_measured({peer.endpoint: peer}, {peer.endpoint: Link(5.0, 120.0)})
    measurements.links_measured({peer.endpoint: peer}, {peer.endpoint: Link(7.0, 0.0)})
    assert measurements.network([peer]).link(CLIENT, peer.key.text) == Link(7.0, 120.0)
    assert measurements.unprobed([peer]) == []
    measurements.links_measured({peer.endpoint: peer}, {})
    assert measurements.unprobed([peer]) == [], "who is silent is not asked for more"


def test_bandwidth_is_probed_again_later_than_round_trips() -> None:
    clock, echo = Clock(), Echo()
    end, other = record(address="tcp://192.0.2.1:1"), record(address="tcp://192.0.2.1:2")
    measurements, facts = facts_with(clock, echo, [])
    facts.measure_peers([end], [other])
    probes = sum(size > 0 for size in echo.sizes)
    assert 2 <= probes == sum(size == PROBE_BYTES for size in echo.sizes)
    assert measurements.unknown([end, other]) == [] and measurements.unprobed([end, other]) == [other]
    rate = measurements.network([end]).link(CLIENT, end.key.text).bytes_per_ms
    for waited_s in (1.0, PROBE_AGAIN_S - 2.0):
        clock.now += waited_s
        echo.sizes.clear()
        facts.measure_peers([end])
        assert echo.sizes == [0, 0]
        assert measurements.network([end]).link(CLIENT, end.key.text).bytes_per_ms == rate, "what was measured counts"
    clock.now += 2.0
    facts.measure_peers([end])
    assert sum(map(bool, echo.sizes)) >= 2
    facts.close()


def test_new_hops_are_pinged_before_use_while_other_peers_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, echo = Clock(), Echo()
    there = [
        record(address=f"tcp://192.0.2.1:{port}", start=port % 3 * 2, end=port % 3 * 2 + 2) for port in range(1, 31)
    ]
    gone = [record(address=f"tcp://192.0.2.2:{port}", start=0, end=2) for port in (1, 2)]
    everyone = [*there, *gone]
    with client_of(everyone, clock, echo) as swarm:

        def asked(among: list[PeerRecord], **options: Any) -> tuple[list[PeerRecord], list[Endpoint]]:
            """The hops of a route, and the endpoints that were pinged."""
            clock.now += LOST_S + 1
            monkeypatch.setattr(swarm, "_peers_to_plan_with", lambda *_, **__: (among, set[str]()))
            echo.asked.clear()
            return [hop.record for hop in swarm.plan_route(NEEDS, **options)], list(echo.asked)

        for some in (there[:15], there[15:]):
            swarm.measurer.measure_peers(some)
            clock.now += 61.0
        tried = {peer.endpoint: peer for peer in gone}
        swarm.measurements.links_measured(tried, {})
        route, pings = asked(everyone)
        assert sorted(pings, key=str) == sorted([hop.endpoint for hop in route for _ in range(2)], key=str)
        _, pings = asked(there)
        assert not pings, "who has no record any more says nothing of others"
        swarm.measurements.links_measured(tried, {})
        _, pings = asked(everyone, holders={peer.key.text for peer in there})
        assert not pings, "who holds the session is no newcomer"
        swarm.measurements.links_measured(tried, {})
        echo.silent = {hop.endpoint for hop in route}
        second, pings = asked(everyone)
        assert not {hop.endpoint for hop in second} & echo.silent
        clock.now += SILENT_S
        _, pings = asked(everyone)
        assert not pings, "what was silent long ago says nothing either"
        swarm.measurements.links_measured(tried, {})
        swarm.measurer._pinged(PINGS_PER_MINUTE)
        _, pings = asked(everyone)
        assert not pings, "a minute has so many pings and no more"


def test_pings_ask_for_the_load_of_peers() -> None:
    clock, echo = Clock(), Echo()
    peers = [record(queue_ms=1.0)]
    measurements, facts = facts_with(clock, echo, peers)
    for measure, wait_ms in ((facts.look_at, 12.0), (facts.measure_peers, 14.0)):
        echo.load = echo.load._replace(wait_ms=wait_ms)
        measure(peers)
        assert [peer.queue_ms for peer in measurements.peers(peers)] == [wait_ms]
        clock.now += TRUST_S + 1
    facts.close()


def test_routes_avoid_a_silent_region() -> None:
    """Peers of the region that were never asked are avoided, too, although they are faster than all others."""
    clock, echo = Clock(), Echo()
    near, far = region("192.0.2.1", 0.0, 1.0, 300), region("192.0.2.2", 90.0, 2.0, 300)
    with client_of([*near, *far], clock, echo) as swarm:
        swarm.measurer.measure_peers([], near[:20])
        assert endpoints([hop.record for hop in swarm.plan_route(NEEDS)]) <= endpoints(near)
        clock.now += SILENT_S + 1
        echo.silent = endpoints(near)
        swarm.measurements.links_measured({peer.endpoint: peer for peer in near[:2]}, {})
        echo.asked.clear()
        assert endpoints([hop.record for hop in swarm.plan_route(NEEDS)]) <= endpoints(far)
        assert len(echo.silent.intersection(echo.asked)) < len(near) / 3, "most of them were never asked"
        clock.now += SILENT_S + 1
        echo.silent = endpoints([*near, *far])
        assert swarm.plan_route(NEEDS), "where all are silent some route is tried"


@pytest.mark.default_cases(strangers=(4,))
@pytest.mark.parametrize("strangers", [4, 20])
def test_answering_peers_near_silent_peers_are_used(strangers: int) -> None:
    """Two machines of a site are lost, or an attacker publishes nonexistent peers near existing ones."""
    clock, echo = Clock(), Echo()
    near = [peer for peer in region("192.0.2.1", 0.0, 1.0, 9) if peer.start]
    far, gone = region("192.0.2.2", 90.0, 500.0, 9), region("192.0.2.3", 0.5, 0.1, strangers)
    with client_of([*near, *far, *gone], clock, echo) as swarm:
        swarm.measurements.links_measured(
            {peer.endpoint: peer for peer in near}, dict.fromkeys(endpoints(near), Link(1.0, 0))
        )
        clock.now += LOST_S + 1
        echo.silent = endpoints(gone)
        swarm.measurements.links_measured({peer.endpoint: peer for peer in gone[:2]}, {})
        first, *others = swarm.plan_route(NEEDS)
        assert first.record in far, "nobody else serves its blocks"
        assert endpoints([hop.record for hop in others]) <= endpoints(near)


@pytest.mark.default_cases(known=("it holds the session",))
@pytest.mark.parametrize("known", ["it holds the session", "it was heard a moment ago"])
def test_a_peer_known_to_be_alive_is_used_despite_silent_neighbours(known: str) -> None:
    clock, echo = Clock(), Echo()
    [near], far = region("192.0.2.1", 0.0, 1.0, 1), region("192.0.2.2", 90.0, 500.0, 30)
    gone = [*region("192.0.2.3", 0.5, 0.1, 1), *region("192.0.2.4", 0.6, 0.1, 1)]
    with client_of([near, *far, *gone], clock, echo) as swarm:
        swarm.measurements.links_measured({near.endpoint: near}, {near.endpoint: Link(0.1, 0.0)})
        holds = known == "it holds the session"
        clock.now += LOST_S + 1 if holds else LOST_S - 1
        swarm.measurements.links_measured({peer.endpoint: peer for peer in far[:2]}, {})
        echo.silent = endpoints([near, *gone])
        route = swarm.plan_route(NEEDS, holders={near.key.text} if holds else ())
        assert near.endpoint in endpoints([hop.record for hop in route])
        assert echo.silent.intersection(echo.asked) == endpoints(gone), "and it need not be asked"
