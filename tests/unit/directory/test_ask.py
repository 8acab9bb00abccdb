"""The directory without a DHT: how the answers of peers are merged, and what a malicious peer cannot do."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from splitnet.directory import ask
from splitnet.directory.ask import PART_BYTES, REMEMBERED_MODELS, PeerDirectory, parts_of
from splitnet.directory.interface import OWN_DEPTH
from splitnet.directory.record import PeerRecord, verified_record
from splitnet.errors import DirectoryError
from splitnet.security.identity import Identity
from splitnet.transport.addresses import check_peer_address, endpoint_of, peer_address
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.fields import packb
from splitnet.wire.messages import (
    MAX_DEPTH,
    MAX_FOUND,
    Announce,
    Announced,
    Failure,
    FailureCode,
    Found,
    LookUp,
    Message,
    decode,
    encode,
)
from tests.unit.directory.test_directory import record_of

MODEL = "ab" * 16
Script = Callable[[LookUp | Announce], Sequence[Message]]


def signed(identity: Identity | None = None, **changes: Any) -> PeerRecord:
    """A record of a peer of the model, in the form in which other processes read it."""
    identity = identity or Identity.generate()
    return PeerRecord.unpack(record_of(identity, **({"model": MODEL} | changes)).pack(identity))


def tells(*records: PeerRecord) -> Script:
    """A peer that answers with these records, and takes every announcement."""

    def answer(asked: LookUp | Announce) -> Sequence[Message]:
        if isinstance(asked, Announce):
            return [Announced(asked.number, True)]
        parts = parts_of(records)
        return [Found(asked.number, len(parts) - 1 - at, part) for at, part in enumerate(parts)]

    return answer


def says_nothing(asked: LookUp | Announce) -> Sequence[Message]:
    return []


class ScriptedPeers:
    """Links to peers that answer by scripts of the test. All messages are encoded to frames and decoded."""

    def __init__(self) -> None:
        self.on_answer: Callable[[Endpoint, Message], None] | None = None
        self.scripts: dict[Endpoint, Script] = {}
        self.states: dict[Endpoint, LinkState] = {}
        self.asked: list[tuple[Endpoint, Message]] = []
        self.connecting: set[Endpoint] = set()
        self.closed = False

    def add(self, script: Script, state: LinkState = LinkState.UP) -> Endpoint:
        endpoint = Endpoint(f"tcp://127.0.0.1:{1000 + len(self.scripts)}", Identity.generate().public)
        self.scripts[endpoint] = script
        self.states[endpoint] = state
        return endpoint

    def send(self, endpoint: Endpoint, message: Message) -> None:
        self.asked.append((endpoint, message))
        assert isinstance(message, LookUp | Announce)
        for answer in self.scripts.get(endpoint, says_nothing)(message):
            self.say(endpoint, answer)

    def say(self, endpoint: Endpoint, message: Message) -> None:
        assert self.on_answer is not None
        self.on_answer(endpoint, decode(encode(message)))

    def link_state(self, endpoint: Endpoint) -> LinkState:
        return self.states.get(endpoint, LinkState.CONNECTING)

    def is_connecting(self, endpoint: Endpoint) -> bool:
        return endpoint in self.connecting

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedPeers]:
    monkeypatch.setattr(ask, "DIRECTORY_ANSWER_S", 0.2)
    monkeypatch.setattr(ask, "DIRECTORY_OTHERS_S", 0.05)
    monkeypatch.setattr(ask, "DIRECTORY_DOWN_S", 0.0)
    yield ScriptedPeers()


def test_the_latest_record_of_each_peer_counts(links: ScriptedPeers) -> None:
    moved, left, stays = Identity.generate(), Identity.generate(), signed()
    now = time.time()
    old, new = (signed(moved, issued_at=now - age, end=end) for age, end in ((20, 2), (10, 3)))
    there = signed(left, issued_at=now - 5)
    gone = PeerRecord.unpack(there.farewell().pack(left))
    asked = PeerDirectory([links.add(tells(new, there)), links.add(tells(old, gone)), links.add(tells(stays))], links)
    assert sorted(asked.peers(MODEL), key=lambda record: record.end) == [new, stays]


def test_each_model_is_listed_once(links: ScriptedPeers) -> None:
    other = signed(model="cd" * 16, model_name="another")
    asked = PeerDirectory([links.add(tells(signed(), other)), links.add(tells(other))], links)
    assert asked.models() == {MODEL: "tiny", "cd" * 16: "another"}
    assert [message.model for _, message in links.asked if isinstance(message, LookUp)] == ["", ""]


def forges(asked: LookUp | Announce) -> Sequence[Message]:
    record = signed()
    changed = bytearray(record.signed)
    changed[-1] ^= 1
    elsewhere = signed(model="ef" * 16)
    late = signed(issued_at=time.time() + 1000)
    void = signed(issued_at=time.time() - 1000)
    packed = [bytes(changed), b"no record", elsewhere.signed, late.signed, void.signed]
    return [Found(asked.number, 2, packb(packed)), Found(asked.number, 1, b"\xff"), Found(asked.number, 0, packb([7]))]


def counts_wrongly(asked: LookUp | Announce) -> Sequence[Message]:
    return [Found(asked.number, MAX_FOUND - 1, b""), Found(asked.number, 0, b"")]


def never_ends(asked: LookUp | Announce) -> Sequence[Message]:
    return [Found(asked.number, MAX_FOUND - 1, b"")]


def refuses(asked: LookUp | Announce) -> Sequence[Message]:
    return [Failure(b"", 0, asked.number, FailureCode.BUSY, "ask again in 7 s")]


@pytest.mark.parametrize(
    "wrong", [forges, counts_wrongly, never_ends, refuses, tells(), says_nothing], ids=lambda script: script.__name__
)
@pytest.mark.parametrize("first", [True, False])
def test_a_lying_or_empty_peer_hides_no_record(links: ScriptedPeers, wrong: Script, first: bool) -> None:
    honest = signed()
    scripts = [wrong, tells(honest)] if first else [tells(honest), wrong]
    asked = PeerDirectory([links.add(script) for script in scripts], links)
    assert asked.peers(MODEL) == [honest]


def test_an_earlier_record_does_not_hide_a_later_one(links: ScriptedPeers) -> None:
    peer, now = Identity.generate(), time.time()
    left = PeerRecord.unpack(record_of(peer, model=MODEL, issued_at=now - 30).farewell(now - 20).pack(peer))
    back = signed(peer, issued_at=now)
    asked = PeerDirectory([links.add(tells(left)), links.add(tells(back))], links)
    assert asked.peers(MODEL) == [back]


def test_answers_of_other_peers_and_second_answers_are_ignored(links: ScriptedPeers) -> None:
    honest, liar = signed(), signed()
    peer = links.add(says_nothing)
    other = links.add(says_nothing)

    def interrupted(asked: LookUp | Announce) -> Sequence[Message]:
        links.say(other, Found(asked.number, 0, packb([liar.signed])))
        links.say(peer, Found(asked.number, 0, packb([honest.signed])))
        return [Found(asked.number, 0, packb([liar.signed])), Announced(asked.number, True)]

    links.scripts[peer] = interrupted
    assert PeerDirectory([peer], links).peers(MODEL) == [honest]


def test_an_answer_is_cut_at_its_bound(links: ScriptedPeers, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [signed() for _ in range(4)]
    monkeypatch.setattr(ask, "MAX_ANSWER_BYTES", 2 * len(records[0].signed) + 40)
    assert len(parts_of(records)) == 1

    def endless(asked: LookUp | Announce) -> Sequence[Message]:
        return [Found(asked.number, 3 - at, packb([record.signed])) for at, record in enumerate(records)]

    assert PeerDirectory([links.add(endless)], links).peers(MODEL) == records[:2]


def test_late_answers_count_from_the_next_question_on(links: ScriptedPeers) -> None:
    early, late = signed(), signed()
    slow = links.add(says_nothing)
    asked = PeerDirectory([links.add(tells(early)), slow], links)
    assert asked.peers(MODEL) == [early]
    question = next(message for endpoint, message in links.asked if endpoint == slow)
    assert isinstance(question, LookUp)
    links.say(slow, Found(question.number, 0, packb([late.signed])))
    assert asked.peers(MODEL) == [early, late]
    assert asked.peers(MODEL) == [early, late]  # although the late peer has not answered these questions


def test_an_error_names_the_reason_of_each_silent_peer(links: ScriptedPeers) -> None:
    states = {
        LinkState.REFUSED: "does not accept this key",
        LinkState.WRONG_KEY: "ends the handshake as if it had another key",
        LinkState.UP: "does not answer",
        LinkState.DOWN: "is not reached",
        LinkState.CONNECTING: "is not reached",
    }
    endpoints = {links.add(says_nothing, state): text for state, text in states.items()}
    busy = links.add(refuses)
    with pytest.raises(DirectoryError) as told:
        PeerDirectory.join_peers([*endpoints, busy], links)
    for endpoint, text in {**endpoints, busy: "refuses (ask again in 7 s)"}.items():
        assert f"{peer_address(endpoint)} {text}" in str(told.value)


def test_other_peers_are_asked_when_the_joined_ones_are_gone(links: ScriptedPeers) -> None:
    other = Identity.generate()
    record = signed(other, address="tcp://127.0.0.1:999")
    joined = links.add(tells(record))
    asked = PeerDirectory([joined], links)
    assert asked.peers(MODEL) == [record]
    found_later = signed()
    links.scripts[joined] = says_nothing
    links.scripts[record.endpoint] = tells(record, found_later)
    assert set(asked.peers(MODEL)) == {record, found_later}
    identity = Identity.generate()
    assert asked.announce(record_of(identity, model=MODEL), identity)
    assert record.endpoint in [endpoint for endpoint, message in links.asked if isinstance(message, Announce)]


def test_a_late_answer_counts_while_other_peers_are_asked(links: ScriptedPeers) -> None:
    record = signed()
    far = links.add(tells(record))
    asked = PeerDirectory([far], links)
    assert asked.peers(MODEL) == [record]
    questions: list[LookUp | Announce] = []
    found_later = signed()

    def answers_late(question: LookUp | Announce) -> Sequence[Message]:
        questions.append(question)
        return []

    def lets_the_late_answer_come(_: LookUp | Announce) -> Sequence[Message]:
        for answer in tells(found_later)(questions[0]):
            links.say(far, answer)
        return []

    links.scripts |= {far: answers_late, record.endpoint: lets_the_late_answer_come}
    assert asked.peers(MODEL) == [found_later]
    assert len(questions) == 1


def test_the_depth_of_a_question_is_bounded(links: ScriptedPeers) -> None:
    asked = PeerDirectory([links.add(tells(signed()))], links, serving=True)
    for depth in range(MAX_DEPTH + 2):
        asked.records(MODEL, depth)
        identity = Identity.generate()
        record = record_of(identity, model=MODEL)
        assert asked.store_record(record, record.pack(identity), depth)
    told = [message.depth for _, message in links.asked if isinstance(message, LookUp | Announce)]
    assert told == sorted([*range(MAX_DEPTH + 1), *range(MAX_DEPTH + 1)])


def test_a_question_for_another_process_ends_before_that_process_gives_up(
    links: ScriptedPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    asked = PeerDirectory([links.add(says_nothing)], links, serving=True)
    monkeypatch.setattr(ask, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    monkeypatch.setattr(asked._heard, "wait", lambda seconds: now.__setitem__(0, now[0] + seconds))
    ends: list[float] = []
    for depth in range(1, OWN_DEPTH + 1):
        began = now[0]
        with pytest.raises(DirectoryError):
            asked.records(MODEL, depth)
        ends.append(now[0] - began)
    assert ends == pytest.approx([ask.DIRECTORY_ANSWER_S * depth / OWN_DEPTH for depth in range(1, OWN_DEPTH + 1)])


def test_a_void_record_is_not_kept_for_others(links: ScriptedPeers) -> None:
    asked = PeerDirectory([], links, serving=True)
    for issued_at in (time.time() - 61, time.time() + 1000):
        record = signed(issued_at=issued_at)
        assert not asked.store_record(record, record.signed, depth=0)
    assert asked.peers(MODEL) == []


def test_a_serving_peer_keeps_what_others_announce_to_it(links: ScriptedPeers) -> None:
    upstream = links.add(says_nothing)
    asked = PeerDirectory([upstream], links, serving=True)
    record = signed()
    assert asked.store_record(record, record.signed, depth=1)  # also while the joined peers are gone
    assert asked.peers(MODEL) == [record]
    assert asked.models() == {MODEL: "tiny"}
    asked.close()
    assert links.closed


def test_a_refused_serving_peer_keeps_its_known_records(links: ScriptedPeers) -> None:
    upstream = links.add(tells(told := signed()))
    asked = PeerDirectory([upstream], links, serving=True)
    own = Identity.generate()
    asked.announce(record_of(own, model=MODEL), own)
    assert {record.key for record in asked.peers(MODEL)} == {own.public, told.key}
    for others in range(REMEMBERED_MODELS + 1):  # meanwhile strangers ask about other models
        asked.records(f"{others:032x}", MAX_DEPTH)
    links.scripts[upstream] = refuses
    assert {record.key for record in asked.peers(MODEL)} == {own.public, told.key}


def test_only_the_latest_answer_of_each_peer_is_kept(links: ScriptedPeers) -> None:
    hostile = Identity.generate()

    def tells_new_ones(asked: LookUp | Announce) -> Sequence[Message]:
        return tells(signed(hostile))(asked)

    asked = PeerDirectory([links.add(tells_new_ones), links.add(never_ends)], links)
    for _ in range(10):
        asked.peers(MODEL)
    verified_record.cache_clear()
    gc.collect()
    made = [record for record in gc.get_objects() if type(record) is PeerRecord and record.key == hostile.public]
    assert len(made) <= 2


def test_a_client_keeps_no_records_and_its_links_stay_open(links: ScriptedPeers) -> None:
    record = signed()
    asked = PeerDirectory([links.add(says_nothing)], links)
    assert not asked.store_record(record, record.signed, depth=0)
    with pytest.raises(DirectoryError, match="No peer answers with records"):
        asked.announce(*_of_mine())
    asked.close()
    assert not links.closed


def _of_mine() -> tuple[PeerRecord, Identity]:
    identity = Identity.generate()
    return record_of(identity, model=MODEL), identity


def test_a_far_peer_is_waited_for_during_its_handshake(links: ScriptedPeers) -> None:
    honest = signed()
    timers: list[threading.Timer] = []

    def late(asked: LookUp | Announce) -> Sequence[Message]:
        def come() -> None:
            links.connecting.clear()
            links.say(far, *tells(honest)(asked))

        timers.append(threading.Timer(3 * ask.DIRECTORY_ANSWER_S, come))
        timers[-1].start()
        return []

    far = links.add(late, LinkState.CONNECTING)
    links.connecting.add(far)
    assert PeerDirectory([far], links).peers(MODEL) == [honest]
    for timer in timers:
        timer.join()


def test_an_answer_of_lists_of_lists_takes_no_memory(links: ScriptedPeers) -> None:
    lists = b"\xdc\x04\x00" + b"\x90" * 1024
    bomb = b"\x93" + (b"\xdc\x04\x00" + lists * 1024) * 3
    honest = signed()
    asked = PeerDirectory([links.add(lambda asked: [Found(asked.number, 0, bomb)]), links.add(tells(honest))], links)
    tracemalloc.start()
    try:
        assert asked.peers(MODEL) == [honest]
        assert tracemalloc.get_traced_memory()[1] < 8 * len(bomb)
    finally:
        tracemalloc.stop()


def test_answers_are_split_into_parts_of_bounded_size() -> None:
    records = [dataclasses.replace(signed(), model_name="x" * 150) for _ in range(2)]
    for record in records:
        object.__setattr__(record, "signed", os.urandom(2500))
    parts = parts_of(records * 60)
    assert len(parts) > 4
    assert all(len(part) <= PART_BYTES + 16 for part in parts)
    assert parts_of([]) == [b""]


def test_the_address_of_a_peer_comes_back_from_its_text() -> None:
    endpoint = Endpoint("tcp://[::1]:31331", Identity.generate().public)
    assert endpoint_of(peer_address(endpoint)) == endpoint
    named = f"tcp://localhost:31331?key={endpoint.key.text}"
    assert endpoint_of(named).address in ("tcp://127.0.0.1:31331", "tcp://[::1]:31331")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.partition("?")[0], "not the address of a peer"),
        (lambda text: text.replace(":31331", ""), "not the address of a peer"),
        (lambda text: text.replace(":31331", ":0"), "not the address of a peer"),
        (lambda text: text[:-1], "is not a splitnet key"),
        (lambda text: text[:-1] + ("a" if text[-1] != "a" else "b"), "checksum"),
    ],
)
def test_an_invalid_address_of_a_peer_is_refused_with_the_reason(change: Callable[[str], str], reason: str) -> None:
    address = change(peer_address(Endpoint("tcp://127.0.0.1:31331", Identity.generate().public)))
    with pytest.raises(DirectoryError, match=reason):
        check_peer_address(address)


def test_clocks_of_peers_are_estimated_from_their_records(links: ScriptedPeers) -> None:
    own, now = Identity.generate(), time.time()
    ahead, right = (signed(address=f"tcp://127.0.0.1:{port}", issued_at=now + by) for port, by in ((7, 7200), (8, -9)))
    mine = signed(own, issued_at=now - 8000)
    asked = PeerDirectory([links.add(tells(ahead, right, mine))], links)
    asked._own.add(own.public)
    assert not asked.clocks()
    assert asked.peers(MODEL) == [right]
    clocks = asked.clocks()
    assert clocks == {ahead.address: pytest.approx(7200, abs=60), right.address: pytest.approx(-9, abs=60)}
