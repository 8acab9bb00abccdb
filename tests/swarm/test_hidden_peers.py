"""Unreachable peers serve through relays, and the tokens are those of the whole model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peers.running_peer import RunningPeer
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.announcer import find_helpers, relaying
from splitnet.directory.ask import PeerDirectory
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.hf.causal_lm import attach
from splitnet.nat import punch, unreachable
from splitnet.nat.punch import PathKind
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import SwarmKey
from splitnet.swarm.swarm import ModelFacts, Overview, Swarm, reached
from splitnet.swarm.trial import PeerLinks
from splitnet.tools.doctor.examination import peer as finding_of
from splitnet.tools.doctor.machine_checks import Status
from splitnet.transport import addresses
from splitnet.transport.addresses import Reach
from splitnet.wire.endpoints import Endpoint
from tests.swarm.generation import GREEDY, After, prompt
from tests.swarm.harness import LocalSwarm, local_swarm, wait_until

pytestmark = pytest.mark.swarm

NOWHERE = "127.0.0.1:9"
"""An address without a listener: a peer announced at it can only be reached through relays."""


@pytest.fixture
def no_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables hole punching. On loopback every node reaches every other, so a direct way would always be found."""
    monkeypatch.setattr(punch, "PUNCH_S", 0.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unreachable, "LOOK_S", 0.5)


@pytest.fixture
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    """A swarm without peers; each test adds relays and unreachable peers."""
    with local_swarm(folder, [], node=node) as swarm:
        yield swarm


def add_hidden(swarm: LocalSwarm, start: int, end: int, relays: int = 1) -> RunningPeer:
    peer = swarm.add(start, end, public_host=NOWHERE, reach=Reach.helpers)
    wait_until(lambda: len(peer.paths.hidden.relays) == relays)
    peer._announcer.publish()
    return peer


def ways_of(swarm: LocalSwarm) -> dict[tuple[int, int], PathKind]:
    return {
        (record.start, record.end): swarm.client.links.tunnels.path_kind(record.endpoint)
        for record in swarm.client.peers(fresh=True)
    }


@pytest.mark.usefixtures("no_holes")
def test_hidden_peers_serve_through_a_helper(swarm: LocalSwarm, local: Any) -> None:
    helper = swarm.add(0, 2, relay_port=0)
    first, second = add_hidden(swarm, 2, 4), add_hidden(swarm, 4, 6)
    model = swarm.model()
    with model.session() as cache:
        got = model.generate(**prompt(), **GREEDY)
        assert cache.session is not None
        assert not any(hop.relayed for hop in cache.session.hops)  # Unreachable peers reach each other, too.
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))
    assert ways_of(swarm) == {(0, 2): PathKind.DIRECT, (2, 4): PathKind.RELAYED, (4, 6): PathKind.RELAYED}
    assert helper.paths.helper is not None and helper.paths.helper.passed_bytes
    assert first.paths.hidden.streams.taken and second.paths.hidden.streams.taken


@pytest.mark.full
def test_better_ways_are_found_during_a_session(swarm: LocalSwarm, local: Any) -> None:
    swarm.add(0, 2, relay_port=0)
    add_hidden(swarm, 2, 4)
    add_hidden(swarm, 4, 6)
    model = swarm.model()
    wanted = local.generate(**prompt(), **GREEDY)

    def is_direct() -> bool:
        assert torch.equal(model.generate(**prompt(), **GREEDY), wanted)
        return PathKind.RELAYED not in ways_of(swarm).values()

    wait_until(is_direct)
    assert not [event for event in model.swarm.events.since(0) if event.kind == "lost"]


@pytest.mark.usefixtures("no_holes")
def test_an_answer_continues_when_a_relay_dies(swarm: LocalSwarm, local: Any) -> None:
    swarm.add(0, 3, relay_port=0)
    swarm.add(0, 3, relay_port=0)
    add_hidden(swarm, 3, 6, relays=2)
    model = swarm.model()
    died: list[Any] = []

    def kill() -> None:
        helper = next(
            peer.paths.helper for peer in swarm.peers if peer.paths.helper and peer.paths.helper.streams.taken
        )
        helper.close()
        died.append(helper)

    with model.session():
        got = model.generate(**prompt(), **GREEDY, streamer=After(10, kill))
    assert died and torch.equal(got, local.generate(**prompt(), **GREEDY))


@pytest.mark.usefixtures("no_holes")
def test_a_bootstrap_node_is_a_relay_and_prints_that(
    swarm: LocalSwarm, node: DhtDirectory, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = Identity.generate()
    with relaying(node, identity, "127.0.0.1", 0, None) as relay:
        wait_until(lambda: relay in find_helpers(node))
        assert not any("helper" in name for name in node.models().values())
        peer = swarm.add(0, 6, public_host=NOWHERE, reach=Reach.helpers)
        wait_until(lambda: peer.paths.hidden.relays == (relay,))
        peer._announcer.publish()
        records = swarm.client.peers(fresh=True)
        overview = Overview.of(swarm.client, records)
        assert [reached(record) for record in overview.records] == ["1 helper"]
        told = overview.as_json()["peers"][0]["relays"]
        assert told == [{"address": relay.address, "key": identity.public.text}]
        with PeerLinks(Identity.generate()) as links:
            answers = links.try_out({records[0].endpoint})
        finding = finding_of(records[0], answers[records[0].endpoint], 0.0, 3.0)
        assert finding.status is Status.passed and finding.text.endswith("with its key, relayed"), finding
        peer.close()
    assert relay not in find_helpers(node)


def test_a_peer_asks_whether_it_is_reachable_and_looks_for_relays(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch, node: DhtDirectory
) -> None:
    """Peers on loopback ask no other peers, so in this test all addresses count as addresses on the internet."""
    monkeypatch.setattr("peers.peer_paths.is_global", lambda address: True)
    monkeypatch.setattr("peers.peer_paths.is_reachable", lambda listen: True)
    swarm.add(0, 3, relay_port=0)
    reached = swarm.add(3, 6)
    reached.paths.check_reachability()
    assert not reached.paths.hidden.relays and reached.paths._ask_at > time.monotonic() + 500
    with monkeypatch.context() as patch:
        patch.setattr("peers.running_peer.public_address", lambda *_: f"tcp://{NOWHERE}")
        lost = swarm.add(3, 6, port_mapping=False)
    lost.paths._ask_at = 0.0
    lost.paths.check_reachability()
    wait_until(lambda: lost.paths.hidden.relays)
    record = next(record for record in node.peers(lost.checkpoint.fingerprint) if record.key == lost.identity.public)
    assert record.relays or wait_until(lambda: lost.record().relays) is None
    with monkeypatch.context() as patch:
        patch.setattr(lost.paths, "_asked_helpers", lambda _: [])
        patch.setattr(PeerLinks, "ask_back", lambda *_: {"one": True, "two": True})
        assert lost.paths._is_reached(lost.paths.address) is False, "they say so, and nobody has come"
        patch.setattr(PeerLinks, "ask_back", lambda *_: {"one": False, "two": False})
        here = Endpoint(f"tcp://127.0.0.1:{lost.transport.port}", lost.identity.public)
        with PeerLinks(Identity.generate()) as links:
            assert links.try_out([here])[here].rtt_ms is not None
            assert lost.paths._is_reached(here.address) is True, "they deny it, and somebody is here"
    lost.paths.endpoint, lost.paths._ask_at = here, 0.0
    lost.paths.check_reachability()
    assert not lost.paths.hidden.relays


def test_a_peer_whose_machine_gets_another_address_announces_it_and_looks_for_helpers_again(
    swarm: LocalSwarm,
    monkeypatch: pytest.MonkeyPatch,
    node: DhtDirectory,
    local: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hosts = ["127.0.0.1"]
    found_out = addresses.reachable_host
    for module in ("peers.peer_paths", "splitnet.transport.addresses"):
        monkeypatch.setattr(
            f"{module}.reachable_host", lambda listen: hosts[-1] if "0.0.0.0" in listen else found_out(listen)
        )
    monkeypatch.setattr("peers.peer_paths.is_reachable", lambda address: "127.0.0.1" not in address)
    monkeypatch.setattr("peers.peer_paths.MOVED_S", 0.0)
    swarm.add(0, 3, relay_port=0)
    peer = swarm.add(3, 6, listen="tcp://0.0.0.0:0", reach=Reach.helpers)
    assert "others cannot connect to tcp://0.0.0.0:0: this machine has no address for it" in caplog.text
    hosts.append("127.0.0.2")
    wait_until(lambda: peer.paths.hidden.relays)

    def announced() -> str:
        records = node.peers(peer.checkpoint.fingerprint)
        return next(record.address for record in records if record.key == peer.identity.public)

    port = peer.transport.port
    wait_until(lambda: announced() == f"tcp://127.0.0.2:{port}")
    assert torch.equal(swarm.model().generate(**prompt(), **GREEDY), local.generate(**prompt(), **GREEDY))
    wait_until(lambda: not peer.paths._has_moved and peer.paths.hidden.relays)
    stopped = peer.paths.hidden._task
    hosts.append("127.0.0.1")  # The machine has no network for a moment.
    hosts.append("127.0.0.3")
    wait_until(lambda: announced() == f"tcp://127.0.0.3:{port}")
    wait_until(lambda: peer.paths.hidden._task is not stopped and peer.paths.hidden.relays)
    assert peer.join_address.startswith(f"tcp://127.0.0.3:{port}?")
    assert torch.equal(swarm.model().generate(**prompt(), **GREEDY), local.generate(**prompt(), **GREEDY))


@pytest.mark.usefixtures("no_holes")
def test_a_process_that_joins_through_a_peer_finds_relays_of_the_dht(
    swarm: LocalSwarm, node: DhtDirectory, local: Any
) -> None:
    with relaying(node, Identity.generate(), "127.0.0.1", 0, None) as relay:
        wait_until(lambda: relay in find_helpers(node))
        first = swarm.add(0, 3)
        swarm.add(3, 6, join=[first.join_address], public_host=NOWHERE, reach=Reach.helpers)
        hidden_one = swarm.peers[-1]
        wait_until(lambda: hidden_one.paths.hidden.relays == (relay,))
        hidden_one._announcer.publish()
        directory = hidden_one.directory
        assert isinstance(directory, PeerDirectory)
        assert relay.key not in {other.key.raw for other in directory._others}, "it answers no questions"
        assert torch.equal(swarm.model().generate(**prompt(), **GREEDY), local.generate(**prompt(), **GREEDY))
        assert ways_of(swarm)[3, 6] is PathKind.RELAYED
        assert set(hidden_one.directory.models()) == {hidden_one.checkpoint.fingerprint}


@pytest.mark.usefixtures("no_holes")
def test_hidden_peers_of_a_closed_swarm_are_reached_through_its_peers(folder: Path, local: Any) -> None:
    key = SwarmKey.generate()
    with local_swarm(folder, [(0, 3)], swarm_key=key, relay_port=0) as swarm:
        first = swarm.peers[0]
        options = {"swarm_key": key, "join": [first.join_address], "public_host": NOWHERE, "reach": Reach.helpers}
        second = swarm.add(3, 6, **options)
        wait_until(lambda: second.paths.hidden.relays)
        second._announcer.publish()
        assert find_helpers(second.directory) == []
        with Swarm(ModelFacts.of(first.checkpoint), [first.join_address], swarm_key=key) as client:
            model = attach(Checkpoint.open(folder), client, codec="none")
            assert torch.equal(model.generate(**prompt(), **GREEDY), local.generate(**prompt(), **GREEDY))
            records = client.peers(fresh=True)
            assert [client.links.tunnels.path_kind(record.endpoint) for record in records if record.relays] == [
                PathKind.RELAYED
            ]
