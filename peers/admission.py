"""What a peer accepts: blocks that it serves, memory that is free, and keys with what they are granted.

All memory that clients make a peer take is counted in a `MemoryAccount`: KV memory by the `SessionTable`, waiting steps
by the `WorkQueue`, and training by `Training`. In each a key leaves something for the next.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from peers.sessions import Session, SessionTooLong
from splitnet.errors import PeerBusy, ProtocolError
from splitnet.limits import MINUTE_S, Budget, TokenBucket
from splitnet.security.identity import AuthorizedKeys, KeyOptions, PublicKey
from splitnet.wire.codecs import check_size, codec_by_code
from splitnet.wire.endpoints import Endpoint, is_address
from splitnet.wire.messages import FailureCode, Open, Payload, Step

MAX_SESSIONS = 1024
MIN_RESERVATION = 64
"""Positions that a session reserves at least, so that many tiny sessions are not free."""

LEASE_S = 10.0
"""While another key wants its memory, a session of a key that has more than its share ends this long after its last
step."""

LONGEST_LEASE_S = 60.0
"""And this long after it was opened, even if it makes steps."""

WANTED_S = 15.0
"""How long a refused key counts as wanting memory: keys that have more than their share get no more meanwhile."""

LOOK_AGAIN_S = 0.25
"""A key that was refused this recently is refused without a look at the sessions."""

REVOKED = "the owner of this peer does not accept your key any more: use other peers"


class Purpose(StrEnum):
    """What memory is for."""

    POSITIONS = "positions"
    """Keys, values and logs, for all positions that a session has reserved."""
    ROWS = "rows"
    """What rows take besides their positions: tensors, and states with copies of them."""
    STEPS = "steps"
    """Steps that wait for the device."""
    PASSES = "passes"
    """Passes that wait, and inputs that gradients may come for."""
    GRAPHS = "graphs"
    """What spares passes that gradients may come for to be computed again; it makes room for everything else."""
    ADAPTERS = "adapters"
    """Adapters, with parts that come in and sums of gradients."""


class MemoryAccount(Budget):
    """Bytes of one kind of memory by key, session and purpose; a key gets what `Budget` says. Its user has a lock.

    Args:
        limit: bytes.
        refusal: the beginning of the refusal, before the bytes.
        advice: what a refused client can do, as a clause.
        most: as of `Budget`, for a key, a session of it, and a purpose of that.
    """

    def __init__(self, limit: int, refusal: str, advice: str, most: tuple[int | None, ...] = ()) -> None:
        super().__init__(limit, most)
        self._refusal, self._advice = refusal, advice

    def used_for(self, purpose: Purpose) -> int:
        """Bytes of all sessions."""
        return sum(nbytes for account, nbytes in self.accounts() if account[2:] == (purpose,))

    def take(self, session: Session, purpose: Purpose, nbytes: int) -> None:
        """Before something is allocated.

        Raises:
            PeerBusy: it does not fit, or leaves too little for other keys. Nothing is changed then.
        """
        if not self.reserve(nbytes, session.owner, session, purpose):
            held = self.held(session.owner)
            shared = f"; your key has {held}, and may have as much as is left for others" if nbytes <= self.free else ""
            raise PeerBusy(
                f"{self._refusal} {nbytes} bytes: {self.free} of {self.limit} are free{shared}; {self._advice}"
            )

    def give_back(self, session: Session, purpose: Purpose, nbytes: int) -> None:
        """After something was dropped; nothing is left of a session that has ended."""
        account = session.owner, session, purpose
        self.release(min(nbytes, self.held(*account)), *account)

    def end(self, session: Session) -> None:
        """Gives back all that is left of a session."""
        for purpose in Purpose:
            self.give_back(session, purpose, self.limit)


@dataclass(frozen=True, slots=True)
class ServedBlocks:
    """The part of a model that this peer serves."""

    model: str
    """Fingerprint of the weights."""
    start: int
    end: int
    num_blocks: int
    hidden_size: int
    max_positions: int | None
    weights: str = ""
    """What they are held as, see `Weights.text`."""

    def refusal(self, message: Open) -> tuple[FailureCode, str] | None:
        """Why an `Open` cannot be served by this peer at all."""
        if message.model != self.model:
            return FailureCode.WRONG_MODEL, "this peer serves other weights"
        if not self.start <= message.start < message.end <= self.end:
            return (
                FailureCode.WRONG_BLOCKS,
                f"this peer serves blocks {self.start}..{self.end - 1}, not {message.start}..{message.end - 1}",
            )
        try:
            codec_by_code(message.codec)
            next_hop_of(message)
            if message.previous:
                PublicKey(message.previous)
        except Exception as error:  # an unknown codec, a key that is no point of the curve, a malformed address
            return FailureCode.BAD_MESSAGE, str(error)
        return None

    def check(self, session: Session, message: Step) -> int:
        """Positions in the step, after everything that its header claims was checked against its session."""
        rows = set[int]()
        total = longest = 0
        for row, start, length, keep in message.parts:
            if not length or keep > length:
                raise ProtocolError("a part of the step is empty, or keeps more than it has")
            rows.add(row)
            total += length
            longest = max(longest, start + length)
        if not total:
            raise ProtocolError("a step has no parts")
        if len(rows) != len(message.parts):
            raise ProtocolError("a step names a row twice")
        self.check_payload(message.codec, message.payload, total)
        if self.max_positions is not None and longest > self.max_positions:
            raise SessionTooLong(f"position {longest} is beyond the model's context of {self.max_positions}")
        size = total + len(message.forks or ())
        # Twice in all, as steps that are answered may still be in their pass, and those of an older epoch are finished.
        if size > session.reservation or session.waiting_size + size > 2 * session.reservation:
            raise SessionTooLong(f"the session has reserved {session.reservation} positions")
        return total

    def check_payload(self, codec: int, payload: Payload, positions: int) -> None:
        """Raises CodecError if there is no such codec, or the payload has not the size of so many positions."""
        check_size(codec, payload, positions, self.hidden_size)


def next_hop_of(message: Open) -> Endpoint | None:
    """The next hop that an `Open` names. Raises ProtocolError and KeyFileError if that is malformed."""
    if not message.next_key:
        return None
    key = PublicKey(message.next_key)
    _ = key.curve_raw
    if not all(map(is_address, (message.next_address, *(relay.address for relay in message.next_relays)))):
        raise ProtocolError("the next hop's address is not tcp://IP:PORT: names of others are not looked up")
    for relay in message.next_relays:
        PublicKey(relay.key)
    return Endpoint(message.next_address, key, message.next_relays)


class SessionTable:
    """Admission by KV memory: what is reserved never exceeds `capacity`.

    One key may have all of it until another wants some. Each has a share then, by its weight. A key within its share
    gets room: sessions of keys beyond theirs end when they have made no step for `LEASE_S`, or after `LONGEST_LEASE_S`.

    Args:
        capacity: bytes for keys and values, states, and logs of what was sent on.
        idle_s: after this long without a message a session is dropped.
        position_bytes: of keys and values.
        row_bytes: what a row takes besides its positions.
        usual_log_bytes: what the log of a position takes with the codec that most sessions have.
        ahead: share of its reservation that a session's rows and logs may take beyond it, as they are allocated ahead.
        num_blocks: of the model; sessions that end there keep no log.
        keys: what each key is granted; None: all alike.

    Attributes:
        get: the session of an id, or None.
        memory: what sessions have reserved.
    """

    def __init__(
        self,
        capacity: int,
        *,
        idle_s: float = 600.0,
        position_bytes: float = 1.0,
        row_bytes: int = 0,
        usual_log_bytes: int = 0,
        ahead: float = 0.0,
        num_blocks: int = 0,
        keys: AuthorizedKeys | None = None,
    ) -> None:
        # What a key may have is found here.
        self.memory = MemoryAccount(capacity, "no KV memory for", "try with fewer positions", (capacity,) * 3)
        self.idle_s = idle_s
        self._position_bytes = position_bytes * (1 + ahead)
        self._row_bytes = row_bytes
        self._usual_bytes = (position_bytes + usual_log_bytes) * (1 + ahead)
        self._ahead = ahead
        self._num_blocks = num_blocks
        self._keys = keys or AuthorizedKeys.anyone()
        self._sessions: dict[bytes, Session] = {}
        self.get = self._sessions.get
        self._count: dict[bytes, int] = {}
        """Sessions by key."""
        self._wanted: dict[bytes, float] = {}
        """By key: when it was refused."""
        self._ended = threading.Condition()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def capacity(self) -> int:
        """What one session of one row could reserve if there were no others, in positions with the usual codec."""
        return max(0, int((self.memory.limit - self._row_bytes) / self._usual_bytes))

    @property
    def free_positions(self) -> int:
        """What a new session may reserve, with the usual codec."""
        return max(0, int((self.memory.free - self._row_bytes) / self._usual_bytes))

    def make_room(self, session: Session, reservation: int, now: float) -> list[Session]:
        """Ends sessions of keys that have more than their share, if that lets a key reserve what it wants.

        Args:
            session: of that key; one that is not admitted yet, or has a smaller reservation.
            reservation: positions that it wants.

        Returns:
            Those that were ended; none if there is room already, or there would not be.
        """
        key, is_new = session.owner, session.id not in self._sessions
        wanted = self._new_bytes(session) if is_new else self._bytes_of(session, reservation - session.reservation)
        short = wanted - self.memory.free
        crowded = is_new and len(self._sessions) >= MAX_SESSIONS
        if (short <= 0 and not crowded) or now - self._wanted.get(key, -LOOK_AGAIN_S) < LOOK_AGAIN_S:
            return []
        weights = self._weights(key, now)
        share, places = self._share(key, weights)
        most = self._keys.options_of(key).kv
        if self.memory.held(key) + wanted > (share if most is None else min(share, most)):
            return []
        if is_new and self._count.get(key, 0) >= places:
            return []
        ending: list[Session] = []
        left = {owner: self.memory.held(owner) for owner in self._count}
        for other in sorted(self._sessions.values(), key=lambda other: other.stepped_at):
            if short <= 0 and (not crowded or ending):
                break
            if other.owner != key and self._lease_left_s(other, now) <= 0:
                share, places = self._share(other.owner, weights)
                if left[other.owner] > share or (crowded and self._count[other.owner] > places):
                    left[other.owner] -= self.memory.held(other.owner, other)
                    short -= self.memory.held(other.owner, other)
                    ending.append(other)
        if short > 0 or (crowded and not ending):
            return []
        for other in ending:
            self.remove(other)
        return ending

    def add(self, session: Session) -> None:
        """Admits a session; its reservation becomes what it has reserved.

        Raises:
            PeerBusy: its reservation does not fit, or is more than its key may have now.
        """
        if len(self._sessions) >= MAX_SESSIONS:
            text = f"this peer holds {MAX_SESSIONS} sessions already"
            raise PeerBusy(f"{text}; {self._note_refused(session.owner, 0, session.used_at)}")
        session.reservation = self._reservation(session)
        self._check_share(session.owner, self._new_bytes(session), session.used_at)
        try:
            self._take(session, Purpose.POSITIONS, self._bytes_of(session, session.reservation))
            self._take(session, Purpose.ROWS, self._row_bytes)
        except PeerBusy:
            self.memory.end(session)
            raise
        session.reserved_rows = 1
        session.opened_at = session.stepped_at = session.used_at
        self._sessions[session.id] = session
        self._count[session.owner] = self._count.get(session.owner, 0) + 1
        self._wanted.pop(session.owner, None)

    def hold_rows(self, session: Session, rows: int) -> None:
        """Reserves what so many rows take besides their positions, or gives back what fewer do not.

        Raises:
            PeerBusy: it does not fit. Nothing is changed then.
        """
        more = max(1, rows) - session.reserved_rows
        if not more or session.closed:
            return
        if more > 0:
            self._take(session, Purpose.ROWS, more * self._row_bytes)
        else:
            self.memory.give_back(session, Purpose.ROWS, -more * self._row_bytes)
        session.reserved_rows += more

    def resize(self, session: Session, reservation: int) -> None:
        """Changes what a session has reserved; it never shrinks.

        Raises:
            PeerBusy: the larger reservation does not fit, or is more than its key may have now.
        """
        if reservation > session.reservation:
            more = self._bytes_of(session, reservation - session.reservation)
            self._check_share(session.owner, more, session.used_at)
            self._take(session, Purpose.POSITIONS, more)
            session.reservation = reservation

    def remove(self, session: Session) -> None:
        if self._sessions.pop(session.id, None) is not None:
            self._count[session.owner] -= 1
            if not self._count[session.owner]:
                del self._count[session.owner]
            self.memory.end(session)
            session.closed = True
            with self._ended:
                self._ended.notify_all()

    def wait_for_end(self, timeout_s: float) -> bool:
        """Waits until a session ends, for `timeout_s` seconds at most."""
        with self._ended:
            return self._ended.wait(timeout_s)

    def expire(self, now: float) -> list[Session]:
        """Removes and returns the sessions that were idle for too long."""
        idle = [session for session in self._sessions.values() if now - session.used_at > self.idle_s]
        for session in idle:
            self.remove(session)
        self._wanted = self._wanting(now)
        return idle

    def _reservation(self, session: Session) -> int:
        least = int((self.memory.limit - self._row_bytes) / self._cost_of(session))
        return max(session.reservation, min(MIN_RESERVATION, max(1, least)))

    def _new_bytes(self, session: Session) -> int:
        """What a session takes when it is admitted."""
        return self._bytes_of(session, self._reservation(session)) + self._row_bytes

    def _bytes_of(self, session: Session, positions: int) -> int:
        return math.ceil(positions * self._cost_of(session))

    def _cost_of(self, session: Session) -> float:
        """Bytes of a position of its reservation."""
        log = session.log.bytes_per_position if session.end < self._num_blocks else 0
        return self._position_bytes + log * (1 + self._ahead)

    def _take(self, session: Session, purpose: Purpose, nbytes: int) -> None:
        try:
            self.memory.take(session, purpose, nbytes)
        except PeerBusy as error:
            raise PeerBusy(f"{error}; {self._note_refused(session.owner, nbytes, session.used_at)}") from None

    def _wanting(self, now: float) -> dict[bytes, float]:
        """The keys that want memory, and when they were refused."""
        return {key: at for key, at in self._wanted.items() if now - at <= WANTED_S}

    def _weights(self, key: bytes, now: float) -> float:
        """Of a key and those that have memory, or want some."""
        return sum(self._keys.options_of(each).weight for each in {key, *self._count, *self._wanting(now)})

    def _share(self, key: bytes, weights: float) -> tuple[float, float]:
        """Bytes and sessions that a key may have beside others, of all of whose weights it has its own."""
        part = self._keys.options_of(key).weight / weights
        return part * self.memory.limit, max(1.0, part * MAX_SESSIONS)

    def _lease_left_s(self, session: Session, now: float) -> float:
        return min(session.stepped_at + LEASE_S, session.opened_at + LONGEST_LEASE_S) - now

    def _check_share(self, key: bytes, nbytes: int, now: float) -> None:
        held = self.memory.held(key)
        most = self._keys.options_of(key).kv
        if most is not None and held + nbytes > most:
            raise PeerBusy(
                f"your key may reserve {most} bytes of KV memory at this peer, and has {held}: close sessions, or ask "
                "the owner for a larger kv="
            )
        others = [at + WANTED_S - now for other, at in self._wanting(now).items() if other != key]
        if others and held + nbytes > self._share(key, self._weights(key, now))[0]:
            raise PeerBusy(
                f"others wait for KV memory of this peer, and your key has {held} bytes already: close sessions, or "
                f"come back in {max(others):.0f} s"
            )

    def _note_refused(self, key: bytes, nbytes: int, now: float) -> str:
        """Remembers that a key wants memory; what it can do."""
        share, places = self._share(key, self._weights(key, now))
        within = self.memory.held(key) + nbytes <= share and self._count.get(key, 0) < places
        if within and now - self._wanted.get(key, -LOOK_AGAIN_S) >= LOOK_AGAIN_S and len(self._wanted) < MAX_SESSIONS:
            self._wanted[key] = now
        when = f"come back in {LEASE_S:.0f} s, when sessions without steps make room" if within else "close sessions"
        return f"{when}, or use other peers"


class KeyPolicy:
    """Holds CURVE keys to what the owner of the peer grants them.

    Args:
        keys: which are accepted, with their options; None: any, all alike.
    """

    def __init__(self, keys: AuthorizedKeys | None = None) -> None:
        self.keys = keys or AuthorizedKeys.anyone()
        self._spent: dict[bytes, TokenBucket] = {}
        """By key."""

    def weight(self, key: bytes) -> float:
        """In proportion to it keys share what several want."""
        return self.keys.options_of(key).weight

    def check_training(self, key: bytes) -> None:
        """Raises PeerBusy if the owner of this peer does not let the key train."""
        if not self._granted(key).train:
            raise PeerBusy("the owner of this peer does not let your key train (train=no): train through other peers")

    def spend(self, key: bytes, positions: int, now: float) -> None:
        """Takes off positions that are to be computed; what is left comes back evenly over a minute.

        Raises:
            PeerBusy: those of the last minute are used up, or the key is not accepted any more.
        """
        per_minute = self._granted(key).tokens_per_minute
        if per_minute is None:
            return
        bucket = self._spent.get(key) or TokenBucket()
        if wait_s := bucket.wait_s(per_minute, now):
            raise PeerBusy(
                f"your key has used the {per_minute} tokens per minute that the owner of this peer grants it: "
                f"come back in {wait_s} s"
            )
        if positions:
            bucket.spend(positions, per_minute, now)
            self._spent[key] = bucket
        if len(self._spent) > 1024:
            self._spent = {other: used for other, used in self._spent.items() if now - used.at < MINUTE_S}

    def _granted(self, key: bytes) -> KeyOptions:
        if not self.keys.allows(key):
            raise PeerBusy(REVOKED)
        return self.keys.options_of(key)
