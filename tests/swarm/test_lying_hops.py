"""One peer claims to be the fastest and lies: beside honest peers, every text is right and the liar is banned."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peers.running_peer import RunningPeer
from peers.sessions import HopSession
from scheduler import liveness
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import PeerFailed
from splitnet.session import machine
from splitnet.session.inference import Session
from splitnet.wire.messages import Failure, FailureCode, Ping, Pong, Result, Step, Timing
from tests.swarm.generation import GREEDY, prompt
from tests.swarm.harness import SPANS, LocalSwarm, local_swarm

pytestmark = pytest.mark.swarm

HIDDEN = 64
MODEST_MS = 50.0
"""The time per block that honest peers publish."""

OPTIONS: dict[str, Any] = GREEDY | {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def company(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    """Two honest peers for every span, and a third that may lie; it always publishes the best speed."""
    with local_swarm(folder, SPANS * 3, node=node) as swarm:
        for peer in swarm.peers[:6]:
            claim(peer, MODEST_MS)
        yield swarm


def claim(peer: RunningPeer, block_ms: float) -> None:
    """Makes a peer publish this time per block, and an empty queue."""
    announcer: Any = peer._announcer

    def describe() -> Any:
        record = peer.record()
        speed = tuple(block_ms for _ in record.block_ms)
        return replace(record, block_ms=speed, queue_ms=0.0, batch=0.0, kv_free_positions=1 << 20, sessions=0)

    announcer.describe = describe
    announcer.publish()


Answer = Callable[[RunningPeer, HopSession, Step], None]


@contextmanager
def lying(peer: RunningPeer, answer: Answer, pong: Callable[[Ping], Pong] | None = None) -> Iterator[list[int]]:
    """A peer that publishes a time of zero, and gives a false answer to every step.

    Args:
        answer: gives the false answer.
        pong: makes the answers to pings; None: the true answers.

    Yields:
        The numbers of the steps sent to the peer.
    """
    service: Any = peer.service
    step, tell = service._step, service._pong
    met: list[int] = []

    def lie(source: Any, message: Step, now: float) -> None:
        session = service.sessions.get(message.session)
        if session is None or message.epoch != session.epoch:
            step(source, message, now)
            return
        met.append(message.number)
        answer(peer, session, message)

    service._step = lie
    if pong is not None:
        service._pong = lambda source, ping, _: service.outbox.send(source, pong(ping))
    claim(peer, 0.0)
    try:
        yield met
    finally:
        service._step, service._pong = step, tell
        claim(peer, MODEST_MS)


def send(peer: RunningPeer, to: Any, message: Any) -> None:
    service: Any = peer.service
    service.outbox.send(to, message)


def fails(code: FailureCode) -> Answer:
    def answer(peer: RunningPeer, session: HopSession, step: Step) -> None:
        send(peer, session.reply_to, Failure(session.id, step.epoch, step.number, code, "\x1b[31mno"))

    return answer


def answers(unit: bytes, count: int | None = None, codec: int | None = None) -> Answer:
    """Answers with values that all are `unit`; `count` values, or the right number."""

    def answer(peer: RunningPeer, session: HopSession, step: Step) -> None:
        named = session.codec.code if codec is None else codec
        if step.replay_until and session.end >= step.replay_until:
            send(peer, session.reply_to, Result(session.id, step.epoch, step.number, session.end, named, ()))
        elif session.next is not None:
            body = unit * (step.positions * HIDDEN if count is None else count)
            onward = replace(step, codec=named, payload=body, boundary=session.end)
            send(peer, session.next, onward)
        else:
            kept = sum(part.keep for part in step.parts)
            body = unit * (kept * HIDDEN if count is None else count)
            send(peer, session.reply_to, Result(session.id, step.epoch, step.number, session.end, named, (), body))

    return answer


def swallows(*_: Any) -> None:
    pass


LIES: dict[str, Answer] = {
    "internal": fails(FailureCode.INTERNAL),
    "too long": fails(FailureCode.TOO_LONG),
    "wrong model": fails(FailureCode.WRONG_MODEL),
    "bad message": fails(FailureCode.BAD_MESSAGE),
    "no session": fails(FailureCode.UNKNOWN_SESSION),
    "short": answers(b"x", count=10),
    "codec": answers(bytes(4), codec=99),
    "nan": answers(b"\x00\x00\xc0\x7f"),
    "inf": answers(b"\x00\x00\x80\x7f"),
    "swallows": swallows,
}


@pytest.mark.default_cases(index=(1,), lie=("internal", "nan"))
@pytest.mark.default_cases(index=(0,), lie=("codec",))
@pytest.mark.default_cases(index=(2,), lie=("too long",))
@pytest.mark.parametrize("index", range(3), ids=["head", "middle", "tail"])
@pytest.mark.parametrize("lie", LIES)
def test_a_liar_beside_honest_peers_is_replaced(
    company: LocalSwarm, local: Any, monkeypatch: pytest.MonkeyPatch, index: int, lie: str
) -> None:
    monkeypatch.setattr(liveness, "MAX_SILENCE_S", 0.5)
    liar = company.peers[6 + index]
    expected = local.generate(**prompt(), **OPTIONS)
    with company.newcomer() as visitor, lying(liar, LIES[lie]) as met:
        model = visitor.model()
        began = time.monotonic()
        assert torch.equal(model.generate(**prompt(), **OPTIONS), expected)
        assert time.monotonic() - began < 30.0
        assert met
        assert model.swarm.bans.keys() >= {liar.identity.public.text}
        met.clear()
        assert torch.equal(model.generate(**prompt(), **OPTIONS), expected)
        assert not met


def test_a_liar_that_reports_progress_is_replaced(
    company: LocalSwarm, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "MAX_SILENCE_S", 0.5)
    monkeypatch.setattr(machine, "DECODE_PROGRESS_S", 1.5)
    done = iter(range(1, 1 << 20))

    def pong(ping: Ping) -> Pong:
        return Pong(
            ping.nonce, 0.0, 1 << 40, waiting=1 if ping.session else 0, done=next(done), holds=bool(ping.session)
        )

    expected = local.generate(**prompt(), **OPTIONS)
    with company.newcomer() as visitor, lying(company.peers[7], swallows, pong) as met:
        model = visitor.model()
        began = time.monotonic()
        assert torch.equal(model.generate(**prompt(), **OPTIONS), expected)
        assert time.monotonic() - began < 30.0
        assert met
        assert model.swarm.bans.keys() >= {company.peers[7].identity.public.text}


@pytest.mark.default_cases(index=(1,))
@pytest.mark.parametrize("index", range(3), ids=["head", "middle", "tail"])
def test_messages_of_a_replaced_hop_change_nothing(company: LocalSwarm, local: Any, index: int) -> None:
    liar = company.peers[6 + index]
    clients: dict[bytes, Any] = {}
    stop = threading.Event()

    def snipe() -> None:
        for turn in range(1 << 20):
            if stop.wait(0.003):
                return
            for session, client in list(clients.items()):
                epoch, number = 2 + turn % 4, turn // 4 % 50
                for code in (FailureCode.INTERNAL, FailureCode.LEAVING):
                    send(liar, client, Failure(session, epoch, 0, code, "killed by a hop that was replaced"))
                send(liar, client, Failure(session, epoch, number, FailureCode.INTERNAL, "no"))
                send(liar, client, Result(session, epoch, number, 6, 0, (), bytes(4 * HIDDEN)))

    def answer(peer: RunningPeer, session: HopSession, step: Step) -> None:
        clients[session.id] = session.reply_to
        send(peer, session.reply_to, Failure(session.id, step.epoch, step.number, FailureCode.INTERNAL, "no"))

    sniper = threading.Thread(target=snipe)
    with company.newcomer() as visitor, lying(liar, answer) as met:
        model = visitor.model()
        sniper.start()
        try:
            with model.session() as cache:
                got = model.generate(**prompt(), **GREEDY)
                assert cache.session is not None
                causes = [repair.cause for repair in cache.session.recoveries]
                assert [cause for cause in causes if cause != "better_route"] == ["lost"]
        finally:
            stop.set()
            sniper.join()
    assert met and clients
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))


class Rewriting:
    """An outbox that forges the measurements of earlier hops."""

    def __init__(self, outbox: Any) -> None:
        self._outbox = outbox

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outbox, name)

    def send(self, destination: Any, message: Any) -> None:
        if isinstance(message, Result):
            hour = Timing(3600 * 10**6, 3600 * 10**6, 3600 * 10**6)
            message = replace(message, timings=(*(hour for _ in message.timings[:-1]), message.timings[-1]))
        self._outbox.send(destination, message)


def test_measurements_of_other_hops_from_the_tail_are_ignored(
    company: LocalSwarm, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar: Any = company.peers[8]
    monkeypatch.setattr(liar.service.outputs, "outbox", Rewriting(liar.service.outbox))
    with company.newcomer() as visitor, lying(liar, swallows):
        liar.service._step = type(liar.service)._step.__get__(liar.service)
        model = visitor.model()
        measurements = model.swarm.measurements
        with model.session() as cache:
            assert torch.equal(model.generate(**prompt(), **GREEDY), local.generate(**prompt(), **GREEDY))
            assert isinstance(cache.session, Session)
            names = [hop.name for hop in cache.session.hops]
            assert names[2] == liar.identity.public.text
            assert max(timing.wait_us for timing in cache.session.timings) >= 3600 * 10**6
        until = time.monotonic() + 10.0
        while not set(names) <= measurements._hops.keys() and time.monotonic() < until:
            time.sleep(0.01)
        # Every hop is measured by its own reports.
        assert set(names) <= measurements._hops.keys()
        for seen in measurements._hops.values():
            assert max(seen.wait_ms) < 10_000 and max(seen.block_ms) < 10_000
        assert all(rtt_ms < 10_000 for _, rtt_ms in measurements._links.values())


def test_a_liar_without_a_replacement_ends_the_answer(own_folder: Path, node: DhtDirectory) -> None:
    with local_swarm(own_folder, SPANS, node=node) as swarm, lying(swarm.peers[1], LIES["nan"]) as met:
        with pytest.raises(PeerFailed, match="not finite"):
            swarm.model().generate(**prompt(), **OPTIONS)
        assert met.count(met[0]) == 3
