"""How a client uses the records of the directory."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.cost import Encoding
from scheduler.facts import Link
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.record import PeerRecord
from splitnet.errors import CoverageError, PeerBusy, ProtocolVersionError, WrongSwarm
from splitnet.security.identity import Identity
from splitnet.swarm import measure as measurer
from splitnet.swarm import peer_cache
from splitnet.swarm.client_links import Links
from splitnet.swarm.plan import Needs
from splitnet.swarm.swarm import KEPT_EVENTS, EventLog, ModelFacts, Swarm
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.messages import PROTOCOL_VERSION, Message, Ping, Pong, decode, encode

NEEDS = Needs(kv_positions=10, encodings=(Encoding("int8", 66),), blocks=(0, 6))
FACTS = ModelFacts("ab" * 32, "a-model", num_blocks=6, hidden_size=64, max_positions=256)
RECORD = PeerRecord(
    key=Identity.generate().public,
    model=FACTS.fingerprint,
    model_name=FACTS.name,
    # The discard port has no listener on this machine, so the link stays unmeasured.
    address="tcp://127.0.0.1:9",
    start=0,
    end=6,
    num_blocks=6,
    protocol=PROTOCOL_VERSION,
    codecs=("none", "int8"),
    device="cpu",
    dtype="float32",
    block_ms=(1.0, 1.0, 1.6, 6.4, 25.6),
    queue_ms=0.0,
    batch=0.0,
    kv_free_positions=1000,
    sessions=0,
    max_blocks=0,
    placed_at=time.time(),
    moving_to=None,
    serves=True,
    coordinate=(0.0, 0.0, 0.0, 0.01),
    coordinate_error=1.0,
    bytes_per_ms=0.0,
    links=(),
    version="0.2.0",
    issued_at=time.time(),
)


class FakeDirectory:
    """A directory with the records that a test puts in."""

    def __init__(self) -> None:
        self.records: list[PeerRecord] = []
        self.names: dict[str, str] = {}
        self.lookups = 0
        self.states: dict[Endpoint, LinkState] = {}

    def peers(self, model: str) -> list[PeerRecord]:
        self.lookups += 1
        return self.records

    def models(self) -> dict[str, str]:
        return self.names

    def close(self) -> None:
        pass


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> FakeDirectory:
    fake = FakeDirectory()
    monkeypatch.setattr(DhtDirectory, "start", lambda **_: fake)
    monkeypatch.setattr(measurer, "ANSWER_S", 0.0)
    monkeypatch.setattr(Links, "link_state", lambda self, endpoint: fake.states.get(endpoint, LinkState.CONNECTING))
    return fake


@pytest.fixture
def swarm(directory: FakeDirectory) -> Iterator[Swarm]:
    with Swarm(FACTS, ["/an/address"]) as swarm:
        yield swarm


def served(**changes: object) -> PeerRecord:
    return dataclasses.replace(RECORD, key=Identity.generate().public, **changes)  # pyright: ignore[reportArgumentType]


def test_a_ping_asks_about_a_session(swarm: Swarm, directory: FakeDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.records = [served()]
    peer = directory.records[0].endpoint
    swarm.peers()
    sent: list[Message] = []
    monkeypatch.setattr(swarm.links._transport, "send", lambda _, frames: sent.append(decode(frames)))
    answer = swarm.ping(peer, bytes(range(16)))
    [ping] = [message for message in sent if isinstance(message, Ping)]
    assert ping.session == bytes(range(16))
    swarm.links._receive_message(peer, encode(Pong(ping.nonce, 1.0, 2, 3, 4, True)))
    assert answer.result().holds
    assert (answer.result().waiting, answer.result().done) == (3, 4)


def test_a_client_that_has_planned_reads_the_directory_in_the_background(
    directory: FakeDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next session need not wait for the directory."""
    monkeypatch.setattr(peer_cache, "LOOK_S", 0.01)
    directory.records = [served(start=0, end=FACTS.num_blocks)]
    with Swarm(FACTS, ["/an/address"]) as swarm:
        swarm.measurer._look.wait(0.1)
        assert not directory.lookups, "it has not been used yet"
        swarm.plan_route(NEEDS)
        deadline = time.monotonic() + 20
        while directory.lookups < 3 and time.monotonic() < deadline:
            swarm.measurer._closing.wait(0.01)
        assert directory.lookups >= 3
        assert swarm.measurer.news == 0


def test_newer_peers_require_a_newer_client(swarm: Swarm, directory: FakeDirectory) -> None:
    directory.records = [served(protocol=PROTOCOL_VERSION + 1)]
    with pytest.raises(ProtocolVersionError, match="upgrade this client"):
        swarm.peers()


def test_older_peers_must_be_upgraded(swarm: Swarm, directory: FakeDirectory) -> None:
    directory.records = [served(protocol=PROTOCOL_VERSION - 1)]
    with pytest.raises(ProtocolVersionError, match="upgrade the peers"):
        swarm.peers()


def test_peers_of_another_version_are_left_out(swarm: Swarm, directory: FakeDirectory) -> None:
    spoken = served()
    directory.records = [served(protocol=PROTOCOL_VERSION + 1), spoken]
    assert swarm.peers() == [spoken]


def test_a_swarm_without_records_of_the_model_is_named(
    swarm: Swarm, directory: FakeDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_cache, "ARRIVE_S", 0.0)
    directory.names = {"cd" * 32: "another-model"}
    with pytest.raises(WrongSwarm, match="another-model"):
        swarm.peers()
    directory.names[FACTS.fingerprint] = FACTS.name
    assert swarm.peers() == [], "then the missing blocks are named"


def test_a_client_waits_for_records_of_its_model(
    swarm: Swarm, directory: FakeDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peer_cache, "ARRIVE_LOOK_S", 0.0)
    directory.names = {"cd" * 32: "another-model"}
    record = served()
    monkeypatch.setattr(directory, "peers", lambda model: [record] if len(asked) > 2 else asked.append(model) or [])
    asked: list[str] = []
    assert swarm.peers() == [record]
    assert sum("only of another-model: waiting" in each.message for each in caplog.records) == 1


def test_records_are_looked_up_once_for_a_while(swarm: Swarm, directory: FakeDirectory) -> None:
    directory.records = [served()]
    swarm.peers()
    swarm.peers()
    assert directory.lookups == 1
    swarm.peers(fresh=True)
    assert directory.lookups == 2


def test_missing_blocks_are_named_by_their_number_in_the_model(swarm: Swarm, directory: FakeDirectory) -> None:
    directory.records = [served(start=0, end=3), served(start=5, end=6)]
    with pytest.raises(CoverageError, match=r"blocks 3\.\.4 .*--blocks 3:5"):
        swarm.plan_route(NEEDS, blocks=(2, 6))


def test_peers_without_memory_are_busy(swarm: Swarm, directory: FakeDirectory) -> None:
    directory.records = [served(kv_free_positions=5)]
    with pytest.raises(PeerBusy, match=r"blocks 0\.\.5"):
        swarm.plan_route(NEEDS)


def test_banned_and_lost_peers_are_tried_again(
    swarm: Swarm, directory: FakeDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    banned, silent, lost, _ = directory.records = [served() for _ in range(4)]
    directory.states[lost.endpoint] = LinkState.DOWN
    for record in (banned, silent):
        swarm.ban(record.key.text, seconds=60)
    tried: list[Endpoint] = []

    def measure(endpoints: Iterable[Endpoint], timeout_s: float) -> dict[Endpoint, Link]:
        tried.extend(endpoints)
        return {endpoint: Link(1.0, 1.0) for endpoint in tried if endpoint != silent.endpoint}

    monkeypatch.setattr(swarm.links.prober, "measure_links", measure)
    swarm.unban_living()
    assert sorted(tried, key=str) == sorted((record.endpoint for record in (banned, silent, lost)), key=str)
    assert swarm.bans.keys() == {silent.key.text}


def test_a_route_between_two_peers_covers_part_of_the_model(swarm: Swarm, directory: FakeDirectory) -> None:
    whole, first, last = served(), served(start=0, end=2), served(start=4, end=6)
    directory.records = [whole, first, last]
    hops = swarm.plan_route(
        NEEDS,
        blocks=(2, 4),
        neighbours=(first, last),
        exclude={first.key.text, last.key.text},
    )
    assert [(hop.record, hop.start, hop.end) for hop in hops] == [(whole, 2, 4)]


def test_routes_avoid_banned_peers(swarm: Swarm, directory: FakeDirectory) -> None:
    good, bad = served(block_ms=(50.0,) * 5), served()
    directory.records = [good, bad]
    assert swarm.plan_route(NEEDS)[0].record == bad
    swarm.ban(bad.key.text, seconds=60)
    swarm.ban(bad.key.text, seconds=0)
    assert swarm.plan_route(NEEDS)[0].record == good, "a shorter ban does not end a longer one"
    swarm.bans.lift(bad.key.text)
    assert swarm.plan_route(NEEDS)[0].record == bad


def test_routes_avoid_peers_with_a_failed_link(swarm: Swarm, directory: FakeDirectory) -> None:
    living, killed = served(block_ms=(50.0,) * 5), served()
    directory.records = [living, killed]
    directory.states[Endpoint(killed.address, killed.key)] = LinkState.DOWN
    assert swarm.plan_route(NEEDS)[0].record == living
    directory.records = [killed]
    with pytest.raises(CoverageError, match="no peer that can be used"):
        swarm.plan_route(NEEDS, fresh=True)


@given(st.lists(st.integers(0, 2 * KEPT_EVENTS), max_size=4))
def test_a_reader_of_the_event_log_gets_each_kept_event_once(bursts: list[int]) -> None:
    log = EventLog(clock=lambda: 7.0)
    last, told, noted = 0, 0, 0
    for burst in bursts:
        for _ in range(burst):
            noted += 1
            log.note("gone", f"event {noted}")
        new = log.since(last)
        assert [event.text for event in new] == [f"event {number + 1}" for number in range(noted)][-len(new) or noted :]
        assert len(new) == min(burst, KEPT_EVENTS) and all(event.at == 7.0 for event in new)
        told += len(new)
        last = new[-1].number if new else last
    assert log.since(last) == [] and len(log.since(0)) == min(noted, KEPT_EVENTS) and told <= noted


def test_several_threads_may_note_events_at_once() -> None:
    log = EventLog()

    def note() -> None:
        for _ in range(50):
            log.note("lost", "a hop")

    threads = [threading.Thread(target=note) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.number for event in log.since(0)] == list(range(1, 201))
