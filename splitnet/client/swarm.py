"""A client's connection to the peers of one model: who is there, how far away, and through whom to go."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from scheduler.network import CLIENT, Link
from splitnet.client.bans import Bans
from splitnet.client.event_log import EventLog
from splitnet.client.planner import CLIENT_ENDS, Ends, Forecast, Needs, PlannedHop, Planner
from splitnet.client.survey import Survey
from splitnet.errors import (
    CoverageError,
    NotAuthorized,
    PeerBusy,
    PeerLost,
    ProtocolError,
    ProtocolVersionError,
    SplitnetError,
    WrongSwarm,
)
from splitnet.net.directory import Directory
from splitnet.net.endpoints import Destination, Endpoint, LinkState
from splitnet.net.fields import STRICT_VERSIONS
from splitnet.net.identity import Identity
from splitnet.net.messages import PROTOCOL_VERSION, Failure, Message, Payload, Pong, decode, encode
from splitnet.net.prober import PING_TIMEOUT_S, Answer, Prober
from splitnet.net.records import PeerRecord
from splitnet.net.transport import Transport

if TYPE_CHECKING:
    from splitnet.model.checkpoint import Checkpoint

log = logging.getLogger(__name__)

RECORDS_MAX_AGE_S = 10.0
MEASURED_AT_ONCE = 32
PARDON_S = 0.5
"""In which a banned peer must answer if its ban is to be lifted, as nobody else serves its blocks."""
MAX_PROBED_ROUTES = 4
"""How often a route is planned again because the links to its ends were not measured yet."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a client must know of the model to use its swarm."""

    fingerprint: str
    name: str
    num_blocks: int
    hidden_size: int
    max_positions: int | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelFacts:
        """The facts of a checkpoint."""
        return cls(
            fingerprint=checkpoint.fingerprint,
            name=checkpoint.name,
            num_blocks=checkpoint.num_blocks,
            hidden_size=checkpoint.hidden_size,
            max_positions=checkpoint.max_positions,
        )


class Subscriber(Protocol):
    """Who gets what arrives for a session, from the transport's thread."""

    id: bytes

    def deliver(self, source: Endpoint, message: Message) -> None: ...

    def link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None: ...

    def close(self) -> None: ...


class Swarm:
    """All peers of one model, seen from a client. Thread-safe; close it when done.

    Args:
        facts: the model.
        initial_peers: multiaddrs that any peer of the swarm prints.
        identity: the client's key; None makes one that lives as long as this object.

    Attributes:
        survey: what is known of peers and links.
        events: what has happened to peers and routes lately.
        news: counts up when that was refreshed.
        was_covered: all blocks were served at some time.

    Raises:
        DirectoryError: none of `initial_peers` answers.
    """

    def __init__(self, facts: ModelFacts, initial_peers: Sequence[str], *, identity: Identity | None = None) -> None:
        self.facts = facts
        self.identity = identity or Identity.generate()
        self.survey = Survey()
        self.events = EventLog()
        self.news = 0
        self.was_covered = False
        self._directory = Directory.start(initial_peers=initial_peers, listen=None)
        self._records: list[PeerRecord] = []
        self._records_at = 0.0
        self._sessions: dict[bytes, Subscriber] = {}
        self._bans = Bans()
        self._closing = threading.Event()
        self._look = threading.Event()
        self._suspects: Sequence[PeerRecord] = ()
        self._planner = Planner(self.survey, facts.name)
        self._prober = Prober(self.send)
        self._transport = Transport(self.identity, on_message=self._receive, on_link=self._link_changed)
        self._transport.start()
        self._watcher = threading.Thread(target=self._watch, name="splitnet-watch", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Closes all sessions and leaves."""
        for session in list(self._sessions.values()):
            session.close()
        self._closing.set()
        self._look.set()
        self._transport.close()
        self._directory.close()
        self._watcher.join(PING_TIMEOUT_S)

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def peers(self, *, fresh: bool = False) -> list[PeerRecord]:
        """Peers that serve this model and speak this protocol; read again after 10 s, or at once if `fresh`.

        Raises:
            WrongSwarm: the swarm serves other weights only.
            ProtocolVersionError: all peers speak another protocol.
        """
        if fresh or not self._records or time.monotonic() - self._records_at > RECORDS_MAX_AGE_S:
            self._records = self._directory.peers(self.facts.fingerprint)
            self._records_at = time.monotonic()
        speaking = [record for record in self._records if record.protocol == PROTOCOL_VERSION]
        if not self._records:
            others = sorted({name for key, name in self._directory.models().items() if key != self.facts.fingerprint})
            if others:
                raise WrongSwarm(
                    f"this swarm serves other weights than your {self.facts.name}: it has {', '.join(others)}. "
                    "Use that model, or the address of a swarm of yours"
                )
        elif not speaking:
            spoken = max(record.protocol for record in self._records)
            older = "this client" if spoken > PROTOCOL_VERSION else "the peers"
            raise ProtocolVersionError(
                f"the peers speak protocol {spoken}, this client speaks {PROTOCOL_VERSION}: upgrade {older}"
            )
        return speaking

    def plan(
        self,
        needs: Needs,
        *,
        blocks: tuple[int, int] | None = None,
        ends: Ends = CLIENT_ENDS,
        exclude: Collection[str] = (),
        holders: Collection[str] = (),
        fresh: bool = False,
    ) -> list[PlannedHop]:
        """The best route for a session.

        Args:
            needs: of the session.
            blocks: the part `[start, end)` of the model to plan; None: all that the session needs.
            ends: the peers before and after that part; None: the client.
            exclude: keys (as text) of peers that must not be used.
            holders: keys of peers that hold the session already.
            fresh: look into the directory even if that was done a moment ago.

        Raises:
            CoverageError: blocks are served by nobody that could be used; names them.
            PeerBusy: they are served, but no peer has memory for the session.
        """
        part = blocks or needs.blocks
        try:
            records, restricted = self._usable(exclude, fresh=fresh)
            route = self._planner.plan(records, needs, part, ends=ends, holders=holders, restricted=restricted)
            for _ in range(MAX_PROBED_ROUTES):
                # Of many peers only some links are measured. Those that the client would use are, before it does.
                own = [hop.record for hop, end in zip((route[0], route[-1]), ends, strict=True) if end is None]
                if not self._measure(self.survey.unknown(own)):
                    break
                route = self._planner.plan(records, needs, part, ends=ends, holders=holders, restricted=restricted)
            self.was_covered |= blocks is None
            return route
        except (CoverageError, PeerBusy):
            if fresh:
                raise
            return self.plan(needs, blocks=blocks, ends=ends, exclude=exclude, holders=holders, fresh=True)

    def look_again(self, suspects: Sequence[PeerRecord]) -> None:
        """Refreshes the facts soon, in the background; the links to `suspects` are measured in any case."""
        self._suspects = suspects
        self._look.set()

    def cost_ms(self, needs: Needs, hops: Sequence[PlannedHop]) -> float:
        """Ms of a usual step through `hops` by what is known now."""
        return self._planner.cost_ms(self.peers(), needs, hops)

    def move_ms(self, needs: Needs, before: PlannedHop | None, hops: Sequence[PlannedHop], cached: int) -> float:
        """Ms until `hops`, which follow `before` (None: the client), hold the KV cache of `cached` positions."""
        return self._planner.move_ms(self.peers(), needs, before, hops, cached)

    def forecast(self, needs: Needs, hops: Sequence[PlannedHop], positions: int) -> Forecast:
        """What a step of `positions` positions through `hops` takes, by what is known now."""
        return self._planner.forecast(self.peers(), needs, hops, positions)

    def ban(self, key: str, seconds: float, *, leaves: bool = False) -> None:
        """Plans without a peer for a while; `leaves`: it said that it goes away, so that it answers means nothing."""
        record = next((record for record in self._records if record.key.text == key), None)
        self._bans.add(key, seconds, record if leaves else None)

    def unban(self, key: str) -> None:
        """Lifts a ban that was not deserved."""
        self._bans.lift(key)

    def pardon_living(self) -> None:
        """Lifts the bans of peers that answer now: they were slow or cut off, or have moved and serve other blocks."""
        banned = {
            Endpoint(record.address, record.key): record for record in self._bans.pardonable(self.peers(fresh=True))
        }
        for endpoint in self._prober.measure(banned, PARDON_S):
            self._bans.lift(endpoint.key.text)

    def link(self, sender: PeerRecord | None, receiver: PeerRecord | None) -> Link:
        """The link between two peers, or the client (None) and a peer: as measured, foretold, or assumed."""
        records = [record for record in (sender, receiver) if record is not None]
        names = [record.key.text if record is not None else CLIENT for record in (sender, receiver)]
        return self.survey.network(records).link(*names)

    def link_state(self, endpoint: Endpoint) -> LinkState:
        return self._transport.state(endpoint)

    def send(self, endpoint: Endpoint, message: Message) -> int:
        """Sends a message and returns its size in bytes."""
        frames = encode(message)
        self._transport.send(endpoint, frames)
        return sum(map(len, frames))

    def register(self, session: Subscriber) -> None:
        self._sessions[session.id] = session

    def unregister(self, session: Subscriber) -> None:
        self._sessions.pop(session.id, None)

    def ping(self, endpoint: Endpoint, session: bytes = b"") -> Future[Answer]:
        """Asks a peer for a sign of life; the future stays undone if none comes.

        Args:
            endpoint: the peer.
            session: id of a session to ask about. A peer without a record, or of a version that does not know this
                question, is asked without: `Answer.holds` is None then.
        """
        record = next((record for record in self._records if record.key == endpoint.key), None)
        asked = session if record is not None and record.version not in STRICT_VERSIONS else b""
        return self._prober.ping(endpoint, session=asked)

    def rtt_ms(self, endpoint: Endpoint) -> float:
        """The round trip to a peer as its last pings tell; 0: not measured."""
        return self._prober.rtt_ms(endpoint)

    def _usable(self, exclude: Collection[str], *, fresh: bool) -> tuple[list[PeerRecord], bool]:
        """Peers that a route may go through, and whether there are others."""
        excluded = set(exclude) | self._bans.keys()
        present = self.peers(fresh=fresh)
        records = [record for record in present if record.key.text not in excluded]
        if len(self.survey.whereabouts.links) < MEASURED_AT_ONCE:
            self._measure(self.survey.unknown(records))
        # A record outlives a peer that was killed; whom the client cannot connect to cannot serve it.
        usable = [
            record
            for record in records
            if record.serves and self.link_state(Endpoint(record.address, record.key)) is not LinkState.DOWN
        ]
        return usable, len(usable) < len(present)

    def _measure(self, records: Sequence[PeerRecord]) -> bool:
        """Measures the links to the first of these peers; False if there are none."""
        chosen = {Endpoint(record.address, record.key): record for record in records[:MEASURED_AT_ONCE]}
        if chosen:
            self.survey.links_measured(chosen, self._prober.measure(chosen, PING_TIMEOUT_S))
        return bool(chosen)

    def _watch(self) -> None:
        """While sessions are open: keeps records and links fresh, so that they can tell when a better route exists."""
        while True:
            self._look.wait(RECORDS_MAX_AGE_S)
            if self._closing.is_set():
                return
            self._look.clear()
            if not self._sessions:
                continue
            suspects, self._suspects = self._suspects, ()
            try:
                stale = self.survey.stale(self.peers(fresh=True))
                self._measure([*suspects, *(record for record in stale if record not in suspects)])
                self.news += 1
            except SplitnetError as error:
                log.info("the facts about peers could not be refreshed: %s", error)

    def _receive(self, source: Destination, frames: Sequence[Payload]) -> None:
        if not isinstance(source, Endpoint):
            return
        try:
            message = decode(frames)
        except ProtocolError as error:
            log.warning("%s sent what is not a message: %s", source.address, error)
            if isinstance(error, ProtocolVersionError):
                for session in list(self._sessions.values()):
                    session.link_failed(source, error)
            return
        if isinstance(message, Pong):
            self._prober.pong(source, message)
        elif isinstance(message, Failure) and not message.session:
            log.warning("%s answered: %s", source.address, message.text)
        else:
            session = self._sessions.get(getattr(message, "session", b""))
            if session is not None:
                session.deliver(source, message)

    def _link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        if state.is_final:
            error: SplitnetError = refusal(endpoint, state)
        elif state is LinkState.DOWN:
            error = PeerLost(f"the peer at {endpoint.address} is gone")
        else:
            return
        for session in list(self._sessions.values()):
            session.link_failed(endpoint, error)


def refusal(endpoint: Endpoint, state: LinkState) -> NotAuthorized:
    """The error of a link whose keys do not fit."""
    if state is LinkState.WRONG_KEY:
        return NotAuthorized(
            f"what answers at {endpoint.address} has another key than the record of the peer there: if the peer was "
            "started anew, wait a minute until its old record has expired; otherwise do not trust that address"
        )
    return NotAuthorized(
        f"the peer at {endpoint.address} does not accept this client's key: ask its owner to add the output of "
        "`splitnet key` to the peer's --authorized-keys file"
    )
