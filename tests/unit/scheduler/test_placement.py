from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers.peer_options import ANY_SPAN
from peers.relocation import READ_BYTES, TRIED_AT_ONCE, PresentPeers, answering, choose_blocks, expected_block_ms
from scheduler.facts import Link, Peer, Speed, coverage, missing_blocks
from scheduler.placement import choose_span
from splitnet.directory.record import PeerRecord
from splitnet.security.identity import Identity
from splitnet.wire.endpoints import Endpoint
from tests.unit.swarm.test_swarm import RECORD


def peer(start: int, end: int, decode_ms: float = 1.0) -> Peer:
    return Peer(f"{start}-{end}", start, end, Speed.of(decode_ms, decode_ms), kv_free=1000)


peers_strategy = st.lists(
    st.builds(peer, st.integers(-1, 12), st.integers(0, 14), st.sampled_from([0.0, 0.5, 1.0, 7.0, 1e9])),
    max_size=6,
)


@given(peers=peers_strategy, num_blocks=st.integers(1, 12), max_blocks=st.integers(1, 20))
def test_a_span_is_in_range_and_fills_the_most_missing_blocks(
    peers: list[Peer], num_blocks: int, max_blocks: int
) -> None:
    start, end = choose_span(peers, num_blocks, max_blocks)
    assert 0 <= start < end <= num_blocks
    assert end - start == min(max_blocks, num_blocks)
    empty = [replicas == 0 for replicas in coverage(peers, num_blocks)]
    most = max(sum(empty[first : first + end - start]) for first in range(num_blocks - (end - start) + 1))
    assert sum(empty[start:end]) == most


@given(peers=peers_strategy, num_blocks=st.integers(1, 12), max_blocks=st.integers(1, 12))
def test_joining_peers_cover_the_model(peers: list[Peer], num_blocks: int, max_blocks: int) -> None:
    for _ in range(num_blocks):
        peers = [*peers, peer(*choose_span(peers, num_blocks, max_blocks))]
    assert missing_blocks(peers, num_blocks) == []


def test_missing_blocks_have_priority_over_weak_ones() -> None:
    assert choose_span([peer(0, 10, decode_ms=100.0), peer(14, 20)], 20, 4) == (10, 14)


def test_the_weakest_blocks_are_reinforced() -> None:
    swarm = [peer(0, 10), peer(10, 20, decode_ms=5.0), peer(20, 30)]
    assert choose_span(swarm, 30, 10) == (10, 20)
    assert choose_span([*swarm, peer(10, 20, decode_ms=0.1)], 30, 10) == (0, 10)


def test_the_throughput_of_a_peer_is_bounded_by_its_uplink() -> None:
    slow_way = Peer("far", 0, 10, Speed.of(1.0, 0.1), sending_ms=100.0)
    swarm = [slow_way, Peer("near", 10, 20, Speed.of(2.0, 0.2), sending_ms=0.1)]
    assert choose_span(swarm, 20, 10) == (0, 10)
    assert choose_span([replace(slow_way, sending_ms=0.0), swarm[1]], 20, 10) == (10, 20)


def test_a_peer_with_a_slow_uplink_serves_the_weakest_blocks() -> None:
    swarm = [Peer(str(start), start, start + 10, Speed.of(1.0, 0.1), sending_ms=60.0) for start in (0, 10, 0, 10, 10)]
    swarm.append(Peer("fast", 10, 20, Speed.of(0.1, 0.01), sending_ms=1.0))
    assert choose_span(swarm, 20, 10, own_ms=0.1) == (0, 10)
    assert choose_span([*swarm[:2], replace(swarm[0], id="0b")], 20, 10, own_ms=12.0) == (10, 20)


def test_a_fast_peer_joins_blocks_of_slow_peers() -> None:
    swarm = [peer(0, 10, decode_ms=10.0), peer(0, 10, decode_ms=10.0), peer(10, 20, decode_ms=20.0)]
    swarm.append(Peer("fast", 10, 20, Speed.of(1.0, 1.0)))
    assert choose_span(swarm, 20, 10, own_ms=1.0) == (0, 10)
    swarm.append(peer(0, 10, decode_ms=1.0))
    slow = [peer(start, start + 10, decode_ms=10.0) for start in (0, 10, 0)]
    assert choose_span([*swarm[-2:], *slow], 20, 10, own_ms=1.0) == (0, 10), "both as fast, whatever else is there"
    assert choose_span(slow, 20, 10, own_ms=20.0) == (10, 20)
    assert choose_span([peer(0, 10)], 20, 10, own_ms=0.01) == (10, 20), "a hole goes before all"


def test_distant_peers_count_less_than_near_ones() -> None:
    """Each region serves the whole model if it has enough peers, so that routes do not cross regions without need."""
    near, far = peer(0, 10), [Peer(f"far{number}", 10, 20, Speed.of(1.0, 1.0)) for number in range(3)]
    swarm, away_ms = [near, *far], {each.id: 80.0 for each in far}
    assert choose_span(swarm, 20, 10, own_ms=1.0, away_ms=away_ms) == (10, 20)
    assert choose_span(swarm, 20, 10, own_ms=1.0, away_ms=dict.fromkeys(away_ms, 0.1)) == (0, 10), "in the same house"
    assert choose_span(swarm, 20, 10, own_ms=1.0) == (0, 10), "where they are is not known"
    assert choose_span(swarm, 20, 10, own_ms=500.0, away_ms=away_ms) == (0, 10), "to a slow peer all are near"
    assert choose_span([near, peer(0, 10), far[0]], 30, 10, 1.0, away_ms) == (20, 30), "a hole goes before all"


def test_an_empty_swarm_is_filled_from_the_first_block() -> None:
    assert choose_span([], 30, 12) == (0, 12)
    assert choose_span([peer(0, 12)], 30, 12) == (12, 24)
    assert choose_span([peer(0, 12), peer(12, 24)], 30, 12) == (18, 30)
    assert choose_span([], 30, 99) == (0, 30)


@pytest.mark.parametrize(("num_blocks", "max_blocks"), [(0, 1), (4, 0)])
def test_a_peer_serves_at_least_one_block(num_blocks: int, max_blocks: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        choose_span([], num_blocks, max_blocks)


def test_the_expected_time_of_a_block_is_that_of_reading_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peers.relocation.block_bytes", lambda *_: 10 * READ_BYTES)
    now = iter([0.0, 0.5, 1.0, 1.1, 2.0, 2.3])
    # The module's name alone: other threads read the clock of `time`.
    monkeypatch.setattr("peers.relocation.time", SimpleNamespace(perf_counter=lambda: next(now)))
    assert expected_block_ms(Any, device="cpu", dtype=None) == pytest.approx(10 * 100.0)  # pyright: ignore


def test_a_new_peer_compares_speeds_by_decode_alone() -> None:
    """Three peers as fast as the newcomer give more than one peer twice as fast, also when arithmetic limits
    prompts."""
    cpu, twice = Speed.of(12.0, 4.0), Speed.of(6.0, 2.0)
    own = replace(RECORD, block_ms=cpu.block_ms, bytes_per_ms=0.0)
    present = [replace(own, key=Identity.generate().public, start=0, end=1) for _ in range(3)]
    present.append(replace(own, key=Identity.generate().public, start=1, end=2, block_ms=twice.block_ms))
    checkpoint: Any = SimpleNamespace(
        num_blocks=2, hidden_size=64, name="model", config=SimpleNamespace(num_hidden_layers=2)
    )
    assert choose_blocks(checkpoint, ANY_SPAN, 1, PresentPeers(present), own_ms=12.0) == (1, 2)


class FewLinks:
    """Peers answer after the round trip of their coordinate; peers of `silent` never answer."""

    tried: ClassVar[list[set[Endpoint]]]
    rtt_ms: ClassVar[dict[Endpoint, float]]

    def __init__(self, _: Identity) -> None:
        self.prober = SimpleNamespace(measure_links=lambda some: {each: Link(1.0, 500.0) for each in some})

    def __enter__(self) -> FewLinks:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def try_out(self, endpoints: set[Endpoint]) -> dict[Endpoint, SimpleNamespace]:
        self.tried.append(endpoints)
        return {each: SimpleNamespace(rtt_ms=self.rtt_ms.get(each)) for each in endpoints}


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> type[FewLinks]:
    monkeypatch.setattr("peers.relocation.PeerLinks", FewLinks)
    FewLinks.tried, FewLinks.rtt_ms = [], {}
    return FewLinks


def at(place_ms: float, error: float = 0.1) -> PeerRecord:
    key = Identity.generate().public
    return replace(RECORD, key=key, coordinate=(place_ms, 0.0, 0.0, 1.0), coordinate_error=error)


def test_a_new_peer_pings_random_peers_and_then_near_ones(links: type[FewLinks]) -> None:
    near, far, lost = ([at(place_ms, error) for _ in range(80)] for place_ms, error in ((0, 0.1), (90, 0.1), (0, 1.0)))
    links.rtt_ms = {each.endpoint: 2.0 if each in near else 92.0 for each in (*near, *far, *lost)}
    found = answering([*near, *far, *lost], Identity.generate())
    first, second = links.tried
    assert len(first) == len(second) == TRIED_AT_ONCE and not first & second
    assert second <= {each.endpoint for each in near}
    assert {each.endpoint for each in found.records} == first | second
    assert found.away_ms == {each.key.text: links.rtt_ms[each.endpoint] / 2 for each in found.records}
    assert found.bytes_per_ms == 500.0


def test_false_coordinates_do_not_mislead_a_new_peer(links: type[FewLinks]) -> None:
    near, far = [at(0) for _ in range(80)], [at(90) for _ in range(80)]
    liars = [at(place_ms, 0.0) for place_ms in (1e9, -1e9)]
    links.rtt_ms = {each.endpoint: 92.0 if each in far else 2.0 for each in (*near, *far)}
    links.rtt_ms |= {each.endpoint: 1.0 for each in liars}
    with pytest.MonkeyPatch.context() as patch:
        keys = {each.key for each in (*liars, *near[:20])}
        patch.setattr("splitnet.directory.record.has_worked", lambda key, _: key in keys)
        found = answering([*near, *far, *liars], Identity.generate())
    first, second = links.tried
    assert first >= {each.endpoint for each in (*liars, *near[:20])}, "whose keys have cost work come first"
    assert second <= {each.endpoint for each in near}
    assert len(found.records) == 2 * TRIED_AT_ONCE


def test_a_new_peer_ignores_silent_peers(links: type[FewLinks]) -> None:
    there, gone = [at(0) for _ in range(3)], [at(0) for _ in range(TRIED_AT_ONCE - 2)]
    links.rtt_ms = {each.endpoint: 2.0 for each in there}
    found = answering([*there, *gone], Identity.generate())
    assert {each.endpoint for each in found.records} == links.rtt_ms.keys()
    links.tried.clear()
    assert answering(gone * 2, Identity.generate()) == PresentPeers([], {}, 0.0)
    links.tried.clear()
    assert answering([], Identity.generate()) == PresentPeers() and not links.tried
    keys = {each.key for each in gone}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitnet.directory.record.has_worked", lambda key, _: key in keys)
        found = answering([*there, *gone, *(at(0) for _ in range(2))], Identity.generate())
    assert {each.endpoint for each in found.records} == links.rtt_ms.keys(), (
        "where the first are silent others are asked"
    )


def test_a_returning_peer_ignores_its_own_old_record(links: type[FewLinks]) -> None:
    identity, other = Identity.generate(), at(0)
    before = replace(at(0), key=identity.public)
    links.rtt_ms = {each.endpoint: 2.0 for each in (before, other)}
    assert answering([before, other], identity).records == [other]
    assert answering([before], identity) == PresentPeers()


def test_measured_latencies_decide_the_first_span() -> None:
    """In the region of the newcomer, no peer serves the second half."""
    near, *far = (
        replace(at(place_ms), start=start, end=start + 10, num_blocks=20, block_ms=(1.0,) * 5, bytes_per_ms=0.0)
        for place_ms, start in ((0, 0), (90, 10), (90, 10))
    )
    away_ms = {near.key.text: 1.0, **{each.key.text: 46.0 for each in far}}
    checkpoint: Any = SimpleNamespace(
        num_blocks=20, hidden_size=64, name="model", config=SimpleNamespace(num_hidden_layers=20)
    )
    for known, span in ((away_ms, (10, 20)), ({}, (0, 10))):
        assert choose_blocks(checkpoint, ANY_SPAN, 10, PresentPeers([near, *far], known), own_ms=1.0) == span
