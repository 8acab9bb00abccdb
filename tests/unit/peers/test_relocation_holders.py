"""Who is taken for gone although its record is still in the DHT."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import Mock

import pytest

from peers import relocation
from peers.relocation import MAX_WATCHED, HolderWatch, Mover, Relocation
from scheduler.liveness import HOLDER_LOST_S, HOLDER_SILENT_S
from splitnet.directory.record import PeerRecord
from splitnet.security.identity import Identity
from splitnet.wire.endpoints import Endpoint, LinkState
from tests.unit.swarm.test_swarm import RECORD

NUM_BLOCKS = 6


class Links:
    """Stands for `NextHops`."""

    def __init__(self) -> None:
        self.open: list[Endpoint] = []
        self.states: dict[Endpoint, LinkState] = {}

    def acquire(self, endpoint: Endpoint) -> bool:
        self.open.append(endpoint)
        return True

    def release(self, endpoint: Endpoint) -> None:
        self.open.remove(endpoint)


@pytest.fixture
def links() -> Links:
    return Links()


@pytest.fixture
def watch(links: Links) -> HolderWatch:
    return HolderWatch(links, lambda endpoint: links.states.get(endpoint, LinkState.UP))  # type: ignore[arg-type]


def record(start: int, end: int, **facts: object) -> PeerRecord:
    return replace(RECORD, key=Identity.generate().public, start=start, end=end, placed_at=0.0, **facts)


def endpoint_of(peer: PeerRecord) -> Endpoint:
    return Endpoint(peer.address, peer.key)


def test_links_are_held_to_those_that_are_watched(watch: HolderWatch, links: Links) -> None:
    first, second = record(0, 2), record(2, 4)
    watch.watch_holders([first, second])
    watch.watch_holders([second])
    assert links.open == [endpoint_of(second)]
    watch.watch_holders([record(0, 2) for _ in range(MAX_WATCHED + 5)])
    assert len(links.open) == MAX_WATCHED


def test_who_falls_silent_is_gone_and_sooner_if_its_link_is_lost(watch: HolderWatch, links: Links) -> None:
    peer = record(0, 2)
    watch.watch_holders([peer])
    assert not watch.gone(1000.0), "it was never heard of, so it may be out of reach only from here"
    watch.message_received(endpoint_of(peer), 0.0)
    assert not watch.gone(HOLDER_SILENT_S)
    assert watch.gone(HOLDER_SILENT_S + 0.1) == {peer.key}
    links.states[endpoint_of(peer)] = LinkState.DOWN
    assert watch.gone(HOLDER_LOST_S + 0.1) == {peer.key}
    watch.message_received(endpoint_of(peer), HOLDER_LOST_S + 0.2)
    assert not watch.gone(HOLDER_LOST_S + 0.3)


class Swarm:
    """Three peers and a spare one, whose view this is."""

    def __init__(self, watch: HolderWatch) -> None:
        self.watch = watch
        self.others: Sequence[PeerRecord] = [record(0, 2), record(2, 4), record(4, 6)]
        self.own = record(0, 2, max_blocks=2)
        while self.own.key.text < max(other.key.text for other in self.others):  # the lowest may not leave at once
            self.own = record(0, 2, max_blocks=2)
        self.published, self.moves = 0, list[tuple[tuple[int, int], bool]]()
        self.relocation = Relocation(
            Mover(NUM_BLOCKS),
            watch,
            threading.Event(),
            own=lambda: self.own,
            others=lambda: self.others,
            publish=self.publish,
            move=self.move,
        )

    def publish(self) -> None:
        self.published += 1

    def move(self, span: tuple[int, int], urgent: bool) -> None:
        self.moves.append((span, urgent))


@pytest.fixture
def swarm(watch: HolderWatch) -> Swarm:
    return Swarm(watch)


def test_blocks_of_who_is_gone_are_taken_over(swarm: Swarm, links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Mock()
    monkeypatch.setattr(relocation.time, "monotonic", clock)
    clock.return_value = 0.0
    assert not swarm.relocation.reconsider()
    last = swarm.others[2]
    assert endpoint_of(last) in links.open
    swarm.watch.message_received(endpoint_of(last), 0.0)
    clock.return_value = HOLDER_SILENT_S + 1
    assert swarm.relocation.reconsider()
    assert swarm.moves == [((4, 6), True)]


def test_where_peers_are_few_all_are_watched(swarm: Swarm, links: Links) -> None:
    swarm.relocation.reconsider()
    assert set(links.open) == {endpoint_of(peer) for peer in swarm.others}
    swarm.others = [record(0, 6) for _ in range(MAX_WATCHED + 1)]
    swarm.relocation.reconsider()
    assert not links.open


def test_who_renews_its_record_is_there_though_it_does_not_answer(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Mock(return_value=0.0)
    monkeypatch.setattr(relocation.time, "monotonic", clock)
    swarm.relocation.reconsider()
    monkeypatch.setattr(swarm.relocation.mover, "decide", decide := Mock(return_value=None))
    swarm.watch.message_received(endpoint_of(swarm.others[2]), 0.0)
    clock.return_value = HOLDER_SILENT_S + 1
    swarm.relocation.reconsider()
    assert swarm.others[2] not in decide.call_args.args[1]
    swarm.others = [*swarm.others[:2], replace(swarm.others[2], issued_at=swarm.others[2].issued_at + 15)]
    swarm.relocation.reconsider()
    assert swarm.others[2] in decide.call_args.args[1]


def test_a_move_that_is_announced_is_answered_at_once(swarm: Swarm) -> None:
    swarm.relocation.reconsider()
    assert swarm.published == 0
    swarm.others = [replace(swarm.others[0], moving_to=(4, 6)), *swarm.others[1:]]
    swarm.relocation.reconsider()
    swarm.relocation.reconsider()
    assert swarm.published == 1
