"""A session's route: its hops, a route that is being made, and how hops are filled with the KV cache.

The peer before a hop has logged the encoded activations that it sent. A replacement gets that log: the same bytes give
the same KV cache. Where that peer died too, the log of the nearest living sender stands in, at last the client's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat, takewhile

from splitnet.errors import (
    CoverageError,
    NotAuthorized,
    PeerBusy,
    PeerLeaving,
    PeerLost,
    ProtocolError,
    SessionLost,
    SplitnetError,
    TooLongForPeers,
    WrongKey,
)
from splitnet.session.events import Cause, NoRoute
from splitnet.session.requests import ReplayRequest
from splitnet.swarm.plan import HeldBlocks, PlannedHop, blocks_text
from splitnet.wire.codecs import Codec
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Replay, Result, Step
from splitnet.wire.sent_log import SentLog


@dataclass(slots=True, eq=False)
class RouteHop:
    """A peer with its blocks of the session; stays the same object as long as the peer runs them.

    Attributes:
        codec: of its output, and so of its log: it never changes.
        relayed: it does not reach its next hop, so the client relays its output.
        relay_log: what the client has relayed; None if that is not all of it.
        cached_positions: that it held of the session when it was opened last.
        recalled: they are of pages that it had stored before.
        stores: it stores pages of the session.
        asked: for such pages, when it was opened last.
        context: that it was opened with, see `Open`.
        filled: it holds the KV cache that the session wants.
        weights: what its blocks are held as, as its record or itself has said last.
        adapter_version: of the adapter that it has taken over; 0: none.
        lost: it was given up, and is not replaced yet.
    """

    planned: PlannedHop
    codec: Codec
    relayed: bool = False
    relay_log: SentLog | None = None
    cached_positions: int = 0
    prefix_hit: bool = False
    stores: bool = False
    asked_prefix: bool = False
    context: bytes = b""
    filled: bool = False
    weights: str = ""
    adapter_version: int = 0
    lost: bool = False
    endpoint: Endpoint = field(init=False)
    name: str = field(init=False)
    blocks: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        planned, record = self.planned, self.planned.record
        self.endpoint, self.name, self.blocks = record.endpoint, planned.name, (planned.start, planned.end)
        self.weights = record.dtype

    def forget(self) -> None:
        """What it holds of the session counts no more."""
        self.filled, self.adapter_version, self.relay_log = False, 0, None

    def opened(self, wanted: int) -> None:
        """The route is open; the hop may have lost the session since. wanted: positions that were sent before."""
        if not self.cached_positions:
            self.filled, self.adapter_version = False, 0
        if not wanted or (self.prefix_hit and self.cached_positions >= wanted):
            self.filled = True
        if not self.relayed:
            self.relay_log = None  # what the hop pushes itself would be missing in it

    def changed_weights(self, held: Sequence[HeldBlocks]) -> list[str]:
        """Which blocks the hop holds in another format than the session had before, for people."""
        start, end = self.blocks
        return [
            f"blocks {blocks_text(max(start, one.start), min(end, one.end))} as {self.weights} that were {one.weights}"
            for one in held
            if one.start < end and one.end > start and one.weights != self.weights
        ]

    def log_relayed(self, step: Step, result: Result) -> None:
        """Takes in what the client relays; a log is of use only from where the session holds nothing else."""
        begins = step.forks == () or step.replay_until  # all rows are dropped, or sent again
        if self.relay_log is None and begins and not any(part.start for part in step.parts):
            self.relay_log = SentLog(result.codec, len(result.payload) // step.positions)
        if self.relay_log is not None:
            try:
                self.relay_log.record(step.parts, step.forks, result.payload, step.reach, step.labels)
            except ProtocolError:  # its rows were filled by a replay that did not come this way
                self.relay_log = None


class PeerSilent(PeerLost):
    """A hop has not answered in time; if it does later, it was only far away."""


@dataclass(slots=True)
class RouteSetup:
    """A route that is being made.

    Attributes:
        repairs: there was a route before.
        reasons: why, for people.
        refused: why peers do not take the session, by name, the latest last.
        excluded: those of them that are not asked again while this route is made; later, bans count.
        question: number of the route that is being planned; 0: none is.
        retry_at: when to plan again, as no route was found.
        opened_at: when all hops had opened the session.
    """

    began: float
    repairs: bool
    cause: Cause = Cause.LOST
    reasons: list[str] = field(default_factory=list)
    refused: dict[str, SplitnetError] = field(default_factory=dict)
    excluded: set[str] = field(default_factory=set)
    question: int = 0
    retry_at: float = math.inf
    opened_at: float | None = None

    @property
    def silent(self) -> set[str]:
        """Names of peers that were lost."""
        return {name for name, error in self.refused.items() if isinstance(error, PeerLost)}

    def refuse(self, name: str, error: SplitnetError) -> None:
        """Takes in why a peer does not take the session."""
        self.refused.pop(name, None)
        self.refused[name] = error
        self.excluded.add(name)

    def may_wait(self, answer: NoRoute, *, grows: bool) -> bool:
        """Whether a route may exist soon: other peers take the blocks of dead ones, or a network is back.

        grows: the session has a route, which only has too little memory.
        """
        if not isinstance(answer.error, CoverageError | PeerBusy):
            return False
        if isinstance(answer.error, TooLongForPeers) and not self.repairs:  # no peer that is there will ever have room
            return False
        silent = self.silent
        if silent == self.refused.keys() and (silent or answer.was_covered):
            return True
        # Nothing is missing but peers that do not accept this client's key, or must not be used any more.
        forbidden = bool(self.refused) and all(
            isinstance(error, NotAuthorized) and not isinstance(error, WrongKey) for error in self.refused.values()
        )
        return self.repairs and not forbidden and not (grows and isinstance(answer.error, PeerBusy))

    def explanation(self, answer: NoRoute) -> SplitnetError:
        """Why there is no route: the refusal of a peer that is there says more than that no other is."""
        ignored = self.silent if self.repairs else set[str]()
        names = [name for name in reversed(self.refused) if name in answer.present and name not in ignored]
        return self.refused[names[0]] if names else answer.error


def cause_of(error: SplitnetError) -> Cause:
    if isinstance(error, PeerLeaving):
        return Cause.LEAVING
    if isinstance(error, SessionLost):
        return Cause.SESSION_LOST
    return Cause.BUSY if isinstance(error, PeerBusy) else Cause.LOST


def next_refill(
    hops: Sequence[RouteHop], sent: SentLog, session: bytes, epoch: int, next_number: Callable[[], int]
) -> tuple[list[RouteHop], list[ReplayRequest]]:
    """The first hops in a row that are not filled, and the replays that fill them; both empty if all are filled.

    sent: what the client itself has sent.
    """
    first = next((index for index, hop in enumerate(hops) if not hop.filled), None)
    if first is None:
        return [], []
    group = list(takewhile(lambda hop: not hop.filled, hops[first:]))
    before = hops[first - 1] if first else None
    if before is not None and not before.relayed:
        # The client cannot relay what a hop replays, as it does not know its parts.
        direct = len(list(takewhile(lambda hop: not hop.relayed, group[:-1])))
        group = group[: direct + 1]
        since = min(hop.cached_positions if hop.prefix_hit else 0 for hop in group)
        message = Replay(session, epoch, next_number(), group[-1].blocks[1], since)
        return group, [ReplayRequest(message, before.endpoint, group[-1].endpoint)]
    if before is not None and before.relay_log is not None:
        log, to = before.relay_log, group[0].endpoint
    else:
        # The client begins; if its steps pass hops that are filled, those compute them once more.
        log, to = sent, hops[0].endpoint
    until = group[-1].blocks[1]
    since = min(hop.cached_positions if hop.prefix_hit else 0 for hop in group)
    # A hop may hold rows of a text before; all that are wanted are sent.
    steps = (
        Step(session, epoch, next_number(), parts, forks, until, log.codec, payload, reach=reach, labels=labels)
        for forks, (parts, payload, reach, labels) in zip(
            chain([None if since else ()], repeat(None)), log.replay(since=since), strict=False
        )
    )
    return group, [ReplayRequest(step, to, group[-1].endpoint) for step in steps]
