"""Peers move to blocks without a peer, under the same address, while texts continue."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from peers import relocation
from peers.peer_options import SpanWish
from peers.relocation import HolderWatch
from peers.running_peer import RunningPeer
from splitnet.blocks.span import block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import DirectoryError
from splitnet.security.identity import PublicKey
from splitnet.wire.endpoints import Endpoint
from tests.swarm.generation import GREEDY, After, prompt
from tests.swarm.harness import local_swarm

pytestmark = pytest.mark.swarm

COVERED_S = 45.0
"""On slow machines, too, the blocks are served again before the records of failed peers expire (60 s)."""


@pytest.fixture
def moves_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers do not decide by themselves whether to move."""
    monkeypatch.setattr(relocation, "QUICK_LOOK_S", 1e6)


def memory_for(folder: Path, blocks: int) -> SpanWish:
    return SpanWish(memory=blocks * block_bytes(Checkpoint.open(folder), None))


def has_moved(spare: RunningPeer, others: list[RunningPeer]) -> bool:
    """Lets a peer move. If it must announce the move first, all other peers publish again before."""
    for _ in range(3):
        if spare.relocation.reconsider():
            return True
        for other in others:
            other._announcer.publish()
    return False


@pytest.mark.usefixtures("moves_when_told")
def test_a_replicated_peer_moves_to_missing_blocks(node: DhtDirectory, own_folder: Path, own_local: Any) -> None:
    with local_swarm(own_folder, [(0, 2), (2, 4), (4, 6)], node=node) as swarm:
        spare = swarm.add(0, 2, wish=memory_for(own_folder, 2))
        address, before = spare.endpoint, spare.span.start
        assert not has_moved(spare, swarm.peers[:3])
        hole = next(peer for peer in swarm.peers[:3] if peer.span.start not in (0, before))
        missing = hole.span.start, hole.span.end
        hole.close()
        assert has_moved(spare, [peer for peer in swarm.peers[:3] if peer is not hole])
        assert (spare.span.start, spare.span.end) == missing
        assert spare.endpoint == address
        model = swarm.model()
        assert torch.equal(model.generate(**prompt(), **GREEDY), own_local.generate(**prompt(), **GREEDY))


def die(peer: RunningPeer) -> None:
    """Ends a peer as if its machine had failed: its record stays in the DHT."""
    peer._leaving.set()
    peer._announcer._withdrawn = True
    peer._announcer._leaving.set()
    peer._announcer._soon.set()
    peer.transport.close()


@pytest.mark.default_cases(fixed=([(0, 2), (2, 4), (4, 6)],))
@pytest.mark.parametrize("fixed", [[(0, 2), (2, 4), (4, 6)], [(0, 2), (2, 4), (4, 6), (4, 6)]], ids=len)
def test_blocks_of_failed_peers_are_soon_served_again(
    node: DhtDirectory, own_folder: Path, own_local: Any, fixed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, moved = threading.Event(), threading.Event()
    doomed: set[PublicKey] = set()
    heard, move = HolderWatch.message_received, RunningPeer._move_span

    def hear(watch: HolderWatch, endpoint: Endpoint, now: float) -> None:
        heard(watch, endpoint, now)
        if doomed and {found.key for found, at in watch._heard_at.items() if at is not None} >= doomed:
            watched.set()

    def go(peer: RunningPeer, span: tuple[int, int], urgent: bool) -> None:
        move(peer, span, urgent)
        assert urgent
        moved.set()

    monkeypatch.setattr(HolderWatch, "message_received", hear)
    monkeypatch.setattr(RunningPeer, "_move_span", go)
    with local_swarm(own_folder, fixed, node=node) as swarm:
        spare = swarm.add(0, 2, wish=memory_for(own_folder, 2))
        lost = 4 if spare.span.start != 4 else 2
        doomed |= {peer.endpoint.key for peer in swarm.peers if peer.span.start == lost}
        assert watched.wait(60.0)
        for peer in swarm.peers:
            if peer.endpoint.key in doomed:
                die(peer)
        assert moved.wait(COVERED_S)
        assert (spare.span.start, spare.span.end) == (lost, lost + 2)
        model = swarm.model()
        assert torch.equal(model.generate(**prompt(), **GREEDY), own_local.generate(**prompt(), **GREEDY))


@pytest.mark.full
@pytest.mark.usefixtures("moves_when_told")
def test_a_moved_peer_frees_the_memory_of_its_old_span(node: DhtDirectory, own_folder: Path) -> None:
    with local_swarm(own_folder, [(0, 6), (0, 2)], node=node) as swarm:
        mover = swarm.peers[1]
        gc.collect()
        gc.freeze()  # The daemon does the same after its start.
        try:
            left = weakref.ref(mover.span)
            mover._move_span((2, 4))
        finally:
            gc.unfreeze()
        assert mover.span.start == 2 and mover.counters.moves == 1
        assert left() is None


@pytest.mark.full
@pytest.mark.usefixtures("moves_when_told")
def test_a_peer_moves_while_the_directory_is_silent(
    node: DhtDirectory, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_swarm(own_folder, [(0, 6), (0, 2)], node=node) as swarm:
        mover = swarm.peers[1]
        publish = mover._announcer.publish

        def fail_once() -> None:
            monkeypatch.setattr(mover._announcer, "publish", publish)
            raise DirectoryError("The DHT did not answer.")

        monkeypatch.setattr(mover._announcer, "publish", fail_once)
        mover._move_span((2, 4))
        assert mover.span.start == 2
        assert mover.record().serves


@pytest.mark.full
@pytest.mark.usefixtures("moves_when_told")
def test_a_session_waits_for_a_peer_that_moves_to_its_lost_blocks(
    node: DhtDirectory, own_folder: Path, own_local: Any
) -> None:
    with local_swarm(own_folder, [(0, 2), (2, 4), (4, 6)], node=node) as swarm:
        spare = swarm.add(0, 2, wish=memory_for(own_folder, 2))
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
        assert torch.equal(got, own_local.generate(**prompt(), **GREEDY))


@pytest.mark.full
@pytest.mark.usefixtures("moves_when_told")
def test_a_peer_that_moves_hands_its_session_over(node: DhtDirectory, own_folder: Path, own_local: Any) -> None:
    with local_swarm(own_folder, [(0, 2), (2, 4), (4, 6), (2, 4)], node=node) as swarm:
        movers = [peer for peer in swarm.peers if peer.span.start == 2]
        model = swarm.model()
        moved: list[threading.Thread] = []

        def move() -> None:
            assert cache.session is not None
            used = next(peer for peer in movers if peer.endpoint == cache.session.hops[1].endpoint)
            moved.append(threading.Thread(target=used._move_span, args=((3, 5),)))
            moved[0].start()

        with model.session() as cache:
            got = model.generate(**prompt(), **GREEDY, streamer=After(5, move))
            moved[0].join()
        assert torch.equal(got, own_local.generate(**prompt(), **GREEDY))
        assert sorted(peer.span.start for peer in movers) == [2, 3]
        assert {(record.start, record.serves) for record in swarm.connect().peers(fresh=True)} == {
            (0, True), (2, True), (3, True), (4, True),
        }  # fmt: skip


@pytest.mark.full
@pytest.mark.usefixtures("moves_when_told")
def test_a_peer_may_be_closed_while_it_moves(node: DhtDirectory, own_folder: Path) -> None:
    with local_swarm(own_folder, [(0, 6), (0, 6)], node=node) as swarm:
        peer = swarm.peers[1]
        peer._leaving.set()
        peer._move_span((0, 3))
        peer.close()
        assert [record.key for record in swarm.connect().peers(fresh=True)] == [swarm.peers[0].identity.public]
