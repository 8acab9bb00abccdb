"""The answers of a peer to questions about the directory, for peers and clients that do not use the DHT.

Every key that may connect may ask. An answer is reused for a moment, so that a flood of questions does not reach the
DHT, and the answers to a key are bounded in bytes per minute.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Final, TypeVar

from peers.peer_links import ReplyTarget
from splitnet.directory.ask import DirectoryDelta, parts_of
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.record import MAX_RECORD_BYTES, PeerRecord, verified_record
from splitnet.errors import NotAuthorized, ProtocolError, SplitnetError
from splitnet.limits import TokenBucket, keep_latest
from splitnet.security.swarm_key import OPEN, SEAL_BYTES, OpenSwarm
from splitnet.wire.endpoints import Connection
from splitnet.wire.messages import ENTRY_BYTES, Announce, Announced, Failure, FailureCode, Found, LookUp

log = logging.getLogger(__name__)

FRESH_S: Final = 1.0  # maximum age in seconds of an answer that is reused
FRESH_PER_RECORD_S: Final = 0.1  # for an answer with changes, this age per record: many records are slow to read
FRESH_CHANGES_S: Final = 10.0  # upper limit of the age of such an answer: a client that wants changes asks again soon
# Maximum size of all answers to one key: a few full directories, or some thousand small swarms.
BYTES_PER_MINUTE: Final = 16 << 20
# The same for all keys and questions about the peer's own model; half as much for each other kind of question.
BYTES_OF_ALL_PER_MINUTE: Final = 16 * BYTES_PER_MINUTE
LOOK_UP_BYTES: Final = 4096  # bytes that a question counts in addition to its answer
# Additional bytes that a question about another model counts, because the peer reads the directory for it.
READ_BYTES: Final = 1 << 18
ANNOUNCEMENTS_PER_MINUTE: Final = 256  # maximum for one key; a peer announces itself four times a minute
# Maximum for all keys; less than other peers accept from this peer, which also announces itself.
PASSED_ON_PER_MINUTE: Final = ANNOUNCEMENTS_PER_MINUTE * 3 // 4
# Number of keys whose records one key may announce: a peer without a DHT passes on records of others.
RECORDS_PER_ANNOUNCER: Final = 64
WAITING_PER_KEY: Final = 4  # maximum number of questions and announcements of one key that wait
# The same for all keys: half for the peer's own model and announcements, a quarter for each other kind.
MAX_WAITING: Final = 1024
MAX_MODELS: Final = 16  # maximum number of answers that are kept or being read
MAX_KEYS: Final = 4096  # maximum number of keys whose use is remembered


class _About(StrEnum):
    """The subjects of questions. Each kind has separate bounds."""

    OWN = "own"  # this peer's model, or all models
    KNOWN = "known"  # another model of a closed swarm, which only members can name
    OTHER = "other"  # everything else, which any sender can name


_Payer = tuple[_About, bytes]
"""The account that a question is charged to. Each key has a separate account for questions about other models: a peer
may ask them on behalf of strangers, and can then still ask about this peer's own model."""


@dataclass
class _CachedAnswer:
    """An answer that is being read, or was read a moment ago."""

    waiting: list[tuple[Connection, LookUp, _Payer]] = field(default_factory=list[tuple[Connection, LookUp, _Payer]])
    parts: list[bytes] | None = None
    told: DirectoryDelta | None = None  # None: the model is unknown
    fresh_changes_s: float = FRESH_S
    read_at: float = 0.0

    def serves(self, now: float, *, changes: bool) -> bool:
        """Whether the answer is fresh enough, or still being read."""
        return self.parts is None or now - self.read_at <= (self.fresh_changes_s if changes else FRESH_S)


class DirectoryService:
    """Answers questions about records. Thread-safe; close it before the directory.

    model: fingerprint of this peer's own model, whose questions wait for no others. swarm: key of a closed swarm.
    """

    def __init__(self, directory: SwarmDirectory, model: str, outbox: ReplyTarget, swarm: OpenSwarm = OPEN) -> None:
        self._directory = directory
        self._swarm = swarm
        self._home: dict[str, str] = {}  # models, by their names in questions
        self._outbox = outbox
        # By model and depth; the answer that was used latest is last.
        self._readings: OrderedDict[tuple[str, int], _CachedAnswer] = OrderedDict()
        self._known: dict[int, tuple[float, dict[str, str]]] = {}
        """For a closed swarm, by depth: the time of the last read, and the models by their names in questions."""
        self._waiting: Counter[_Payer] = Counter()  # questions and announcements without an answer
        self._waiting_in: Counter[_About] = Counter()
        self._bytes: dict[_Payer, TokenBucket] = {}
        self._announcements: dict[bytes, TokenBucket] = {}
        self._of_all = {about: TokenBucket() for about in _About}
        self._passed_on = TokenBucket()
        # By key of the announcer, then key of the record: time at which the record expires.
        self._announced: dict[bytes, dict[bytes, float]] = {}
        self._tasks: dict[tuple[str, int], deque[Callable[[], None]]] = {}
        """By kind and depth, each with a separate thread. A peer may wait for another peer, but passes a question on
        with a lower
    depth, so that peers never wait for each other in a circle."""
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._lock = threading.Lock()
        self.serve_model(model)

    def receive_question(self, source: Connection, message: LookUp | Announce, now: float) -> None:
        with self._lock:
            if self._closed:
                return
            payer = self._payer(source, message)
            most = MAX_WAITING // (2 if payer[0] is _About.OWN else 4)
            if self._waiting[payer] >= WAITING_PER_KEY or self._waiting_in[payer[0]] >= most:
                self._refuse_question(source, message.number, "too many questions wait here: ask again later")
            elif isinstance(message, LookUp):
                self._look_up(source, message, now)
            else:
                self._announce(source, message, now)
            if not self._waiting[payer]:
                del self._waiting[payer]

    def serve_model(self, model: str) -> None:
        """Changes the peer's own model."""
        with self._lock:
            self._home = {self._swarm.place(""): "", self._swarm.place(model): model}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _look_up(self, source: Connection, message: LookUp, now: float) -> None:
        payer = self._payer(source, message)
        used, of_all = _bucket_of(self._bytes, payer), self._of_all[payer[0]]
        wait_s = max(used.wait_s(BYTES_PER_MINUTE, now), of_all.wait_s(_bytes_of_all(payer[0]), now))
        if wait_s:
            self._refuse_question(
                source, message.number, f"your key has received too much from this directory: ask again in {wait_s} s"
            )
            return
        name = (message.model, message.depth)
        reading = self._readings.get(name)
        if reading is not None and not reading.serves(now, changes=message.most > 0):
            reading = None
        if reading is None:
            if not self._make_room(message.model, now):
                self._refuse_question(
                    source, message.number, "this peer looks up too many other models: ask again later"
                )
                return
            if message.model not in self._home:
                self._charge(payer, READ_BYTES, now)
            reading = self._readings[name] = _CachedAnswer()
            self._readings.move_to_end(name)
            self._do_later(self._kind(message), message.depth, partial(self._read_records, name, reading))
        if reading.parts is None:
            reading.waiting.append((source, message, payer))
            self._waits(payer)
        elif message.most:
            self._waits(payer)
            self._do_later(
                self._kind(message), message.depth, partial(self._send_changes, source, message, payer, reading, "")
            )
        else:
            self._send_answer(source, message, payer, reading.parts, b"", now)

    def _kind(self, message: LookUp) -> str:
        about = self._about(message.model)
        return "models" if self._home.get(message.model) == "" else about

    def _about(self, place: str) -> _About:
        if place in self._home:
            return _About.OWN
        return _About.KNOWN if any(place in known for _, known in list(self._known.values())) else _About.OTHER

    def _payer(self, source: Connection, message: LookUp | Announce) -> _Payer:
        return self._about(message.model) if isinstance(message, LookUp) else _About.OWN, source.curve

    def _waits(self, payer: _Payer) -> None:
        self._waiting[payer] += 1
        self._waiting_in[payer[0]] += 1

    def _make_room(self, model: str, now: float) -> bool:
        """Drops old answers; returns whether one more may be read."""
        for name, reading in list(self._readings.items()):
            is_full = len(self._readings) >= MAX_MODELS
            if not reading.serves(now, changes=True) or (is_full and reading.parts is not None):
                del self._readings[name]
        return len(self._readings) < MAX_MODELS or self._about(model) is not _About.OTHER

    def _read_records(self, name: tuple[str, int], reading: _CachedAnswer) -> None:
        failure = ""
        parts = list[bytes]()
        try:
            records = self._records(*name)
            if records is None:
                parts = [b""]  # a sender without the swarm key learns nothing
            else:
                parts = [self._swarm.seal(part) for part in parts_of(records)]
                reading.told = DirectoryDelta(records)
                reading.fresh_changes_s = min(max(FRESH_S, FRESH_PER_RECORD_S * len(records)), FRESH_CHANGES_S)
        except SplitnetError as error:
            # Errors name peers of a closed swarm, so only members get them: members can name the model.
            is_told = not self._swarm.is_closed or name[0] in self._home
            failure = str(error) if is_told else "this peer's directory does not answer: ask again later"
        except Exception:
            log.exception("the directory could not be read")
            failure = "an error at this peer"
        with self._lock:
            waiting, reading.waiting = reading.waiting, []
            reading.parts, reading.read_at = parts, time.monotonic()
            if failure:
                self._readings.pop(name, None)
        for source, message, payer in waiting:
            self._send_changes(source, message, payer, reading, failure)

    def _send_changes(
        self, source: Connection, message: LookUp, payer: _Payer, reading: _CachedAnswer, failure: str
    ) -> None:
        parts, present = reading.parts or [b""], b""
        if message.most and reading.told is not None and not failure:
            present, changed = reading.told.changes(message.known, message.since, message.most)
            parts = [self._swarm.seal(part) for part in parts_of(changed)]
        with self._lock:
            self._done(payer)
            if failure:
                self._refuse_question(source, message.number, failure)
            else:
                self._send_answer(source, message, payer, parts, present, time.monotonic())

    def _records(self, place: str, depth: int) -> list[PeerRecord] | None:
        """The records of a model; None: the model is not known."""
        model = self._home.get(place, None if self._swarm.is_closed else place)
        if model is None:
            model = self._model_at(place, depth)
        if model is None:
            return None
        return [record for record in self._directory.records(model, depth) if record.signed]

    def _model_at(self, place: str, depth: int) -> str | None:
        """The model that a question in a closed swarm names. The models are read at most once per `FRESH_S`, because
        outsiders may ask."""
        read_at, known = self._known.get(depth, (-math.inf, {}))
        if place not in known and time.monotonic() - read_at > FRESH_S:
            models = {record.model for record in self._directory.records("", depth)}
            known = {self._swarm.place(model): model for model in models}
            self._known[depth] = time.monotonic(), known
        return known.get(place)

    def _announce(self, source: Connection, message: Announce, now: float) -> None:
        used = _bucket_of(self._announcements, source.curve)
        if wait_s := used.wait_s(ANNOUNCEMENTS_PER_MINUTE, now):
            self._refuse_question(
                source,
                message.number,
                f"your key has made too many announcements to this peer: try again in {wait_s} s",
            )
            return
        used.spend(1, ANNOUNCEMENTS_PER_MINUTE, now)
        packed: bytes | None = None
        if len(message.payload) <= MAX_RECORD_BYTES + SEAL_BYTES:
            with suppress(NotAuthorized):  # announcements of outsiders do not wait
                packed = self._swarm.unseal(message.payload)
        if packed is None:
            self._outbox.send(source, Announced(message.number, False))
            return
        self._waits((_About.OWN, source.curve))
        store = partial(self._store, source, message.number, packed, message.depth)
        self._do_later("announce", message.depth, store)

    def _store(self, source: Connection, number: int, packed: bytes, depth: int) -> None:
        record: PeerRecord | None = None
        taken, failure = False, ""
        try:
            record = verified_record(packed)
            now = time.time()
            if record.is_valid_at(now) and self._has_place(source.curve, record, now):
                taken = self._directory.store_record(record, packed, self._depth_left(depth))
        except (ProtocolError, NotAuthorized):
            pass
        except SplitnetError as error:
            failure = str(error)
        except Exception:
            log.exception("a record could not be announced")
            failure = "an error at this peer"
        with self._lock:
            self._done((_About.OWN, source.curve))
            # Drop cached answers, because the announcer may ask for the record at once.
            if record is not None and taken:
                for name, reading in list(self._readings.items()):
                    if name[0] in map(self._swarm.place, ("", record.model)) and reading.parts is not None:
                        del self._readings[name]
            if failure:
                self._refuse_question(source, number, failure)
            else:
                self._outbox.send(source, Announced(number, taken))

    def _depth_left(self, depth: int) -> int:
        """The depth with which to pass a record on; 0: this peer has passed on too many, and only stores the record."""
        with self._lock:
            now = time.monotonic()
            if not depth or self._passed_on.wait_s(PASSED_ON_PER_MINUTE, now):
                return 0
            self._passed_on.spend(1, PASSED_ON_PER_MINUTE, now)
            return depth

    def _has_place(self, announcer: bytes, record: PeerRecord, now: float) -> bool:
        if record.key.curve_raw == announcer:
            return True
        with self._lock:
            announced = self._announced.get(announcer, dict[bytes, float]())
            keep_latest(self._announced, announcer, announced, MAX_KEYS)
            for key in [key for key, expires_at in announced.items() if expires_at <= now]:
                del announced[key]
            if record.key.raw not in announced and len(announced) >= RECORDS_PER_ANNOUNCER:
                return False
            announced[record.key.raw] = record.expires_at
            return True

    def _send_answer(
        self, source: Connection, message: LookUp, payer: _Payer, parts: list[bytes], present: bytes, now: float
    ) -> None:
        self._charge(payer, LOOK_UP_BYTES + ENTRY_BYTES * len(message.known) + sum(map(len, parts)), now)
        for index, part in enumerate(parts):
            self._outbox.send(source, Found(message.number, len(parts) - 1 - index, part, present))

    def _charge(self, payer: _Payer, nbytes: int, now: float) -> None:
        _bucket_of(self._bytes, payer).spend(nbytes, BYTES_PER_MINUTE, now)
        self._of_all[payer[0]].spend(nbytes, _bytes_of_all(payer[0]), now)

    def _refuse_question(self, source: Connection, number: int, text: str) -> None:
        self._outbox.send(source, Failure(b"", 0, number, FailureCode.BUSY, text[:500]))

    def _done(self, payer: _Payer) -> None:
        self._waiting_in[payer[0]] -= 1
        self._waiting[payer] -= 1
        if not self._waiting[payer]:
            del self._waiting[payer]

    def _do_later(self, kind: str, depth: int, task: Callable[[], None]) -> None:
        tasks = self._tasks.setdefault((kind, depth), deque())
        tasks.append(task)
        if len(tasks) == 1:
            name = f"splitnet-directory-{kind}"
            thread = threading.Thread(target=self._run_tasks, args=((kind, depth),), name=name, daemon=True)
            self._threads.add(thread)
            thread.start()

    def _run_tasks(self, name: tuple[str, int]) -> None:
        tasks = self._tasks[name]
        while True:
            tasks[0]()
            with self._lock:
                tasks.popleft()
                if self._closed or not tasks:
                    tasks.clear()
                    self._threads.discard(threading.current_thread())
                    return


def _bytes_of_all(about: _About) -> int:
    return BYTES_OF_ALL_PER_MINUTE if about is _About.OWN else BYTES_OF_ALL_PER_MINUTE // 2


K = TypeVar("K", bytes, _Payer)


def _bucket_of(buckets: dict[K, TokenBucket], key: K) -> TokenBucket:
    keep_latest(buckets, key, buckets.get(key) or TokenBucket(), MAX_KEYS)
    return buckets[key]
