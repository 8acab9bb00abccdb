"""Which peers serve the client's model, as the directory said last; also while it says nothing.

The directory is read as a whole at first and then seldom, as that takes megabytes among many peers. In between peers
are asked what has changed, another one each time: none can forge a record, and what one leaves out the next one tells.
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
from splitnet.directory.ask import Changes, PeerDirectory
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.offers import REFRESH_S
from splitnet.directory.record import PeerRecord
from splitnet.errors import DirectoryError, NotAuthorized, ProtocolVersionError, WrongSwarm
from splitnet.security.identity import AuthorizedKeys, PublicKey
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.messages import ENTRY_BYTES, PROTOCOL_VERSION

log = logging.getLogger(__name__)

LOOK_S = 10.0  # interval of questions while the client is in use, or no peer answers
SLOWER = 2
FEW_RECORDS = 32  # the interval grows with the number of records beyond this, at most twofold
RECORDS_MAX_AGE_S = 20.0  # a caller that needs younger records waits for an answer: some round trips
READ_S: Final = 600.0  # interval of reading everything; beyond `FEW_RECORDS` it grows in proportion, as the effort does
REST_S: Final = 30.0  # a directory that was not read for so long rests until it is
BYTES_PER_MINUTE: Final = 30_000  # of questions about changes and their answers, without those when a peer is silent
MESSAGE_BYTES: Final = 400  # a question and its answer, without records
LEAST_BYTES: Final = 3000  # an answer may have so many in any case: some records
LISTED: Final = 256  # records that are named in a question
LISTED_LIKELY: Final = 192  # of these are for routes most likely; the others were not heard of for longest
CLOCKS_S: Final = 60.0  # by which the clocks of peers may differ
UNHEARD_S: Final = 1800.0  # an expired record that no peer confirms does not count after that
NEVER: Final = 1e11
ARRIVE_S: Final = REFRESH_S + DIRECTORY_ANSWER_S  # a peer that serves has announced itself in this time
ARRIVE_LOOK_S: Final = 1.0

Likely = Callable[[Sequence[PeerRecord], Sequence[PeerRecord], int], Sequence[PeerRecord]]


class LinkStates(Protocol):
    """The client's links to peers."""

    def state(self, endpoint: Endpoint) -> LinkState: ...


@dataclass(eq=False)
class PeerCache:
    """The records of a model's peers, as they were read or told last. Thread-safe.

    Args:
        trusted: keys of the peers that count; None: any.
        peers: asks them what has changed; None: everything is read each time.
        likely: of all peers and some of them so many of the latter through which routes most likely go.
    """

    directory: SwarmDirectory
    fingerprint: str
    model_name: str
    links: LinkStates
    trusted: AuthorizedKeys | None = None
    peers: PeerDirectory | None = None
    likely: Likely = lambda _, some, count: some[:count]

    def __post_init__(self) -> None:
        # By key, those of peers that have left, too; when a peer was last confirmed, Unix time in seconds.
        self._held: dict[PublicKey, PeerRecord] = {}
        self._heard_at: dict[PublicKey, float] = {}
        self._records: list[PeerRecord] = []
        self._asked_at = self._read_at = -math.inf
        self._told_since = 0.0  # of all that are where they are since before that it was told; Unix time in seconds
        self._asked_last: Endpoint | None = None
        self._asks_linked = False
        self._silent = False  # nobody answered the last time, though there are peers to go on with
        self._asking = threading.Lock()
        self._awaited_until: float | None = None  # the first record, where the swarm has other models only

    def look(self, *, fresh: bool = False, whole: bool = False) -> list[PeerRecord]:
        """Peers that serve this model and speak this protocol; asked for again after 20 to 30 s, or at once if `fresh`.

        While no peer answers, that is tried every 10 s. Meanwhile the last records count, until they expire; those of
        peers to which a link is up count longer. whole: the directory is read, unless that was 10 s ago at most.

        Raises:
            DirectoryError: the directory does not answer, and no peer is known.
            WrongSwarm: the swarm serves other weights only, after `ARRIVE_S` too.
            ProtocolVersionError: all peers speak another protocol.
            NotAuthorized: there are peers, of which none is trusted.
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
                f"{len(self._records)} peers serve {self.model_name}, and none of them is one that you trust: add "
                "its key to your --trusted-peers file if you do"
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
        """How often the directory is to be asked while the client is in use."""
        return LOOK_S * min(max(len(self._records) / FEW_RECORDS, 1.0), SLOWER)

    @property
    def is_old(self) -> bool:
        """Whether to ask again in the background, so that nobody has to wait for that before the next look."""
        return time.monotonic() - self._asked_at > min(LOOK_S, self.look_s - LOOK_S / 2)

    def find(self, key: PublicKey) -> PeerRecord | None:
        """The record of a peer, as it was read last."""
        return next((record for record in self._records if record.key == key), None)

    def trusts(self, key: PublicKey) -> bool:
        """Whether the peer with this key counts."""
        return self.trusted is None or self.trusted.allows(key.curve_raw)

    def _is_due(self, fresh: bool) -> bool:
        age_s = time.monotonic() - self._asked_at
        if not self._records or age_s > (LOOK_S if self._silent else RECORDS_MAX_AGE_S + self.look_s - LOOK_S):
            return True
        return fresh and not self._silent

    def _ask_once(self, whole: bool) -> None:
        """Asks, unless another thread has just asked."""
        asked_at = self._asked_at
        # An answer that does not come takes seconds: only one of all threads waits for the answer.
        if self._asking.acquire(blocking=not self._silent):
            try:
                if self._asked_at == asked_at:
                    self._ask(whole)
            finally:
                self._asking.release()

    def _ask(self, whole: bool) -> None:
        try:
            read_s_ago = time.monotonic() - self._read_at
            if (whole and read_s_ago > LOOK_S) or not self._hear_changes():
                self._read()
            elif read_s_ago > REST_S:
                self.directory.rest()
            self._silent = False
        except DirectoryError as error:
            now, up = time.time(), LinkState.UP
            self._keep(lambda each: self._void_at(each) > now or self.links.state(each.endpoint) is up)
            if not self._records:
                self._silent = False
                raise
            if not self._silent:
                log.warning("%s Until it does, the %d peers known so far are used.", error, len(self._records))
            self._silent = True
        finally:
            self._asked_at = time.monotonic()

    def _read(self) -> None:
        began = time.time()
        records = self.directory.peers(self.fingerprint)
        self._held = {record.key: record for record in records}
        self._heard_at.clear()
        self._records = records
        self._told_since, self._read_at = began - CLOCKS_S, time.monotonic()

    def _hear_changes(self) -> bool:
        """Asks a peer for changes; False: no peer can be asked, or answers, or it is time to read everything."""
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
            # One alone could leave out any peer. If no other is left, those are asked that it has left out.
            teller, named = self._asked_last, {record.endpoint for record in suspects}
            others = self._others_to_ask({teller, *named})
            second = self._hear_from(others or self._others_to_ask({teller}), suspects, NEVER)
            if second:
                suspects = self._take_in(suspects, second)
            elif others:
                suspects = []
        gone = {record.key for record in suspects}
        self._keep(
            lambda record: (
                record.key not in gone and self._void_at(record) > (began if record.has_left else began - UNHEARD_S)
            )
        )
        self._told_since = began - CLOCKS_S
        return True

    def _listed(self) -> Sequence[PeerRecord]:
        """The records that are named in a question, those first that are needed most."""
        if len(self._records) <= LISTED:
            return self._records
        likely = self.likely(self._records, self._records, LISTED_LIKELY)
        new = [record for record in self._records if record.placed_at >= self._told_since]  # they would be told again
        rest = sorted(self._records, key=self._void_at)
        return list({record.key: record for record in (*likely, *new, *rest)}.values())[:LISTED]

    def _hear_from(
        self, asked: Sequence[Endpoint], listed: Sequence[PeerRecord], since: float, others: Sequence[Endpoint] = ()
    ) -> list[Changes]:
        """The answers of these peers, see `PeerDirectory.changes`."""
        assert self.peers is not None
        if not asked:
            return []
        room = BYTES_PER_MINUTE * self.look_s / 60 / len(asked) - MESSAGE_BYTES - (ENTRY_BYTES + 2) * len(listed)
        told = self.peers.changes(self.fingerprint, listed, since, max(int(room), LEAST_BYTES), asked, others)
        self._asked_last = next(iter(told), asked[0])
        return list(told.values())

    def _askable(self, excluded: Collection[Endpoint | None]) -> tuple[list[Endpoint], list[Endpoint]]:
        """Peers that can be asked what has changed: those to which a link is up, and all that can be connected to."""
        known = [
            record.endpoint
            for record in self._records
            if record.protocol == PROTOCOL_VERSION and record.endpoint not in excluded and self.trusts(record.key)
        ]
        linked = [endpoint for endpoint in known if self.links.state(endpoint) is LinkState.UP]
        return linked, [endpoint for endpoint in known if not endpoint.hidden] or linked

    def _one_to_ask(self) -> list[Endpoint]:
        """In turns a peer with a link and any one: those with a link may collude. Not the one of last time."""
        linked, known = self._askable({self._asked_last})
        if not known:
            linked, known = self._askable(())
        self._asks_linked = not self._asks_linked
        choice = linked if linked and self._asks_linked else known
        return [random.choice(choice)] if choice else []

    def _others_to_ask(self, excluded: Collection[Endpoint | None]) -> list[Endpoint]:
        """One with a link and any one at once, so that a silent one delays nothing."""
        linked, known = self._askable(excluded)
        return list(dict.fromkeys(random.choice(some) for some in (linked, known) if some))

    def _take_in(self, listed: Sequence[PeerRecord], heard: Sequence[Changes]) -> list[PeerRecord]:
        """Takes in answers; returns the listed records that are void, and that no answer confirms."""
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

    def _keep(self, counts: Callable[[PeerRecord], bool]) -> None:
        """Keeps the records that still count."""
        self._held = {key: record for key, record in self._held.items() if counts(record)}
        self._heard_at = {key: at for key, at in self._heard_at.items() if key in self._held}
        self._records = [record for record in self._held.values() if not record.has_left]

    def _void_at(self, record: PeerRecord) -> float:
        """Until when a record counts, by itself or by later confirmations of its peer; Unix time in seconds."""
        return max(record.expires_at, self._heard_at.get(record.key, 0.0) + record.ttl_s)

    def _may_arrive(self) -> bool:
        """Whether to wait for the first record of this model, where the swarm has other models: a peer that has just
        started announces itself later than others see its swarm. Raises WrongSwarm: no record came in `ARRIVE_S`."""
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
                "Use that model, or the address of a swarm of yours"
            )
        return bool(others) and waits


@dataclass(frozen=True, slots=True)
class _Ban:
    """left_at: the `placed_at` of the span that the peer was leaving, if it said so."""

    until: float
    left_at: float | None


class Bans:
    """Which peers a client does not plan with, and for how long, by key text. Thread-safe. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._bans: dict[str, _Ban] = {}

    def add(self, key: str, left: PeerRecord | None = None, *, seconds: float = BAN_S) -> None:
        """Bans a peer that failed; left: its record, if it said that it goes away."""
        ban = _Ban(self._clock() + seconds, left.placed_at if left else None)
        with self._lock:
            self._bans[key] = ban

    def lift(self, key: str) -> None:
        with self._lock:
            self._bans.pop(key, None)

    def keys(self) -> set[str]:
        """Peers that are banned now."""
        return set(self._present())

    def unusable(self, records: Iterable[PeerRecord], links: LinkStates, exclude: Collection[str] = ()) -> set[str]:
        """Names of the peers that no route may go through now: banned ones, and those that do not serve.

        A record outlives a killed peer, so one whose link has failed is left out until that is up, or some time after
        it was closed.
        """
        banned = self.keys() | set(exclude)
        return {
            record.key.text
            for record in records
            if record.key.text in banned or not record.serves or links.state(record.endpoint) is LinkState.DOWN
        }

    def may_be_unbanned(self, records: Iterable[PeerRecord]) -> list[PeerRecord]:
        """Banned peers that may serve again, if they answer: those that did not go away, or have come back since."""
        banned = self._present()
        serving = [record for record in records if record.serves and record.key.text in banned]
        return [record for record in serving if banned[record.key.text].left_at != record.placed_at]

    def _present(self) -> dict[str, _Ban]:
        now = self._clock()
        with self._lock:
            self._bans = {key: ban for key, ban in self._bans.items() if ban.until > now}
            return dict(self._bans)
