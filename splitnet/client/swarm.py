"""A client's connection to the peers of one model: who is there, how far away, and through whom to go."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Protocol

from scheduler.route import NoRoute, best_route
from scheduler.swarm import CLIENT, Link, Network, Peer
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
from splitnet.net.facts import facts_of
from splitnet.net.identity import Identity
from splitnet.net.messages import PROTOCOL_VERSION, Failure, Message, Payload, Ping, Pong, decode, encode
from splitnet.net.records import PeerRecord
from splitnet.net.transport import Transport

if TYPE_CHECKING:
    from splitnet.model.checkpoint import Checkpoint

log = logging.getLogger(__name__)

RECORDS_MAX_AGE_S = 10.0
PING_TIMEOUT_S = 1.0
PROBE_BYTES = 64 * 1024


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


@dataclass(frozen=True, slots=True)
class PlannedHop:
    """A peer of a route with the blocks `[start, end)` that it runs."""

    record: PeerRecord
    start: int
    end: int

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.record.address, self.record.key)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a ping brings back."""

    rtt_ms: float
    queue_ms: float
    """How long a new step would wait for the peer's device; 0: it has nothing to do."""


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

    Raises:
        DirectoryError: none of `initial_peers` answers.
    """

    def __init__(self, facts: ModelFacts, initial_peers: Sequence[str], *, identity: Identity | None = None) -> None:
        self.facts = facts
        self.identity = identity or Identity.generate()
        self._directory = Directory.start(initial_peers=initial_peers, listen=None)
        self._records: list[PeerRecord] = []
        self._records_at = 0.0
        self._network = Network()
        self._sessions: dict[bytes, Subscriber] = {}
        self._pings: dict[int, tuple[float, Future[Answer]]] = {}
        self._nonces = count(1)
        self._measured: set[str] = set()
        self._random = random.Random()
        self._banned: dict[str, float] = {}
        self._lock = threading.Lock()
        self._transport = Transport(self.identity, on_message=self._receive, on_link=self._link_changed)
        self._transport.start()

    def close(self) -> None:
        """Closes all sessions and leaves."""
        for session in list(self._sessions.values()):
            session.close()
        self._transport.close()
        self._directory.close()

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
        *,
        positions: int,
        bytes_per_position: int,
        blocks: tuple[int, int] | None = None,
        between: tuple[PeerRecord | None, PeerRecord | None] = (None, None),
        exclude: Collection[str] = (),
        fresh: bool = False,
    ) -> list[PlannedHop]:
        """The best route for a session of `positions` positions.

        Args:
            positions: KV positions that every hop must have free.
            bytes_per_position: size of an encoded position on a link.
            blocks: the part `[start, end)` of the model to plan; None: all of it.
            between: the peers before and after that part; None: the client.
            exclude: keys (as text) of peers that must not be used.
            fresh: look into the directory even if that was done a moment ago.

        Raises:
            CoverageError: blocks are served by nobody that could be used; names them.
            PeerBusy: they are served, but no peer has memory for the session.
        """
        start, end = blocks or (0, self.facts.num_blocks)
        now = time.monotonic()
        excluded = set(exclude) | {key for key, until in self._banned.items() if until > now}
        records = {record.key.text: record for record in self.peers(fresh=fresh) if record.key.text not in excluded}
        self._measure(records.values())
        # A record outlives a peer that was killed; whom the client cannot connect to cannot serve it.
        lost = [
            key
            for key, record in records.items()
            if self.link_state(Endpoint(record.address, record.key)) is LinkState.DOWN
        ]
        for key in lost:
            del records[key]
        parts = [part for record in records.values() if (part := _within(facts_of(record), start, end)) is not None]
        try:
            route = best_route(
                parts,
                end - start,
                self._seen_from(*between),
                bytes_per_position=bytes_per_position,
                kv_needed=positions,
                rng=self._random,
            )
        except NoRoute as error:
            if not fresh:
                return self.plan(
                    positions=positions,
                    bytes_per_position=bytes_per_position,
                    blocks=blocks,
                    between=between,
                    exclude=exclude,
                    fresh=True,
                )
            raise _no_route(error, self.facts, start, excluded=bool(excluded or lost)) from None
        return [PlannedHop(records[hop.peer], hop.start + start, hop.end + start) for hop in route.hops]

    def ban(self, key: str, seconds: float) -> None:
        """Plans without a peer for a while."""
        self._banned[key] = time.monotonic() + seconds

    def link(self, record: PeerRecord) -> Link:
        """The client's link to a peer, as measured; pessimistic if it was not."""
        return self._network.link(CLIENT, record.key.text)

    def link_between(self, sender: PeerRecord, receiver: PeerRecord) -> Link:
        """The link from one peer to another, as far as known."""
        return self._network.link(sender.key.text, receiver.key.text)

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

    def ping(self, endpoint: Endpoint, padding: int = 0) -> Future[Answer]:
        """Asks a peer for a sign of life; the future stays undone if none comes."""
        nonce = next(self._nonces)
        future: Future[Answer] = Future()
        with self._lock:
            self._pings[nonce] = (time.perf_counter(), future)
        self.send(endpoint, Ping(nonce, bytes(padding)))
        return future

    def _seen_from(self, before: PeerRecord | None, after: PeerRecord | None) -> Network:
        """The links as a planner sees them that begins at one peer and ends at another instead of the client."""
        network = self._network
        for key in {other for pair in network.measured for other in pair} - {CLIENT}:
            if before is not None:
                network = network.with_link(CLIENT, key, self._network.link(before.key.text, key))
            if after is not None:
                network = network.with_link(key, CLIENT, self._network.link(key, after.key.text))
        return network

    def _measure(self, records: Collection[PeerRecord]) -> None:
        """Measures the links to peers that are new; those that don't answer in a second stay unmeasured."""
        new = [record for record in records if record.key.text not in self._measured]
        if not new:
            return
        self._measured.update(record.key.text for record in new)
        endpoints = {record.key.text: Endpoint(record.address, record.key) for record in new}
        # The first ping of a link also pays for its handshake, so it is thrown away.
        wait([self.ping(endpoint) for endpoint in endpoints.values()], timeout=PING_TIMEOUT_S)
        small = {key: self.ping(endpoint) for key, endpoint in endpoints.items()}
        wait(small.values(), timeout=PING_TIMEOUT_S)
        padded = {key: self.ping(endpoint, PROBE_BYTES) for key, endpoint in endpoints.items() if small[key].done()}
        wait(padded.values(), timeout=PING_TIMEOUT_S)
        for key, future in padded.items():
            if future.done():
                rtt_ms = small[key].result().rtt_ms
                extra_ms = max(future.result().rtt_ms - rtt_ms, 1e-3)
                link = Link(latency_ms=rtt_ms / 2, bytes_per_ms=PROBE_BYTES / extra_ms)
                self._network = self._network.with_link(CLIENT, key, link).with_link(key, CLIENT, link)

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
            with self._lock:
                began, future = self._pings.pop(message.nonce, (0.0, None))
            if future is not None:
                future.set_result(Answer((time.perf_counter() - began) * 1000, message.queue_ms))
        elif isinstance(message, Failure) and not message.session:
            log.warning("%s answered: %s", source.address, message.text)
        else:
            session = self._sessions.get(getattr(message, "session", b""))
            if session is not None:
                session.deliver(source, message)

    def _link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        if state is LinkState.REFUSED:
            error: SplitnetError = not_authorized(endpoint)
        elif state is LinkState.DOWN:
            error = PeerLost(f"the peer at {endpoint.address} is gone")
        else:
            return
        for session in list(self._sessions.values()):
            session.link_failed(endpoint, error)


def not_authorized(endpoint: Endpoint) -> NotAuthorized:
    """A link was refused in its handshake."""
    return NotAuthorized(
        f"the peer at {endpoint.address} does not accept this client's key (or has another key than its record says): "
        "ask its owner to add the output of `splitnet key` to the peer's --authorized-keys file"
    )


def _within(peer: Peer, start: int, end: int) -> Peer | None:
    """What a peer serves of the blocks `[start, end)`, counted from `start`."""
    first, last = max(peer.start, start), min(peer.end, end)
    return replace(peer, start=first - start, end=last - start) if first < last else None


def _no_route(error: NoRoute, facts: ModelFacts, offset: int, *, excluded: bool) -> SplitnetError:
    """What the user is told. Blocks in `error` are counted from `offset`."""
    missing = [(start + offset, end + offset) for start, end in error.missing]
    if not missing:
        full = _ranges([(start + offset, end + offset) for start, end in error.full])
        return PeerBusy(
            f"the peers of blocks {full} of {facts.name} have no free KV memory for this session: "
            "try again later, generate less, or start another peer for them"
        )
    start, end = missing[0]
    who = "by no peer that can be used" if excluded else "by nobody"
    return CoverageError(
        f"blocks {_ranges(missing)} of {facts.name} are served {who}: start a peer with "
        f"`splitnet peer {facts.name} --blocks {start}:{end} --join ADDR`"
    )


def _ranges(blocks: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{start}..{end - 1}" if end - start > 1 else f"{start}" for start, end in blocks)
