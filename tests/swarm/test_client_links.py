"""A client that runs for a long time: a silent directory, peers that join and leave, garbage in reference cycles."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import DirectoryError
from splitnet.security.identity import Identity
from splitnet.session.inference import Session
from splitnet.swarm import peer_cache
from splitnet.swarm.client_links import MAX_LINKS
from splitnet.wire.endpoints import Endpoint
from tests.swarm.generation import GREEDY, After, prompt
from tests.swarm.harness import SPANS, LocalSwarm, local_swarm, repairs

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def running(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    """A swarm with two peers for every span."""
    with local_swarm(folder, SPANS * 2, node=node) as swarm:
        yield swarm


@pytest.fixture
def swarm(running: LocalSwarm) -> Iterator[LocalSwarm]:
    with running.newcomer() as swarm:
        yield swarm


@pytest.mark.default_cases(speculate=(None,))
@pytest.mark.parametrize("speculate", [None, "prompt-lookup"])
def test_a_silent_directory_neither_ends_nor_prevents_a_generation(
    swarm: LocalSwarm, local: Any, monkeypatch: pytest.MonkeyPatch, speculate: str | None
) -> None:
    model = swarm.model()
    directory: Any = model.swarm.directory

    def fall_silent() -> None:
        def silent(*_: Any) -> Any:
            raise DirectoryError("The DHT did not answer.")

        directory.peers = directory.models = silent
        # Every look at the peers then asks the directory again.
        monkeypatch.setattr(peer_cache, "RECORDS_MAX_AGE_S", 0.0)

    options: Any = GREEDY | ({"speculate": speculate} if speculate else {})
    expected = local.generate(**prompt(), **GREEDY)
    assert torch.equal(model.generate(**prompt(), **options, streamer=After(5, fall_silent)), expected)
    assert torch.equal(model.generate(**prompt(), **options), expected)
    with pytest.raises(DirectoryError):
        directory.peers(model.swarm.facts.fingerprint)


def test_measured_peers_report_their_load(swarm: LocalSwarm) -> None:
    model = swarm.model()
    model.generate(**prompt(), **GREEDY)
    records = model.swarm.peers()
    model.swarm.measurer.look_at(records)
    told = [model.swarm.links.prober.loads.get(record.endpoint) for record in records]
    assert all(load and load.at >= record.issued_at for load, record in zip(told, records, strict=True))
    assert sum(load.wait_ms > 0 for load in told if load) >= len(SPANS), "these have just computed"


def test_a_hop_is_replaced_while_the_directory_is_silent(
    swarm: LocalSwarm, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = swarm.model()
    directory: Any = model.swarm.directory

    def silent(*_: Any) -> Any:
        raise DirectoryError("The DHT did not answer.")

    def lose_a_hop() -> None:
        directory.peers = directory.models = silent
        monkeypatch.setattr(peer_cache, "RECORDS_MAX_AGE_S", 0.0)
        assert cache.session is not None
        model.swarm.links._link_changed(cache.session.hops[1].endpoint, peer_cache.LinkState.DOWN)

    with model.session() as cache:
        got = model.generate(**prompt(), **GREEDY, streamer=After(5, lose_a_hop))
        assert cache.session is not None and len(repairs(cache.session)) == 1
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))


def test_peers_report_the_progress_of_a_session(swarm: LocalSwarm) -> None:
    model = swarm.model()
    stranger = swarm.connect(Identity.generate())
    stranger.peers()
    with model.session() as cache:
        model.generate(**prompt(), **GREEDY, speculate="off")
        assert isinstance(cache.session, Session)
        for hop in cache.session.hops:
            asked = (model.swarm.ping(hop.endpoint, cache.session.id).result(20.0) for _ in range(100))
            answer = next(answer for answer in asked if not answer.waiting)  # a step ends after its result is sent
            assert (answer.holds, answer.done) == (True, cache.get_seq_length())
            answer = stranger.ping(hop.endpoint, cache.session.id).result(20.0)
            assert (answer.holds, answer.waiting, answer.done) == (False, 0, 0)
            assert not model.swarm.ping(hop.endpoint).result(20.0).holds


def test_peers_report_the_progress_of_training(swarm: LocalSwarm) -> None:
    model = swarm.model()
    ids = prompt()["input_ids"]
    model(
        inputs_embeds=model.get_input_embeddings()(ids).detach().requires_grad_(), use_cache=False
    ).logits.sum().backward()
    [session] = model.swarm.links._sessions
    done = [model.swarm.ping(peer.endpoint, session).result(20.0).done for peer in swarm.peers]
    # Forward and backward through all spans; more if a hop on a busy machine was so slow that it was replaced.
    assert sum(done) >= 2 * ids.numel() * len(SPANS), done


def test_a_thousand_peers_that_come_and_go_leave_room_for_the_others(swarm: LocalSwarm, local: Any) -> None:
    model = swarm.model()
    expected = local.generate(**prompt(), **GREEDY)
    assert torch.equal(model.generate(**prompt(), **GREEDY), expected)
    before = len(os.listdir("/proc/self/fd"))
    key = Identity.generate().public
    for number in range(1000):  # a client measures every new peer
        model.swarm.ping(Endpoint(f"tcp://127.0.0.1:{1 + number}", key))
    assert torch.equal(model.generate(**prompt(), **GREEDY), expected)
    assert len(os.listdir("/proc/self/fd")) - before <= 4 * MAX_LINKS


@pytest.mark.full
def test_a_collected_cache_frees_the_memory_of_its_peers(swarm: LocalSwarm) -> None:
    model = swarm.model()
    output = model(**prompt(), use_cache=True)
    sessions = {peer.endpoint: peer.service.sessions for peer in swarm.peers}
    held = [sessions[hop.endpoint] for hop in output.past_key_values.session.hops]
    box: list[Any] = [output]
    box.append(box)
    del output, box
    assert all(len(table) == 1 for table in held)
    with model.swarm.links._transport._outbox.lock:  # as when an allocation in `Transport.send` starts the collector
        gc.collect()
    for table in held:
        assert any(not len(table) or (table.wait_for_end(0.1) and not len(table)) for _ in range(100))
