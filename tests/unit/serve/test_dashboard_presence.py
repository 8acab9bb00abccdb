"""The states of peers, found from answers to pings, links and records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from scheduler.liveness import LOST_S
from splitnet.directory.record import PeerRecord
from splitnet.security.identity import Identity
from splitnet.serve.dashboard import ASKED_PEERS, PAUSE_S, PeerState, Presence
from splitnet.swarm.plan import peer_command
from splitnet.swarm.swarm import EventLog, Overview, Swarm
from splitnet.transport.prober import PingReply
from splitnet.wire.endpoints import Endpoint, LinkState
from tests.unit.swarm.test_swarm import FACTS, RECORD

OTHER = dataclasses.replace(RECORD, key=Identity.generate().public, address="tcp://127.0.0.1:10", start=2, end=4)


class FakeSwarm:
    """A swarm of peers that answer pings or not, as a test sets."""

    def __init__(self) -> None:
        self.events = EventLog()
        self.now = 100.0
        self.silent: set[Endpoint] = set()
        self.states: dict[Endpoint, LinkState] = {}
        self.pinged: list[Endpoint] = []
        self.links = SimpleNamespace(link_state=lambda endpoint: self.states.get(endpoint, LinkState.UP))
        self.presence = Presence(cast(Swarm, self), clock=lambda: self.now)

    def ping(self, endpoint: Endpoint) -> Future[PingReply]:
        self.pinged.append(endpoint)
        future: Future[PingReply] = Future()
        if endpoint not in self.silent:
            future.set_result(PingReply(rtt_ms=1.0, queue_ms=2.0, kv_free_positions=30))
        return future

    def look(self, *records: PeerRecord, after: float = 1.0, working: Sequence[PeerRecord] = ()) -> list[PeerState]:
        self.now += after
        return [seen.state for seen in self.presence.refresh(records, {record.key.text for record in working})]

    def told(self) -> list[str]:
        return [event.kind for event in self.events.since(0)]


@pytest.fixture
def swarm() -> FakeSwarm:
    return FakeSwarm()


def endpoint_of(record: PeerRecord) -> Endpoint:
    return Endpoint(record.address, record.key)


def test_a_peer_that_answers_is_here(swarm: FakeSwarm) -> None:
    assert swarm.look(RECORD) == [PeerState.UNKNOWN]
    assert swarm.look(RECORD) == [PeerState.HERE]
    (seen,) = swarm.presence.refresh([RECORD])
    assert seen.answer == PingReply(1.0, 2.0, 30) and seen.since == swarm.now
    assert swarm.told() == []


def test_a_silent_peer_is_gone_and_may_come_back(swarm: FakeSwarm) -> None:
    swarm.look(RECORD, OTHER)
    assert swarm.look(RECORD, OTHER) == [PeerState.HERE, PeerState.HERE]
    swarm.silent.add(endpoint_of(RECORD))
    states = [swarm.look(RECORD, OTHER) for _ in range(int(LOST_S) + 2)]
    assert states[0] == [PeerState.HERE, PeerState.HERE] and states[-1] == [PeerState.GONE, PeerState.HERE]
    assert swarm.told() == ["gone"]
    assert "blocks 0..5 have lost a peer" in swarm.events.since(0)[0].text
    swarm.silent.clear()
    for _ in range(int(LOST_S) + 1):
        states.append(swarm.look(RECORD, OTHER))
    assert states[-1] == [PeerState.HERE, PeerState.HERE] and swarm.told() == ["gone", "back"]


def test_a_silent_peer_on_a_route_of_a_running_answer_is_here(swarm: FakeSwarm) -> None:
    swarm.look(RECORD)
    swarm.look(RECORD)
    swarm.silent.add(endpoint_of(RECORD))
    states = [swarm.look(RECORD, working=[RECORD]) for _ in range(3 * int(LOST_S))]
    states += [swarm.look(RECORD) for _ in range(int(LOST_S) - 1)]
    assert set(map(tuple, states)) == {(PeerState.HERE,)}
    assert swarm.look(RECORD) == [PeerState.GONE]
    swarm.states[endpoint_of(RECORD)] = LinkState.DOWN
    assert swarm.look(RECORD, working=[RECORD]) == [PeerState.GONE]


def test_a_peer_with_a_broken_link_is_gone_at_once(swarm: FakeSwarm) -> None:
    swarm.look(RECORD)
    swarm.look(RECORD)
    swarm.states[endpoint_of(RECORD)] = LinkState.DOWN
    asked = len(swarm.pinged)
    assert swarm.look(RECORD, after=0.1) == [PeerState.GONE] and len(swarm.pinged) == asked
    assert swarm.look(RECORD, after=LOST_S) == [PeerState.GONE] and len(swarm.pinged) == asked + 1, "it may be back"
    swarm.states[endpoint_of(RECORD)] = LinkState.REFUSED
    assert swarm.look(RECORD, after=0.1) == [PeerState.REFUSES]


def test_joins_moves_and_leaves_are_noted(swarm: FakeSwarm) -> None:
    swarm.look(RECORD)
    swarm.look(RECORD, OTHER)
    swarm.look(RECORD, OTHER)
    swarm.look(RECORD, dataclasses.replace(OTHER, start=3, end=5))
    swarm.look(RECORD)
    assert swarm.told() == ["joined", "moved", "left"]
    assert "now serves blocks 3..4" in swarm.events.since(0)[1].text


def test_changes_during_a_pause_are_not_noted(swarm: FakeSwarm) -> None:
    swarm.look(RECORD)
    swarm.look(OTHER, after=PAUSE_S + 1)
    assert swarm.told() == []


def test_a_fixed_subset_of_many_peers_is_pinged() -> None:
    swarm = FakeSwarm()
    records = [dataclasses.replace(RECORD, key=Identity.generate().public) for _ in range(ASKED_PEERS + 8)]
    orders: Sequence[Any] = (records, records[::-1])
    for order in orders:
        swarm.look(*order)
    assert len(set(swarm.pinged)) == ASKED_PEERS
    states = swarm.look(*records)
    assert (states.count(PeerState.HERE), states.count(PeerState.UNKNOWN)) == (ASKED_PEERS, 8)


def test_an_overview_names_missing_blocks_and_gives_advice() -> None:
    starting = dataclasses.replace(OTHER, start=4, end=6, serves=False)
    model, address = "/models/a b", "tcp://192.0.2.7:1?key=k"
    swarm: Any = SimpleNamespace(
        facts=dataclasses.replace(FACTS, source=model), start_peer=partial(peer_command, model, ["--join", address])
    )
    overview = Overview.of(swarm, [starting, OTHER], local=[(0, 1)])
    assert overview.records == (OTHER, starting) and overview.missing == ((1, 2), (4, 6))
    assert overview.advice()[1] == (
        f"blocks 4..5 are served by nobody: start a peer with `splitnet peer '{model}' --blocks 4:6 --join '{address}'`"
    )
