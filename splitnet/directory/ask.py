"""The directory without a DHT: a process asks peers for records, over the links that it also uses for sessions.

The process merges the answers of several peers. Records are signed, so a peer cannot forge a record. A peer that lies,
knows nothing or is silent cannot hide records that another peer knows.
"""

from __future__ import annotations

import math
import random
import struct
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate, chain, count, zip_longest
from operator import itemgetter
from typing import Final, Protocol

from scheduler.liveness import DIRECTORY_ANSWER_S, DIRECTORY_DOWN_S, DIRECTORY_OTHERS_S, DIRECTORY_SOON_S
from splitnet.directory.interface import OWN_DEPTH, KeptRecords, SwarmDirectory, latest
from splitnet.directory.record import DEMAND, HELPERS, KEY_PREFIX_BYTES, MAX_RECORD_BYTES, PeerRecord, verified_record
from splitnet.errors import DirectoryError, NotAuthorized, ProtocolError
from splitnet.security.identity import PublicKey
from splitnet.security.swarm_key import OPEN, OpenSwarm
from splitnet.transport.addresses import peer_address
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.fields import ValueReader, packb
from splitnet.wire.messages import ENTRY_BYTES, MAX_FOUND, Announce, Announced, Failure, Found, LookUp, Message, Payload

_ENTRY = struct.Struct(f">{KEY_PREFIX_BYTES}s3sI4B")
"""First bytes of the key, digest of the exact fields, time of issue, and four measured amounts in steps."""
assert _ENTRY.size == ENTRY_BYTES

_EXACT_FIELDS: Final = (
    *("model_name", "address", "start", "end", "num_blocks", "protocol", "codecs", "device", "dtype", "max_blocks"),
    *("moving_to", "serves", "version", "state_bytes", "relays", "relay_port"),
)
"""Fields of a record in the digest. Peers of different versions compare digests, so a digest must omit an added field
that holds its default."""

RECORD_OVERHEAD: Final = 3  # bytes that an answer takes for a record besides the record itself

STEPS_PER_DOUBLING: Final = 4
MATERIAL_STEPS: Final = 2
"""A measured amount has changed if it differs by this many steps: by 30 to 50 percent, or by a few units if it is
small."""
OUTDATED_S: Final = 300.0
"""A known record that is this much older than the latest is sent again, because coordinates and links are not
compared."""

_TICKS_PER_S, _TICKS = 16, 1 << 32  # resolution and range of the time of issue, which wraps after eight years
_EXACT = 256  # weight of a change of an exact field, larger than any number of steps


def entry_of(record: PeerRecord) -> bytes:
    """The entry of a known record for `LookUp.known`."""
    amounts = zip((record.block_ms[0], record.queue_ms, record.batch, record.kv_free_positions), _UNITS, strict=True)
    return _ENTRY.pack(
        record.key.raw[:KEY_PREFIX_BYTES],
        _digest(record),
        int(record.issued_at * _TICKS_PER_S) % _TICKS,
        *(_steps(amount, unit) for amount, unit in amounts),
    )


class DirectoryDelta:
    """The records that a peer knows, the latest of each peer, also of peers that have left. Computes the changes for a
    `LookUp`. Thread-safe."""

    def __init__(self, records: Sequence[PeerRecord]) -> None:
        self._by_key: defaultdict[bytes, list[tuple[bytes, PeerRecord]]] = defaultdict(list)
        for record in records:
            entry = entry_of(record)
            self._by_key[entry[:KEY_PREFIX_BYTES]].append((entry, record))
        present = [record for record in records if not record.has_left]
        # Keys with a proof of work come first, so that a flood of cheap keys does not hide them.
        self._newest = sorted(present, key=lambda record: (not record.is_proven, -record.placed_at))

    def changes(self, known: Sequence[bytes], since: float, most: int) -> tuple[bytes, list[PeerRecord]]:
        """Answers a `LookUp` with these fields. Returns `Found.present`, and changed and new records alternately, at
        most `most` bytes of records."""
        bits = 0
        changed: list[tuple[int, PeerRecord]] = []
        for at, entry in enumerate(known):
            for newest, record in self._by_key.get(entry[:KEY_PREFIX_BYTES], ()):
                if not record.has_left:
                    bits |= 1 << at
                if weight := _weight(entry, newest):
                    changed.append((weight, record))
        changed.sort(key=itemgetter(0), reverse=True)
        listed = {entry[:KEY_PREFIX_BYTES] for entry in known}
        new = (
            record
            for record in self._newest
            if record.placed_at >= since and record.key.raw[:KEY_PREFIX_BYTES] not in listed
        )
        room = most
        told: list[PeerRecord] = []
        for record in chain.from_iterable(zip_longest((record for _, record in changed), new)):
            if record is not None:
                room -= len(record.signed) + RECORD_OVERHEAD
                if room < 0:
                    break
                told.append(record)
        return bits.to_bytes((len(known) + 7) // 8, "little"), told


def still_there(present: bytes, count: int) -> list[bool]:
    """For each of `count` entries whether its bit is set, see `Found.present`."""
    bits = int.from_bytes(present, "little")
    return [bool(bits >> at & 1) for at in range(count)]


def _digest(record: PeerRecord) -> bytes:
    return blake2b(packb([getattr(record, name) for name in _EXACT_FIELDS]), digest_size=3).digest()


_UNITS: Final = (0.1, 5.0, 0.5, 16.0)
"""Units of the measured amounts: ms per block, ms of queue wait, positions in a pass, free positions. For an amount
below its unit, a step is about a quarter of the unit."""


def _steps(amount: float, unit: float) -> int:
    return min(round(STEPS_PER_DOUBLING * math.log2(1 + amount / unit)), 255)


def _weight(held: bytes, latest: bytes) -> int:
    """How much the record with the entry `latest` matters to a holder of the record with the entry `held`; 0: not at
    all."""
    _, exact, issued, *amounts = _ENTRY.unpack(held)
    _, latest_exact, latest_issued, *latest_amounts = _ENTRY.unpack(latest)
    later = (latest_issued - issued) % _TICKS
    if later > _TICKS // 2:  # `latest` was issued before `held`
        return 0
    if exact != latest_exact:
        return _EXACT
    most = max(abs(one - other) for one, other in zip(amounts, latest_amounts, strict=True))
    return most if most >= MATERIAL_STEPS else int(later >= OUTDATED_S * _TICKS_PER_S)


CONNECT_TIMES: Final = 3.0
"""Before the first answer, factor on the wait for a peer that has accepted the connection: a handshake takes several
round trips, which may take seconds."""
LOOK_S: Final = 0.05  # between two looks at the states of links

PART_BYTES: Final = 60_000  # of records in one message of an answer, at most
MAX_ANSWER_BYTES: Final = 4 << 20  # of records in an answer of one peer, at most
MAX_JOINED: Final = 16  # peers that are asked in every question
MAX_OTHERS: Final = 8  # peers from the last answer that are asked when all joined peers are silent
OPEN_QUESTIONS: Final = 32  # questions whose late answers are accepted
REMEMBERED_MODELS: Final = 4  # models of other processes' questions whose last answers are kept
_RECORDS_PER_PART = 1024


class AskingLinks(Protocol):
    """The part of `splitnet.swarm.client_links.Links` that a `PeerDirectory` needs."""

    on_answer: Callable[[Endpoint, Message], None] | None

    def send(self, endpoint: Endpoint, message: Message) -> object: ...

    def link_state(self, endpoint: Endpoint) -> LinkState: ...

    def is_connecting(self, endpoint: Endpoint) -> bool: ...

    def close(self) -> None: ...


@dataclass
class _PeerAnswer:
    """The answer of one peer."""

    payloads: list[bytes] = field(default_factory=list[bytes])
    present: bytes = b""  # see `Found`
    nbytes: int = 0
    remaining: int | None = None  # messages of the answer that will follow; None: no message has arrived
    complete: bool = False
    taken: bool = False
    refusal: str = ""
    records: list[PeerRecord] | None = None  # the valid records in the payloads; None: they were not read yet
    asked_at: float = field(default_factory=time.time)

    def add_payload(self, message: Found, swarm: OpenSwarm, model: str) -> None:
        expected = message.remaining if self.remaining is None else self.remaining - 1
        self.nbytes += len(message.payload)
        if message.remaining != expected or self.nbytes > MAX_ANSWER_BYTES:
            self.complete = True  # later messages are ignored
            return
        try:
            # A peer of a closed swarm answers with an empty payload if it does not know the model.
            self.payloads.append(swarm.unseal(message.payload) if message.payload or not model else b"")
        except NotAuthorized as error:
            self.complete, self.refusal = True, str(error)
            return
        self.present = message.present
        self.remaining, self.complete = message.remaining, message.remaining == 0


@dataclass(frozen=True, slots=True)
class RecordChanges:
    """The changes of known records according to one peer.

    present: for each known record, whether its peer is still in the directory. records: the verified records of the
    answer, also of peers that have left.
    """

    present: Sequence[bool]
    records: Sequence[PeerRecord]


@dataclass
class _Question:
    """A question to some peers, and their answers. model: the fingerprint asked for; None: an announcement."""

    number: int
    model: str | None
    answers: dict[Endpoint, _PeerAnswer] = field(default_factory=dict["Endpoint", "_PeerAnswer"])
    before: dict[Endpoint, _PeerAnswer] = field(default_factory=dict["Endpoint", "_PeerAnswer"])
    """Answers to the same question when it was asked before."""

    def said(self) -> dict[Endpoint, _PeerAnswer]:
        return {endpoint: answer for endpoint, answer in self.answers.items() if answer.complete and not answer.refusal}

    def best(self) -> dict[Endpoint, _PeerAnswer]:
        """The answers, with earlier answers of silent peers. Earlier answers are safe, because records expire."""
        return self.before | self.said()


class PeerDirectory(SwarmDirectory):
    """Asks peers for records, and announces the records of this process to them.

    joined: the peers to ask; empty: this peer begins a swarm, and knows only peers that announce themselves to it.
    serving: True for a peer: keeps the records that other peers announce to it, and closes `links` at its end. swarm:
    the key of a closed swarm.
    """

    def __init__(
        self, joined: Sequence[Endpoint], links: AskingLinks, *, serving: bool = False, swarm: OpenSwarm = OPEN
    ) -> None:
        if len(joined) > MAX_JOINED:
            raise DirectoryError(
                f"a process asks at most {MAX_JOINED} peers for records, not {len(joined)}: give fewer --join"
            )
        self.addresses = []
        self._joined = list(dict.fromkeys(joined))
        self._links = links
        self._swarm = swarm
        self._kept = KeptRecords() if serving else None
        self._numbers = count(1)
        self._open_node: OrderedDict[int, _Question] = OrderedDict()
        self._last: OrderedDict[str, _Question] = OrderedDict()
        """The last question about each model that this process asks about, and about the latest `REMEMBERED_MODELS`
        other models, which other processes ask about."""
        self._wanted: set[str] = set()  # models that this process itself asks about
        self._others: list[Endpoint] = []  # further peers, from the answers of joined peers
        self._silent: set[Endpoint] = set()  # peers that did not answer their last question
        self._alone = False  # all joined peers were silent at the last question
        self._own: set[PublicKey] = set()  # keys that this process has announced
        self._heard = threading.Condition()
        self._closed = False
        links.on_answer = self._receive_answer

    @classmethod
    def join_peers(
        cls, joined: Sequence[Endpoint], links: AskingLinks, *, serving: bool = False, swarm: OpenSwarm = OPEN
    ) -> PeerDirectory:
        """Returns a directory after a peer has answered. Raises DirectoryError: no peer answers; the error says why."""
        directory = cls(joined, links, serving=serving, swarm=swarm)
        try:
            directory.records("")
        except BaseException:
            directory.close()
            raise
        return directory

    def store_record(self, record: PeerRecord, packed: bytes, depth: int = OWN_DEPTH) -> bool:
        taken = False
        if depth == OWN_DEPTH:
            self._own.add(record.key)
        if self._kept is not None:
            taken = self._kept.add_record(record if record.signed == packed else verified_record(packed))
        leaves = record.has_left and depth == OWN_DEPTH
        if leaves and self._kept is not None:  # peers that only ask this peer learn of its end from no other peer
            kept = self._kept.records(record.model)
            known = [other.endpoint for other in kept if not other.has_left and other.key not in self._own]
            self._others = self._nearest(known) or self._others
        if not depth or not (self._joined or (leaves and self._others)) or not record.is_valid_at(time.time()):
            return taken
        try:
            question = self._ask_peers(
                None, depth, lambda number: Announce(number, depth - 1, self._swarm.seal(packed)), everybody=leaves
            )
        except DirectoryError:
            if not taken or depth == OWN_DEPTH:
                raise
            return True
        return any(answer.taken for answer in question.said().values()) or (taken and depth < OWN_DEPTH)

    def clocks(self) -> dict[str, float]:
        """How many seconds the clock of each peer is ahead of this machine's clock, by address. Estimated from the
        records of the latest answers, which are at most a minute old."""
        with self._heard:
            answers = [answer for question in self._last.values() for answer in question.best().values()]
        told = [(record, record.issued_at - answer.asked_at) for answer in answers for record in _records(answer)]
        return {one.address: ahead_s for one, ahead_s in told if one.is_of_model and one.key not in self._own}

    def records(self, model: str, depth: int = OWN_DEPTH) -> list[PeerRecord]:
        found = [self._kept.records(model)] if self._kept is not None else []
        if not depth or not self._joined:
            return latest(model, found)
        try:
            question = self._ask_peers(model, depth, lambda number: LookUp(number, self._swarm.place(model), depth - 1))
        except DirectoryError:
            with self._heard:
                before = self._last.get(model)
            known = [] if before is None else list(map(_records, before.best().values()))
            if not any(found):
                raise
            return latest(model, [*found, *known])
        with self._heard:
            before = self._last.pop(model, None)
            if before is not None:
                question.before = before.best()
                self._forget_question(before)
            self._last[model] = question
            if depth == OWN_DEPTH:
                self._wanted.add(model)
            others = [other for other in self._last if other not in self._wanted]
            for other in others[: max(0, len(others) - REMEMBERED_MODELS)]:
                self._forget_question(self._last.pop(other))
            answers = list(question.best().values())
        records = latest(model, [*found, *map(_records, answers)])
        # Only for questions of this process. Relays and gateways answer no questions, so they are not asked.
        if depth == OWN_DEPTH and model not in (HELPERS, DEMAND):
            present = [record.endpoint for record in records if not record.has_left]
            self._others = self._nearest(present) or self._others
        return records

    def changes(
        self,
        model: str,
        known: Sequence[PeerRecord],
        since: float,
        most: int,
        asked: Sequence[Endpoint],
        others: Sequence[Endpoint] = (),
    ) -> dict[Endpoint, RecordChanges]:
        """Asks peers for changes of records.

        Args:
            known: the records that the process knows, the most needed first.
            since: other records are sent only if the peer has served its span since this Unix time (seconds) or later.
            most: largest number of bytes of records from each peer.
            asked: the peers to ask.
            others: peers to ask if no peer in `asked` answers within `DIRECTORY_SOON_S`.

        Raises:
            DirectoryError: the directory is closed.
        """
        place, entries = self._swarm.place(model), tuple(map(entry_of, known))

        def message(number: int) -> LookUp:
            return LookUp(number, place, OWN_DEPTH - 1, entries, since, most)

        question = self._ask_these(asked, model, message, DIRECTORY_SOON_S if others else DIRECTORY_ANSWER_S)
        if not question.said() and others:
            self._ask_also(question, others, message, DIRECTORY_ANSWER_S - DIRECTORY_SOON_S)
        with self._heard:
            self._forget_question(question)
            answers = question.said()
        # A peer that does not know the model answers without bits.
        told = {endpoint: answer for endpoint, answer in answers.items() if answer.present}
        return {endpoint: _changes(answer, model, known, most) for endpoint, answer in told.items()}

    def close(self) -> None:
        self._closed = True
        with self._heard:
            self._heard.notify_all()
        if self._kept is not None:
            self._links.close()

    def _ask_peers(
        self, model: str | None, depth: int, message: Callable[[int], Message], *, everybody: bool = False
    ) -> _Question:
        """Asks the joined peers, and then other peers if all joined ones are silent. everybody: asks all at once."""
        # A question for another process must be answered before that process gives up.
        limit_s = DIRECTORY_ANSWER_S * depth / OWN_DEPTH
        others = [other for other in self._others if other not in self._joined and other.key not in self._own]
        rounds = [[*self._joined, *others]] if self._alone or everybody else [self._joined, others]
        rounds = [asked for asked in rounds if asked]
        question = self._ask_these((), model, message, 0.0)
        for asked in rounds:  # late answers to an earlier round still count, because a handshake may take many seconds
            self._ask_also(question, asked, message, limit_s / len(rounds))
            if question.said():
                break
        self._alone = not any(endpoint in question.said() for endpoint in self._joined)
        if question.said():
            return question
        reasons = [f"{peer_address(endpoint)} {self._reason(endpoint)}" for endpoint in self._joined]
        raise DirectoryError(f"No peer answers with records: {'; '.join(reasons)}.")

    def _ask_these(
        self, asked: Sequence[Endpoint], model: str | None, message: Callable[[int], Message], limit_s: float
    ) -> _Question:
        question = _Question(next(self._numbers), model)
        with self._heard:
            self._open_node[question.number] = question
            while len(self._open_node) > OPEN_QUESTIONS:
                self._open_node.popitem(last=False)
        self._ask_also(question, asked, message, limit_s)
        return question

    def _ask_also(
        self, question: _Question, asked: Sequence[Endpoint], message: Callable[[int], Message], limit_s: float
    ) -> None:
        with self._heard:
            question.answers |= {endpoint: _PeerAnswer() for endpoint in asked if endpoint not in question.answers}
        for endpoint in asked:
            self._links.send(endpoint, message(question.number))
        self._wait_for_answers(question, limit_s)
        with self._heard:
            silent = {endpoint for endpoint, answer in question.answers.items() if not answer.complete}
            self._silent = (self._silent & {*self._joined, *self._others} - question.answers.keys()) | silent

    def _forget_question(self, question: _Question) -> None:
        """Closes a question, so that late answers, which may have megabytes, are dropped."""
        self._open_node.pop(question.number, None)

    def _wait_for_answers(self, question: _Question, limit_s: float) -> None:
        began = time.monotonic()
        until = began + limit_s
        satisfied = False
        with self._heard:
            while not self._closed:
                now = time.monotonic()
                answers = question.said().values()
                if not satisfied and any(answer.taken or answer.present or any(answer.payloads) for answer in answers):
                    satisfied = True
                    until = min(until, now + DIRECTORY_OTHERS_S)
                waiting = [
                    endpoint
                    for endpoint, answer in question.answers.items()
                    if not answer.complete
                    and not self._is_lost(endpoint, now - began)
                    and not (satisfied and endpoint in self._silent)
                ]
                connect = not satisfied and now < began + CONNECT_TIMES * limit_s
                if connect and any(map(self._links.is_connecting, waiting)):
                    until = max(until, now + limit_s)
                if not waiting or now >= until:
                    return
                self._heard.wait(min(LOOK_S, until - now))
        raise DirectoryError("The directory is closed; start it again.")

    def _is_lost(self, endpoint: Endpoint, waited_s: float) -> bool:
        state = self._links.link_state(endpoint)
        return state.is_final or (state is LinkState.DOWN and waited_s > DIRECTORY_DOWN_S)

    def _receive_answer(self, source: Endpoint, message: Message) -> None:
        """Handles an answer from the peer that was asked; a complete answer is not changed. Runs in the transport's
        thread."""
        if not isinstance(message, Found | Announced | Failure):
            return
        with self._heard:
            question = self._open_node.get(message.number)
            answer = question.answers.get(source) if question is not None else None
            if question is None or answer is None or answer.complete:
                return
            if isinstance(message, Failure):
                answer.complete, answer.refusal = True, message.text
            elif isinstance(message, Found) and question.model is not None:
                answer.add_payload(message, self._swarm, question.model)
            elif isinstance(message, Announced) and question.model is None:
                answer.complete, answer.taken = True, message.taken
            self._heard.notify_all()

    def _nearest(self, endpoints: Collection[Endpoint]) -> list[Endpoint]:
        """Chooses peers to ask when all joined peers are silent. Peers with a link come first, because they are known
        to exist."""
        tried = random.sample(list(endpoints), min(len(endpoints), 64))
        tried.sort(key=lambda endpoint: self._links.link_state(endpoint) is not LinkState.UP)
        return tried[:MAX_OTHERS]

    def _reason(self, endpoint: Endpoint) -> str:
        with self._heard:
            said = [
                question.answers[endpoint].refusal
                for question in self._open_node.values()
                if endpoint in question.answers
            ]
        if said and said[-1]:
            return f"refuses ({said[-1]})"
        match self._links.link_state(endpoint):
            case LinkState.REFUSED:
                return "does not accept this key: have the output of `splitnet key` added to its --authorized-keys"
            case LinkState.WRONG_KEY:
                return "ends the handshake as if it had another key: copy the address that the peer prints now"
            case LinkState.UP:
                return "does not answer: it hangs"
            case _:
                return "is not reached: check that it runs and that its port is open"


def parts_of(records: Sequence[PeerRecord]) -> list[bytes]:
    """The payloads of an answer with these records; the last records are omitted if there is no room for them."""
    parts: list[list[bytes]] = [[]]
    room, left = PART_BYTES, MAX_ANSWER_BYTES
    for record in records:
        size = len(record.signed) + RECORD_OVERHEAD
        if size > room:
            if len(parts) == MAX_FOUND:
                break
            parts.append([])
            room = PART_BYTES
        if size > left:
            break
        parts[-1].append(record.signed)
        room, left = room - size, left - size
    return [packb(part) if part else b"" for part in parts]


def _records(answer: _PeerAnswer) -> list[PeerRecord]:
    """The valid records of an answer, which may be hostile."""
    if answer.records is None:
        answer.records = []
        for payload in answer.payloads:
            for packed in _packed(payload):
                with suppress(ProtocolError, NotAuthorized):
                    answer.records.append(verified_record(packed))
        answer.payloads = []
    return answer.records


def _changes(answer: _PeerAnswer, model: str, known: Sequence[PeerRecord], most: int) -> RecordChanges:
    """The changes in an answer. Records of unknown peers count only up to `most` bytes, because keys are cheap to
    make."""
    told = latest(model, [_records(answer)])
    keys = {record.key for record in known}
    sizes = accumulate(0 if record.key in keys else len(record.signed) + RECORD_OVERHEAD for record in told)
    records = [record for record, size in zip(told, sizes, strict=True) if record.key in keys or size <= most]
    return RecordChanges(still_there(answer.present, len(known)), records)


def _packed(payload: Payload) -> list[bytes]:
    if not payload:
        return []
    try:
        values = ValueReader(payload, most_text=0, most_bytes=MAX_RECORD_BYTES)
        items = [values.value() for _ in range(values.array(_RECORDS_PER_PART))]
    except ProtocolError:
        return []
    return [item for item in items if type(item) is bytes]
