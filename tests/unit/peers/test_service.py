"""What a peer answers to each message in each state, without sockets and without a device."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peers import service
from peers.engine import Engine
from peers.next_hop import FAR_TIMES
from peers.peer_links import KEEP_S, MAX_NEXT_HOPS, NextHops
from peers.prefixes import READ_S, Page, PageNamespace, PrefixStore
from peers.queue import WorkQueue
from peers.rows import room_for
from peers.served import ServedBlocks
from peers.service import CLIENT_LOST_S, PROBE_S, SessionService
from peers.sessions import (
    MAX_SESSIONS,
    MESSAGE_BYTES,
    MIN_RESERVATION,
    MOST_RESENT,
    RESEND_S,
    SHORTAGE_S,
    HopSession,
    KeyPolicy,
    SessionTable,
    SessionTooLong,
    Work,
)
from peers.speed import ObservedSpeed, measure_speed
from scheduler.batching import PASS_POSITIONS
from scheduler.facts import PASS_SIZES
from splitnet.errors import ProtocolError, ProtocolVersionError
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.wire.codecs import CODECS
from splitnet.wire.endpoints import Connection, Destination, Endpoint, LinkState
from splitnet.wire.messages import (
    MAX_LABELS,
    Chunk,
    Close,
    Failure,
    FailureCode,
    Fork,
    Forward,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Replay,
    Result,
    Step,
    Tapped,
    Timing,
    decode,
    encode,
)
from splitnet.wire.sent_log import PAGE, REPLAY_POSITIONS

HIDDEN = 8
MODEL = "fingerprint"
CAPACITY = 10_000
REACH_S = 3.0
IDLE_S = 600.0
PLAIN = CODECS["none"]
SID = bytes(range(16))

OWNER = Identity.generate().public
BEFORE = Identity.generate().public
AFTER = Endpoint("tcp://192.0.2.1:7000", Identity.generate().public)
OTHER = Endpoint("tcp://192.0.2.2:7000", Identity.generate().public)
CLIENT = Connection(b"client", OWNER.curve_raw)
PREVIOUS = Connection(b"previous", BEFORE.curve_raw)
STRANGER = Connection(b"stranger", Identity.generate().public.curve_raw)


class FakeOutbox:
    """Records what the service says; the test decides how links are."""

    def __init__(self) -> None:
        self.sent: list[tuple[Destination, Message]] = []
        self.states: dict[Endpoint, LinkState] = {}
        self.open_links: set[Endpoint] = set()
        self.probed: list[Endpoint] = []
        self.answers = 0
        self.far_s = 1.0

    def send(self, destination: Destination, message: Message) -> None:
        assert decode(encode(message)) == message, "only what the protocol allows is said"
        self.sent.append((destination, message))

    def connect(self, endpoint: Endpoint) -> None:
        self.open_links.add(endpoint)

    def disconnect(self, endpoint: Endpoint) -> None:
        self.open_links.remove(endpoint)
        self.states.pop(endpoint, None)

    def link_state(self, endpoint: Endpoint) -> LinkState:
        return self.states.get(endpoint, LinkState.CONNECTING)

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def unsent(self, endpoint: Endpoint) -> int:
        return 0

    def probe(self, endpoint: Endpoint) -> int:
        self.probed.append(endpoint)
        return len(self.probed)

    def answered(self, endpoint: Endpoint) -> int:
        return self.answers

    def rtt_ms(self, endpoint: Endpoint) -> float:
        return 0.25

    def answer_limit_s(self, endpoint: Endpoint, *, connects: bool) -> float:
        return self.far_s


class FakeRow:
    """A row without keys and values."""

    prefix_length = 0
    has_states = False

    def __init__(self, length: int = 0, room: int = 0) -> None:
        self.length = length
        self.room = room

    @property
    def computed(self) -> int:
        return self.length

    def crop(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length

    def fork(self, length: int | None, room: int) -> FakeRow:
        return FakeRow(self.length if length is None else length, room)


@dataclass
class Peer:
    """A service of blocks 2..5 of 8, with a clock that the test moves."""

    end: int = 6
    capacity: int = CAPACITY
    max_positions: int | None = 4096
    now: float = field(default_factory=lambda: float(int(time.monotonic())))  # whole seconds add up exactly
    outbox: FakeOutbox = field(default_factory=FakeOutbox)
    queue: WorkQueue = field(default_factory=WorkQueue)
    policy: KeyPolicy | None = None

    def __post_init__(self) -> None:
        served = ServedBlocks(MODEL, 2, self.end, 8, HIDDEN, self.max_positions, "int8/float32")
        self.table = SessionTable(self.capacity, idle_s=IDLE_S)
        self.service = SessionService(
            served,
            self.table,
            self.queue,
            self.outbox,  # pyright: ignore[reportArgumentType]
            NextHops(self.outbox),  # pyright: ignore[reportArgumentType]
            reach_s=REACH_S,
            policy=self.policy,
            sign=Identity.generate().sign,
        )

    def says(self, message: Message, source: Destination = CLIENT) -> list[tuple[Destination, Message]]:
        """What is sent because of `message`."""
        self.service.receive_message(source, message, self.now)
        return self.heard()

    def heard(self) -> list[tuple[Destination, Message]]:
        sent, self.outbox.sent = self.outbox.sent, []
        return sent

    def passes(self, seconds: float) -> list[tuple[Destination, Message]]:
        self.now += seconds
        self.service.tick(self.now)
        return self.heard()

    def link(self, endpoint: Endpoint, state: LinkState) -> list[tuple[Destination, Message]]:
        self.outbox.states[endpoint] = state
        self.service.link_changed(endpoint, state)
        return self.heard()

    def session(self) -> HopSession:
        session = self.table.get(SID)
        assert session is not None
        return session

    def begin(self) -> Work:
        """The engine takes the next step and prepares its rows."""
        [(work, count)] = self.queue.take_steps(10_000)
        assert count == work.remaining
        self.service.rows.prepare_step(work)
        return work

    def end_pass(self, work: Work, output: bytes | None = None, kept: bytes = b"kept") -> list[tuple[Destination, Any]]:
        """The engine has computed a step."""
        for part in work.parts(work.remaining):
            new: Any = FakeRow(room=work.session.row_state.new_room.get(part.row, 0))
            row: Any = work.session.row_state.caches.setdefault(part.row, new)
            row.length += part.length
        work.done = work.total
        work.outputs = [kept if work.session.end == 8 else output or bytes(work.step.payload)]
        self.service.outputs.finish_step(work)
        self.queue.release_work(work)
        return self.heard()

    def compute(self, message: Step, source: Connection = CLIENT) -> list[tuple[Destination, Any]]:
        """A step from its arrival to what is sent on."""
        assert self.says(message, source) == []
        return self.end_pass(self.begin())


def opening(**changes: Any) -> Open:
    message = Open(
        session=SID,
        epoch=1,
        model=MODEL,
        start=2,
        end=6,
        reservation=1000,
        codec=PLAIN.code,
        previous=BEFORE.raw,
        next_key=AFTER.key.raw,
        next_address=AFTER.address,
    )
    return replace(message, **changes)


def to_client(**changes: Any) -> Open:
    return opening(next_key=b"", next_address="", **changes)


def step(*parts: Chunk, forks: tuple[Fork, ...] | None = None, fill: int = 0, **changes: Any) -> Step:
    parts = parts or (Chunk(1, 0, 3, 1),)
    payload = bytes([fill]) * (sum(part.length for part in parts) * 4 * HIDDEN)
    return replace(Step(SID, 1, 7, parts, forks, 0, PLAIN.code, payload, 2), **changes)


def code_of(sent: list[tuple[Destination, Any]], to: Destination = CLIENT) -> FailureCode:
    [(destination, message)] = sent
    assert destination == to
    assert isinstance(message, Failure)
    assert message.text
    return FailureCode(message.code)


def is_opened(sent: list[tuple[Destination, Any]], *, reachable: bool, epoch: int = 1) -> bool:
    [(destination, message)] = sent
    assert destination == CLIENT
    assert isinstance(message, Opened)
    return (message.session, message.epoch, message.next_reachable) == (SID, epoch, reachable)


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
def opened(peer: Peer) -> Peer:
    """With a session whose next hop is up."""
    peer.outbox.states[AFTER] = LinkState.UP
    assert is_opened(peer.says(opening()), reachable=True)
    return peer


class TestPolicy:
    """What the owner of the peer grants the key of the client."""

    @pytest.fixture
    def granted(self, tmp_path: Path) -> Callable[[str], Peer]:
        def make(options: str) -> Peer:
            path = tmp_path / "authorized_keys"
            path.write_text(f"{OWNER.text} {options}\n{BEFORE.text}\n")
            return Peer(policy=KeyPolicy(AuthorizedKeys(path)))

        return make

    def test_a_key_that_may_not_train_computes_passes_without_gradients(self, granted: Callable[[str], Peer]) -> None:
        peer = granted("train=no")
        peer.says(to_client())
        passes = Forward(SID, 1, 7, 0, (3,), True, 0, PLAIN.code, PLAIN.code, bytes(3 * 4 * HIDDEN), 2)
        [(_, refused)] = peer.says(passes)
        assert isinstance(refused, Failure)
        assert (refused.code, refused.number) == (FailureCode.BUSY, 7)
        assert "train=no" in refused.text
        assert peer.queue.pass_positions == 0
        assert peer.says(replace(passes, kept=False)) == []
        assert peer.queue.pass_positions == 3

    def test_a_key_that_is_taken_away_loses_its_sessions_and_what_waits(self, tmp_path: Path) -> None:
        """Its own connection ends, but the hop before would send on what its session has sent to that."""
        path, seconds = tmp_path / "authorized_keys", itertools.count(step=10)
        path.write_text(f"{OWNER.text} train=no,tokens-per-minute=60\n{BEFORE.text}\n")
        peer = Peer(policy=KeyPolicy(AuthorizedKeys(path, clock=lambda: next(seconds))))
        peer.says(to_client())
        assert peer.says(step(), PREVIOUS) == []
        path.write_text(f"{BEFORE.text}\n")
        [(client, failure)] = peer.passes(0.2)
        assert client == CLIENT and isinstance(failure, Failure)
        assert (failure.code, failure.number) == (FailureCode.BUSY, 7)
        assert "does not accept your key any more" in failure.text
        assert not len(peer.table) and not peer.queue.queued_positions
        assert code_of(peer.says(step(), PREVIOUS), PREVIOUS) == FailureCode.UNKNOWN_SESSION
        assert code_of(peer.says(to_client())) == FailureCode.BUSY, "it comes before the end of the connection"
        assert not len(peer.table)

    def test_a_key_that_has_used_its_tokens_is_told_when_to_come_back(self, granted: Callable[[str], Peer]) -> None:
        peer = granted("tokens-per-minute=60")
        peer.says(to_client())
        assert peer.says(step(Chunk(1, 0, 90, 1), number=1)) == [], "what begins within them may go beyond"
        for message in (step(Chunk(1, 90, 1, 1), number=2), to_client(session=bytes(16))):
            [(_, refused)] = peer.says(message)
            assert isinstance(refused, Failure) and refused.code == FailureCode.BUSY
            assert "try again in 31 s" in refused.text
        peer.now += 31
        assert peer.says(step(Chunk(1, 90, 1, 1), number=2)) == []


class TestOpen:
    def test_is_answered_at_once_when_the_next_hop_is_up(self, peer: Peer) -> None:
        peer.outbox.states[AFTER] = LinkState.UP
        assert is_opened(peer.says(opening()), reachable=True)
        assert peer.table.free_positions == CAPACITY - 1000

    def test_is_answered_at_once_when_results_go_to_the_client(self, peer: Peer) -> None:
        assert is_opened(peer.says(to_client()), reachable=True)
        assert not peer.outbox.open_links

    def test_waits_until_the_link_is_up(self, peer: Peer) -> None:
        assert peer.says(opening()) == []
        assert peer.outbox.open_links == {AFTER}
        assert peer.passes(REACH_S - 0.1) == []
        assert peer.link(OTHER, LinkState.UP) == []
        assert is_opened(peer.link(AFTER, LinkState.UP), reachable=True)
        assert peer.passes(REACH_S) == []
        assert peer.session().next == AFTER

    @pytest.mark.parametrize(("far_s", "waits_s"), [(7.0, 7.0), (100.0, FAR_TIMES * REACH_S)])
    def test_waits_longer_where_round_trips_are_long(self, peer: Peer, far_s: float, waits_s: float) -> None:
        peer.outbox.far_s = far_s
        assert peer.says(opening()) == []
        assert peer.passes(waits_s - 0.1) == []
        assert is_opened(peer.passes(0.1), reachable=False)

    def test_is_answered_when_the_next_hop_refuses(self, peer: Peer) -> None:
        assert peer.says(opening()) == []
        assert is_opened(peer.link(AFTER, LinkState.REFUSED), reachable=False)

    @pytest.mark.parametrize("state", [LinkState.CONNECTING, LinkState.WRONG_KEY, LinkState.DOWN])
    @pytest.mark.parametrize("known", [False, True])
    def test_does_not_tell_what_is_at_an_address(self, peer: Peer, state: LinkState, known: bool) -> None:
        if known:
            peer.outbox.states[AFTER] = state
        assert peer.says(opening()) == []
        assert peer.link(AFTER, state) == []
        assert peer.passes(REACH_S - 0.1) == []
        assert is_opened(peer.passes(0.1), reachable=False)

    @pytest.mark.parametrize("state", [LinkState.WRONG_KEY, LinkState.DOWN])
    def test_tells_at_once_of_a_next_hop_that_was_reached_before(self, peer: Peer, state: LinkState) -> None:
        peer.link(AFTER, LinkState.UP)
        peer.outbox.states[AFTER] = LinkState.CONNECTING
        assert peer.says(opening()) == []
        assert is_opened(peer.link(AFTER, state), reachable=False)

    def test_is_answered_at_once_when_the_link_is_known_to_be_refused(self, peer: Peer) -> None:
        peer.outbox.states[AFTER] = LinkState.REFUSED
        assert is_opened(peer.says(opening()), reachable=False)

    def test_gives_up_when_the_time_is_over_and_stops_to_connect(self, peer: Peer) -> None:
        peer.says(opening())
        assert is_opened(peer.passes(REACH_S), reachable=False)
        assert peer.session().next is None
        assert not peer.outbox.open_links, "a hostile address is not tried for ever"
        assert peer.link(AFTER, LinkState.UP) == []

    def test_many_times_while_waiting_is_answered_once_and_in_time(self, peer: Peer) -> None:
        for _ in range(90):
            assert peer.says(opening()) == []
            assert peer.passes(REACH_S / 100) == []
        assert is_opened(peer.passes(REACH_S / 10 + 0.01), reachable=False)
        assert peer.passes(REACH_S) == []

    def test_what_weights_are_held_as_is_told(self, peer: Peer) -> None:
        [(_, message)] = peer.says(to_client())
        assert isinstance(message, Opened) and message.weights == "int8/float32"

    def test_again_is_harmless(self, opened: Peer) -> None:
        opened.compute(step())
        assert is_opened(opened.says(opening()), reachable=True)
        assert opened.table.free_positions == CAPACITY - 1000
        assert opened.session().row_state.caches[1].length == 3

    def test_again_with_more_budget_reserves_more_and_never_less(self, opened: Peer) -> None:
        opened.says(opening(reservation=1500))
        assert opened.table.free_positions == CAPACITY - 1500
        opened.says(opening(reservation=10))
        assert opened.table.free_positions == CAPACITY - 1500
        assert code_of(opened.says(opening(reservation=CAPACITY + 1))) is FailureCode.BUSY
        assert opened.table.free_positions == CAPACITY - 1500

    def test_again_with_another_next_hop_uses_that(self, opened: Peer) -> None:
        moved = opening(epoch=2, next_key=OTHER.key.raw, next_address=OTHER.address)
        assert opened.says(moved) == []
        assert is_opened(opened.link(OTHER, LinkState.UP), reachable=True, epoch=2)
        [(destination, _)] = opened.compute(step(epoch=2))
        assert destination == OTHER

    def test_of_a_session_that_pushes_already_survives_a_link_that_is_down(self, opened: Peer) -> None:
        opened.outbox.states[AFTER] = LinkState.DOWN
        assert opened.says(opening(reservation=1500)) == []
        assert is_opened(opened.passes(REACH_S), reachable=False)
        assert opened.session().next == AFTER
        assert opened.outbox.open_links == {AFTER}

    def test_without_memory_is_busy(self, peer: Peer) -> None:
        assert code_of(peer.says(opening(reservation=CAPACITY + 1))) is FailureCode.BUSY
        assert len(peer.table) == 0
        assert peer.table.free_positions == CAPACITY

    def test_of_tiny_sessions_is_not_free(self, peer: Peer) -> None:
        answers = [peer.says(to_client(session=number.to_bytes(16, "big"), reservation=0)) for number in range(200)]
        admitted = sum(isinstance(message, Opened) for sent in answers for _, message in sent)
        assert admitted == CAPACITY // MIN_RESERVATION == len(peer.table)

    def test_of_more_sessions_than_allowed_is_busy(self) -> None:
        peer = Peer(capacity=MIN_RESERVATION * (MAX_SESSIONS + 10))
        for number in range(MAX_SESSIONS):
            peer.says(to_client(session=number.to_bytes(16, "big"), reservation=1))
        assert code_of(peer.says(to_client(session=b"\xff" * 16, reservation=1))) is FailureCode.BUSY
        assert len(peer.table) == MAX_SESSIONS

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"model": "other"}, FailureCode.WRONG_MODEL),
            ({"start": 1}, FailureCode.WRONG_BLOCKS),
            ({"end": 7}, FailureCode.WRONG_BLOCKS),
            ({"start": 4, "end": 4}, FailureCode.WRONG_BLOCKS),
            ({"start": 5, "end": 3}, FailureCode.WRONG_BLOCKS),
            ({"codec": 255}, FailureCode.BAD_MESSAGE),
            ({"next_address": "udp://192.0.2.1:1"}, FailureCode.BAD_MESSAGE),
            ({"next_address": "tcp://192.0.2.1"}, FailureCode.BAD_MESSAGE),
            ({"next_address": "tcp://192.0.2.1:0"}, FailureCode.BAD_MESSAGE),
            ({"next_address": "tcp://192.0.2.1;192.0.2.2:1"}, FailureCode.BAD_MESSAGE),
            ({"next_address": ""}, FailureCode.BAD_MESSAGE),
            ({"next_key": b"\xff" * 32}, FailureCode.BAD_MESSAGE),
            ({"next_key": bytes(32)}, FailureCode.BAD_MESSAGE),
            ({"previous": b"\xff" * 32}, FailureCode.BAD_MESSAGE),
        ],
    )
    def test_of_what_is_not_served_is_refused(self, peer: Peer, changes: dict[str, Any], code: FailureCode) -> None:
        assert code_of(peer.says(opening(**changes))) is code
        assert len(peer.table) == 0
        assert not peer.outbox.open_links

    @pytest.mark.parametrize("changes", [{"start": 3}, {"end": 5}, {"codec": CODECS["fp16"].code}])
    def test_of_an_open_session_keeps_blocks_and_codec(self, opened: Peer, changes: dict[str, Any]) -> None:
        before = opened.table.free_positions
        assert code_of(opened.says(opening(reservation=2000, **changes))) is FailureCode.WRONG_BLOCKS
        assert opened.table.free_positions == before

    def test_by_another_key_changes_nothing(self, opened: Peer) -> None:
        assert code_of(opened.says(to_client(epoch=9), STRANGER), STRANGER) is FailureCode.UNKNOWN_SESSION
        assert (opened.session().epoch, opened.session().next) == (1, AFTER)

    def test_again_after_trouble_a_link_counts_only_if_the_next_hop_answers(self, opened: Peer) -> None:
        assert opened.says(opening(epoch=2)) == []
        assert opened.outbox.probed == [AFTER]
        opened.service.ping_answered(AFTER)
        assert is_opened(opened.heard(), reachable=True, epoch=2)
        assert opened.says(opening(epoch=3)) == []
        assert is_opened(opened.passes(REACH_S / 3 + 0.1), reachable=False, epoch=3)

    def test_of_an_older_epoch_is_stale(self, opened: Peer) -> None:
        opened.says(opening(epoch=5))
        assert code_of(opened.says(opening(epoch=4))) is FailureCode.STALE_EPOCH
        assert opened.session().epoch == 5


class TestLinks:
    def open_to(self, peer: Peer, number: int, endpoint: Endpoint) -> list[tuple[Destination, Message]]:
        session = number.to_bytes(16, "big")
        return peer.says(
            opening(session=session, reservation=1, next_key=endpoint.key.raw, next_address=endpoint.address)
        )

    def test_are_few_whatever_clients_ask_for(self, peer: Peer) -> None:
        key = AFTER.key
        for number in range(MAX_NEXT_HOPS + 20):
            self.open_to(peer, number, Endpoint(f"tcp://192.0.2.9:{1 + number}", key))
        answers = [message for _, message in peer.heard()]
        assert len(peer.outbox.open_links) == MAX_NEXT_HOPS
        assert answers == []
        [(_, message)] = self.open_to(peer, 1000, AFTER)
        assert isinstance(message, Opened), "the client is told to carry"
        assert not message.next_reachable
        peer.passes(REACH_S)
        assert not peer.outbox.open_links

    def test_are_shared_and_closed_some_time_after_the_last_session(self, peer: Peer) -> None:
        peer.outbox.states[AFTER] = LinkState.UP
        for number in range(3):
            self.open_to(peer, number, AFTER)
        for number in range(3):
            assert peer.outbox.open_links == {AFTER}
            peer.says(Close(number.to_bytes(16, "big")))
        peer.passes(1)
        peer.passes(KEEP_S)
        assert peer.outbox.open_links == {AFTER}, "the next session finds it open"
        peer.passes(1)
        assert not peer.outbox.open_links

    def test_that_are_not_used_make_room(self, peer: Peer) -> None:
        endpoints = [Endpoint(f"tcp://192.0.2.9:{1 + number}", AFTER.key) for number in range(MAX_NEXT_HOPS + 1)]
        for number, endpoint in enumerate(endpoints):
            peer.outbox.states[endpoint] = LinkState.UP
            [(_, message)] = self.open_to(peer, number, endpoint)
            assert isinstance(message, Opened) and message.next_reachable
            peer.says(Close(number.to_bytes(16, "big")))
        assert peer.outbox.open_links == set(endpoints[1:])

    def test_of_sessions_that_end_in_any_way_are_let_go(self, peer: Peer) -> None:
        peer.says(opening())
        peer.says(Close(SID))
        assert not peer.outbox.open_links
        peer.says(opening())
        peer.passes(IDLE_S + 1)
        assert not peer.outbox.open_links
        assert peer.passes(1) == []


class TestStep:
    def test_is_pushed_to_the_next_hop(self, opened: Peer) -> None:
        sent = step(fill=1)
        opened.says(sent)
        work = opened.begin()
        [(destination, pushed)] = opened.end_pass(work, output=b"\2" * len(sent.payload))
        assert destination == AFTER
        assert pushed == replace(sent, payload=b"\2" * len(sent.payload), boundary=6, timings=(Timing(0, 0, 250),))

    def test_goes_to_the_client_where_that_carries(self, peer: Peer) -> None:
        peer.says(to_client())
        sent = step()
        [(destination, result)] = peer.compute(sent)
        assert destination == CLIENT
        assert isinstance(result, Result)
        assert (result.number, result.end, result.payload) == (sent.number, 6, sent.payload)

    def test_ends_at_the_tail_with_what_the_client_keeps(self) -> None:
        peer = Peer(end=8)
        peer.says(to_client(start=4, end=8))
        [(destination, result)] = peer.compute(step())
        assert destination == CLIENT
        assert (result.end, result.payload) == (8, b"kept")
        assert peer.session().log.nbytes == 0

    def test_is_taken_from_the_previous_hop_and_answered_to_the_client(self, peer: Peer) -> None:
        peer.says(to_client())
        [(destination, _)] = peer.compute(step(), PREVIOUS)
        assert destination == CLIENT
        assert code_of(peer.says(step(Chunk(1, 3, 3, 4)), PREVIOUS)) is FailureCode.BAD_MESSAGE

    def test_of_a_stranger_is_of_no_session(self, opened: Peer) -> None:
        assert code_of(opened.says(step(), STRANGER), STRANGER) is FailureCode.UNKNOWN_SESSION
        assert code_of(opened.says(step(session=b"\xff" * 16))) is FailureCode.UNKNOWN_SESSION
        assert opened.service.queue.queued_positions == 0

    def test_that_a_hop_pushes_must_stand_where_the_session_begins(self, opened: Peer) -> None:
        """Or hostile clients could make peers push to each other in a circle."""
        for boundary in (0, 1, 3, 6):
            assert code_of(opened.says(step(boundary=boundary), PREVIOUS)) is FailureCode.BAD_MESSAGE
        assert opened.says(step(boundary=2), PREVIOUS) == []

    def test_that_the_client_carries_stands_where_the_client_says(self, opened: Peer) -> None:
        assert opened.says(step(boundary=0)) == []

    def test_of_another_epoch_is_dropped(self, opened: Peer) -> None:
        for epoch in (0, 2):
            assert opened.says(step(epoch=epoch)) == []
        assert opened.service.queue.queued_positions == 0

    @pytest.mark.parametrize(
        ("wrong", "code"),
        [
            (step(Chunk(1, 0, 0, 0), payload=b""), FailureCode.BAD_MESSAGE),
            (step(Chunk(1, 0, 2, 0), Chunk(2, 0, 0, 0)), FailureCode.BAD_MESSAGE),
            (step(parts=(), payload=b""), FailureCode.BAD_MESSAGE),
            (step(Chunk(1, 0, 2, 3)), FailureCode.BAD_MESSAGE),
            (step(Chunk(1, 0, 1, 0), Chunk(1, 1, 1, 0)), FailureCode.BAD_MESSAGE),
            (step(payload=b"short"), FailureCode.BAD_MESSAGE),
            (step(payload=b""), FailureCode.BAD_MESSAGE),
            (step(codec=255), FailureCode.BAD_MESSAGE),
            (step(codec=CODECS["fp16"].code), FailureCode.BAD_MESSAGE),
            (step(Chunk(1, 4095, 2, 0)), FailureCode.TOO_LONG),
            (step(Chunk(1, 0, 1001, 0)), FailureCode.TOO_LONG),
            (step(Chunk(1, 0, 1 << 24, 0), payload=b""), FailureCode.BAD_MESSAGE),
            (step(Chunk(1, 0, 1, 0), forks=tuple(Fork(row, row) for row in range(1000))), FailureCode.TOO_LONG),
        ],
    )
    def test_that_cannot_be_is_refused_before_the_device_sees_it(
        self, opened: Peer, wrong: Step, code: FailureCode
    ) -> None:
        assert code_of(opened.says(wrong)) is code
        assert opened.service.queue.queued_positions == 0

    def test_waits_only_within_twice_the_budget(self, opened: Peer) -> None:
        for start in (*range(0, 1000, 250), *range(0, 1000, 250)):
            assert opened.says(step(Chunk(1, start, 250, 0))) == []
        assert code_of(opened.says(step(Chunk(1, 0, 1, 0)))) is FailureCode.TOO_LONG
        opened.end_pass(opened.begin())
        assert opened.says(step(Chunk(1, 0, 250, 0))) == []

    def test_of_an_older_epoch_is_not_computed_any_more(self, opened: Peer) -> None:
        for start in (0, 10):
            assert opened.says(step(Chunk(1, start, 10, 0))) == []
        running = opened.begin()
        opened.says(opening(epoch=2))
        opened.end_pass(running)
        assert opened.session().waiting_size == 0
        assert opened.service.queue.queued_positions == 0

    def test_twice_changes_nothing(self, opened: Peer) -> None:
        opened.compute(step(Chunk(1, 0, 3, 0)))
        again = step(Chunk(1, 3, 1, 1), Chunk(2, 3, 1, 1), forks=(Fork(1, 1), Fork(2, 1)))
        first = opened.compute(again)
        rows = {row: held.length for row, held in opened.session().row_state.caches.items()}
        second = opened.compute(again)
        assert first == second
        assert rows == {1: 4, 2: 4} == {row: held.length for row, held in opened.session().row_state.caches.items()}


class TestTaps:
    """What is kept, checked and said of hidden states that a client wants."""

    @pytest.mark.parametrize("taps", [(2,), (7,), (4, 3), (4, 4), (6, 8), (1, 4)])
    def test_only_boundaries_behind_blocks_of_the_session_are_taken(self, peer: Peer, taps: tuple[int, ...]) -> None:
        assert code_of(peer.says(to_client(taps=taps))) is FailureCode.BAD_MESSAGE
        assert code_of(peer.says(to_client(taps=(4,), tap_codec=255))) is FailureCode.BAD_MESSAGE
        assert not len(peer.table)

    def test_the_client_is_told_that_they_will_come(self, peer: Peer) -> None:
        for taps in ((), (3, 6)):
            [(_, opened)] = peer.says(to_client(taps=taps))
            assert isinstance(opened, Opened) and opened.taps == bool(taps)

    def test_they_count_as_the_step_does_while_it_waits(self, peer: Peer) -> None:
        memory, held = peer.queue.memory, list[int]()
        for taps in ((), (3, 6)):
            peer.says(to_client(taps=taps))
            peer.says(step(Chunk(1, 0, 3, 2)))
            held.append(memory.limit - memory.free)
            peer.end_pass(peer.begin())
            assert memory.free == memory.limit
        assert held[1] - held[0] == 2 * 2 * 4 * HIDDEN

    def test_of_replays_and_of_what_the_client_does_not_keep_there_are_none(self, peer: Peer) -> None:
        peer.says(to_client(taps=(3, 6)))
        peer.says(step(Chunk(1, 0, 3, 0)))
        assert peer.begin().taps is None
        other = Peer()
        other.says(to_client(taps=(3, 6)))
        other.says(step(replay_until=6))
        assert other.begin().taps is None

    def test_more_than_a_message_holds_is_refused(self, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service, "MAX_PAYLOAD_BYTES", 3 * 4 * HIDDEN)
        peer.says(to_client(taps=(3,)))
        assert peer.says(step(Chunk(1, 0, 3, 3))) == []
        assert code_of(peer.says(step(Chunk(1, 0, 4, 4)))) is FailureCode.BAD_MESSAGE


class TestRows:
    def test_are_cropped_to_the_start(self, opened: Peer) -> None:
        opened.compute(step(Chunk(1, 0, 10, 0)))
        opened.compute(step(Chunk(1, 4, 1, 0)))
        assert opened.session().row_state.caches[1].length == 5

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            (step(Chunk(1, 11, 1, 0)), ProtocolError),
            (step(Chunk(2, 1, 1, 0)), ProtocolError),
            (step(Chunk(3, 0, 1, 0), forks=(Fork(3, 2),)), ProtocolError),
            (step(Chunk(1, 0, 1, 0), Chunk(2, 0, 995, 0)), None),
            (step(Chunk(2, 0, 995, 0)), SessionTooLong),
            (step(Chunk(1, 9, 1, 0), forks=tuple(Fork(row, 1) for row in range(1, 102))), SessionTooLong),
        ],
    )
    def test_stay_as_they_were_if_a_step_does_not_fit(
        self, opened: Peer, wrong: Step, error: type[Exception] | None
    ) -> None:
        opened.compute(step(Chunk(1, 0, 10, 0)))
        session = opened.session()
        row = session.row_state.caches[1]
        opened.says(wrong)
        [(work, _)] = opened.queue.take_steps(10_000)
        if error is None:
            opened.service.rows.prepare_step(work)
            return
        with pytest.raises(error):
            opened.service.rows.prepare_step(work)
        assert session.row_state.caches == {1: row}
        assert row.length == 10

    def test_that_a_refused_step_would_drop_stay_reserved(self, opened: Peer) -> None:
        opened.compute(step(Chunk(1, 0, 10, 0)))
        opened.compute(step(Chunk(1, 10, 1, 0), forks=(Fork(1, 1), Fork(2, 1))))
        session = opened.session()
        assert (set(session.row_state.caches), session.reserved_rows) == ({1, 2}, 2)
        opened.says(step(Chunk(1, 15, 1, 0), forks=(Fork(1, 1),)))
        [(work, _)] = opened.queue.take_steps(10_000)
        with pytest.raises(ProtocolError):
            opened.service.rows.prepare_step(work)
        assert (set(session.row_state.caches), session.reserved_rows) == ({1, 2}, 2)

    def test_that_were_long_once_give_their_memory_to_others(self, opened: Peer) -> None:
        opened.compute(step(Chunk(1, 0, 990, 0)))
        for row in range(2, 10):
            opened.compute(step(Chunk(row - 1, 0, 1, 0), Chunk(row, 0, 900, 0)))
            assert sum(held.room for held in opened.session().row_state.caches.values()) <= room_for(1000)

    def test_of_a_batch_fit_in_what_a_client_reserves_for_them(self, opened: Peer) -> None:
        """Up to the last position, with forks to and fro, and in a second batch of another size."""
        for batch in (4, 10):
            columns = 1000 // batch
            rows = list(range(batch * 1000, batch * 1000 + batch))
            opened.compute(step(*(Chunk(row, 0, 5, 1) for row in rows), forks=()))
            for position in range(5, columns):
                forks = None
                if position % 50 == 0:
                    forks = tuple(Fork(row + 100 * position, rows[0]) for row in rows)
                    rows = [fork.row for fork in forks]
                opened.compute(step(*(Chunk(row, position, 1, 1) for row in rows), forks=forks))
            assert sum(row.length for row in opened.session().row_state.caches.values()) == batch * columns


class TestClose:
    def test_frees_the_memory(self, opened: Peer) -> None:
        opened.says(step())
        assert opened.says(Close(SID)) == []
        assert opened.table.free_positions == CAPACITY
        assert opened.service.queue.queued_positions == 0
        assert code_of(opened.says(step())) is FailureCode.UNKNOWN_SESSION

    @pytest.mark.parametrize("source", [STRANGER, PREVIOUS])
    def test_by_anybody_else_is_ignored(self, opened: Peer, source: Connection) -> None:
        assert opened.says(Close(SID), source) == []
        assert opened.session() is not None

    def test_of_nothing_is_ignored(self, peer: Peer) -> None:
        assert peer.says(Close(SID)) == []

    def test_while_the_step_is_on_the_device(self, opened: Peer) -> None:
        opened.compute(step())
        opened.says(step(Chunk(1, 3, 1, 1)))
        work = opened.begin()
        opened.says(Close(SID))
        assert work.session.row_state.caches[1].length == 3, "the pass that runs keeps its rows"
        assert opened.end_pass(work) == []
        opened.service.report_failure(work, FailureCode.INTERNAL, "too late")
        assert opened.heard() == []
        assert opened.service.queue.queued_positions == 0

    def test_and_open_again_begins_anew(self, opened: Peer) -> None:
        opened.compute(step())
        opened.says(Close(SID))
        assert is_opened(opened.says(opening()), reachable=True)
        assert not opened.session().row_state.caches


class TestEpochs:
    def test_a_step_that_was_on_the_device_when_a_newer_epoch_began_is_not_sent_but_logged(self, opened: Peer) -> None:
        opened.says(step())
        work = opened.begin()
        opened.says(opening(epoch=2))
        assert opened.end_pass(work) == []
        # The rows hold its positions, so the next step continues after them, and so must the log.
        [(destination, pushed)] = opened.compute(step(Chunk(1, 3, 1, 1), epoch=2))
        assert (destination, pushed.epoch) == (AFTER, 2)
        assert opened.session().log.length(1) == 4

    def test_the_answer_to_an_open_names_the_newest(self, peer: Peer) -> None:
        peer.says(opening(epoch=1))
        peer.says(opening(epoch=2))
        assert is_opened(peer.link(AFTER, LinkState.UP), reachable=True, epoch=2)
        assert peer.passes(REACH_S) == []


class TestReplay:
    def test_sends_the_log_to_the_next_hop(self, opened: Peer) -> None:
        length = REPLAY_POSITIONS + 10
        opened.says(opening(reservation=2000))
        opened.compute(step(Chunk(1, 0, length, 1), fill=3))
        opened.compute(step(Chunk(1, length, 2, 1), fill=4))
        sent = opened.says(Replay(SID, 1, 99, 8))
        assert [destination for destination, _ in sent] == [AFTER, AFTER]
        steps: list[Any] = [message for _, message in sent]
        assert [message.parts for message in steps] == [
            (Chunk(1, 0, REPLAY_POSITIONS, 0),),
            (Chunk(1, REPLAY_POSITIONS, 12, 0),),
        ]
        assert [message.number for message in steps] == [0, 99]
        assert {message.replay_until for message in steps} == {8}
        assert b"".join(message.payload for message in steps) == b"\3" * 4 * HIDDEN * length + b"\4" * 4 * HIDDEN * 2

    def test_of_nothing_is_answered_at_once(self, opened: Peer) -> None:
        [(destination, result)] = opened.says(Replay(SID, 1, 99, 8))
        assert destination == CLIENT
        assert isinstance(result, Result)
        assert (result.number, bytes(result.payload)) == (99, b"")

    def test_steps_end_at_their_boundary_with_one_answer(self, peer: Peer) -> None:
        peer.says(to_client())
        assert peer.compute(step(number=0, replay_until=6), PREVIOUS) == []
        [(destination, result)] = peer.compute(step(Chunk(1, 3, 1, 0), number=99, replay_until=6), PREVIOUS)
        assert (destination, result.number, result.payload) == (CLIENT, 99, b"")
        assert peer.session().log.length(1) == 4

    def test_steps_for_a_later_boundary_are_passed_on(self, opened: Peer) -> None:
        [(destination, pushed)] = opened.compute(step(number=0, replay_until=8), PREVIOUS)
        assert (destination, pushed.replay_until, pushed.number) == (AFTER, 8, 0)

    def test_is_refused_to_strangers_and_for_other_epochs(self, opened: Peer) -> None:
        for source in (STRANGER, PREVIOUS):
            assert code_of(opened.says(Replay(SID, 1, 1, 8), source), source) is FailureCode.UNKNOWN_SESSION
        assert code_of(opened.says(Replay(SID, 2, 1, 8))) is FailureCode.STALE_EPOCH

    def test_without_a_next_hop_is_refused(self, peer: Peer) -> None:
        peer.says(to_client())
        assert code_of(peer.says(Replay(SID, 1, 1, 8))) is FailureCode.STALE_EPOCH

    def test_a_log_is_not_replayed_again_and_again(self, opened: Peer) -> None:
        opened.compute(step())
        epoch = 1
        for number in range(MOST_RESENT):
            epoch = 1 + number // 2
            if epoch > 1:
                opened.says(opening(epoch=epoch))
                opened.service.ping_answered(AFTER)
                opened.heard()
            [(destination, replayed)] = opened.says(Replay(SID, epoch, 99, 8))
            assert destination == AFTER and isinstance(replayed, Step)
        assert code_of(opened.says(Replay(SID, epoch, 99, 8))) is FailureCode.BUSY
        opened.now += RESEND_S
        assert opened.says(Replay(SID, epoch, 99, 8))[0][0] == AFTER
        assert code_of(opened.says(Replay(SID, epoch, 99, 8))) is FailureCode.BUSY

    def test_the_log_forgets_what_rows_forget_also_if_the_step_fails(self, opened: Peer) -> None:
        opened.compute(step())
        log = opened.session().log
        assert log.positions == 3
        assert opened.says(step(Chunk(2, 0, 3, 1), forks=(), number=8)) == []
        work = opened.begin()
        opened.service.report_failure(work, FailureCode.BAD_MESSAGE, "its payload cannot be decoded")
        work.done = work.total
        opened.queue.release_work(work)
        assert log.positions == 0
        opened.heard()
        opened.compute(step(Chunk(3, 0, 3, 1), number=9))
        assert log.positions == 3

    def test_steps_that_wait_take_no_more_memory_than_there_is(self, opened: Peer) -> None:
        opened.queue.memory.limit = 6 * MESSAGE_BYTES
        answers = [opened.says(step(Chunk(1, 0, 1, 1), number=number)) for number in range(1, 9)]
        answers = [opened.says(step(Chunk(2 + number, 0, 1, 1), number=9 + number)) for number in range(8)]
        assert code_of(answers[-1]) is FailureCode.BUSY
        assert 0 < opened.queue.memory.used <= opened.queue.memory.limit
        theirs = bytes(16)
        opened.says(opening(session=theirs), STRANGER)
        assert opened.says(step(session=theirs), STRANGER) == [], "one key leaves memory for others"
        opened.says(Close(SID))
        opened.says(Close(theirs), STRANGER)
        assert opened.queue.memory.used == 0


class TestTime:
    def test_an_idle_session_is_dropped(self, opened: Peer) -> None:
        opened.says(step())
        opened.passes(IDLE_S)
        assert len(opened.table) == 1
        opened.passes(1)
        assert len(opened.table) == 0
        assert opened.table.free_positions == CAPACITY
        assert opened.service.queue.queued_positions == 0

    def test_steps_and_opens_keep_a_session(self, opened: Peer) -> None:
        for message in (opening(), step(), step(Chunk(1, 3, 1, 1))):
            opened.passes(IDLE_S - 1)
            opened.says(message)
        opened.passes(IDLE_S - 1)
        assert len(opened.table) == 1

    def test_strangers_do_not_keep_it(self, opened: Peer) -> None:
        opened.passes(IDLE_S)
        opened.says(step(), STRANGER)
        opened.says(Replay(SID, 1, 1, 8), STRANGER)
        opened.passes(1)
        assert len(opened.table) == 0

    def test_a_silent_client_is_probed_and_its_sessions_end_soon_if_it_is_gone(self, opened: Peer) -> None:
        opened.passes(1)
        probes = opened.passes(PROBE_S)
        assert [destination for destination, _ in probes] == [CLIENT]
        assert all(isinstance(message, Pong) for _, message in probes)
        opened.service.connection_lost(STRANGER, opened.now)
        opened.service.connection_lost(CLIENT, opened.now)
        opened.passes(CLIENT_LOST_S)
        assert len(opened.table) == 1
        # It is lost in every probe, which gives it no more time.
        opened.service.connection_lost(CLIENT, opened.now)
        opened.passes(1)
        assert len(opened.table) == 0

    def test_a_client_that_comes_back_keeps_its_sessions(self, opened: Peer) -> None:
        opened.service.connection_lost(CLIENT, opened.now)
        opened.passes(CLIENT_LOST_S - 1)
        returned = Connection(b"another", CLIENT.curve)
        opened.says(opening(epoch=2), returned)
        opened.passes(CLIENT_LOST_S)
        assert len(opened.table) == 1
        assert opened.session().reply_to == returned


POISON = 666.0


class FakeSpan:
    """Blocks that add one, and fail if they are given `POISON`."""

    start, end, hidden_size = 2, 6, HIDDEN
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.meanwhile: Callable[[], None] | None = None
        """Called once, in a pass."""
        self.passes: list[int] = []
        self.taps: list[tuple[int, ...]] = []
        self.error: Exception = ValueError("a bug in a block")

    def new_row(self, room: int | None = None, adapter: Any = None) -> FakeRow:
        return FakeRow()

    def view(self, start: int, end: int) -> FakeSpan:
        return self

    def forward(self, hidden: torch.Tensor, parts: Sequence[Any], taps: Sequence[int] = ()) -> torch.Tensor:
        self.taps.append(tuple(taps))
        self.passes.append(len(hidden))
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        if (hidden == POISON).any():
            raise self.error
        for part in parts:
            assert part.row.length == part.start
            part.row.length += part.count
        return torch.cat([*(hidden + 10 * tap for tap in taps), hidden + 1], dim=1)


class TestEngine:
    """The engine with one session of each of three clients."""

    @pytest.fixture
    def device(self) -> str:
        return "cpu"

    @pytest.fixture
    def span(self, device: str, monkeypatch: pytest.MonkeyPatch) -> FakeSpan:
        span = FakeSpan()
        monkeypatch.setattr(span, "device", torch.device(device))
        return span

    @pytest.fixture
    def threads(self) -> int:
        """That share the work of a pass."""
        return 1

    @pytest.fixture
    def engine(self, peer: Peer, span: FakeSpan, threads: int, monkeypatch: pytest.MonkeyPatch) -> Engine:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        for name in (1, 2, 3):
            peer.says(to_client(session=bytes([name]) * 16), Connection(bytes([name]), OWNER.curve_raw))
        return Engine(span, peer.service, ObservedSpeed((1.0,) * 5))  # type: ignore[arg-type]

    def send(self, peer: Peer, name: int, value: float = 0.0, start: int = 0, **changes: Any) -> None:
        payload = PLAIN.encode(torch.full((2, HIDDEN), float(value)))
        message = step(Chunk(1, start, 2, 1), session=bytes([name]) * 16, payload=payload, **changes)
        assert peer.says(message, Connection(bytes([name]), OWNER.curve_raw)) == []

    def answers(self, peer: Peer) -> dict[int, Any]:
        """By the number of the session; each has one."""
        heard = [(message.session[0], message) for _, message in peer.heard() if not isinstance(message, Opened)]  # type: ignore[union-attr]
        assert len(dict(heard)) == len(heard)
        return dict(heard)

    def test_runs_what_is_ready_in_one_pass(self, peer: Peer, engine: Engine, span: FakeSpan) -> None:
        for name in (1, 2, 3):
            self.send(peer, name, value=name)
        assert engine._run_next_pass()
        assert span.passes == [6]
        for name, result in self.answers(peer).items():
            assert isinstance(result, Result)
            assert torch.equal(PLAIN.decode(result.payload, 2, HIDDEN), torch.full((2, HIDDEN), name + 1.0))

    def test_hidden_states_go_to_the_client_that_wants_them_behind_what_is_sent_on(
        self, peer: Peer, engine: Engine, span: FakeSpan
    ) -> None:
        """Of several sessions in one pass; also of a session that ends where it wants some."""
        for name, taps in ((1, (3, 6)), (2, (5,))):
            peer.says(to_client(session=bytes([name]) * 16, taps=taps), Connection(bytes([name]), OWNER.curve_raw))
        peer.heard()
        for name in (1, 2, 3):
            self.send(peer, name, value=name)
        assert engine._run_next_pass()
        assert span.passes == [6] and span.taps == [(3, 5)]
        heard: list[Any] = [message for _, message in peer.heard()]
        assert [type(message) for message in heard] == [Result] * 3 + [Tapped] * 3
        found = {(m.session[0], m.boundary): float(PLAIN.decode(m.payload, 1, HIDDEN).mean()) for m in heard[3:]}
        assert found == {(1, 3): 31.0, (1, 6): 2.0, (2, 5): 52.0}

    def test_hidden_states_of_a_step_in_several_passes_come_together(
        self, peer: Peer, engine: Engine, span: FakeSpan
    ) -> None:
        client, count = Connection(b"\1", OWNER.curve_raw), PASS_POSITIONS + 5
        peer.says(to_client(session=b"\1" * 16, taps=(4, 6), reservation=4000), client)
        peer.heard()
        values = torch.arange(float(count))[:, None].expand(count, HIDDEN)
        sent = step(Chunk(1, 0, count, 7), session=b"\1" * 16, payload=PLAIN.encode(values))
        assert peer.says(sent, client) == []
        while not (heard := peer.heard()):
            assert engine._run_next_pass()
        assert span.passes == [PASS_POSITIONS, 5]
        messages: list[Any] = [message for _, message in heard]
        assert [type(message) for message in messages] == [Result, Tapped, Tapped]
        for message, added in zip(messages[1:], (40, 1), strict=True):
            assert torch.equal(PLAIN.decode(message.payload, 7, HIDDEN), values[-7:] + added)

    def test_of_a_step_that_fails_no_hidden_states_come(self, peer: Peer, engine: Engine, span: FakeSpan) -> None:
        client = Connection(b"\1", OWNER.curve_raw)
        peer.says(to_client(session=b"\1" * 16, taps=(4,)), client)
        peer.heard()
        self.send(peer, 1, value=POISON)
        assert engine._run_next_pass()
        [(_, failure)] = peer.heard()
        assert isinstance(failure, Failure)

    def test_a_short_step_alone_runs_in_the_thread_that_received_it(
        self, peer: Peer, engine: Engine, span: FakeSpan
    ) -> None:
        peer.queue.defers = True
        self.send(peer, 1)
        engine.run_here()
        assert span.passes == [2]
        assert isinstance(self.answers(peer)[1], Result)

    @pytest.mark.parametrize("threads", [2])
    def test_where_threads_share_a_pass_the_engines_thread_runs_them_all(
        self, peer: Peer, engine: Engine, span: FakeSpan
    ) -> None:
        peer.queue.defers = True
        self.send(peer, 1)
        engine.run_here()
        assert span.passes == []
        assert engine._run_next_pass()
        assert span.passes == [2]

    @pytest.mark.parametrize(("threads", "device"), [(2, "cuda")])
    def test_a_short_step_of_a_gpu_runs_in_the_thread_that_received_it(
        self, peer: Peer, engine: Engine, span: FakeSpan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
        peer.queue.defers = True
        self.send(peer, 1)
        engine.run_here()
        assert span.passes == [2]

    @pytest.mark.parametrize(
        ("start", "room", "has_states", "forks"),
        [(1, 100, True, None), (2, 3, False, None), (2, 100, False, (Fork(1, 1), Fork(2, 1)))],
        ids=["positions to run once more", "a row that moves", "a copy of a row"],
    )
    def test_what_may_take_longer_is_left_to_the_engines_thread(
        self,
        peer: Peer,
        engine: Engine,
        span: FakeSpan,
        start: int,
        room: int,
        has_states: bool,
        forks: tuple[Fork, ...] | None,
    ) -> None:
        peer.queue.defers = True
        self.send(peer, 1)
        engine.run_here()
        session = peer.table.get(bytes([1]) * 16)
        assert session is not None and span.passes == [2]
        row: Any = session.row_state.caches[1]
        row.room, row.has_states = room, has_states
        peer.heard()
        self.send(peer, 1, start=start, forks=forks)
        engine.run_here()
        assert span.passes == [2]
        assert engine._run_next_pass()
        assert span.passes == [2, 2]

    def test_a_window_of_drafts_that_takes_some_back_runs_in_the_thread_that_received_it(
        self, peer: Peer, engine: Engine, span: FakeSpan
    ) -> None:
        peer.queue.defers = True
        self.send(peer, 1)
        engine.run_here()
        session = peer.table.get(bytes([1]) * 16)
        assert session is not None
        session.row_state.caches[1].room = 100
        peer.heard()
        self.send(peer, 1, start=1)
        engine.run_here()
        assert span.passes == [2, 2]

    def test_steps_of_two_clients_wait_for_one_pass(self, peer: Peer, engine: Engine, span: FakeSpan) -> None:
        peer.queue.defers = True
        self.send(peer, 1)
        self.send(peer, 2)
        engine.run_here()
        assert span.passes == []
        engine._run_next_pass()
        assert span.passes == [4]

    def test_while_the_device_is_busy_a_step_is_left_to_the_engines_thread(
        self, peer: Peer, engine: Engine, span: FakeSpan
    ) -> None:
        peer.queue.defers = True
        threads, ran = list[int](), threading.Event()
        span.meanwhile = lambda: (threads.append(threading.get_ident()), ran.set())[1]
        engine.start()
        try:
            with engine._turns:
                self.send(peer, 1)
                engine.run_here()
                assert span.passes == []
            assert ran.wait(20)
        finally:
            engine.close()
        assert threads != [threading.get_ident()]

    def test_the_device_is_measured_between_passes(self, peer: Peer, engine: Engine, span: FakeSpan) -> None:
        engine.measure_when_idle()
        self.send(peer, 1)
        assert engine._run_next_pass()
        assert span.passes == [2], "steps come first"
        assert engine._run_next_pass()
        assert [size for size, _ in itertools.groupby(span.passes[1:])] == list(PASS_SIZES)
        assert engine._speed.block_ms != (1.0,) * 5

    def test_measuring_gives_way_to_a_step(self, peer: Peer, engine: Engine, span: FakeSpan) -> None:
        span.meanwhile = lambda: self.send(peer, 1)
        engine.measure_when_idle()
        engine._run_next_pass()
        assert span.passes == [1]
        engine._run_next_pass()
        assert span.passes == [1, 2]
        assert isinstance(self.answers(peer)[1], Result)

    def test_the_clock_is_read_after_the_device_has_finished(
        self, peer: Peer, engine: Engine, span: FakeSpan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[object] = []
        forward, counter = span.forward, time.perf_counter
        monkeypatch.setattr(span, "device", torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: calls.append(device.type))
        monkeypatch.setattr(span, "forward", lambda *given: (calls.append("pass"), forward(*given))[1])
        monkeypatch.setattr(time, "perf_counter", lambda: (calls.append("clock"), counter())[1])
        self.send(peer, 1)
        engine._run_next_pass()
        assert calls[-4:] == ["clock", "pass", "cuda", "clock"]
        measure_speed(span)  # type: ignore[arg-type]
        assert calls[-5:] == ["cuda", "clock", "pass", "cuda", "clock"]

    def test_a_step_that_breaks_a_pass_fails_alone(self, peer: Peer, engine: Engine) -> None:
        for name in (1, 2, 3):
            self.send(peer, name, value=POISON if name == 2 else 0.0)
        engine._run_next_pass()
        answers = self.answers(peer)
        assert [type(answers[name]) for name in (1, 2, 3)] == [Result, Failure, Result]
        assert answers[2].code == FailureCode.INTERNAL
        assert "bug" not in answers[2].text, "what went wrong inside is for the log"
        assert peer.queue.queued_positions == 0
        # Its session goes on.
        self.send(peer, 2)
        engine._run_next_pass()
        assert isinstance(self.answers(peer)[2], Result)

    def test_others_run_while_a_row_catches_up(
        self, peer: Peer, engine: Engine, span: FakeSpan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def catch_up(row: FakeRow, adapter: object, most: int) -> int:
            owed[row] = max(0, owed[row] - most)
            return most

        owed: dict[FakeRow, int] = {}
        monkeypatch.setattr(FakeRow, "computed", property(lambda row: row.length - owed.get(row, 0)))
        monkeypatch.setattr(span, "catch_up", catch_up, raising=False)
        self.send(peer, 1)
        engine._run_next_pass()
        self.answers(peer)
        session = peer.table.get(b"\1" * 16)
        assert session is not None
        owed[session.row_state.caches[1]] = 3 * PASS_POSITIONS  # type: ignore[index]
        done = session.done
        self.send(peer, 1, start=2)
        for _ in range(2):
            self.send(peer, 2)
            engine._run_next_pass()
            assert set(self.answers(peer)) == {2}
        assert session.done == done + 2 * PASS_POSITIONS
        engine._run_next_pass()
        assert set(self.answers(peer)) == {1}

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError(),
            MemoryError(),
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            RuntimeError("CUDA error: out of memory"),
        ],
    )
    def test_memory_that_is_used_up_is_told_and_not_offered_again(
        self, error: Exception, peer: Peer, engine: Engine, span: FakeSpan
    ) -> None:
        span.error = error
        session = peer.table.get(bytes([1]) * 16)
        assert session is not None
        memory, limit = peer.table.memory, peer.table.memory.limit
        for name in (1, 2):
            self.send(peer, name, value=POISON if name == 1 else 0.0)
        engine._run_next_pass()
        answers = self.answers(peer)
        assert isinstance(answers[2], Result)
        assert answers[1].code == FailureCode.BUSY and "memory is short" in answers[1].text
        held, used = memory.held_bytes(session.owner, session), memory.used
        offered = (limit - used + held) // 2
        assert memory.limit == used - held + offered and memory.free == max(0, offered - held)
        peer.table.remove(session)
        assert memory.used == used - held and memory.free == offered, "others keep what they have"
        peer.service.tick(time.monotonic() + SHORTAGE_S)
        assert memory.limit == limit

    def test_rows_for_which_there_is_no_memory_are_not_offered_again(
        self, peer: Peer, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_memory(row: FakeRow, *_: object) -> FakeRow:
            raise MemoryError

        self.send(peer, 1)
        engine._run_next_pass()
        peer.heard()
        monkeypatch.setattr(FakeRow, "fork", no_memory)
        limit = peer.table.memory.limit
        self.send(peer, 1, forks=(Fork(1, 1), Fork(2, 1)))
        engine._run_next_pass()
        assert self.answers(peer)[1].code == FailureCode.BUSY
        assert peer.table.memory.limit < limit

    def test_refused_steps_fail_alone(self, peer: Peer, engine: Engine) -> None:
        self.send(peer, 1, start=9)
        self.send(peer, 2, forks=(Fork(1, 5),))
        self.send(peer, 3)
        engine._run_next_pass()
        answers = self.answers(peer)
        assert [answers[name].code for name in (1, 2)] == [FailureCode.OUT_OF_ORDER] * 2
        assert isinstance(answers[3], Result)

    def test_an_error_while_rows_are_copied_ends_nothing(
        self, peer: Peer, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_memory(row: FakeRow) -> FakeRow:
            raise RuntimeError("cannot allocate")

        self.send(peer, 1)
        engine._run_next_pass()
        peer.heard()
        monkeypatch.setattr(FakeRow, "fork", no_memory)
        self.send(peer, 1, forks=(Fork(1, 1), Fork(2, 1)))
        self.send(peer, 2)
        assert engine._run_next_pass()
        answers = self.answers(peer)
        assert answers[1].code == FailureCode.INTERNAL
        assert isinstance(answers[2], Result)

    def test_an_error_while_a_result_is_sent_fails_alone(
        self, peer: Peer, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish = peer.service.outputs.finish_step

        def fail(work: Work) -> None:
            if work.session.id[0] == 2:
                raise RuntimeError("a bug")
            finish(work)

        monkeypatch.setattr(peer.service.outputs, "finish_step", fail)
        for name in (1, 2, 3):
            self.send(peer, name)
        engine._run_next_pass()
        answers = self.answers(peer)
        assert [type(answers[name]) for name in (1, 2, 3)] == [Result, Failure, Result]

    def test_a_session_that_closes_while_a_pass_is_made_disturbs_nobody(
        self, peer: Peer, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.send(peer, 1)
        engine._run_next_pass()
        peer.heard()
        self.send(peer, 1, start=2)
        self.send(peer, 2)
        compute = engine._compute

        def close_first(ready: list[tuple[Work, int]]) -> None:
            peer.says(Close(b"\1" * 16), Connection(b"\1", OWNER.curve_raw))
            compute(ready)

        monkeypatch.setattr(engine, "_compute", close_first)
        engine._run_next_pass()
        assert [type(answer) for answer in self.answers(peer).values()] == [Result]
        assert peer.queue.queued_positions == 0

    def test_a_session_that_has_ended_is_not_computed(self, peer: Peer, engine: Engine, span: FakeSpan) -> None:
        self.send(peer, 1)
        session = peer.table.get(b"\1" * 16)
        assert session is not None
        peer.table.remove(session)
        engine._run_next_pass()
        assert span.passes == []
        assert peer.heard() == []

    def test_a_step_longer_than_a_pass_takes_several(self, peer: Peer, engine: Engine, span: FakeSpan) -> None:
        length = 900
        payload = PLAIN.encode(-torch.arange(length * HIDDEN).reshape(length, HIDDEN).float())
        client = Connection(b"\1", OWNER.curve_raw)
        peer.says(step(Chunk(1, 0, length, 1), session=b"\1" * 16, payload=payload), client)
        engine._run_next_pass()
        self.send(peer, 2)
        engine._run_next_pass()
        assert sum(span.passes) == length + 2
        answers = self.answers(peer)
        assert torch.equal(PLAIN.decode(answers[1].payload, length, HIDDEN), PLAIN.decode(payload, length, HIDDEN) + 1)
        assert isinstance(answers[2], Result)

    def test_a_ping_tells_the_progress_of_a_session(self, peer: Peer, engine: Engine) -> None:
        def progress() -> tuple[int, int]:
            peer.heard()
            [(_, pong)] = peer.says(Ping(5, session=b"\1" * 16))
            assert isinstance(pong, Pong) and pong.holds
            return pong.waiting, pong.done

        assert progress() == (0, 0)
        self.send(peer, 1)
        self.send(peer, 1, start=2)
        assert progress() == (2, 0)
        engine._run_next_pass()
        assert progress() == (1, 2)
        engine._run_next_pass()
        assert progress() == (0, 4)
        self.send(peer, 1, start=9)  # is refused: positions are missing before it
        assert progress() == (1, 4)
        engine._run_next_pass()
        assert progress() == (0, 4)

    def test_keeps_no_session_alive(self, peer: Peer, engine: Engine) -> None:
        self.send(peer, 1)
        engine._run_next_pass()
        session = peer.table.get(b"\1" * 16)
        assert session is not None
        row: Any = session.row_state.caches[1]
        alive = weakref.ref(row)
        del row, session
        peer.says(Close(b"\1" * 16), Connection(b"\1", OWNER.curve_raw))
        gc.collect()
        assert alive() is None, "the memory of its rows is free at once"


class TestOthers:
    def test_a_ping_is_answered_with_the_load(self, opened: Peer) -> None:
        opened.service.ms_per_position = 2.5
        opened.service.queue.queued_positions = 5
        assert opened.says(Ping(5, b"padding"), STRANGER) == [(STRANGER, Pong(5, 12.5, CAPACITY - 1000))]

    def test_who_asks_is_told_how_busy_the_device_has_been(self, opened: Peer) -> None:
        opened.service.load.observe(opened.now, [40.0], [3])
        [(_, answer)] = opened.says(Ping(5, load=True), STRANGER)
        assert isinstance(answer, Pong)
        [told] = answer.load
        assert (told.wait_ms, told.batch) == opened.service.load.estimate_at(opened.now) > (0.0, 0.0)
        assert abs(told.at - time.time()) < 60

    def test_only_the_owner_of_a_session_learns_of_it_by_a_ping(self, opened: Peer) -> None:
        unknown = Pong(5, 0.0, CAPACITY - 1000)
        held = replace(unknown, holds=True)
        assert opened.says(Ping(5, session=SID)) == [(CLIENT, held)]
        assert opened.says(Ping(5, session=SID), STRANGER) == [(STRANGER, unknown)]
        assert opened.says(Ping(5, session=SID), PREVIOUS) == [(PREVIOUS, unknown)]
        assert opened.says(Ping(5, session=bytes(16))) == [(CLIENT, unknown)]
        assert opened.says(Ping(5)) == [(CLIENT, unknown)]
        session = opened.table.get(SID)
        assert session is not None
        session.route_state.timing = Timing(1, 2, 3)
        assert opened.says(Ping(5, session=SID)) == [(CLIENT, replace(held, timing=(Timing(1, 2, 3),)))]
        assert opened.says(Ping(5, session=SID), STRANGER) == [(STRANGER, unknown)]
        opened.says(Close(SID))
        assert opened.says(Ping(5, session=SID)) == [(CLIENT, Pong(5, 0.0, CAPACITY))]

    def test_what_was_sent_on_counts_as_work_until_a_ping_behind_it_is_answered(self, opened: Peer) -> None:
        def waiting() -> int:
            [(_, pong)] = opened.says(Ping(5, session=SID))
            assert isinstance(pong, Pong)
            return pong.waiting

        assert waiting() == 0 and opened.outbox.probed == []
        opened.compute(step())
        assert [waiting(), waiting()] == [1, 1] and opened.outbox.probed == [AFTER], "one ping tells of all before it"
        opened.outbox.answers = 1
        assert waiting() == 0
        opened.compute(step(Chunk(1, 3, 1, 1), number=8))
        assert waiting() == 1, "the ping that came back went before this"
        opened.outbox.states[AFTER] = LinkState.DOWN
        assert waiting() == 0, "what was on a link that is lost is lost"
        opened.outbox.states[AFTER] = LinkState.UP
        opened.says(opening(epoch=2))
        assert waiting() == 0, "it is sent again in a newer epoch"

    @pytest.mark.parametrize(
        "message", [Pong(1, 0, 0), Opened(SID, 1, True, 0), Result(SID, 1, 1, 6, 0, ()), Failure(SID, 1, 1, 1, "x")]
    )
    def test_what_only_peers_say_is_refused(self, opened: Peer, message: Message) -> None:
        assert code_of(opened.says(message)) is FailureCode.BAD_MESSAGE

    def test_a_sender_of_another_version_is_told(self, peer: Peer) -> None:
        peer.service.reject(CLIENT, ProtocolVersionError("the other side speaks protocol 9"))
        assert code_of(peer.heard()) is FailureCode.BAD_MESSAGE

    def test_frames_that_are_no_message_are_dropped(self, peer: Peer) -> None:
        peer.service.reject(CLIENT, ProtocolError("no message"))
        peer.service.reject(AFTER, ProtocolVersionError("the other side speaks protocol 9"))
        assert peer.heard() == []

    def test_what_the_next_hop_refuses_is_told_to_the_client(self, opened: Peer) -> None:
        failure = Failure(SID, 1, 7, FailureCode.UNKNOWN_SESSION, "no session")
        assert opened.says(failure, AFTER) == [(CLIENT, failure)]
        assert opened.says(failure, OTHER) == []
        assert opened.says(replace(failure, epoch=2), AFTER) == []
        assert opened.says(replace(failure, session=b""), AFTER) == []

    @pytest.mark.parametrize("message", [Ping(1), opening(), step(), Close(SID), Replay(SID, 1, 1, 8)])
    def test_a_next_hop_has_nothing_else_to_say(self, opened: Peer, message: Message) -> None:
        assert opened.says(message, AFTER) == []
        assert opened.session() is not None

    def test_what_could_not_be_sent_on_is_told_to_the_client(self, opened: Peer) -> None:
        for lost in (step(), Result(SID, 1, 7, 6, 0, ()), replace(step(), number=0)):
            opened.service.dropped(lost, "its receiver is too slow")
            [(destination, failure)] = opened.heard()
            assert destination == CLIENT and isinstance(failure, Failure)
            assert (failure.code, failure.number) == (FailureCode.BUSY, lost.number)
        for untold in (replace(step(), epoch=2), replace(step(), session=bytes(16)), failure, Pong(1, 0, 0)):
            opened.service.dropped(untold, "its receiver is too slow")
        assert opened.heard() == []

    def test_a_failed_step_is_told_to_the_client(self, opened: Peer) -> None:
        opened.says(step(), PREVIOUS)
        work = opened.begin()
        opened.service.report_failure(work, FailureCode.INTERNAL, "x" * 9999)
        assert code_of(opened.heard()) is FailureCode.INTERNAL


class SlowStore(PrefixStore):
    """Finds pages when the test says so."""

    def __init__(self) -> None:
        super().__init__("facts", lambda: 1 << 30)
        self.asked: list[tuple[Sequence[bytes], Callable[[list[Page]], None]]] = []

    def lookup_prefix(self, space: PageNamespace, labels: Sequence[bytes], then: Callable[[list[Page]], None]) -> None:
        self.asked.append((labels, then))


class TestPages:
    """Pages that are looked for while a session is opened."""

    LABELS = tuple(bytes((number % 256, number // 256, *bytes(14))) for number in range(MAX_LABELS))

    @pytest.fixture
    def slow(self, peer: Peer) -> Peer:
        peer.table.prefixes = SlowStore()
        return peer

    def asks(self, **changes: Any) -> Open:
        return to_client(context=bytes(16), row=1, labels=self.LABELS, **changes)

    def found(self, peer: Peer, which: int, pages: int) -> list[tuple[Destination, Message]]:
        assert isinstance(peer.table.prefixes, SlowStore)
        labels, then = peer.table.prefixes.asked[which]
        then([Page(label, {"0.keys": torch.zeros(1)}) for label in labels[:pages]])
        return peer.heard()

    def test_it_is_said_to_be_open_once_they_are_found(self, slow: Peer) -> None:
        assert slow.says(self.asks()) == []
        [(_, message)] = self.found(slow, 0, 2)
        assert isinstance(message, Opened)
        assert (message.looked_up, message.cached_positions) == (True, 2 * PAGE)

    def test_no_more_are_looked_for_than_are_reserved(self, slow: Peer) -> None:
        slow.says(self.asks(reservation=1000))
        assert isinstance(slow.table.prefixes, SlowStore)
        assert len(slow.table.prefixes.asked[0][0]) == 1000 // PAGE

    def test_a_disk_that_hangs_does_not_hold_it_up(self, slow: Peer) -> None:
        slow.says(self.asks())
        assert slow.passes(READ_S) == []
        [(_, message)] = slow.passes(READ_S)
        assert isinstance(message, Opened) and not message.looked_up
        assert self.found(slow, 0, 2) == [] and slow.session().row_state.hit is None

    @pytest.mark.parametrize("then", ["closed", "a newer epoch", "without labels"])
    def test_what_is_found_too_late_counts_no_more(self, slow: Peer, then: str) -> None:
        slow.says(self.asks())
        if then == "closed":
            assert slow.says(Close(SID)) == []
        elif then == "a newer epoch":
            assert slow.says(self.asks(epoch=2)) == []
        else:
            assert is_opened(slow.says(to_client(context=bytes(16), epoch=2)), reachable=True, epoch=2)
        assert self.found(slow, 0, 3) == []
        if then == "a newer epoch":
            [(_, message)] = self.found(slow, 1, 1)
            assert isinstance(message, Opened)
            assert (message.epoch, message.cached_positions) == (2, PAGE)

    def test_asking_again_and_again_holds_no_more_memory(self, slow: Peer) -> None:
        for epoch in range(1, 50):
            slow.says(self.asks(epoch=epoch))
            self.found(slow, epoch - 1, 7)
        assert slow.session().log.nbytes == 0, "nothing is logged before a step goes on there"
        assert len(slow.table) == 1

    def test_labels_of_wrong_count_are_refused(self, slow: Peer) -> None:
        slow.says(self.asks())
        self.found(slow, 0, 0)
        assert code_of(slow.says(step(labels=self.LABELS[:1]))) is FailureCode.BAD_MESSAGE
        assert code_of(slow.says(step(Chunk(1, 0, 2 * PAGE, 1), labels=self.LABELS[:1]))) is FailureCode.BAD_MESSAGE

    def test_a_stranger_learns_nothing_of_them(self, slow: Peer) -> None:
        slow.says(self.asks())
        self.found(slow, 0, 2)
        assert code_of(slow.says(self.asks(epoch=2), STRANGER), STRANGER) is FailureCode.UNKNOWN_SESSION
        own = replace(self.asks(), session=bytes(16))
        slow.says(own, STRANGER)
        held = slow.table.get(bytes(16))
        assert held is not None and held.namespace != slow.session().namespace
