"""A client's links stay open while a session uses them, are bounded in number, and close from any thread."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator

import pytest

from splitnet.errors import PeerLost, SplitnetError
from splitnet.security.identity import Identity
from splitnet.swarm import client_links as links_module
from splitnet.swarm.client_links import Links
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.messages import Close, Message, Open, Ping

MOST = 8
WAIT_S = 20.0


class FakeSession:
    """A session that records link failures."""

    def __init__(self, links: Links, number: int = 1) -> None:
        self.id = bytes([number]) * 16
        self.failures: queue.Queue[tuple[Endpoint, SplitnetError]] = queue.Queue()
        self.closed = threading.Event()
        self._links = links
        links.register(self)

    def open(self, endpoint: Endpoint) -> int:
        return self._links.send(endpoint, Open(self.id, 1, "model", 0, 2, 8, 0, b"", b"", ""))

    def deliver(self, source: Endpoint, message: Message) -> None: ...

    def link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None:
        self.failures.put((endpoint, error))

    def close(self) -> None:
        self._links.unregister(self)
        self.closed.set()


@pytest.fixture
def links() -> Iterator[Links]:
    links = Links(Identity.generate(), most=MOST)
    try:
        yield links
    finally:
        links.close()


KEY = Identity.generate().public


def peer(number: int = 0) -> Endpoint:
    """An endpoint at a port without a listener."""
    return Endpoint(f"tcp://127.0.0.1:{1 + number}", KEY)


def open_links(links: Links) -> set[Endpoint]:
    """The open links, once the transport's thread has handled all earlier messages."""
    done = threading.Event()
    on_tick = links._transport.on_tick

    def tick() -> None:
        assert on_tick is not None
        on_tick()
        done.set()

    links._transport.on_tick = tick
    assert done.wait(WAIT_S)
    links._transport.on_tick = on_tick
    return set(links._transport._links)


def test_a_link_is_in_use_until_its_last_session_closes(links: Links) -> None:
    first, second = FakeSession(links), FakeSession(links, 2)
    for session in (first, second):
        session.open(peer())
        session.open(peer())
    assert links.pool.in_use == [peer()]
    links.send(peer(), Close(first.id))
    links.send(peer(), Close(first.id))
    assert links.pool.in_use == [peer()]
    second.close()
    assert links.pool.in_use == []
    assert open_links(links) == {peer()}, "the next session finds it open"


def test_the_pool_learns_that_a_link_is_up(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Endpoint] = []
    monkeypatch.setattr(links.pool, "restart_idle_time", told.append)
    links._link_changed(peer(), LinkState.UP)
    assert told == [peer()]


def test_a_closed_session_uses_no_link(links: Links) -> None:
    session = FakeSession(links)
    session.close()
    session.open(peer())
    links.send(peer(), Close(session.id))
    assert links.pool.in_use == []


def test_unused_links_are_closed_for_new_links(links: Links) -> None:
    session = FakeSession(links)
    session.open(peer())
    for number in range(1, 4 * MOST):
        links.send(peer(number), Ping(number))
    remaining = open_links(links)
    assert len(remaining) == MOST and {peer(), peer(4 * MOST - 1)} <= remaining


def test_a_session_gets_an_error_when_all_links_are_in_use(links: Links) -> None:
    session = FakeSession(links)
    assert all(session.open(peer(number)) for number in range(MOST))
    assert session.open(peer(MOST)) == 0
    failed: list[SplitnetError] = []
    while not failed:
        endpoint, error = session.failures.get(timeout=WAIT_S)
        # The links to the other peers fail, because their ports have no listener.
        failed += [error] if endpoint == peer(MOST) else []
    assert isinstance(failed[0], PeerLost) and f"{MOST} links in use" in str(failed[0])
    assert links.send(peer(MOST), Ping(1)) == 0
    assert peer(MOST) not in open_links(links)
    links.send(peer(), Close(session.id))
    assert session.open(peer(MOST)) > 0


def test_a_session_gets_an_error_for_a_message_that_cannot_be_sent(links: Links) -> None:
    session = FakeSession(links)
    nowhere = Endpoint("tcp://nowhere", KEY)
    session.open(nowhere)
    endpoint, error = session.failures.get(timeout=WAIT_S)
    assert endpoint == nowhere and isinstance(error, PeerLost)


def test_a_lost_link_is_closed_and_stays_known_as_down(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession(links)
    session.open(peer())
    assert isinstance(session.failures.get(timeout=WAIT_S)[1], PeerLost)
    session.close()
    links.pool.keep_unreached_s = 0.1
    assert any(not open_links(links) for _ in range(50))
    assert links.link_state(peer()) is LinkState.DOWN


@pytest.mark.full
def test_a_thousand_peers_that_come_and_go_take_few_descriptors() -> None:
    links = Links(Identity.generate())
    try:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(1000):
            links.send(peer(number), Ping(number))
            if number % 50 == 0:
                open_links(links)
        assert len(open_links(links)) == len(links) == links_module.MAX_LINKS
        assert len(os.listdir("/proc/self/fd")) - before <= 4 * links_module.MAX_LINKS
    finally:
        links.close()


def test_close_later_works_while_the_caller_holds_a_lock_of_the_transport(links: Links) -> None:
    session = FakeSession(links)
    # The garbage collector may run while its thread holds these locks.
    with links._transport._outbox.lock, links._lock, links.pool._lock:
        links.close_later(session)
    assert session.closed.wait(WAIT_S)


def test_a_session_that_fails_to_close_does_not_keep_other_sessions_open(links: Links) -> None:
    class Broken(FakeSession):
        def close(self) -> None:
            raise RuntimeError("cannot be closed")

    broken, session = Broken(links), FakeSession(links, 2)
    links.close_later(broken)
    links.close_later(session)
    assert session.closed.wait(WAIT_S)
    links.unregister(broken)
