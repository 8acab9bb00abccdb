"""When a peer decides to move."""

from __future__ import annotations

from dataclasses import replace

from peers.relocation import Mover
from splitnet.directory.record import PeerRecord
from splitnet.security.identity import Identity
from tests.unit.swarm.test_swarm import RECORD

NUM_BLOCKS = 6
IDENTITIES = sorted((Identity.generate() for _ in range(4)), key=lambda identity: identity.public.text)
NOW = 1e9


def record(number: int, start: int, end: int, **facts: object) -> PeerRecord:
    changes = {"max_blocks": end - start, "placed_at": 0.0, "issued_at": NOW, **facts}
    return replace(RECORD, key=IDENTITIES[number].public, start=start, end=end, **changes)


def test_a_replica_goes_to_blocks_that_nobody_serves() -> None:
    others = [record(0, 0, 2), record(1, 2, 4)]
    assert Mover(NUM_BLOCKS).decide(record(2, 2, 4), others, NOW) == (4, 6)


def test_only_the_one_that_is_named_goes() -> None:
    replicas = [record(1, 0, 2), record(2, 0, 2), record(3, 0, 2)]
    others = [record(0, 0, 2)]
    going = [
        own
        for own in replicas
        if Mover(NUM_BLOCKS).decide(own, [*others, *(peer for peer in replicas if peer != own)], NOW)
    ]
    assert len(going) == 1


def test_a_peer_that_was_told_its_blocks_stays() -> None:
    others = [record(0, 0, 2), record(1, 2, 4)]
    assert Mover(NUM_BLOCKS).decide(record(2, 2, 4, max_blocks=0), others, NOW) is None


def test_nobody_goes_where_somebody_is_going() -> None:
    others = [record(0, 0, 2), record(1, 2, 4), record(3, 0, 2, moving_to=(4, 6), serves=False)]
    assert Mover(NUM_BLOCKS).decide(record(2, 2, 4), others, NOW) is None


def test_a_peer_that_has_just_come_stays_unless_blocks_are_missing() -> None:
    slow = tuple(20 * ms for ms in RECORD.block_ms)
    others = [record(0, 0, 3), record(1, 3, 6, block_ms=slow)]
    own = record(2, 0, 3)
    assert Mover(NUM_BLOCKS).decide(replace(own, placed_at=NOW - 1), others, NOW) is None
    assert Mover(NUM_BLOCKS).decide(own, others, NOW) == (3, 6)


def test_who_would_have_to_make_up_for_others_watches_them() -> None:
    others = [record(0, 0, 2), record(1, 2, 4), record(3, 4, 6, max_blocks=0)]
    spare = record(2, 2, 4)
    watched = Mover(NUM_BLOCKS).guarded(spare, others, NOW)
    assert {peer.key for peer in watched} == {others[0].key, others[2].key}, "it is at the blocks of the other itself"
    assert Mover(NUM_BLOCKS).guarded(replace(spare, max_blocks=0), others, NOW) == []
    assert Mover(NUM_BLOCKS).guarded(others[1], [others[0], spare, others[2]], NOW) == [], "the spare one is to go"


def test_several_servers_of_a_block_are_watched_as_they_may_die_at_once() -> None:
    others = [record(0, 0, 4), record(1, 4, 6, max_blocks=0), record(3, 4, 6, max_blocks=0)]
    watched = Mover(NUM_BLOCKS).guarded(record(2, 0, 4), others, NOW)
    assert {peer.key for peer in watched} == {others[1].key, others[2].key}


def test_who_watches_does_not_depend_on_speeds() -> None:
    replicas = [record(number, 0, 3) for number in (0, 1, 2)]
    last = record(3, 3, 6)
    for fast in range(3):
        speeds = [replace(peer, block_ms=RECORD.block_ms) for peer in replicas]
        speeds[fast] = replace(replicas[fast], block_ms=tuple(ms / 10 for ms in RECORD.block_ms))
        watching = [
            own for own in speeds if Mover(NUM_BLOCKS).guarded(own, [*(p for p in speeds if p != own), last], NOW)
        ]
        assert [peer.key for peer in watching] == [IDENTITIES[1].public]


def shifted() -> tuple[PeerRecord, PeerRecord, PeerRecord]:
    """Blocks 5.. are served by nobody, and every peer is the lowest at a block of its own: the second is to go."""
    return record(0, 0, 2), record(1, 1, 3), record(2, 3, 5)


def test_what_must_be_confirmed_waits_until_all_have_spoken_that_could_leave_the_same_blocks() -> None:
    beside, own, elsewhere = shifted()
    mover = Mover(NUM_BLOCKS)
    assert mover.decide(own, [beside, elsewhere], NOW) is None
    assert mover.lacking
    intended = mover.intended
    assert intended == (2, 4)
    assert mover.decide(own, [beside, replace(elsewhere, issued_at=NOW + 5)], NOW + 10) is None
    assert mover.decide(own, [replace(beside, issued_at=NOW + 5), elsewhere], NOW + 11) == intended
    assert mover.intended is None


def test_nobody_is_waited_for_who_could_not_leave_the_same_blocks() -> None:
    beside, own, elsewhere = shifted()
    assert Mover(NUM_BLOCKS).decide(own, [replace(beside, max_blocks=0), elsewhere], NOW) == (2, 4)


def test_blocks_to_which_somebody_is_on_the_way_are_not_lacking() -> None:
    mover = Mover(NUM_BLOCKS)
    own, there = record(2, 2, 4), record(0, 0, 2)
    mover.decide(own, [there, record(3, 0, 2, moving_to=(4, 6), serves=False)], NOW)
    assert not mover.lacking
    mover.decide(own, [there], NOW)
    assert mover.lacking
