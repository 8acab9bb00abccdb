"""The chain: hops push activations to each other, or through the client if they must, and sessions stay separate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import CoverageError, PeerFailed, SessionClosed, TooLongForPeers, WrongSwarm
from splitnet.security.identity import Identity
from splitnet.session.events import Cause
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm import peer_cache
from splitnet.wire.endpoints import Destination
from splitnet.wire.messages import Chunk, Result
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SPANS = [(0, 2), (2, 3), (3, 6)]


@pytest.fixture(scope="module")
def running(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(folder, SPANS, node=node) as swarm:
        yield swarm


@pytest.fixture
def shared(running: LocalSwarm) -> Iterator[LocalSwarm]:
    with running.newcomer() as visitor:
        yield visitor


def prompt(length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (1, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)


def test_peers_push_to_each_other(shared: LocalSwarm, local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = _record_result_ends(monkeypatch)
    model = shared.model()
    with model.session() as cache:
        assert torch.equal(generate(model, prompt()), generate(local, prompt()))
        assert cache.session is not None
        assert not any(hop.relayed for hop in cache.session.hops)
    assert set(ends) == {6}, "only the tail answers the client"


def test_the_client_relays_to_a_hop_that_refuses_other_peers(
    node: DhtDirectory, own_folder: Path, own_local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Identity.generate()
    keys = tmp_path / "authorized_keys"
    keys.write_text(client.public.text + "\n")
    with local_swarm(own_folder, [(0, 2)], node=node) as swarm:
        # This peer accepts the client and no other peer, so no peer can push to it.
        swarm.add(2, 3, authorized_keys=keys)
        swarm.add(3, 6)
        ends = _record_result_ends(monkeypatch)
        model = swarm.model(identity=client)
        with model.session() as cache:
            assert torch.equal(generate(model, prompt()), generate(own_local, prompt()))
            assert cache.session is not None
            assert [hop.relayed for hop in cache.session.hops] == [True, False, False]
            assert [link.sender for link in cache.session.links()][1] == "blocks 0..1 via client"
    assert set(ends) == {2, 6}, "the first hop's output came to the client, the second pushed its own"


def test_a_hop_may_run_a_part_of_its_span(node: DhtDirectory, own_folder: Path, own_local: Any) -> None:
    with local_swarm(own_folder, [(0, 4), (2, 6)], node=node) as swarm:
        model = swarm.model()
        with model.session() as cache:
            assert torch.equal(generate(model, prompt()), generate(own_local, prompt()))
            assert cache.session is not None
            hops = cache.session.hops
            assert hops[0].planned.start == 0
            assert hops[0].planned.end == hops[1].planned.start


@pytest.mark.full
def test_concurrent_clients_get_the_same_tokens_as_alone(shared: LocalSwarm) -> None:
    work = [("none", 5), ("int8", 40), ("fp16", 17), ("none", 90), ("int8", 9), ("bf16", 23)]
    models = [shared.model(codec, identity=Identity.generate()) for codec, _ in work]
    prompts = [prompt(length, seed=length) for _, length in work]
    alone = [generate(model, ids) for model, ids in zip(models, prompts, strict=True)]
    for _ in range(3):
        with ThreadPoolExecutor(len(work)) as pool:
            together = list(pool.map(generate, models, prompts))
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_one_model_serves_several_threads(shared: LocalSwarm, local: Any) -> None:
    model = shared.model()
    prompts = [prompt(length, seed=length) for length in (4, 12, 30)]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda ids: generate(model, ids), prompts))
    for ids, tokens in zip(prompts, got, strict=True):
        assert torch.equal(tokens, generate(local, ids))


def test_a_hop_rebuilds_its_cache_from_the_log_of_the_previous_hop(shared: LocalSwarm) -> None:
    swarm = shared.connect()
    torch.manual_seed(0)
    hidden = torch.randn(20, 64)
    with_replay = Session(swarm, ConnectionOptions(codec="int8"), reservation=64)
    undisturbed = Session(swarm, ConnectionOptions(codec="int8"), reservation=64)
    for session in (with_replay, undisturbed):
        session.step(hidden[:12], [Chunk(1, 0, 12, 0)])
        session.step(hidden[12:15], [Chunk(1, 12, 3, 1)])
    # The last hop has lost the session; the hop before it sends its log again.
    tail = next(peer for peer in shared.peers if peer.span.end == 6)
    held = tail.service.sessions.get(with_replay.id)
    assert held is not None
    tail.service.sessions.remove(held)
    after = [session.step(hidden[15:16], [Chunk(1, 15, 1, 1)]) for session in (with_replay, undisturbed)]
    assert torch.equal(*after)
    assert [recovered.cause for recovered in with_replay.recoveries] == [Cause.SESSION_LOST]
    held = tail.service.sessions.get(with_replay.id)
    assert held is not None
    assert {row: cache.length for row, cache in held.row_state.caches.items()} == {1: 16}
    for session in (with_replay, undisturbed):
        session.close()


def test_a_repeated_step_changes_nothing(shared: LocalSwarm) -> None:
    session = Session(shared.connect(), ConnectionOptions(codec="none"), reservation=64)
    hidden = torch.randn(10, 64, generator=torch.Generator().manual_seed(3))
    session.step(hidden[:9], [Chunk(1, 0, 9, 1)])
    once = session.step(hidden[9:], [Chunk(1, 9, 1, 1)])
    twice = session.step(hidden[9:], [Chunk(1, 9, 1, 1)])
    assert torch.equal(once, twice)
    session.close()


def test_a_step_with_a_gap_behind_the_cache_is_refused(shared: LocalSwarm) -> None:
    from splitnet.errors import ProtocolError

    session = Session(shared.connect(), ConnectionOptions(codec="none"), reservation=64)
    with pytest.raises((PeerFailed, ProtocolError), match="position"):
        session.step(torch.randn(1, 64), [Chunk(1, 5, 1, 1)])
    session.close()


def test_a_session_larger_than_the_kv_memory_is_refused(
    node: DhtDirectory, shared: LocalSwarm, own_folder: Path
) -> None:
    with local_swarm(own_folder, [(0, 6)], kv_memory=100 * 6 * 2 * 2 * 16 * 4, node=node) as small:
        model = small.model()
        with pytest.raises(TooLongForPeers, match=r"hold .* at most: .*--kv-memory"):
            model.generate(prompt(), max_new_tokens=200, eos_token_id=None)
        # A session that fits is served, and closing it frees the memory.
        for _ in range(3):
            model.generate(prompt(), max_new_tokens=60, eos_token_id=None)


def test_missing_blocks_are_named(node: DhtDirectory, own_folder: Path) -> None:
    with (
        local_swarm(own_folder, [(0, 2), (5, 6)], node=node) as swarm,
        pytest.raises(CoverageError, match=r"blocks 2\.\.4 .*--blocks 2:5"),
    ):
        generate(swarm.model(), prompt())


@pytest.mark.full
def test_a_swarm_of_other_weights_is_named(shared: LocalSwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_cache, "ARRIVE_S", 0.0)
    other = LocalSwarm(random_checkpoint("llama", tmp_path, seed=9), peers=shared.peers)
    with other.newcomer() as visitor, pytest.raises(WrongSwarm, match="other weights"):
        generate(visitor.model(), prompt())


def test_a_peer_that_leaves_is_noticed_and_named(node: DhtDirectory, own_folder: Path) -> None:
    with local_swarm(own_folder, [(0, 3), (3, 6)], node=node) as swarm:
        model = swarm.model(recovery_timeout_s=0.5)
        with model.session():
            generate(model, prompt())
            swarm.peers[1].close()
            with pytest.raises(CoverageError, match=r"3\.\.5"):
                generate(model, prompt(8, seed=1))
        with pytest.raises(CoverageError, match=r"3\.\.5"):
            generate(model, prompt())


def _record_result_ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The boundaries of all results that reach clients."""
    ends: list[int] = []
    deliver = Session.deliver

    def spy(self: Session, source: Destination, message: object) -> None:
        if isinstance(message, Result):
            ends.append(message.end)
        deliver(self, source, message)  # pyright: ignore

    monkeypatch.setattr(Session, "deliver", spy)
    return ends


@pytest.mark.default_cases(columns=(1,))
@pytest.mark.parametrize("columns", [0, 1, 20])
def test_another_thread_can_close_a_session_in_use(shared: LocalSwarm, columns: int) -> None:
    """The session is closed while its route opens, at its first token, or in the middle of an answer."""
    model = shared.model()
    cache = model.new_cache()
    ids = prompt()
    options: dict[str, Any] = {**GREEDY, "max_new_tokens": 240, "attention_mask": torch.ones_like(ids), "cache": cache}
    with ThreadPoolExecutor(1) as pool:
        using = pool.submit(model.generate, ids, **options)
        while cache.session is None or cache.remote.columns < columns:
            assert not using.done()
        cache.close()
        with pytest.raises(SessionClosed):
            using.result(5)
    cache.close()
    with pytest.raises(SessionClosed):
        model(input_ids=ids, cache=cache, use_cache=True)
    deadline = time.monotonic() + 10
    while any(len(peer.service.sessions) for peer in shared.peers):
        assert time.monotonic() < deadline
