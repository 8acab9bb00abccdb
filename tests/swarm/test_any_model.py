"""Peers that serve any model move to the model with demand, stay there, and uncover no model in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peers import any_model, relocation
from peers.peer_options import SpanWish
from peers.running_peer import RunningPeer
from splitnet.blocks.span import block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.transfer import fetching
from splitnet.directory.demand import DemandPublisher, demand_of
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.record import DEMAND, MAX_WANTED_TOKENS, Wanted
from splitnet.errors import ModelNotFound
from splitnet.security.identity import Identity
from splitnet.swarm.swarm import ModelFacts
from splitnet.swarm.swarm_models import models_of
from tests.attacks.directory import flood_records
from tests.swarm.generation import GREEDY, prompt
from tests.swarm.harness import LocalSwarm, dht_node, local_swarm, wait_until
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm


@pytest.fixture
def node() -> Iterator[DhtDirectory]:
    """A DHT node for each test, because all tests use the same models."""
    with dht_node() as directory:
        yield directory


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("other"), blocks=4, seed=7)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """All looks happen more often."""
    for module, name, times in ((any_model, "LOOK_S", 40), (any_model, "HOLD_S", 10), (relocation, "QUICK_LOOK_S", 10)):
        monkeypatch.setattr(module, name, getattr(module, name) / times)
    monkeypatch.setattr(relocation, "CHECK_S", 0.05)


def memory_for(folder: Path, blocks: int) -> SpanWish:
    return SpanWish(memory=blocks * block_bytes(Checkpoint.open(folder), None))


def any_peer(swarm: LocalSwarm, folder: Path | None, allowed: list[Path], blocks: int) -> RunningPeer:
    options: dict[str, Any] = {"wish": memory_for(swarm.folder, blocks), "any_model": [str(each) for each in allowed]}
    return swarm.add(0, 0, folder=folder, **options)


def serves(peer: RunningPeer, folder: Path) -> bool:
    return peer._server is not None and peer.checkpoint.fingerprint == Checkpoint.open(folder).fingerprint


def look(*peers: RunningPeer) -> None:
    """Waits until these peers have started three more looks at other models, so that two looks are complete."""
    for choice in [peer._choice for peer in peers] * 3:
        assert choice is not None
        before = choice._look_at
        wait_until(lambda choice=choice, before=before: choice._look_at != before)


def answer(swarm: LocalSwarm, folder: Path) -> torch.Tensor:
    client = LocalSwarm(folder, swarm.peers, swarm.node)
    with client._stack:
        return client.model().generate(**prompt(), **GREEDY)


def whole_answer(folder: Path) -> torch.Tensor:
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return whole.generate(**prompt(), **GREEDY)


def test_demand_moves_an_idle_peer_and_it_stays(node: DhtDirectory, folder: Path, other: Path) -> None:
    facts = {each: ModelFacts.of(Checkpoint.open(each)) for each in (folder, other)}
    with local_swarm(folder, [(0, 6)], node=node) as swarm:
        swarm.add(0, 2, folder=other)
        idle = any_peer(swarm, folder, [folder, other], 6)
        port, key = idle.endpoint.address, idle.identity.public
        look(idle)
        assert serves(idle, folder), "nobody has asked for the other one"
        gateway = swarm._stack.enter_context(closing(DemandPublisher(node, Identity.generate())))
        gateway.asked(facts[other], 100)
        wait_until(lambda: serves(idle, other))
        wait_until(lambda: [one.key for one in node.peers(facts[other].fingerprint) if one.serves].count(key))
        assert (idle.endpoint.address, idle.counters.moves) == (port, 1)
        assert torch.equal(answer(swarm, other), whole_answer(other))
        assert torch.equal(answer(swarm, folder), whole_answer(folder))
        listed = {model.fingerprint: model for model in models_of(node)}
        assert not any(model.missing for model in listed.values())
        assert listed[facts[other].fingerprint].demand > 0
        assert len(listed[facts[folder].fingerprint].records) == 1, "its record there is withdrawn"
        # The busy peer of this model handles this demand; the idle peer is needed where it is.
        gateway.asked(facts[folder], 50_000)
        wait_until(lambda: facts[folder].fingerprint in demand_of(node))
        look(idle)
        assert serves(idle, other) and idle.counters.moves == 1
        gateway.close()
        look(idle)
        assert serves(idle, other) and idle.counters.moves == 1, "without demand nothing moves"


@pytest.mark.full
def test_only_one_of_two_idle_peers_moves_to_missing_blocks(node: DhtDirectory, folder: Path, other: Path) -> None:
    with local_swarm(folder, [(0, 6)], node=node) as swarm:
        idle = [any_peer(swarm, folder, [], 6) for _ in range(2)]
        for peer in idle:  # The weights come from a peer of the model, because this peer has no folder with its files.
            peer.relocation.leave = lambda own, others: False
        swarm.add(0, 2, folder=other, share_weights=True)
        swarm.add(2, 4, folder=other, share_weights=True)
        gateway = swarm._stack.enter_context(closing(DemandPublisher(node, Identity.generate())))
        ends = swarm.peers.pop()
        ends.close()
        for peer in idle:
            peer.relocation.leave = peer._leave_model
        gateway.asked(ModelFacts.of(Checkpoint.open(other)), 100)
        wait_until(lambda: any(serves(peer, other) for peer in idle))
        look(*idle)
        assert sum(serves(peer, other) for peer in idle) == 1
        assert sorted(peer.counters.moves for peer in idle) == [0, 1]


def test_a_peer_in_use_stays_until_another_peer_covers_its_blocks(
    node: DhtDirectory, folder: Path, other: Path
) -> None:
    facts = {each: ModelFacts.of(Checkpoint.open(each)) for each in (folder, other)}
    with local_swarm(other, [(0, 4)], node=node) as swarm:
        alone = any_peer(swarm, folder, [folder, other], 6)
        gateway = swarm._stack.enter_context(closing(DemandPublisher(node, Identity.generate())))
        gateway.asked(facts[folder], 100)
        wait_until(lambda: demand_of(node))
        swarm.peers.pop(0).close()
        gateway.asked(facts[other], 50_000)
        wait_until(lambda: len(demand_of(node)) == 2)
        look(alone)
        assert serves(alone, folder)


def test_a_peer_without_a_model_starts_with_the_model_that_lacks_blocks(
    node: DhtDirectory, folder: Path, other: Path, tmp_path: Path
) -> None:
    with local_swarm(folder, [(0, 6)], node=node) as swarm:
        swarm.add(0, 2, folder=other)
        newcomer = any_peer(swarm, None, [tmp_path / "absent", folder, other], 6)
        assert serves(newcomer, other) and newcomer.span.end == 4
        with pytest.raises(ModelNotFound, match="give MODEL, or --allow"):
            any_peer(swarm, None, [tmp_path / "absent"], 6)


def test_a_peer_stays_if_no_source_has_the_weights(
    node: DhtDirectory, folder: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "WAIT_LIMIT_S", 0.5)
    with local_swarm(folder, [(0, 6)], node=node) as swarm:
        swarm.add(0, 2, folder=own_folder)
        idle = any_peer(swarm, folder, [], 6)
        gateway = swarm._stack.enter_context(closing(DemandPublisher(node, Identity.generate())))
        gateway.asked(ModelFacts.of(Checkpoint.open(own_folder)), 100)
        choice = idle._choice
        assert choice is not None
        unserved = Checkpoint.open(own_folder).fingerprint
        wait_until(lambda: choice._retry_at)
        assert serves(idle, folder) and not choice.is_leaving and idle.record().serves
        there = node.peers(unserved)
        assert idle.identity.public not in {record.key for record in there}
        assert torch.equal(answer(swarm, folder), whole_answer(folder))


def test_names_of_strangers_cause_no_downloads_without_a_list_of_models(
    node: DhtDirectory, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, cached = list[str](), list[str]()
    monkeypatch.setattr(any_model, "_open", opened.append)
    monkeypatch.setattr(any_model, "try_to_load_from_cache", lambda *_: next(iter(cached), None))
    with local_swarm(folder, [(0, 6)], node=node) as swarm:
        claims = (Wanted(bytes(32), "stranger/model", 4, MAX_WANTED_TOKENS),)
        assert flood_records(node.addresses, DEMAND, count=1, demand=claims)
        choice = any_peer(swarm, folder, [], 6)._choice
        assert choice is not None
        wait_until(lambda: bytes(32).hex() in choice._retry_at)
        assert not opened
        cached.append("/cache/config.json")
        choice._retry_at.clear()
        wait_until(lambda: bytes(32).hex() in choice._retry_at)
        assert set(opened) == {"stranger/model"}


@pytest.mark.full
def test_demand_claimed_by_strangers_is_bounded(node: DhtDirectory, folder: Path, other: Path) -> None:
    """The demand of another gateway still counts."""
    served, wanted = (Checkpoint.open(each) for each in (folder, other))
    with local_swarm(folder, [(0, 6)], node=node) as swarm:
        gateway = swarm._stack.enter_context(closing(DemandPublisher(node, Identity.generate())))
        gateway.asked(ModelFacts.of(served), 600)
        wait_until(lambda: demand_of(node))
        claims = (Wanted(bytes.fromhex(wanted.fingerprint), "other", 4, MAX_WANTED_TOKENS),)
        assert flood_records(node.addresses, DEMAND, count=600, demand=claims)
        found = demand_of(node)
        assert found[wanted.fingerprint].tokens_per_s <= MAX_WANTED_TOKENS
        assert found[served.fingerprint].tokens_per_s == pytest.approx(10.0, rel=0.2)
        assert set(node.models()) == {served.fingerprint}
        idle = any_peer(swarm, folder, [folder], 6)  # This peer may serve no other model.
        look(idle)
        assert serves(idle, folder)
