"""A client that asks peers for changed records reads the directory seldom, and misses no peer for long."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from splitnet.directory import ask
from splitnet.directory.ask import DirectoryDelta, PeerDirectory, parts_of
from splitnet.directory.interface import latest
from splitnet.directory.record import PeerRecord
from splitnet.errors import DirectoryError
from splitnet.security.identity import Identity
from splitnet.swarm import peer_cache
from splitnet.swarm.peer_cache import LISTED, LOOK_S, READ_S, UNHEARD_S, PeerCache
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.messages import Announce, Found, LookUp, Message, encode
from tests.unit.directory.test_ask import MODEL, ScriptedPeers, says_nothing, signed

TTL_S = 60.0


class World:
    """Peers that pass on each other's records, a directory with all records, and a client with a clock moved by the
    test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ask, "DIRECTORY_SOON_S", 0.1)
        monkeypatch.setattr(ask, "DIRECTORY_ANSWER_S", 0.2)
        self.links = ScriptedPeers()
        self.offset_s = 0.0
        for name in ("monotonic", "time"):
            real = getattr(time, name)
            monkeypatch.setattr(peer_cache.time, name, lambda real=real: real() + self.offset_s)
        self.owners: dict[Endpoint, Identity] = {}
        self.facts: dict[Endpoint, dict[str, Any]] = {}
        self.records: dict[Endpoint, PeerRecord] = {}
        self.reads = 0
        self.directory_is_silent = self.rests = False
        self.known = PeerCache(cast(Any, self), MODEL, "a model", self.links, peers=PeerDirectory([], self.links))

    def peers(self, _: str) -> list[PeerRecord]:
        """The records in the directory."""
        self.reads += 1
        self.rests = False
        if self.directory_is_silent:
            raise DirectoryError("The DHT did not answer.")
        return [record for record in self.there() if not record.has_left]

    def models(self) -> dict[str, str]:
        return {}

    def pause(self) -> None:
        self.rests = True

    def there(self) -> list[PeerRecord]:
        return latest(MODEL, [list(self.records.values())])

    def add(self, state: LinkState = LinkState.UP, **facts: Any) -> Endpoint:
        endpoint, owner = self.links.add(self.tells, state), Identity.generate()
        endpoint = Endpoint(endpoint.address, owner.public)
        self.links.scripts[endpoint], self.links.states[endpoint] = self.tells, state
        self.owners[endpoint] = owner
        self.facts[endpoint] = {"address": endpoint.address, "version": "0.2.0"} | facts
        self.renew(endpoint)
        return endpoint

    def renew(self, *endpoints: Endpoint, **facts: Any) -> None:
        for endpoint in endpoints:
            self.facts[endpoint] |= facts
            self.records[endpoint] = signed(self.owners[endpoint], issued_at=time.time(), **self.facts[endpoint])

    def leave(self, endpoint: Endpoint) -> None:
        self.records[endpoint] = PeerRecord.unpack(self.records[endpoint].farewell().pack(self.owners[endpoint]))

    def tells(self, asked: LookUp | Announce, records: Sequence[PeerRecord] | None = None) -> Sequence[Message]:
        assert isinstance(asked, LookUp)
        present, changed = DirectoryDelta(self.there() if records is None else records).changes(
            asked.known, asked.since, asked.most
        )
        parts = parts_of(changed)
        return [Found(asked.number, len(parts) - 1 - at, part, present) for at, part in enumerate(parts)]

    def hides_all(self, asked: LookUp | Announce) -> Sequence[Message]:
        return self.tells(asked, [])

    def passes(self, seconds: float, *renewed: Endpoint) -> None:
        """Moves the clock, and lets the peers of `renewed` publish their records again."""
        self.offset_s += seconds
        self.renew(*renewed)

    def look(self, *, whole: bool = False) -> set[Endpoint]:
        return {record.endpoint for record in self.known.refresh(fresh=True, whole=whole)}

    @property
    def asked(self) -> list[Endpoint]:
        return [endpoint for endpoint, _ in self.links.asked]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield World(monkeypatch)


def test_new_leaving_and_moving_peers_are_reported_with_the_next_look_up(world: World) -> None:
    first, second, third = world.add(), world.add(), world.add()
    assert world.look() == {first, second, third}
    fourth = world.add()
    world.renew(first, end=2)
    world.leave(second)
    assert world.look() == {first, third, fourth}
    assert {record.endpoint: record.end for record in world.known.refresh()}[first] == 2
    assert world.reads == 1 and len(world.asked) == 1


def test_peers_reported_as_unchanged_outlive_their_records(world: World) -> None:
    everybody = [world.add() for _ in range(10)]
    world.look()
    before = [record.issued_at for record in world.known.refresh()]
    for _ in range(6):
        world.passes(20.0, *everybody)
        assert world.look() == {*everybody}
    assert [record.issued_at for record in world.known.refresh()] == before, "nothing was told again"
    assert world.reads == 1 and world.rests
    sent = sum(len(frame) for _, message in world.links.asked for frame in encode(message)) / len(world.asked)
    assert sent < 300


def test_a_lost_peer_is_dropped_after_its_record_expires_and_two_peers_confirm(world: World) -> None:
    dead, *living = everybody = [world.add() for _ in range(5)]
    world.look()
    world.passes(20.0, *everybody)
    world.links.scripts[dead], world.links.states[dead] = says_nothing, LinkState.DOWN
    world.passes(30.0, *living)
    assert world.look() == {*everybody}
    world.passes(TTL_S - 20.0, *living)
    asked = len(world.asked)
    assert world.look() == {*living}
    assert len({*world.asked[asked:]} & {*living}) >= 2
    assert len(world.known._held) == len(living), "nothing is kept of it"


def test_the_only_other_peer_may_confirm_a_loss_alone(world: World) -> None:
    dead, living = world.add(), world.add()
    world.look()
    world.links.scripts[dead], world.links.states[dead] = says_nothing, LinkState.REFUSED
    world.passes(TTL_S + 10.0, living)
    assert world.look() == {living}


def test_one_lying_peer_hides_no_other_peer(world: World) -> None:
    liar, *_ = everybody = [world.add() for _ in range(3)]
    world.links.scripts[liar] = world.hides_all
    world.look()
    for _ in range(20):
        world.passes(20.0, *everybody)
        assert world.look() == {*everybody}
    assert liar in world.asked and world.reads == 1


def test_several_lying_peers_hide_others_only_until_an_honest_peer_is_asked(world: World) -> None:
    liars, honest = [world.add() for _ in range(3)], [world.add(LinkState.CONNECTING) for _ in range(3)]
    for liar in liars:
        world.links.scripts[liar] = world.hides_all
    world.look()
    complete = 0
    for _ in range(20):
        world.passes(20.0, *liars, *honest)
        complete += world.look() == {*liars, *honest}
    assert complete > 5, "though the client has links to liars alone, every other time it asks any peer"


def test_a_peer_hidden_by_all_asked_peers_is_found_at_the_next_reading(world: World) -> None:
    liars = [world.add() for _ in range(2)]
    honest = world.add()
    world.look()

    def hides_one(asked: LookUp | Announce) -> Sequence[Message]:
        return world.tells(asked, [record for record in world.there() if record.endpoint != honest])

    for liar in liars:
        world.links.scripts[liar] = hides_one
    world.passes(TTL_S + 1.0, *liars)
    assert honest not in world.look()
    world.passes(20.0, *liars, honest)
    assert honest not in world.look() and world.reads == 1
    world.passes(READ_S - 100.0, *liars, honest)
    assert honest not in world.look() and world.reads == 1
    world.passes(50.0, *liars, honest)
    assert honest in world.look() and world.reads == 2


def test_without_a_route_the_directory_is_read_but_not_at_each_look(world: World) -> None:
    everybody = [world.add() for _ in range(3)]
    world.look()
    world.look(whole=True)
    assert world.reads == 1 and not world.rests, "that was a moment ago"
    world.passes(LOOK_S + 1.0, *everybody)
    world.look(whole=True)
    assert world.reads == 2


def test_a_silent_peer_causes_no_reading_and_no_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than the test runs, so that waiting for the silent peer would show.
    monkeypatch.setattr(ask, "DIRECTORY_ANSWER_S", 60.0)
    silent, *_ = everybody = [world.add() for _ in range(4)]
    world.links.scripts[silent] = says_nothing
    world.look()
    for _ in range(55):
        world.passes(10.0, *everybody)
        began = time.perf_counter()
        assert world.look() == {*everybody}
        assert time.perf_counter() - began < ask.DIRECTORY_ANSWER_S / 2
    assert silent in world.asked and world.reads == 1


def test_the_directory_is_read_when_all_peers_are_silent(world: World) -> None:
    everybody = [world.add() for _ in range(3)]
    for each in everybody:
        world.links.scripts[each] = says_nothing
    world.look()
    late = world.add()
    world.links.scripts[late] = says_nothing
    assert world.look() == {*everybody, late}
    assert world.reads == 2


def test_recently_confirmed_peers_count_while_peers_and_directory_are_silent(world: World) -> None:
    everybody = [world.add(LinkState.CONNECTING) for _ in range(3)]
    world.look()
    world.passes(TTL_S - 10.0, *everybody)
    assert world.look() == {*everybody}
    for each in everybody:
        world.links.scripts[each] = says_nothing
    world.directory_is_silent = True
    world.passes(30.0)
    assert world.look() == {*everybody}, "their records have expired, and somebody said that they are still there"
    world.passes(TTL_S)
    with pytest.raises(DirectoryError):
        world.look()


def test_peers_of_another_version_and_unlinked_unreachable_peers_are_not_asked(world: World) -> None:
    other = world.add(protocol=2)
    helper = Identity.generate().public.raw
    hidden = world.add(LinkState.CONNECTING, relays=[("tcp://192.0.2.1:1", helper)])
    usual = world.add()
    world.look()
    for _ in range(6):
        world.look()
    assert {*world.asked} == {usual}
    assert world.known.find_record(world.owners[hidden].public) and world.known.find_record(world.owners[other].public)


def test_look_ups_of_large_swarms_name_likely_peers_always_and_others_alternately(world: World) -> None:
    count = LISTED + 120
    placed = time.time() - 1000
    everybody = [world.add(placed_at=placed) for _ in range(count)]
    likely = everybody[-50:]
    world.known.likely = lambda records, _, most: [record for record in records if record.endpoint in likely][:most]
    world.look()
    late = world.add(placed_at=time.time())
    for _ in range(4):
        world.passes(20.0, *everybody, late)
        assert world.look() == {*everybody, late}
        question = world.links.asked[-1][1]
        assert isinstance(question, LookUp) and len(question.known) == LISTED
        first = {entry[:8] for entry in question.known[: len(likely)]}
        assert first == {endpoint.key.raw[:8] for endpoint in likely}
    named = {entry[:8] for _, message in world.links.asked if isinstance(message, LookUp) for entry in message.known}
    assert len(named) == count + 1
    assert world.reads == 1
    dead = everybody[0]
    del world.records[dead]
    everybody.remove(dead)
    for _ in range(6):
        world.passes(20.0, *everybody, late)
        world.look()
    assert world.known.find_record(dead.key) is None


def test_a_peer_without_confirmation_is_dropped(world: World) -> None:
    lost, usual = world.add(), [world.add() for _ in range(3)]
    world.look()
    world.known._listed = lambda: [record for record in world.known._records if record.endpoint != lost]
    del world.records[lost]
    for seconds, counts in ((UNHEARD_S - 20.0, True), (TTL_S + 30.0, False)):
        world.passes(seconds, *usual)
        world.known._read_at = time.monotonic()
        assert (lost in world.look()) is counts


def test_a_flood_of_new_peers_is_accepted_slowly(world: World) -> None:
    flood = [signed(issued_at=time.time(), version="0.2.0") for _ in range(100)]
    liar = world.add()

    def floods(asked: LookUp | Announce) -> Sequence[Message]:
        present, _ = DirectoryDelta(world.there()).changes(asked.known, 0.0, 0)  # pyright: ignore[reportAttributeAccessIssue]
        return [Found(asked.number, 0, parts_of(flood[:60])[0], present)]

    world.links.scripts[liar] = floods
    world.look()
    assert 1 < len(world.look()) < 20
