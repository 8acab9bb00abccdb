"""The peers that serve the client's model, from the last answer of the directory, also while the directory is silent.

The whole directory is read at first and then seldom, because a read with many peers takes megabytes. In between, peers
are asked for changes, another peer each time: no peer can forge a record, and the next peer reports records that one
peer omits.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from scheduler.liveness import BAN_S, DIRECTORY_ANSWER_S
from splitnet.directory.announcer import REFRESH_S
from splitnet.directory.ask import PeerDirectory, RecordChanges
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.record import PeerRecord
from splitnet.errors import DirectoryError, NotAuthorized, ProtocolVersionError, WrongSwarm
from splitnet.security.identity import AuthorizedKeys, PublicKey
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.messages import ENTRY_BYTES, PROTOCOL_VERSION

log = logging.getLogger(__name__)

LOOK_S = 10.0  # interval of questions while the client is in use, or while no peer answers
SLOWER = 2  # largest factor by which many records make the interval longer
FEW_RECORDS = 32  # the interval grows with the number of records beyond this number
RECORDS_MAX_AGE_S = 20.0  # a caller that needs newer records waits for an answer, some round trips
READ_S: Final = 600.0  # interval of whole reads; beyond `FEW_RECORDS` it grows in proportion, as the traffic does
REST_S: Final = 30.0  # time without a read after which the directory rests until the next read
BYTES_PER_MINUTE: Final = 30_000  # of questions about changes and their answers, without repeats after a silent peer
MESSAGE_BYTES: Final = 400  # of a question and its answer, without records
LEAST_BYTES: Final = 3000  # smallest limit of an answer: room for some records
LISTED: Final = 256  # largest number of records that a question names
LISTED_LIKELY: Final = 192  # largest number of these that are likely on routes; the others were confirmed longest ago
CLOCKS_S: Final = 60.0  # largest difference between the clocks of peers
UNHEARD_S: Final = 1800.0  # time after which an expired record without confirmation is dropped
NEVER: Final = 1e11
ARRIVE_S: Final = REFRESH_S + DIRECTORY_ANSWER_S  # time within which a serving peer has announced itself
ARRIVE_LOOK_S: Final = 1.0

Likely = Callable[[Sequence[PeerRecord], Sequence[PeerRecord], int], Sequence[PeerRecord]]


class LinkStates(Protocol):
    """The client's links to peers."""

    def link_state(self, endpoint: Endpoint) -> LinkState: ...


@dataclass(eq=False)
class PeerCache:
    """The latest records of a model's peers. Thread-safe.

    Args:
        trusted: keys of the peers that may be used; None: any.
        peers: asks peers for changes; None: each look reads the whole directory.
        likely: chooses, from all peers and a subset, a number of the subset's peers that are most likely on routes.
    """

    directory: SwarmDirectory
    fingerprint: str
    model_name: str
    links: LinkStates
    trusted: AuthorizedKeys | None = None
    peers: PeerDirectory | None = None
    likely: Likely = lambda _, some, count: some[:count]

    def __post_init__(self) -> None:
        # Records by key, also of peers that have left; Unix times of the last confirmations.
        self._held: dict[PublicKey, PeerRecord] = {}
        self._heard_at: dict[PublicKey, float] = {}
        self._records: list[PeerRecord] = []
        self._asked_at = self._read_at = -math.inf
        self._told_since = 0.0  # all placements before this Unix time have been reported
        self._asked_last: Endpoint | None = None
        self._asks_linked = False
        self._silent = False  # no peer answered the last question; the known records are used
        self._asking = threading.Lock()
        self._awaited_until: float | None = None  # end of the wait for a first record, in a swarm with other models

    def refresh(self, *, fresh: bool = False, whole: bool = False) -> list[PeerRecord]:
        """Peers that serve this model and speak this protocol; asks again after 20 to 30 s, or at once if `fresh`.

        While no peer answers, the question is repeated every 10 s, and the known records are used until they expire, or
        longer while a link to the peer is up. whole: read the directory, unless the last read was within 10 s.

        Raises:
            DirectoryError: the directory does not answer, and no peer is known.
            WrongSwarm: the swarm serves only other weights, also after `ARRIVE_S`.
            ProtocolVersionError: all peers speak another protocol.
            NotAuthorized: no peer is trusted.
        """
        if self._is_due(fresh or whole):
            self._ask_once(whole)
        while not self._records and self._may_arrive():
            time.sleep(ARRIVE_LOOK_S)
            self._ask_once(whole)
        if not self._records:
            return []
        self._awaited_until = None
        trusted = [record for record in self._records if self.trusts(record.key)]
        speaking = [record for record in trusted if record.protocol == PROTOCOL_VERSION]
        if not trusted:
            raise NotAuthorized(
                f"{len(self._records)} peers serve {self.model_name}, and you trust none of them: add the keys of "
                "trusted peers to your --trusted-peers file"
            )
        if not speaking:
            spoken = max(record.protocol for record in trusted)
            older = "this client" if spoken > PROTOCOL_VERSION else "the peers"
            raise ProtocolVersionError(
                f"the peers speak protocol {spoken}, this client speaks {PROTOCOL_VERSION}: upgrade {older}"
            )
        return speaking

    @property
    def look_s(self) -> float:
        """Interval, in seconds, of questions to the directory while the client is in use."""
        return LOOK_S * min(max(len(self._records) / FEW_RECORDS, 1.0), SLOWER)

    @property
    def is_old(self) -> bool:
        """Whether to ask again in the background, so that the next look does not wait."""
        return time.monotonic() - self._asked_at > min(LOOK_S, self.look_s - LOOK_S / 2)

    def find_record(self, key: PublicKey) -> PeerRecord | None:
        """The latest record of a peer."""
        return next((record for record in self._records if record.key == key), None)

    def trusts(self, key: PublicKey) -> bool:
        """Whether the peer with this key may be used."""
        return self.trusted is None or self.trusted.allows(key.curve_raw)

    def _is_due(self, fresh: bool) -> bool:
        age_s = time.monotonic() - self._asked_at
        if not self._records or age_s > (LOOK_S if self._silent else RECORDS_MAX_AGE_S + self.look_s - LOOK_S):
            return True
        return fresh and not self._silent

    def _ask_once(self, whole: bool) -> None:
        """Asks, unless another thread has just asked."""
        asked_at = self._asked_at
        # A missing answer takes seconds, so only one thread waits for the answer.
        if self._asking.acquire(blocking=not self._silent):
            try:
                if self._asked_at == asked_at:
                    self._ask_directory(whole)
            finally:
                self._asking.release()

    def _ask_directory(self, whole: bool) -> None:
        try:
            read_s_ago = time.monotonic() - self._read_at
            if (whole and read_s_ago > LOOK_S) or not self._hear_changes():
                self._read_records()
            elif read_s_ago > REST_S:
                self.directory.pause()
            self._silent = False
        except DirectoryError as error:
            now, up = time.time(), LinkState.UP
            self._keep_valid(lambda each: self._void_at(each) > now or self.links.link_state(each.endpoint) is up)
            if not self._records:
                self._silent = False
                raise
            if not self._silent:
                log.warning("%s Until the directory answers, the %d known peers are used.", error, len(self._records))
            self._silent = True
        finally:
            self._asked_at = time.monotonic()

    def _read_records(self) -> None:
        began = time.time()
        records = self.directory.peers(self.fingerprint)
        self._held = {record.key: record for record in records}
        self._heard_at.clear()
        self._records = records
        self._told_since, self._read_at = began - CLOCKS_S, time.monotonic()

    def _hear_changes(self) -> bool:
        """Asks a peer for changes; False: no peer can be asked, no peer answers, or a whole read is due."""
        read_s = READ_S * max(len(self._records) / FEW_RECORDS, 1.0)
        if self.peers is None or not self._records or time.monotonic() - self._read_at > read_s:
            return False
        began = time.time()
        listed = self._listed()
        since = 0.0 if len(listed) == len(self._records) else self._told_since
        first = self._one_to_ask()
        heard = self._hear_from(first, listed, since, self._others_to_ask(set(first)))
        if not heard:
            return False
        suspects = self._take_in(listed, heard)
        if suspects:
            # A second peer must confirm, because a peer may omit others. If no second peer is left, the omitted peers
            # are asked.
            teller, named = self._asked_last, {record.endpoint for record in suspects}
            others = self._others_to_ask({teller, *named})
            second = self._hear_from(others or self._others_to_ask({teller}), suspects, NEVER)
            if second:
                suspects = self._take_in(suspects, second)
            elif others:
                suspects = []
        gone = {record.key for record in suspects}
        self._keep_valid(
            lambda record: (
                record.key not in gone and self._void_at(record) > (began if record.has_left else began - UNHEARD_S)
            )
        )
        self._told_since = began - CLOCKS_S
        return True

    def _listed(self) -> Sequence[PeerRecord]:
        """The records that a question names, the most important first."""
        if len(self._records) <= LISTED:
            return self._records
        likely = self.likely(self._records, self._records, LISTED_LIKELY)
        # Records of new placements are named, because they would otherwise be reported again.
        new = [record for record in self._records if record.placed_at >= self._told_since]
        rest = sorted(self._records, key=self._void_at)
        return list({record.key: record for record in (*likely, *new, *rest)}.values())[:LISTED]

    def _hear_from(
        self, asked: Sequence[Endpoint], listed: Sequence[PeerRecord], since: float, others: Sequence[Endpoint] = ()
    ) -> list[RecordChanges]:
        """The answers of these peers, see `PeerDirectory.changes`."""
        assert self.peers is not None
        if not asked:
            return []
        room = BYTES_PER_MINUTE * self.look_s / 60 / len(asked) - MESSAGE_BYTES - (ENTRY_BYTES + 2) * len(listed)
        told = self.peers.changes(self.fingerprint, listed, since, max(int(room), LEAST_BYTES), asked, others)
        self._asked_last = next(iter(told), asked[0])
        return list(told.values())

    def _askable(self, excluded: Collection[Endpoint | None]) -> tuple[list[Endpoint], list[Endpoint]]:
        """Peers that can be asked what has changed: peers with a link, and all peers that can be connected to."""
        known = [
            record.endpoint
            for record in self._records
            if record.protocol == PROTOCOL_VERSION and record.endpoint not in excluded and self.trusts(record.key)
        ]
        linked = [endpoint for endpoint in known if self.links.link_state(endpoint) is LinkState.UP]
        return linked, [endpoint for endpoint in known if not endpoint.hidden] or linked

    def _one_to_ask(self) -> list[Endpoint]:
        """A random peer other than the last one; every second time one with a link. Linked peers alone may collude."""
        linked, known = self._askable({self._asked_last})
        if not known:
            linked, known = self._askable(())
        self._asks_linked = not self._asks_linked
        choice = linked if linked and self._asks_linked else known
        return [random.choice(choice)] if choice else []

    def _others_to_ask(self, excluded: Collection[Endpoint | None]) -> list[Endpoint]:
        """A random peer with a link and a random peer, asked at once, so that a silent one delays nothing."""
        linked, known = self._askable(excluded)
        return list(dict.fromkeys(random.choice(some) for some in (linked, known) if some))

    def _take_in(self, listed: Sequence[PeerRecord], heard: Sequence[RecordChanges]) -> list[PeerRecord]:
        """Applies answers; returns the listed records that have expired and that no answer confirms."""
        for record in (record for changes in heard for record in changes.records):
            held = self._held.get(record.key)
            if held is None or record.issued_at > held.issued_at:
                self._held[record.key] = record
        now = time.time()
        suspects: list[PeerRecord] = []
        for record, *present in zip(listed, *(changes.present for changes in heard), strict=True):
            if any(present):
                self._heard_at[record.key] = now
            elif self._held[record.key].expires_at <= now:
                suspects.append(record)
        return suspects

    def _keep_valid(self, counts: Callable[[PeerRecord], bool]) -> None:
        """Drops all records for which `counts` is false."""
        self._held = {key: record for key, record in self._held.items() if counts(record)}
        self._heard_at = {key: at for key, at in self._heard_at.items() if key in self._held}
        self._records = [record for record in self._held.values() if not record.has_left]

    def _void_at(self, record: PeerRecord) -> float:
        """Unix time in seconds at which a record expires, with later confirmations of its peer."""
        return max(record.expires_at, self._heard_at.get(record.key, 0.0) + record.ttl_s)

    def _may_arrive(self) -> bool:
        """Whether to wait for the first record of this model, in a swarm with other models: a new peer joins the swarm
        before it announces itself. Raises WrongSwarm: no record has arrived within `ARRIVE_S`."""
        models = self.directory.models()
        others = ", ".join(sorted({name for key, name in models.items() if key != self.fingerprint}))
        now = time.monotonic()
        if others and self._awaited_until is None:
            self._awaited_until = now + ARRIVE_S
            log.warning("No peer of %s is found yet, only of %s: waiting %d s.", self.model_name, others, ARRIVE_S)
        waits = self._awaited_until is not None and now < self._awaited_until
        if others and not waits and self.fingerprint not in models:
            raise WrongSwarm(
                f"this swarm serves other weights than your {self.model_name}: it has {others}. "
                "Use that model, or the address of a swarm that serves your model"
            )
        return bool(others) and waits


@dataclass(frozen=True, slots=True)
class _PeerBan:
    """A ban. left_at: `placed_at` of the span that the peer has announced to leave; None: no such announcement."""

    until: float
    left_at: float | None


class Bans:
    """Peers that a client does not plan with, by the text of their keys. Thread-safe. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._bans: dict[str, _PeerBan] = {}

    def ban_peer(self, key: str, left: PeerRecord | None = None, *, seconds: float = BAN_S) -> None:
        """Bans a failed peer. left: the record of a peer that has announced that it leaves. seconds: infinite: the ban
        is never lifted."""
        until, left_at = self._clock() + seconds, left.placed_at if left else None
        with self._lock:
            former = self._bans.get(key)
            self._bans[key] = _PeerBan(max(until, former.until) if former else until, left_at)

    def lift(self, key: str) -> None:
        with self._lock:
            if key in self._bans and self._bans[key].until < math.inf:
                self._bans.pop(key)

    def keys(self) -> set[str]:
        """The banned peers."""
        return set(self._present_bans())

    def unusable(self, records: Iterable[PeerRecord], links: LinkStates, exclude: Collection[str] = ()) -> set[str]:
        """Names of peers that routes must avoid: banned peers, and peers that do not serve.

        A record outlives a killed peer, so a peer with a failed link is left out until the link is up, or for some time
        after the link was closed.
        """
        banned = self.keys() | set(exclude)
        return {
            record.key.text
            for record in records
            if record.key.text in banned or not record.serves or links.link_state(record.endpoint) is LinkState.DOWN
        }

    def may_be_unbanned(self, records: Iterable[PeerRecord]) -> list[PeerRecord]:
        """Banned peers that may serve again if they answer: they have not left, or have returned."""
        banned = self._present_bans()
        serving = [record for record in records if record.serves and record.key.text in banned]
        return [record for record in serving if banned[record.key.text].left_at != record.placed_at]

    def _present_bans(self) -> dict[str, _PeerBan]:
        now = self._clock()
        with self._lock:
            self._bans = {key: ban for key, ban in self._bans.items() if ban.until > now}
            return dict(self._bans)
