"""Faults along the route of a session, with honest peers: no token of the text is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peers import engine
from peers.engine import Engine
from peers.running_peer import RunningPeer
from scheduler import liveness
from scheduler.speculation import Window
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import PeerBusy, PeerLost
from splitnet.session.inference import Session
from splitnet.wire.endpoints import LinkState
from splitnet.wire.messages import Step, decode
from tests.swarm.adapters import lora, wrapped
from tests.swarm.generation import GREEDY, force_window, prompt
from tests.swarm.harness import SPANS, LocalSwarm, local_swarm, repairs
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def thirds(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    """A peer for every span."""
    with local_swarm(folder, SPANS, node=node) as swarm:
        yield swarm


@pytest.fixture
def swarm(thirds: LocalSwarm) -> Iterator[LocalSwarm]:
    """The same peers for a new client."""
    with thirds.newcomer() as swarm:
        yield swarm


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with a context of 1,024 positions."""
    return random_checkpoint("llama", tmp_path_factory.mktemp("long"), blocks=2, max_position_embeddings=1024, seed=5)


@pytest.fixture(scope="module")
def long_local(long_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(long_folder, dtype=torch.float32).eval()


def test_a_failing_effect_does_not_prevent_other_effects(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The route is planned again although the ban of the lost hop fails, so that the wait ends."""
    model, ids = swarm.model(), prompt()["input_ids"]
    cache = model.new_cache()
    expected = model.step(ids, cache).logits
    cache.remote.crop(-1)
    session = cache.session
    assert isinstance(session, Session)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(swarm.client.links, "send", lambda *_: 0)  # no hop gets the step, so the request waits
        sent = model.send_tokens(ids[:, -1:], cache)
        patch.setattr(swarm.client, "ban", fails)
        with pytest.raises(OSError, match="no room"):
            session.link_failed(session.hops[1].endpoint, PeerLost("the link is lost"))
    assert session._asked, "no route is asked for"
    logits = model.receive_outputs(sent, ids[:, -1:], cache).logits
    assert torch.allclose(logits[-1], expected[-1], atol=1e-4)
    cache.close()


def forget(peers: Sequence[RunningPeer]) -> None:
    """Drops all sessions of the peers, as after ten idle minutes."""
    for peer in peers:
        for session in list(peer.service.sessions):
            peer.service.sessions.remove(session)


def generated(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    options: dict[str, Any] = GREEDY | more
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def feed(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The logits after the last of these tokens."""
    with torch.no_grad():
        return model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[0, -1]


def follows(local: Any, ids: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether these are the logits after a text."""
    with torch.no_grad():
        return torch.allclose(logits, local(ids).logits[0, -1], atol=1e-4)


@pytest.mark.default_cases(lost=((0, 1, 2),))
@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_a_lora_is_loaded_again_when_hops_lose_the_session(
    swarm: LocalSwarm, folder: Path, lost: tuple[int, ...]
) -> None:
    ids = prompt(7)["input_ids"]
    tuned: Any = wrapped(AutoModelForCausalLM.from_pretrained(folder), lora())
    model = swarm.model()
    remote: Any = wrapped(model, lora())
    with model.session(max_length=120) as cache:
        first = generated(remote, ids)
        assert torch.equal(first, generated(tuned, ids))
        assert cache.session is not None
        route = [hop.name for hop in cache.session.hops]
        forget([swarm.peers[index] for index in lost])
        longer = torch.cat((first, prompt(3)["input_ids"]), dim=1)
        assert torch.equal(generated(remote, longer), generated(tuned, longer))
        # All hops have behaved correctly, so none is replaced.
        assert [hop.name for hop in cache.session.hops] == route
        assert [repair.cause for repair in cache.session.recoveries] == ["session_lost"]
    assert not model.swarm.bans.keys()


@pytest.mark.default_cases(index=(1,))
@pytest.mark.parametrize("index", [0, 1])
def test_a_lost_message_is_repaired_while_peers_are_busy_with_other_sessions(
    swarm: LocalSwarm, local: Any, index: int
) -> None:
    model = swarm.model()
    sender: Any = swarm.peers[index].transport
    send, lost = sender.send, threading.Event()

    def lossy(to: Any, frames: Any) -> Any:
        message = decode(frames)
        assert isinstance(cache.session, Session)
        if isinstance(message, Step) and message.session == cache.session.id and not lost.is_set():
            lost.set()
            return None
        return send(to, frames)

    stop = threading.Event()

    def others() -> None:
        other, inputs = swarm.model(), prompt(60, batch=8)
        with torch.no_grad():
            while not stop.is_set():
                other(**inputs)

    ids = prompt()["input_ids"]
    with model.session() as cache:
        feed(model, ids[:, :-1], cache)
        busy = threading.Thread(target=others)
        busy.start()
        try:
            sender.send = lossy
            began = time.monotonic()
            logits = feed(model, ids[:, -1:], cache)
            took_s = time.monotonic() - began
        finally:
            sender.send = send
            stop.set()
            busy.join()
        assert cache.session is not None and lost.is_set()
        assert [repair.cause for repair in cache.session.recoveries] == ["stalled"]
    assert follows(local, ids, logits)
    assert took_s < 20.0  # The default limit is two minutes.
    assert not model.swarm.bans.keys()


PAUSE_S = 0.3
"""Additional time of each pass of a slow peer."""

PROGRESS_S = 1.2
"""Replaces the default of two minutes."""


def slow_passes(monkeypatch: pytest.MonkeyPatch, least: int) -> list[int]:
    """Slows down passes of at least `least` positions, and records them."""
    run, ran = Engine._pass, []

    def slow(self: Engine, ready: Any) -> None:
        positions = sum(count for _, count in ready)
        if positions >= least:
            ran.append(positions)
            time.sleep(PAUSE_S)
        run(self, ready)

    monkeypatch.setattr(Engine, "_pass", slow)
    return ran


def be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Session.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Session.__init__.__kwdefaults__, "progress_timeout_s", PROGRESS_S)
    monkeypatch.setattr(liveness, "MAX_SILENCE_S", 0.3)


def test_a_prefill_with_progress_may_take_any_time(
    swarm: LocalSwarm, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_impatient(monkeypatch)
    monkeypatch.setattr(Session, "step_positions", lambda *_: 16)
    ran = slow_passes(monkeypatch, 2)
    ids = prompt(160)["input_ids"]
    got = generated(swarm.model(), ids, max_new_tokens=2)
    assert len(ran) * PAUSE_S > 2 * PROGRESS_S
    assert torch.equal(got, generated(local, ids, max_new_tokens=2))


@pytest.mark.full
def test_a_long_step_with_progress_may_take_any_time(
    long_folder: Path, long_local: Any, node: DhtDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in one step, then its replay: no output arrives before the step is complete."""
    be_impatient(monkeypatch)
    monkeypatch.setattr(Session, "step_positions", lambda _, positions, *__: positions)
    monkeypatch.setattr(engine, "PASS_POSITIONS", 64)
    ids = prompt(600)["input_ids"]
    with local_swarm(long_folder, [(0, 1), (1, 2), (1, 2)], node=node) as swarm:
        model = swarm.model()
        with model.session(max_length=800) as cache:
            ran = slow_passes(monkeypatch, 20)
            feed(model, ids[:, :-1], cache)
            assert len(ran) * PAUSE_S > 2 * PROGRESS_S
            assert cache.session is not None and not cache.session.recoveries
            ran.clear()
            used = cache.session.hops[1].endpoint
            next(peer for peer in swarm.peers if peer.endpoint == used).close()
            logits = feed(model, ids[:, -1:], cache)
            assert len(ran) * PAUSE_S > 2 * PROGRESS_S
            assert len(repairs(cache.session)) == 1
            assert cache.session.hops[1].endpoint != used
    assert follows(long_local, ids, logits)


@pytest.mark.default_cases(limit=({"max_new_tokens": 60},))
@pytest.mark.parametrize("limit", [{"max_new_tokens": 60}, {"max_new_tokens": None, "max_length": 260}], ids=str)
def test_memory_is_extended_while_drafts_are_in_flight(
    long_folder: Path, long_local: Any, node: DhtDirectory, monkeypatch: pytest.MonkeyPatch, limit: dict[str, Any]
) -> None:
    force_window(monkeypatch, Window(3, 4))
    ids = prompt(200)["input_ids"]
    with local_swarm(long_folder, [(0, 1), (1, 2)], node=node) as swarm:
        model = swarm.model()
        with model.session() as cache:
            generated(model, ids[:, :100], max_new_tokens=2)
            assert isinstance(cache.session, Session)
            reservation = cache.session.state.reservation
            got = generated(model, ids, speculate=long_local, **limit)
            assert cache.session.state.reservation > reservation
            assert not cache.session.recoveries
    assert torch.equal(got, generated(long_local, ids, **limit))


@pytest.mark.default_cases(rewinds=(True,))
@pytest.mark.parametrize("rewinds", [True, False])
def test_a_relay_log_is_not_replayed_in_place_of_pushed_steps(
    folder: Path, local: Any, node: DhtDirectory, rewinds: bool
) -> None:
    """The first hop cannot reach the next one, then can, then cannot; each time the next hop is lost."""
    with local_swarm(folder, [(0, 3), (3, 6), (3, 6)], node=node) as swarm:
        model = swarm.model()
        links: Any = swarm.peers[0].service._hops._links
        acquire, apart = links.acquire, [True]
        links.acquire = lambda endpoint: not apart[0] and acquire(endpoint)

        def lose_the_tail() -> None:
            assert cache.session is not None
            model.swarm.bans._bans.clear()
            model.swarm.links._link_changed(cache.session.hops[1].endpoint, LinkState.DOWN)

        one, two, three = prompt(20)["input_ids"], prompt(28)["input_ids"][:, 20:], prompt(32)["input_ids"][:, 28:]
        with model.session(max_length=100) as cache:
            feed(model, one, cache)
            assert cache.session is not None and cache.session.hops[0].relayed
            apart[0] = False
            lose_the_tail()
            if rewinds:
                cache.crop(-8)
            text = torch.cat((one[:, :12] if rewinds else one, two), dim=1)
            assert follows(local, text, feed(model, two, cache))
            assert not cache.session.hops[0].relayed
            apart[0] = True
            lose_the_tail()
            text = torch.cat((text, three), dim=1)
            assert follows(local, text, feed(model, three, cache))
            assert cache.session.hops[0].relayed


def test_a_text_without_memory_fails_each_time(long_folder: Path, long_local: Any, node: DhtDirectory) -> None:
    with local_swarm(long_folder, [(0, 2)], node=node, kv_memory=2 * 256 * 300) as swarm:  # Memory for 300 positions.
        model = swarm.model()
        ids = prompt(100)["input_ids"]
        with model.session():
            first = generated(model, ids, max_new_tokens=20)
            longer = torch.cat((first, prompt(150)["input_ids"]), dim=1)
            for _ in range(3):
                with pytest.raises(PeerBusy):
                    generated(model, longer, max_new_tokens=100)
            # A text that fits continues from the held positions.
            shorter = longer[:, :200]
            assert torch.equal(generated(model, shorter), generated(long_local, shorter))


def test_a_peer_without_memory_for_a_long_text_serves_short_texts(
    long_folder: Path, long_local: Any, node: DhtDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_swarm(long_folder, [(0, 2)], node=node) as swarm:
        peer = swarm.peers[0]
        model, sessions = swarm.model(recovery_timeout_s=1.0), peer.service.sessions
        span, forward, free = peer.span, peer.span.forward, sessions.free_positions

        def short(hidden: torch.Tensor, parts: Sequence[Any], *given: Any) -> torch.Tensor:
            if any(part.start + part.count > 64 for part in parts):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            return forward(hidden, parts, *given)

        monkeypatch.setattr(span, "forward", short)
        with pytest.raises(PeerBusy, match="memory"):
            generated(model, prompt(400)["input_ids"])
        assert 0 < sessions.free_positions < free
        ids = prompt(20)["input_ids"]
        assert torch.equal(generated(model, ids), generated(long_local, ids))
