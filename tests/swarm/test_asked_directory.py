"""Peers that answer for the directory: a process that joins through a peer's own port needs no DHT."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peers.directory_service import MAX_MODELS
from peers.running_peer import RunningPeer
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory import ask
from splitnet.directory.ask import PeerDirectory
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.record import PeerRecord
from splitnet.errors import DirectoryError, LanError
from splitnet.hf.causal_lm import attach
from splitnet.security.identity import Identity
from splitnet.swarm.client_links import Links
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.transport.addresses import peer_address
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Announce, Announced, Failure, Found, LookUp
from tests.attacks.transport import Client
from tests.swarm.harness import LocalSwarm, local_swarm

pytestmark = pytest.mark.swarm

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(3, 12)[None]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

WITHOUT_HIVEMIND = """
import sys
from importlib.machinery import PathFinder

class WithoutHivemind(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {"hivemind", "multiaddr"} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutHivemind
"""

PEER_AND_CLIENT = """
import torch
from transformers import AutoModelForCausalLM
from peers.running_peer import RunningPeer
from peers.peer_options import PeerOptions
from peers.peer_options import SpanWish
import splitnet
from splitnet.errors import DirectoryError
from splitnet.security.identity import Identity

if __name__ == "__main__":
    folder, address = sys.argv[1:]
    options = PeerOptions(
        wish=SpanWish(blocks=(3, 6)), listen="tcp://127.0.0.1:0", kv_memory=2**26, initial_peers=[address]
    )
    peer = RunningPeer.start(folder, options)
    ids = torch.arange(3, 12)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for join in (address, peer.join_address):
        model = splitnet.AutoModelForCausalLM.from_pretrained(
            folder, initial_peers=[join], codec="none", identity=Identity.generate()
        )
        remote = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        model.close()
        whole = AutoModelForCausalLM.from_pretrained(folder)
        whole = whole.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(remote, whole), (remote, whole)
    try:
        splitnet.AutoModelForCausalLM.from_pretrained(
            folder, initial_peers=["/ip4/127.0.0.1/tcp/9/p2p/12D3KooW"], identity=Identity.generate()
        )
    except DirectoryError as error:
        assert "Join through the address" in str(error), error
    else:
        raise AssertionError("there is no hivemind")
    peer.close()
    assert not {name for name in sys.modules if name.partition(".")[0] in ("hivemind", "multiaddr")}
"""


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    """A peer in a DHT, a second peer that has joined through the first, and a third that has joined through the
    second."""
    with local_swarm(folder, [(0, 2)], node=node) as swarm:
        swarm.add(2, 4, join=[swarm.peers[0].join_address])
        swarm.add(4, 6, join=[swarm.peers[1].join_address])
        yield swarm


def spans(found: list[PeerRecord]) -> list[tuple[int, int]]:
    return sorted((record.start, record.end) for record in found)


def wait_until_missed(swarm: LocalSwarm, span: tuple[int, int]) -> None:
    """Waits until no peer returns the record, so that the next test does not see it: answers may be a moment old."""
    deadline = time.monotonic() + 20
    for peer in swarm.peers:
        with connect(swarm, peer) as client:
            while span in spans(client.directory.peers(client.facts.fingerprint)):
                assert time.monotonic() < deadline


def connect(swarm: LocalSwarm, *joined: RunningPeer, identity: Identity | None = None) -> Swarm:
    facts = ModelFacts.of(Checkpoint.open(swarm.folder))
    return Swarm(facts, [peer.join_address for peer in joined], identity=identity)


@pytest.mark.parametrize("joined", [0, 1, 2])
def test_a_client_joins_through_any_peer(swarm: LocalSwarm, local: Any, joined: int) -> None:
    with connect(swarm, swarm.peers[joined]) as client:
        model = attach(Checkpoint.open(swarm.folder), client, codec="none")
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **GREEDY}
        assert torch.equal(model.generate(**inputs), local.generate(**inputs))
        assert spans(client.peers()) == [(0, 2), (2, 4), (4, 6)]
        assert client.directory.models().keys() == {client.facts.fingerprint}


def test_a_client_needs_one_connection_with_the_peer_that_it_joins_through(swarm: LocalSwarm) -> None:
    with connect(swarm, swarm.peers[0]) as client:
        endpoint = swarm.peers[0].endpoint
        assert client.ping(endpoint).result(timeout=20).rtt_ms > 0
        assert [link for link in client.links._transport._links if link.key == endpoint.key] == [endpoint]


def test_a_client_of_the_dht_finds_peers_that_joined_through_a_peer(swarm: LocalSwarm) -> None:
    with swarm.newcomer() as visitor:
        assert spans(visitor.connect().peers()) == [(0, 2), (2, 4), (4, 6)]


def test_addresses_of_peers_and_of_the_dht_may_be_combined(swarm: LocalSwarm, node: DhtDirectory) -> None:
    facts = ModelFacts.of(Checkpoint.open(swarm.folder))
    gone = peer_address(Endpoint("tcp://127.0.0.1:9", Identity.generate().public))
    for joined in ([*node.addresses, swarm.peers[2].join_address], [*node.addresses, gone]):
        with Swarm(facts, joined) as client:
            assert spans(client.peers()) == [(0, 2), (2, 4), (4, 6)]


def test_a_peer_that_leaves_is_gone_at_once(swarm: LocalSwarm) -> None:
    with connect(swarm, swarm.peers[1]) as client:
        leaving = swarm.add(0, 6, join=[swarm.peers[2].join_address])
        assert (0, 6) in spans(client.directory.peers(client.facts.fingerprint))
        leaving.close()
        swarm.peers.remove(leaving)
        deadline = time.monotonic() + 20
        while (0, 6) in spans(client.directory.peers(client.facts.fingerprint)):
            assert time.monotonic() < deadline  # before the record expires
    wait_until_missed(swarm, (0, 6))


@pytest.mark.default_cases(through_dht=(False,))
@pytest.mark.parametrize("through_dht", [True, False])
def test_a_running_client_learns_of_changes_without_reading_all_records(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch, through_dht: bool
) -> None:
    facts = ModelFacts.of(Checkpoint.open(swarm.folder))
    assert swarm.node is not None
    with Swarm(facts, swarm.node.addresses if through_dht else [swarm.peers[1].join_address]) as client:
        assert spans(client.peers()) == [(0, 2), (2, 4), (4, 6)]
        kind = type(client.directory)
        assert kind is (DhtDirectory if through_dht else PeerDirectory)
        reads: list[str] = []
        monkeypatch.setattr(client.directory, "records", lambda model, depth=0: reads.append(model) or [])

        def sees_soon(expected: list[tuple[int, int]]) -> bool:
            deadline = time.monotonic() + 20
            while spans(client.peers(fresh=True)) != expected and time.monotonic() < deadline:
                client.measurer._closing.wait(0.1)
            return spans(client.peers()) == expected

        newcomer = swarm.add(0, 6, join=swarm.node.addresses)
        assert sees_soon([(0, 2), (0, 6), (2, 4), (4, 6)])
        newcomer.close()
        swarm.peers.remove(newcomer)
        assert sees_soon([(0, 2), (2, 4), (4, 6)]), "sooner than its record expires"
        assert not reads
    wait_until_missed(swarm, (0, 6))


def test_peers_that_ask_each_other_do_not_wait_in_a_circle(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = swarm.peers[1:]
    directory = first.directory
    assert isinstance(directory, PeerDirectory)
    monkeypatch.setattr(directory, "_joined", [*directory._joined, second.endpoint])  # a circle
    monkeypatch.setattr(ask, "DIRECTORY_ANSWER_S", 60.0)  # so that a peer that waits for itself would be late
    monkeypatch.setattr(ask, "DIRECTORY_OTHERS_S", 60.0)
    began = time.monotonic()
    with connect(swarm, first, second) as client:
        for _ in range(3):
            assert spans(client.directory.peers(client.facts.fingerprint)) == [(0, 2), (2, 4), (4, 6)]
    assert time.monotonic() - began < 30


def test_a_silent_peer_hides_no_record(swarm: LocalSwarm) -> None:
    stranger = Identity.generate()
    silent = Transport(stranger, on_message=lambda *_: None, listen="tcp://127.0.0.1:0")
    silent.start()
    try:
        address = peer_address(Endpoint(f"tcp://127.0.0.1:{silent.port}", stranger.public))
        with Swarm(ModelFacts.of(Checkpoint.open(swarm.folder)), [address, swarm.peers[0].join_address]) as client:
            assert spans(client.peers()) == [(0, 2), (2, 4), (4, 6)]
    finally:
        silent.close()


def test_without_any_answer_there_is_an_error(swarm: LocalSwarm) -> None:
    facts = ModelFacts.of(Checkpoint.open(swarm.folder))
    other = Identity.generate().public
    wrong = peer_address(Endpoint(swarm.peers[0].endpoint.address, other))
    with pytest.raises(DirectoryError, match="ends the handshake as if it had another key"):
        Swarm(facts, [wrong])
    with pytest.raises(DirectoryError, match="is not reached"):
        Swarm(facts, [peer_address(Endpoint("tcp://127.0.0.1:9", other))])


@pytest.mark.full
def test_without_hivemind_there_are_clients_and_peers(folder: Path) -> None:
    with local_swarm(folder, [(0, 3)]) as swarm:
        command = [sys.executable, "-c", WITHOUT_HIVEMIND + PEER_AND_CLIENT, str(folder), swarm.peers[0].join_address]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert ended.returncode == 0, ended.stderr


def test_a_peer_without_a_dht_cannot_be_found_on_the_local_network(swarm: LocalSwarm) -> None:
    with pytest.raises(LanError, match="leave --lan out"):
        swarm.add(0, 2, join=[swarm.peers[0].join_address], lan=True)


def test_a_swarm_continues_without_its_first_peer(folder: Path) -> None:
    with local_swarm(folder, [(0, 3)]) as swarm:
        first = swarm.peers[0]
        second = swarm.add(0, 3, join=[first.join_address])
        third = swarm.add(3, 6, join=[first.join_address])
        links = Links(Identity.generate())
        with PeerDirectory.join_peers([second.endpoint], links) as directory:
            assert len(directory.peers(second.checkpoint.fingerprint)) == 3
            second.directory.peers(second.checkpoint.fingerprint)
            third.directory.peers(second.checkpoint.fingerprint)
            first.close()
            third._announcer.publish()  # a peer does this every 15 s
            second._announcer.publish()
            found = directory.peers(second.checkpoint.fingerprint)
            assert {record.key for record in found} >= {second.identity.public, third.identity.public}
        links.close()


def test_strangers_at_a_private_peer_learn_and_announce_nothing(
    folder: Path, node: DhtDirectory, tmp_path: Path
) -> None:
    friend, stranger = Identity.generate(), Identity.generate()
    keys = tmp_path / "keys"
    keys.write_text(friend.public.text + "\n")
    with local_swarm(folder, [(0, 6)], node=node, authorized_keys=keys) as swarm:
        with connect(swarm, swarm.peers[0], identity=friend) as client:
            assert (0, 6) in spans(client.peers())
        with pytest.raises(DirectoryError, match="does not accept this key"):
            connect(swarm, swarm.peers[0], identity=stranger)
        peer = swarm.peers[0]
        with Client(peer.endpoint, stranger) as attacker, pytest.raises(TimeoutError):
            attacker.say(LookUp(1, peer.checkpoint.fingerprint, 2), Announce(2, 2, peer.record().pack(peer.identity)))
            attacker.hear(timeout_s=1.0)


def test_a_flood_of_questions_neither_floods_the_dht_nor_keeps_others_waiting(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = swarm.peers[0]
    asked: list[str] = []
    records = peer.directory.records
    monkeypatch.setattr(peer.directory, "records", lambda model, depth: asked.append(model) or records(model, depth))
    with Client(peer.endpoint, queue=0) as attacker, connect(swarm, peer) as client:
        began = time.monotonic()
        attacker.say(*(LookUp(number, f"{number:032x}", 2) for number in range(1, 3000)))
        attacker.say(*(LookUp(number, peer.checkpoint.fingerprint, 2) for number in range(3000, 6000)))
        attacker.say(*(Announce(number, 2, bytes(100)) for number in range(6000, 9000)))
        assert spans(client.directory.peers(client.facts.fingerprint)) == [(0, 2), (2, 4), (4, 6)]
        refused = 0
        for _ in range(8999):
            answer = attacker.hear()
            assert isinstance(answer, Found | Announced | Failure)
            refused += isinstance(answer, Failure)
        attacker.ping()
        waited_s = time.monotonic() - began
    assert refused > 5000
    assert len(asked) <= MAX_MODELS + 70 + 2 * waited_s  # reads that one key may cause in a minute
