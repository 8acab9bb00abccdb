"""An honest swarm while strangers fill the directory, hide records, or announce peers that do not exist."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from peers import relocation
from peers.peer_options import SpanWish
from splitnet.blocks.span import block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.hivemind_node import import_hivemind
from splitnet.directory.interface import RECORDS_PER_IDENTITY, RECORDS_PER_KEY
from splitnet.directory.record import SHARDS, shard_key
from tests.attacks.directory import announce_fakes, flood_records, hide_in_caches, list_models, withhold
from tests.swarm.generation import GREEDY, prompt
from tests.swarm.harness import LocalSwarm, local_swarm

pytestmark = pytest.mark.swarm

READ_S = 2.0


@pytest.fixture
def swarm(folder: Path) -> Iterator[LocalSwarm]:
    with local_swarm(folder, [(0, 3), (3, 6)]) as swarm:
        yield swarm


def memory_for(folder: Path, blocks: int) -> SpanWish:
    return SpanWish(memory=blocks * block_bytes(Checkpoint.open(folder), None))


@pytest.mark.full
def test_many_records_do_not_hide_the_peers(swarm: LocalSwarm, local: Any) -> None:
    model = swarm.peers[0].checkpoint.fingerprint
    flood_records(swarm.addresses, model, count=1700)
    for peer in swarm.peers:
        peer._announcer.publish()
    with DhtDirectory.start(initial_peers=swarm.addresses) as reader:
        begin = time.monotonic()
        found = reader.peers(model)
        assert time.monotonic() - begin < READ_S
        assert {peer.identity.public for peer in swarm.peers} <= {record.key for record in found}
        assert len(found) <= (SHARDS + 1) * RECORDS_PER_KEY
    got = swarm.model().generate(**prompt(), **GREEDY)
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))


@pytest.fixture
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers the bounds of nodes; must run before nodes start."""
    monkeypatch.setattr("splitnet.directory.interface.RECORDS_PER_KEY", 16)


@pytest.mark.full
def test_a_peer_with_a_proof_of_work_enters_a_full_directory(
    few_places: None, swarm: LocalSwarm, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitnet.security.identity.WORK_BITS", 5)
    model = swarm.peers[0].checkpoint.fingerprint
    flood_records(swarm.addresses, model, count=SHARDS * 16 * 2)
    with_nothing = swarm.add(0, 6)
    late = swarm.add(0, 6, key_file=tmp_path / "key")
    late._look_around()
    late._announcer.publish()
    # A record is always found at the peer's own node, if readers know this node.
    directory = swarm.peers[0].directory
    assert isinstance(directory, DhtDirectory)
    node = directory._node.protocol
    for peer, has_place in ((late, True), (with_nothing, False)):
        shard = node.storage.get(import_hivemind().dht_id(shard_key(model, peer.identity.public))).value
        assert (peer.identity.public.text in shard.data) is has_place and len(shard) == 16


@pytest.mark.full
def test_a_client_opens_nothing_at_peers_that_are_silent(swarm: LocalSwarm, local: Any) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        flood_records(swarm.addresses, swarm.peers[0].checkpoint.fingerprint, count=64, address=address)
        client = swarm.join()
        assert torch.equal(swarm.model().generate(**prompt(), **GREEDY), local.generate(**prompt(), **GREEDY))
        assert not client.bans.keys()
        client.close()


def test_models_of_one_key_are_bounded(swarm: LocalSwarm) -> None:
    model = swarm.peers[0].checkpoint.fingerprint
    list_models(swarm.addresses, model, count=500)
    with DhtDirectory.start(initial_peers=swarm.addresses) as reader:
        models = reader.models()
    assert model in models
    assert len(models) <= 1 + RECORDS_PER_IDENTITY


@pytest.mark.full
def test_readers_find_the_peers_while_strangers_hide_them(swarm: LocalSwarm) -> None:
    """With fake records in the caches of nodes, and with nodes near the keys that return no records.

    One of three readings in a row must find all peers, because on a slow machine honest nodes may answer too late.
    """
    model = swarm.peers[0].checkpoint.fingerprint
    everybody = {peer.identity.public for peer in swarm.peers}
    with ThreadPoolExecutor() as pool, DhtDirectory.start(initial_peers=swarm.addresses) as reader:
        attacks = [pool.submit(attack, swarm.addresses, model, seconds=4.0) for attack in (withhold, hide_in_caches)]
        while not all(attack.done() for attack in attacks):
            for peer in swarm.peers:
                peer._announcer.publish()
            assert any(everybody <= {record.key for record in reader.peers(model)} for _ in range(3))
        assert all(attack.result() for attack in attacks)


def test_a_peer_that_returns_no_records_hides_none(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client asks another peer for changes each time."""
    liar = swarm.peers[0]
    client = swarm.join()
    assert len(client.peers()) == 2
    reads: list[str] = []
    monkeypatch.setattr(client.directory, "records", lambda model, depth=0: reads.append(model) or [])
    monkeypatch.setattr(liar._directory_service, "_records", lambda place, depth: [])
    late = swarm.add(0, 6)
    looks = 0
    while client._known.find_record(late.identity.public) is None:
        looks += 1
        assert looks < 10
        client.peers(fresh=True)
    for _ in range(10):
        assert {record.key for record in client.peers(fresh=True)} == {peer.identity.public for peer in swarm.peers}
    assert not reads


def test_blocks_that_only_fakes_serve_are_chosen_by_a_peer_that_joins(folder: Path) -> None:
    with local_swarm(folder, [(0, 2), (2, 4)]) as swarm:
        announce_fakes(swarm.addresses, swarm.peers[0].checkpoint.fingerprint, seconds=0.0, count=2, start=4, end=6)
        newcomer = swarm.add(0, 0, wish=memory_for(folder, 2))
        assert (newcomer.span.start, newcomer.span.end) == (4, 6)


@pytest.mark.full
def test_fake_peers_neither_cause_nor_prevent_moves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relocation, "QUICK_LOOK_S", 1e6)  # peers only look when the test tells them to
    with local_swarm(folder, [(0, 2), (2, 4), (4, 6)]) as swarm:
        spare = swarm.add(0, 2, wish=memory_for(folder, 2))
        model, before = swarm.peers[0].checkpoint.fingerprint, spare.span.start
        stop = threading.Thread(
            target=announce_fakes, args=(swarm.addresses, model), kwargs={"seconds": 3.0, "start": 2, "end": 6}
        )
        stop.start()
        for _ in range(3):
            assert not spare.relocation.reconsider()
        hole = next(peer for peer in swarm.peers[1:3] if peer.span.start != before)
        blocks = hole.span.start, hole.span.end
        hole.close()
        stop.join()
        others = [peer for peer in swarm.peers[:3] if peer is not hole]
        for _ in range(3):
            if spare.relocation.reconsider():
                break
            for other in others:
                other._announcer.publish()
        assert (spare.span.start, spare.span.end) == blocks
