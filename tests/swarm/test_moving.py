"""Peers move to blocks that the swarm lacks, under the same address, while text goes on."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from peers.daemon import Peer
from peers.placing import SpanWish
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.span import block_bytes
from tests.swarm.generation import GREEDY, After, prompt
from tests.swarm.harness import local_swarm

pytestmark = pytest.mark.swarm


def memory_for(folder: Path, blocks: int) -> SpanWish:
    return SpanWish(memory=blocks * block_bytes(Checkpoint.open(folder), None))


def has_moved(spare: Peer, others: list[Peer]) -> bool:
    """Lets a peer move; should it have to announce that first, until all others have spoken again."""
    for _ in range(3):
        if spare.reconsider():
            return True
        for other in others:
            other._announcer.publish()
    return False


def test_a_hole_is_filled_by_a_peer_that_can_be_spared(folder: Path, local: Any) -> None:
    with local_swarm(folder, [(0, 2), (2, 4), (4, 6)]) as swarm:
        spare = swarm.add(0, 2, wish=memory_for(folder, 2))
        address, before = spare.endpoint, spare.span.start
        assert not has_moved(spare, swarm.peers[:3])
        hole = next(peer for peer in swarm.peers[:3] if peer.span.start not in (0, before))
        missing = hole.span.start, hole.span.end
        hole.close()
        assert has_moved(spare, [peer for peer in swarm.peers[:3] if peer is not hole])
        assert (spare.span.start, spare.span.end) == missing
        assert spare.endpoint == address
        model = swarm.model()
        assert torch.equal(model.generate(**prompt(), **GREEDY), local.generate(**prompt(), **GREEDY))


def test_what_a_peer_has_moved_from_takes_no_memory(folder: Path) -> None:
    with local_swarm(folder, [(0, 6), (0, 2)]) as swarm:
        mover = swarm.peers[1]
        gc.collect()
        gc.freeze()  # as the daemon does when it has started
        try:
            left = weakref.ref(mover.span)
            mover._move((2, 4))
        finally:
            gc.unfreeze()
        assert mover.span.start == 2 and mover.counters.moves == 1
        assert left() is None


def test_a_session_waits_for_the_blocks_that_are_moved_to(folder: Path, local: Any) -> None:
    with local_swarm(folder, [(0, 2), (2, 4), (4, 6)]) as swarm:
        spare = swarm.add(0, 2, wish=memory_for(folder, 2))
        doomed = next(peer for peer in swarm.peers[1:3] if peer.span.start != spare.span.start)

        def lose() -> None:
            doomed.close()
            mover.start()

        others = [peer for peer in swarm.peers[:3] if peer is not doomed]
        mover = threading.Thread(target=has_moved, args=(spare, others))
        model = swarm.model()
        with model.session():
            got = model.generate(**prompt(), **GREEDY, streamer=After(10, lose))
        mover.join()
        assert torch.equal(got, local.generate(**prompt(), **GREEDY))


def test_a_peer_that_moves_hands_its_session_over(folder: Path, local: Any) -> None:
    with local_swarm(folder, [(0, 2), (2, 4), (4, 6), (2, 4)]) as swarm:
        movers = [peer for peer in swarm.peers if peer.span.start == 2]
        model = swarm.model()
        moved: list[threading.Thread] = []

        def move() -> None:
            assert cache.session is not None
            used = next(peer for peer in movers if peer.endpoint == cache.session.hops[1].endpoint)
            moved.append(threading.Thread(target=used._move, args=((3, 5),)))
            moved[0].start()

        with model.session() as cache:
            got = model.generate(**prompt(), **GREEDY, streamer=After(5, move))
            moved[0].join()
        assert torch.equal(got, local.generate(**prompt(), **GREEDY))
        assert sorted(peer.span.start for peer in movers) == [2, 3]
        assert {(record.start, record.serves) for record in swarm.connect().peers(fresh=True)} == {
            (0, True), (2, True), (3, True), (4, True),
        }  # fmt: skip


def test_a_peer_ends_while_it_moves(folder: Path) -> None:
    with local_swarm(folder, [(0, 6), (0, 6)]) as swarm:
        peer = swarm.peers[1]
        peer._leaving.set()
        peer._move((0, 3))
        peer.close()
        assert [record.key for record in swarm.connect().peers(fresh=True)] == [swarm.peers[0].identity.public]
