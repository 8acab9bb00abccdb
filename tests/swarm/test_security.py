"""Clients without an authorized key get nothing, and peers with another key than their record are not used."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.record import PeerRecord
from splitnet.errors import CoverageError, NotAuthorized
from splitnet.security.identity import Identity
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.swarm import Swarm
from splitnet.wire.endpoints import Connection, Endpoint
from splitnet.wire.messages import Chunk, Message, Step
from tests.swarm.harness import LocalSwarm, local_swarm

pytestmark = pytest.mark.swarm


@pytest.fixture
def private(node: DhtDirectory, own_folder: Path, tmp_path: Path) -> Iterator[tuple[LocalSwarm, Identity]]:
    """A peer that accepts one key, and the identity with this key."""
    friend = Identity.generate()
    keys = tmp_path / "authorized_keys"
    keys.write_text(f"{friend.public.text} a friend\n")
    with local_swarm(own_folder, [(0, 6)], authorized_keys=keys, node=node) as swarm:
        yield swarm, friend


def one_step(swarm: Swarm) -> torch.Tensor:
    session = Session(swarm, ConnectionOptions(codec="none"), reservation=16)
    try:
        return session.step(torch.ones(3, 64), [Chunk(1, 0, 3, 1)])
    finally:
        session.close()


def test_a_key_that_is_not_listed_gets_nothing(
    private: tuple[LocalSwarm, Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm, friend = private
    heard: list[Message] = []
    service = swarm.peers[0].service
    receive = service.receive_message
    monkeypatch.setattr(
        service, "receive_message", lambda source, message, now: (heard.append(message), receive(source, message, now))
    )
    with pytest.raises(NotAuthorized, match="splitnet key"):
        one_step(swarm.connect(Identity.generate()))
    assert heard == [], "nothing that a stranger sends reaches the peer"
    assert one_step(swarm.connect(friend)).shape == (1, 64)
    assert heard


def test_a_key_that_is_added_later_is_let_in(private: tuple[LocalSwarm, Identity], tmp_path: Path) -> None:
    swarm, friend = private
    newcomer = Identity.generate()
    keys = tmp_path / "authorized_keys"
    keys.write_text(f"{friend.public.text}\n{newcomer.public.text}\n")
    deadline = time.monotonic() + 20
    while True:
        try:
            assert one_step(swarm.connect(newcomer)).shape == (1, 64)
            return
        except NotAuthorized:
            assert time.monotonic() < deadline, "the list is read again within seconds"


def test_a_peer_with_another_key_than_its_record_is_not_used(node: DhtDirectory, own_folder: Path) -> None:
    with local_swarm(own_folder, [(0, 6)], node=node) as swarm:
        honest = swarm.peers[0]
        impostor = Identity.generate()
        # The signature is valid, but the peer at this address has another key.
        lie = dataclasses.replace(honest.record(), key=impostor.public, block_ms=(0.0,) * 5)
        _announce(swarm, lie, impostor)
        client = swarm.connect()
        assert {record.key for record in client.peers(fresh=True)} == {honest.identity.public, impostor.public}
        session = Session(client, ConnectionOptions(codec="none"), reservation=16)
        assert session.step(torch.ones(3, 64), [Chunk(1, 0, 3, 1)]).shape == (1, 64)
        assert [hop.endpoint.key for hop in session.hops] == [honest.identity.public]
        session.close()


def test_a_swarm_of_impostors_serves_nobody(node: DhtDirectory, own_folder: Path) -> None:
    with local_swarm(own_folder, [(0, 3)], node=node) as swarm:
        impostor = Identity.generate()
        lie = dataclasses.replace(swarm.peers[0].record(), key=impostor.public, start=3, end=6)
        _announce(swarm, lie, impostor)
        with pytest.raises((NotAuthorized, CoverageError)):
            one_step(swarm.connect())


def test_a_session_belongs_to_the_key_that_opened_it(node: DhtDirectory, own_folder: Path) -> None:
    with local_swarm(own_folder, [(0, 6)], node=node) as swarm:
        owner, thief = swarm.connect(), swarm.connect()
        session = Session(owner, ConnectionOptions(codec="none"), reservation=16)
        before = session.step(torch.ones(3, 64), [Chunk(1, 0, 3, 1)])
        # The thief knows the id and all other facts of the session.
        stolen = Session(thief, ConnectionOptions(codec="none", recovery_timeout_s=0.5), reservation=16)
        owner_id, stolen_id = session.id, stolen.id
        thief.links.unregister(stolen)
        stolen.id = stolen.state.session = owner_id
        thief.links.register(stolen)
        with pytest.raises(Exception, match="not your session"):
            stolen.open()
        held = swarm.peers[0].service.sessions.get(owner_id)
        assert held is not None
        service = swarm.peers[0].service
        service.receive_message(
            Connection(b"elsewhere", Identity.generate().public.curve_raw),
            Step(owner_id, held.epoch, 99, (Chunk(1, 0, 1, 0),), None, 0, 0, bytes(256)),
            time.monotonic(),
        )
        assert {row: cache.length for row, cache in held.row_state.caches.items()} == {1: 3}
        again = session.step(torch.ones(3, 64), [Chunk(1, 0, 3, 1)])
        assert torch.equal(before, again)
        assert stolen_id != owner_id
        session.close()


def test_an_endpoint_with_a_wrong_key_gets_no_messages(node: DhtDirectory, own_folder: Path) -> None:
    with local_swarm(own_folder, [(0, 6)], node=node) as swarm:
        client = swarm.connect()
        wrong = Endpoint(swarm.peers[0].endpoint.address, Identity.generate().public)
        pong = client.ping(wrong)
        right = client.ping(swarm.peers[0].endpoint)
        assert right.result(timeout=10).rtt_ms > 0
        assert not pong.done()


def _announce(swarm: LocalSwarm, record: PeerRecord, identity: Identity) -> None:
    directory = DhtDirectory.start(initial_peers=swarm.addresses, listen=None)
    try:
        assert directory.announce(record, identity)
    finally:
        directory.close()
