"""Closed swarms: members find each other without a DHT, and outsiders learn and announce nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peers import directory_service
from peers.running_peer import RunningPeer
from splitnet import AutoModelForCausalLM, AutoModelForSequenceClassification
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.joining import part_of
from splitnet.errors import DirectoryError, KeyFileError, LanError, NotAuthorized, SplitnetError, WrongSwarm
from splitnet.hf.causal_lm import attach
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.security.swarm_key import SwarmKey, write_secret_file
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm import peer_cache
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.wire.messages import Announce, Announced, Chunk, Found, LookUp
from tests.attacks.directory import ask_of_nothing
from tests.attacks.transport import Client
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.swarm.test_asked_directory import GREEDY, IDS, spans
from tests.unit.swarm.test_swarm import NEEDS

pytestmark = pytest.mark.swarm

KEY, OTHER = SwarmKey.generate(), SwarmKey.generate()


@pytest.fixture(scope="module")
def swarm(folder: Path) -> Iterator[LocalSwarm]:
    """Two peers of a closed swarm that accept any key, so that outsiders can connect."""
    with local_swarm(folder, [(0, 6)], swarm_key=KEY) as swarm:
        swarm.add(0, 6, swarm_key=KEY, join=[swarm.peers[0].join_address])
        yield swarm


def connect(peer: RunningPeer, key: SwarmKey | None = KEY, **options: Any) -> Swarm:
    return Swarm(ModelFacts.of(peer.checkpoint), [peer.join_address], swarm_key=key, **options)


def test_members_find_each_other_without_a_dht(swarm: LocalSwarm, local: Any) -> None:
    for peer in swarm.peers:
        assert part_of(peer.directory, DhtDirectory) is None and not peer.directory.addresses
        with connect(peer) as client:
            model = attach(Checkpoint.open(swarm.folder), client, codec="none")
            inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **GREEDY}
            assert torch.equal(model.generate(**inputs), local.generate(**inputs))
            assert {record.key for record in client.peers()} == {peer.identity.public for peer in swarm.peers}


def test_from_pretrained_takes_the_swarm_key_and_trusted_keys(swarm: LocalSwarm, local: Any, tmp_path: Path) -> None:
    peer, other = swarm.peers
    key, trusted = tmp_path / "swarm.key", tmp_path / "trusted"
    write_secret_file(key, f"{KEY.secret_text}\n")
    trusted.write_text(f"{other.identity.public.text}\n")
    connection: dict[str, Any] = {"initial_peers": [peer.join_address], "identity": Identity.generate()}
    for given in (KEY, key, str(key)):
        model = AutoModelForCausalLM.from_pretrained(
            swarm.folder, swarm_key=given, trusted_peers=trusted, codec="none", **connection
        )
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **GREEDY}
        with model.session() as cache:
            assert torch.equal(model.generate(**inputs), local.generate(**inputs))
            assert cache.session is not None
            assert [hop.endpoint.key for hop in cache.session.hops] == [other.identity.public]
        model.close()
    trusted.write_text(f"{Identity.generate().public.text}\n")
    classifier = AutoModelForSequenceClassification.from_pretrained(
        swarm.folder, swarm_key=KEY, trusted_peers=trusted, num_labels=2, **connection
    )
    with pytest.raises(NotAuthorized, match="you trust none of them"):
        classifier(input_ids=IDS)
    classifier.close()
    with pytest.raises(KeyFileError):
        AutoModelForCausalLM.from_pretrained(swarm.folder, swarm_key=tmp_path / "none", **connection)


def test_a_model_that_no_peer_serves_is_not_reported_as_a_wrong_key(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_cache, "ARRIVE_S", 0.0)
    facts = dataclasses.replace(ModelFacts.of(swarm.peers[0].checkpoint), fingerprint="ab" * 32)
    with (
        Swarm(facts, [swarm.peers[0].join_address], swarm_key=KEY) as client,
        pytest.raises(WrongSwarm, match="serves other weights"),
    ):
        client.peers()


@pytest.mark.full
def test_the_first_peer_disappears_at_once_when_it_leaves(folder: Path) -> None:
    with local_swarm(folder, [(0, 6)], swarm_key=KEY) as swarm:
        first = swarm.peers[0]
        second = swarm.add(0, 6, swarm_key=KEY, join=[first.join_address])
        model = second.checkpoint.fingerprint
        assert {record.key for record in second.directory.peers(model)} == {
            first.identity.public,
            second.identity.public,
        }
        first.close()
        assert {record.key for record in second.directory.peers(model)} == {second.identity.public}


def test_features_of_a_dht_are_refused_by_name(swarm: LocalSwarm) -> None:
    join = [swarm.peers[0].join_address]
    with pytest.raises(DirectoryError, match="leave --dht-listen out"):
        swarm.add(0, 6, swarm_key=KEY, join=join, dht_listen=["/ip4/127.0.0.1/tcp/0"])
    with pytest.raises(LanError, match="leave --lan out"):
        swarm.add(0, 6, swarm_key=KEY, join=join, lan=True)


def test_an_outsider_finds_no_peers(swarm: LocalSwarm) -> None:
    peer = swarm.peers[0]
    with pytest.raises(DirectoryError, match="has another swarm key, or none"):
        connect(peer, OTHER)
    with connect(peer, None) as client:
        assert client.peers() == []
        assert client.directory.models() == {}
    with pytest.raises(DirectoryError, match="has another swarm key, or none"):
        swarm.add(0, 6, swarm_key=OTHER, join=[peer.join_address])


def test_an_outsider_learns_and_announces_nothing(swarm: LocalSwarm) -> None:
    peer, outsider = swarm.peers[0], Identity.generate()
    model = peer.checkpoint.fingerprint
    packed = dataclasses.replace(peer.record(), key=outsider.public).pack(outsider)
    questions = [
        *(LookUp(0, place, depth) for place in ("", model, OTHER.place(""), OTHER.place(model)) for depth in (0, 2)),
        *(Announce(0, depth, payload) for payload in (packed, OTHER.seal(packed), b"") for depth in (0, 2)),
    ]
    with Client(peer.endpoint, outsider) as attacker:
        for number, question in enumerate(questions, start=1):
            attacker.say(dataclasses.replace(question, number=number))
            expected = Found(number, 0, b"") if isinstance(question, LookUp) else Announced(number, False)
            assert attacker.hear() == expected
    with connect(peer) as client:
        assert {record.key for record in client.peers()} == {peer.identity.public for peer in swarm.peers}
    for member in swarm.peers:
        assert outsider.public not in {record.key for record in member.directory.records(model)}


def test_a_flood_of_outsiders_does_not_keep_a_member_from_joining(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_service, "BYTES_OF_ALL_PER_MINUTE", 1 << 22)
    with local_swarm(folder, [(0, 6)], swarm_key=KEY) as swarm:  # nobody has asked its peer before
        (peer,) = swarm.peers
        answered = ask_of_nothing(peer.endpoint, seconds=0.5)
        assert 0 < answered < 64, "they have had all that they may ask together"
        with connect(peer) as client:
            assert [record.key for record in client.peers()] == [peer.identity.public]


def test_messages_between_members_are_sealed(swarm: LocalSwarm) -> None:
    peer = swarm.peers[0]
    with Client(peer.endpoint) as member:
        member.say(LookUp(1, KEY.place(peer.checkpoint.fingerprint), 0))
        payload = bytes(member.hear(Found).payload)
    for known in (peer.identity.public.raw, peer.checkpoint.fingerprint.encode(), peer.endpoint.address.encode()):
        assert known not in payload and known in KEY.unseal(payload)


def test_a_revoked_invitation_ends_within_seconds(folder: Path, tmp_path: Path) -> None:
    owner, friend = Identity.generate(), Identity.generate()
    keys = tmp_path / "keys"
    keys.write_text(f"{owner.public.text}\n{friend.public.text} anna\n")
    with local_swarm(folder, [(0, 6)], swarm_key=KEY, authorized_keys=keys) as swarm:
        peer = swarm.peers[0]
        place = KEY.place(peer.checkpoint.fingerprint)
        with Client(peer.endpoint, friend) as guest, Client(peer.endpoint, owner) as own:
            for client in (guest, own):
                client.say(LookUp(1, place, 0))
                assert KEY.unseal(client.hear(Found).payload)
            keys.write_text(f"{owner.public.text}\n")
            deadline = time.monotonic() + 10
            while not peer.transport.connections.ended["revoked"]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            guest.say(LookUp(2, place, 0), Announce(3, 0, KEY.seal(b"")))
            with pytest.raises(TimeoutError):
                guest.hear(timeout_s=1.0)
            own.say(LookUp(2, place, 0))
            assert own.hear(Found).number == 2
        with pytest.raises(DirectoryError, match="does not accept this key"):
            connect(peer, identity=friend)
        with connect(peer, identity=owner) as client:
            assert spans(client.peers()) == [(0, 6)]


def test_a_client_routes_only_through_trusted_peers(swarm: LocalSwarm, tmp_path: Path) -> None:
    first, second = (peer.identity.public for peer in swarm.peers)
    trusted, nobody = tmp_path / "trusted", tmp_path / "nobody"
    trusted.write_text(f"{second.text} a friend\n")
    nobody.write_text(f"{Identity.generate().public.text}\n")
    with connect(swarm.peers[0], trusted=AuthorizedKeys(trusted)) as client:
        assert [record.key for record in client.peers()] == [second]
        assert [hop.record.key for hop in client.plan_route(NEEDS)] == [second]
        trusted.write_text(f"{first.text}\n")  # the client reads the file again
        deadline = time.monotonic() + 10
        while [hop.record.key for hop in client.plan_route(NEEDS)] != [first]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with (
        connect(swarm.peers[0], trusted=AuthorizedKeys(nobody)) as client,
        pytest.raises(NotAuthorized, match="and you trust none of them"),
    ):
        client.plan_route(NEEDS)


def test_a_session_leaves_a_peer_that_is_not_trusted_any_more(swarm: LocalSwarm, tmp_path: Path) -> None:
    keys = {peer.identity.public for peer in swarm.peers}
    trusted = tmp_path / "trusted"
    trusted.write_text("".join(f"{key.text}\n" for key in keys))
    with connect(swarm.peers[0], trusted=AuthorizedKeys(trusted)) as client:
        session = Session(client, ConnectionOptions(codec="none"), reservation=64)
        session.step(torch.ones(3, 64), [Chunk(1, 0, 3, 1)])
        (used,) = {hop.endpoint.key for hop in session.hops}
        (other,) = keys - {used}
        trusted.write_text(f"{other.text}\n")
        deadline = time.monotonic() + 5
        for at in range(3, 50):
            session.step(torch.ones(1, 64), [Chunk(1, at, 1, 1)])
            if [hop.endpoint.key for hop in session.hops] == [other]:
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            pytest.fail("the session stays")
        trusted.write_text(f"{Identity.generate().public.text}\n")
        with pytest.raises(SplitnetError, match="trust"):
            for later in range(at + 1, at + 50):
                session.step(torch.ones(1, 64), [Chunk(1, later, 1, 1)])
                time.sleep(0.1)
        session.close()
