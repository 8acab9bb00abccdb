"""What a peer tells others of the directory: in bounded parts, of what it read just now, and in its own threads."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from peers import directory_service
from peers.directory_service import (
    ANNOUNCEMENTS_PER_MINUTE,
    FRESH_S,
    LOOK_UP_BYTES,
    MAX_MODELS,
    WAITING_PER_KEY,
    DirectoryService,
)
from splitnet.directory.ask import entry_of, still_there
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.record import MAX_CLOCK_SKEW_S, MAX_RECORD_BYTES, PeerRecord
from splitnet.errors import DirectoryError
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import OPEN, OpenSwarm, SwarmKey
from splitnet.wire.endpoints import Connection, Destination
from splitnet.wire.fields import unpack_array
from splitnet.wire.messages import (
    ENTRY_BYTES,
    MAX_DEPTH,
    Announce,
    Announced,
    Failure,
    Found,
    LookUp,
    Message,
    decode,
    encode,
)
from tests.unit.directory.test_ask import MODEL, signed
from tests.unit.directory.test_directory import record_of

WAIT_S = 20.0
KEY, OTHER = SwarmKey.generate(), SwarmKey.generate()


class FakeDirectory(SwarmDirectory):
    """Holds what a test puts into it, and notes what it is asked, and by which thread."""

    def __init__(self) -> None:
        self.held: dict[str, list[PeerRecord]] = {}
        self.reads: Counter[str] = Counter()
        self.stored: list[PeerRecord] = []
        self.passed_on = 0
        self.threads: set[int] = set()
        self.silent = False
        self.waits_for: dict[str, threading.Event] = {}

    def store_record(self, record: PeerRecord, packed: bytes, depth: int = 0) -> bool:
        self.threads.add(threading.get_ident())
        assert record.signed == packed
        self.stored.append(record)
        self.passed_on += depth > 0
        return True

    def records(self, model: str, depth: int = 0) -> list[PeerRecord]:
        self.threads.add(threading.get_ident())
        self.reads[model] += 1
        if model in self.waits_for:
            assert self.waits_for[model].wait(WAIT_S)
        if self.silent:
            raise DirectoryError("The DHT did not answer.")
        return self.held.get(model, [])

    def close(self) -> None:
        pass


class Service:
    """A service, whom it has answered what, and a clock that the test moves."""

    def __init__(self, swarm: OpenSwarm = OPEN) -> None:
        self.directory = FakeDirectory()
        self.answers: list[tuple[Destination, Message]] = []
        self.answered = threading.Condition()
        self.now = 1000.0
        self.service = DirectoryService(self.directory, MODEL, self, swarm)

    def send(self, destination: Destination, message: Message) -> None:
        with self.answered:
            self.answers.append((destination, decode(encode(message))))
            self.answered.notify_all()

    def ask(self, source: Connection, message: LookUp | Announce) -> None:
        self.service.receive_question(source, message, self.now)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.answered:
            assert self.answered.wait_for(condition, WAIT_S)

    def answer(self, source: Connection, message: LookUp | Announce) -> Message:
        """The last message of the answer to a question, which is the only one of its number."""
        self.ask(source, message)

        def those() -> list[Message]:
            return [
                answer
                for who, answer in self.answers
                if who == source
                and isinstance(answer, Found | Announced | Failure)
                and answer.number == message.number
                and not (isinstance(answer, Found) and answer.remaining)
            ]

        self.wait_for(lambda: bool(those()))
        return those()[-1]


def client(number: int = 0) -> Connection:
    return Connection(bytes([number]) * 5, bytes([number]) * 32)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made = Service()
    monkeypatch.setattr(directory_service.time, "monotonic", lambda: made.now)
    try:
        yield made
    finally:
        for event in made.directory.waits_for.values():
            event.set()
        made.service.close()


def records_in(answer: Message) -> list[bytes]:
    assert isinstance(answer, Found)
    return unpack_array(answer.payload, most_items=100, most_text=0, most_bytes=MAX_RECORD_BYTES)


def test_records_are_told_as_they_were_signed(service: Service) -> None:
    records = [signed(), signed()]
    service.directory.held = {MODEL: records, "": records[:1]}
    assert records_in(service.answer(client(), LookUp(1, MODEL, 0))) == [record.signed for record in records]
    assert records_in(service.answer(client(), LookUp(2, "", 0))) == [records[0].signed]
    nothing = service.answer(client(), LookUp(3, "ff" * 16, 0))
    assert isinstance(nothing, Found) and not nothing.payload


def test_a_flood_of_questions_is_one_question_to_the_directory(service: Service) -> None:
    service.directory.held[MODEL] = [signed()]
    for number in range(1, 500):
        service.answer(client(number % 7), LookUp(number, MODEL, 0))
    assert service.directory.reads[MODEL] == 1
    service.now += directory_service.FRESH_S + 0.1
    service.answer(client(), LookUp(500, MODEL, 0))
    assert service.directory.reads[MODEL] == 2


def test_a_key_gets_a_bounded_number_of_bytes_in_a_minute(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.directory.held[MODEL] = [signed() for _ in range(40)]
    monkeypatch.setattr(directory_service, "BYTES_PER_MINUTE", 100_000)
    answers = [service.answer(client(1), LookUp(number, MODEL, 0)) for number in range(1, 100)]
    assert isinstance(answers[-1], Failure) and "ask again in" in answers[-1].text
    assert 50_000 < sum(len(answer.payload) for answer in answers if isinstance(answer, Found)) < 130_000
    assert isinstance(service.answer(client(2), LookUp(1, MODEL, 0)), Found)
    service.now += 60.0
    assert isinstance(service.answer(client(1), LookUp(100, MODEL, 0)), Found)


def test_all_keys_together_get_a_bounded_number_of_bytes(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.directory.held[MODEL] = [signed() for _ in range(40)]
    monkeypatch.setattr(directory_service, "BYTES_OF_ALL_PER_MINUTE", 200_000)
    answers = [service.answer(client(number), LookUp(1, MODEL, 0)) for number in range(200)]
    assert isinstance(answers[-1], Failure)
    assert sum(len(answer.payload) for answer in answers if isinstance(answer, Found)) < 230_000


def test_questions_about_other_models_do_not_delay_those_about_its_own(service: Service) -> None:
    others = [os.urandom(16).hex() for _ in range(2 * MAX_MODELS)]
    service.directory.waits_for = {model: threading.Event() for model in others}
    for number, model in enumerate(others):
        service.ask(client(number), LookUp(1, model, 0))
    refused = [answer for _, answer in service.answers if isinstance(answer, Failure)]
    assert len(refused) == MAX_MODELS  # the first are waited for
    service.directory.held[MODEL] = [signed()]
    assert isinstance(service.answer(client(99), LookUp(1, MODEL, 0)), Found)
    assert sum(service.directory.reads.values()) <= 2


def test_a_question_about_all_models_does_not_delay_one_about_its_own(service: Service) -> None:
    service.directory.waits_for[""] = threading.Event()  # as while who was joined through is silent
    service.ask(client(1), LookUp(1, "", 2))
    assert isinstance(service.answer(client(2), LookUp(1, MODEL, 2)), Found)
    assert [who for who, _ in service.answers] == [client(2)]


def test_a_key_has_few_questions_that_wait(service: Service) -> None:
    service.directory.waits_for[MODEL] = threading.Event()
    for number in range(1, 100):
        service.ask(client(1), LookUp(number, MODEL, 0))
    assert sum(isinstance(answer, Failure) for _, answer in service.answers) == 99 - WAITING_PER_KEY
    service.ask(client(2), LookUp(1, MODEL, 0))
    service.directory.waits_for[MODEL].set()
    service.wait_for(lambda: sum(isinstance(answer, Found) for _, answer in service.answers) == WAITING_PER_KEY + 1)
    assert isinstance(service.answer(client(1), LookUp(100, MODEL, 0)), Found)


def test_a_silent_directory_is_a_failure_and_is_asked_again(service: Service) -> None:
    service.directory.silent = True
    answer = service.answer(client(), LookUp(1, MODEL, 0))
    assert isinstance(answer, Failure) and "did not answer" in answer.text
    service.directory.silent = False
    assert isinstance(service.answer(client(), LookUp(2, MODEL, 0)), Found)


def test_an_outsider_of_a_closed_swarm_is_not_told_through_whom_a_peer_has_joined() -> None:
    made = Service(KEY)
    try:
        made.directory.silent = True  # its error names them
        for number, place in enumerate((MODEL, "", OTHER.place(MODEL), OTHER.place("")), start=1):
            answer = made.answer(client(), LookUp(number, place, MAX_DEPTH))
            assert isinstance(answer, Failure) and "DHT" not in answer.text
        answer = made.answer(client(), LookUp(9, KEY.place(MODEL), 0))
        assert isinstance(answer, Failure) and "DHT" in answer.text  # a member is told
    finally:
        made.service.close()


def test_outsiders_take_nothing_of_what_members_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have as many keys as they like, and can name nothing that is there."""
    made, other = Service(KEY), "ab" * 16
    monkeypatch.setattr(directory_service.time, "monotonic", lambda: made.now)
    monkeypatch.setattr(directory_service, "BYTES_OF_ALL_PER_MINUTE", 1 << 22)
    made.directory.held = {MODEL: [signed()], other: [signed(model=other)], "": [signed(), signed(model=other)]}

    def asks_all(number: int) -> None:
        for place in (KEY.place(MODEL), KEY.place(""), KEY.place(other)):
            answer = made.answer(client(number), LookUp(number, place, 0))
            assert isinstance(answer, Found) and KEY.unseal(answer.payload)

    try:
        answers = [made.answer(client(number), LookUp(1, os.urandom(32).hex(), 0)) for number in range(200)]
        assert isinstance(answers[-1], Failure) and "ask again in" in answers[-1].text
        asks_all(201)
        assert made.directory.reads[""] <= 3, "outsiders' questions are no questions of this peer to others"
        made.now += 60.0
        made.directory.waits_for[""] = threading.Event()
        for number in range(250):
            made.ask(client(number), LookUp(2, os.urandom(32).hex(), 0))
            made.ask(client(number), Announce(3, 0, os.urandom(400)))
        assert (client(7), Announced(3, False)) in made.answers
        place = KEY.place(MODEL)
        answer = made.answer(client(251), LookUp(1, place, 0))
        assert isinstance(answer, Found) and KEY.unseal(answer.payload)
    finally:
        for event in made.directory.waits_for.values():
            event.set()
        made.service.close()


def test_who_has_asked_much_about_other_models_may_still_ask_about_this_one(service: Service) -> None:
    # As a peer does that asks on behalf of strangers.
    others = [service.answer(client(), LookUp(number, os.urandom(16).hex(), 1)) for number in range(1, 100)]
    assert isinstance(others[-1], Failure) and "ask again in" in others[-1].text
    assert isinstance(service.answer(client(), LookUp(100, MODEL, 1)), Found)


def test_valid_records_are_announced(service: Service) -> None:
    record = signed()
    assert service.answer(client(), Announce(1, 0, record.signed)) == Announced(1, True)
    assert service.directory.stored == [record]


def test_what_was_announced_a_moment_ago_is_told(service: Service) -> None:
    service.answer(client(), LookUp(1, MODEL, 0))
    record = signed()
    service.answer(client(), Announce(2, 0, record.signed))
    service.directory.held[MODEL] = [record]
    assert records_in(service.answer(client(), LookUp(3, MODEL, 0))) == [record.signed]


def test_records_that_are_not_valid_are_not_announced(service: Service) -> None:
    identity, now = Identity.generate(), time.time()
    forged = bytearray(signed().signed)
    forged[-1] ^= 1
    void = record_of(identity, issued_at=now - 100).pack(identity)
    future = record_of(identity, issued_at=now + MAX_CLOCK_SKEW_S + 60).pack(identity)
    wrong = [bytes(forged), void, future, b"", b"\xff" * 100, bytes(MAX_RECORD_BYTES + 1), bytes(1 << 20)]
    for number, packed in enumerate(wrong, start=1):
        assert service.answer(client(), Announce(number, 0, packed)) == Announced(number, False)
    assert not service.directory.stored


def test_a_key_announces_a_bounded_number_of_others(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_service, "RECORDS_PER_ANNOUNCER", 3)
    records = [signed() for _ in range(4)]
    answers = [service.answer(client(1), Announce(at + 1, 0, record.signed)) for at, record in enumerate(records)]
    assert answers == [Announced(1, True), Announced(2, True), Announced(3, True), Announced(4, False)]
    assert service.answer(client(1), Announce(5, 0, records[0].signed)) == Announced(5, True)
    assert service.answer(client(2), Announce(1, 0, records[3].signed)) == Announced(1, True)


def test_a_key_announces_so_often_in_a_minute(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_service, "ANNOUNCEMENTS_PER_MINUTE", 5)
    record = signed()
    answers = [service.answer(client(1), Announce(number, 0, record.signed)) for number in range(1, 8)]
    assert [type(answer) for answer in answers] == [Announced] * 5 + [Failure] * 2
    assert isinstance(service.answer(client(2), Announce(1, 0, record.signed)), Announced)


def test_what_strangers_announce_leaves_this_peer_room_to_announce_itself(service: Service) -> None:
    for number in range(2 * ANNOUNCEMENTS_PER_MINUTE):
        service.answer(client(100 + number % 16), Announce(number + 1, 1, b"what nobody passes on"))
    for number in range(2 * ANNOUNCEMENTS_PER_MINUTE):  # all of it is taken, and some passed on under this peer's key
        announcement = Announce(number + 1, 1, signed().signed)
        assert service.answer(client(number % 16), announcement) == Announced(number + 1, True)
    assert 0.5 * ANNOUNCEMENTS_PER_MINUTE < service.directory.passed_on < 0.9 * ANNOUNCEMENTS_PER_MINUTE


def changes(service: Service, number: int, known: list[PeerRecord], most: int = 60_000) -> Message:
    return service.answer(client(number), LookUp(number, MODEL, 0, tuple(map(entry_of, known)), 0.0, most))


def test_who_says_what_it_knows_is_told_what_has_changed(service: Service) -> None:
    owner, gone, new = Identity.generate(), signed(), signed()
    before = signed(owner, issued_at=time.time() - 15)
    now = signed(owner, end=2)
    service.directory.held[MODEL] = [now, new]
    answer = changes(service, 1, [before, gone])
    assert isinstance(answer, Found) and still_there(answer.present, 2) == [True, False]
    assert records_in(answer) == [now.signed, new.signed]
    answer = changes(service, 2, [now, new])
    assert isinstance(answer, Found) and still_there(answer.present, 2) == [True, True] and not answer.payload
    answer = changes(service, 3, [before], most=len(now.signed) + 10)
    assert records_in(answer) == [now.signed]
    assert not changes(service, 4, []).present, "who knows nothing is told as much as there is room for"  # pyright: ignore


def test_what_many_ask_that_know_most_is_read_seldom(service: Service) -> None:
    service.directory.held[MODEL] = records = [signed() for _ in range(50)]
    for number in range(1, 40):
        changes(service, number, records)
        service.now += 0.1
    assert service.directory.reads[MODEL] == 1
    service.now += 2.0
    changes(service, 50, records)
    assert service.directory.reads[MODEL] == 2
    service.answer(client(51), LookUp(51, MODEL, 0))
    service.now += FRESH_S + 0.1
    service.answer(client(52), LookUp(52, MODEL, 0))
    assert service.directory.reads[MODEL] == 3, "who asks for everything is told what is there now"


def test_what_has_changed_is_charged_for(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_service, "BYTES_PER_MINUTE", 100_000)
    service.directory.held[MODEL] = records = [signed() for _ in range(100)]
    answers = [
        service.answer(client(1), LookUp(number, MODEL, 0, tuple(map(entry_of, records)), 0.0, 5000))
        for number in range(1, 100)
    ]
    assert isinstance(answers[-1], Failure)
    told = sum(isinstance(answer, Found) for answer in answers)
    assert 10 < told <= 1 + 100_000 // (LOOK_UP_BYTES + 100 * ENTRY_BYTES)
    assert isinstance(changes(service, 2, records), Found)


def test_outsiders_learn_nothing_of_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Service(KEY)
    monkeypatch.setattr(directory_service.time, "monotonic", lambda: made.now)
    try:
        record = signed()
        made.directory.held[MODEL] = [record]
        known = (entry_of(record),)
        for number, place in enumerate((MODEL, OTHER.place(MODEL)), 1):
            answer = made.answer(client(), LookUp(number, place, 0, known, 0.0, 5000))
            assert isinstance(answer, Found) and not answer.payload and not answer.present
        answer = made.answer(client(), LookUp(9, KEY.place(MODEL), 0, known, 0.0, 5000))
        assert isinstance(answer, Found) and still_there(answer.present, 1) == [True]
        assert record.signed not in bytes(answer.payload)
    finally:
        made.service.close()


def test_who_announces_others_has_a_place_itself(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_service, "RECORDS_PER_ANNOUNCER", 3)
    peer = Identity.generate()
    source = Connection(b"peer", peer.public.curve_raw)
    for number in range(1, 5):
        service.answer(source, Announce(number, 0, signed().signed))
    assert service.answer(source, Announce(5, 0, signed(peer).signed)) == Announced(5, True)


def test_the_directory_is_never_called_by_the_thread_that_hands_questions_over(service: Service) -> None:
    service.answer(client(), LookUp(1, MODEL, 0))
    service.answer(client(), LookUp(2, "ff" * 16, 0))
    service.answer(client(), Announce(3, 0, signed().signed))
    assert service.directory.threads and threading.get_ident() not in service.directory.threads


def test_what_is_known_of_keys_is_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_service, "MAX_KEYS", 10)
    for number in range(100):
        service.answer(client(number), LookUp(1, MODEL, 0))
        service.answer(client(number), Announce(2, 0, signed().signed))
    inner = service.service
    assert max(map(len, (inner._bytes, inner._announcements, inner._announced))) <= 10
    assert not inner._waiting
