"""The peers that a client knows, and keeps while the directory does not answer."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any, cast

import pytest

from splitnet.directory.record import PeerRecord
from splitnet.errors import DirectoryError
from splitnet.security.identity import Identity
from splitnet.swarm import peer_cache
from splitnet.swarm.peer_cache import PeerCache
from splitnet.wire.endpoints import Endpoint, LinkState
from tests.unit.swarm.test_swarm import FACTS, RECORD

WAIT_S = 20.0


class FakeDirectory:
    """Returns the records that a test puts in, or does not answer."""

    def __init__(self) -> None:
        self.records: list[PeerRecord] = []
        self.silent = False
        self.asked = 0
        self.is_asked = threading.Event()
        self.answers = threading.Event()
        self.answers.set()

    def peers(self, model: str) -> list[PeerRecord]:
        self.asked += 1
        self.is_asked.set()
        assert self.answers.wait(WAIT_S)
        if self.silent:
            raise DirectoryError("The DHT did not answer.")
        return self.records

    def models(self) -> dict[str, str]:
        if self.silent:
            raise DirectoryError("The DHT did not answer.")
        return {}


class Client:
    """The peers known to a client, with a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = FakeDirectory()
        self.states: dict[Endpoint, LinkState] = {}
        self.now = time.time()
        monkeypatch.setattr(peer_cache.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(peer_cache.time, "time", lambda: self.now)
        self.known = PeerCache(
            cast(Any, self.directory),
            FACTS.fingerprint,
            FACTS.name,
            self,
        )

    def link_state(self, endpoint: Endpoint) -> LinkState:
        """The state of the client's link to a peer."""
        return self.states.get(endpoint, LinkState.CONNECTING)

    def served(self, ttl_s: float = 60.0) -> PeerRecord:
        key = Identity.generate().public
        record = dataclasses.replace(RECORD, key=key, issued_at=self.now, ttl_s=ttl_s)
        self.directory.records = [*self.directory.records, record]
        return record


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(monkeypatch)


def test_the_last_records_count_until_they_expire_while_the_directory_is_silent(client: Client) -> None:
    short, long = client.served(ttl_s=30.0), client.served(ttl_s=120.0)
    assert client.known.refresh() == [short, long]
    client.directory.silent = True
    client.now += 20
    assert client.known.refresh() == client.known.refresh(fresh=True) == [short, long]
    client.now += 20
    assert client.known.refresh(fresh=True) == [long]
    client.now += 100
    with pytest.raises(DirectoryError):
        client.known.refresh()


def test_a_connected_peer_counts_after_its_record_has_expired(client: Client) -> None:
    connected, _ = client.served(), client.served()
    client.known.refresh()
    client.states[connected.endpoint] = LinkState.UP
    client.directory.silent = True
    client.now += 1000
    assert client.known.refresh() == [connected]
    client.states[connected.endpoint] = LinkState.DOWN
    client.now += 1000
    with pytest.raises(DirectoryError):
        client.known.refresh()


def test_a_silent_directory_is_logged_once_and_asked_seldom(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    record = client.served(ttl_s=300.0)
    client.known.refresh()
    client.directory.silent = True
    for _ in range(10):
        client.now += 3
        assert client.known.refresh(fresh=True) == [record]
    assert client.directory.asked == 1 + 3
    assert len(caplog.records) == 1 and "the 1 known peers" in caplog.text
    client.directory.silent = False
    other = client.served()
    client.now += 11
    assert client.known.refresh() == [record, other]
    assert client.known.refresh(fresh=True) and client.directory.asked == 6
    client.directory.silent = True
    client.known.refresh(fresh=True)
    assert len(caplog.records) == 2, "another outage is told again"


def test_recent_records_are_used_without_asking_the_directory(client: Client) -> None:
    client.served()
    client.known.refresh()
    client.now += 19
    client.known.refresh()
    assert client.directory.asked == 1
    client.now += 2
    client.known.refresh()
    assert client.directory.asked == 2


def test_only_one_thread_waits_for_a_silent_directory(client: Client) -> None:
    record = client.served(ttl_s=300.0)
    client.known.refresh()
    client.directory.silent = True
    client.now += 21
    client.known.refresh()
    client.now += 11
    client.directory.answers.clear()
    client.directory.is_asked.clear()
    waiting = threading.Thread(target=client.known.refresh)
    waiting.start()
    assert client.directory.is_asked.wait(WAIT_S)
    try:
        assert client.known.refresh() == client.known.refresh(fresh=True) == [record]
        assert client.directory.asked == 3
    finally:
        client.directory.answers.set()
        waiting.join(WAIT_S)


def test_without_records_a_silent_directory_is_an_error(client: Client) -> None:
    client.directory.silent = True
    for _ in range(2):
        with pytest.raises(DirectoryError):
            client.known.refresh()


@pytest.mark.parametrize(("count", "look_s"), [(1, 10.0), (32, 10.0), (64, 20.0), (96, 20.0), (200, 20.0)])
def test_the_directory_of_a_large_swarm_is_asked_less_often(client: Client, count: int, look_s: float) -> None:
    record = client.served(ttl_s=300.0)
    client.directory.records = [record] * count
    client.known.refresh()
    assert client.known.look_s == look_s
    soonest_s = min(10.0, look_s - 5.0)
    client.now += soonest_s - 0.1
    assert not client.known.is_old
    client.now += 0.2
    assert client.known.is_old, "else it were too old to plan with before the next look"
    client.now += look_s + 9.8 - soonest_s
    client.known.refresh()
    assert client.directory.asked == 1, "not yet too old to plan with"
    client.now += 0.2
    client.known.refresh()
    assert client.directory.asked == 2
