"""A session's route: its hops, the setup of a route, and the replays that fill hops with the KV cache.

Each peer logs the encoded activations that it sends to the next hop. A replacement gets the log of the previous hop:
the same bytes give the same KV cache. If the previous hop is dead, the replay begins at the nearest living sender
before it, at worst at the client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from splitnet.session.events import Cause, Recovered, RouteFailed
from splitnet.session.requests import ReplayRequest
from splitnet.swarm.plan import HeldBlocks, PlannedHop, blocks_text
from splitnet.wire.block_inputs import passed_on
from splitnet.wire.codecs import Codec, check_values
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Forward, Replay, Result, Step
from splitnet.wire.sent_log import SentLog


@dataclass(slots=True, eq=False)
class RouteHop:
    """A peer with its blocks of the session; the same object as long as the peer runs these blocks.

    Attributes:
        codec: the codec of the hop's output and of its log; never changes.
        relayed: the client relays the hop's output, because the hop cannot connect to the next hop.
        relay_log: log of the relayed outputs; None: the log would be incomplete.
        cached_positions: positions of the session that the hop held when it last opened the session.
        prefix_hit: the cached positions come from pages that the hop had stored before.
        stores: the hop stores pages of the session.
        asked_prefix: the last `Open` asked the hop for stored pages.
        context: the context of the last `Open`.
        filled: the hop holds the KV cache of the session.
        weights: format of the blocks' weights, as last reported by the hop or its record.
        adapter_version: of the adapter that the hop has loaded; 0: no adapter.
        lost: the hop was given up and has no replacement yet.
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

    def forget_session(self) -> None:
        """Makes the hop's state of the session invalid."""
        self.filled, self.adapter_version, self.relay_log = False, 0, None

    def route_opened(self, wanted: int) -> None:
        """All hops have opened the session; the hop may have lost its cache. wanted: positions of the client's log."""
        if not self.cached_positions:
            self.filled, self.adapter_version = False, 0
        if not wanted or (self.prefix_hit and self.cached_positions >= wanted):
            self.filled = True
        if not self.relayed:
            self.relay_log = None  # the log would lack the outputs that the hop sends directly

    def changed_weights(self, held: Sequence[HeldBlocks]) -> list[str]:
        """Texts for people: which blocks the hop holds in another format than the session had before."""
        start, end = self.blocks
        return [
            f"blocks {blocks_text(max(start, one.start), min(end, one.end))} as {self.weights} instead of {one.weights}"
            for one in held
            if one.start < end and one.end > start and one.weights != self.weights
        ]

    def relay(self, message: Step | Forward, result: Result, hidden_size: int) -> Step | Forward:
        """The message to the next hop with this hop's output. Logs the output of a step; a log is complete only if it
        begins with the session's first positions. Raises ProtocolError: the output cannot be used."""
        if result.codec != self.codec.code:
            raise ProtocolError(f"codec {result.codec} was not agreed upon")
        check_values(result.codec, result.payload, message.positions, hidden_size)
        payload, inputs = passed_on(message, result.payload, result.end)
        relayed = replace(message, codec=result.codec, payload=payload, boundary=result.end, inputs=inputs)
        if isinstance(relayed, Step):
            self._log_relayed(relayed, len(result.payload) // message.positions)
        return replace(relayed, timings=result.timings)

    def _log_relayed(self, step: Step, bytes_per_position: int) -> None:
        begins = step.forks == () or step.replay_until  # all rows are dropped, or sent again
        if self.relay_log is None and begins and not any(part.start for part in step.parts):
            self.relay_log = SentLog(step.codec, bytes_per_position)
        if self.relay_log is not None:
            try:
                logged = step.parts, step.forks, step.payload, step.rope_length, step.labels, step.inputs
                self.relay_log.record_step(*logged)
            except ProtocolError:  # a replay that the client did not relay has filled the rows
                self.relay_log = None


class PeerSilent(PeerLost):
    """A hop has not answered in time. A late answer shows that the hop lives."""


@dataclass(slots=True)
class RouteSetup:
    """The setup of a route.

    Attributes:
        began: start of the setup, in seconds of the clock of `SessionState.handle`.
        repairs: there was an open route before.
        reasons: reasons of the repair, for people.
        refused: errors of peers that do not take the session, by name, the latest last.
        excluded: names of peers that are not asked again during this setup; afterwards only bans count.
        question: number of the `AskRoute` without an answer; 0: there is none.
        retry_at: when to plan again, because no route was found.
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
    def silent_hops(self) -> set[str]:
        """Names of lost peers."""
        return {name for name, error in self.refused.items() if isinstance(error, PeerLost)}

    def recovered(self, now: float) -> Recovered:
        """The repair that ends with this setup."""
        opened_ms = ((self.opened_at or now) - self.began) * 1000
        return Recovered(tuple(self.reasons), opened_ms, (now - self.began) * 1000, self.cause)

    def refuse(self, name: str, error: SplitnetError) -> None:
        """Records that a peer does not take the session."""
        self.refused.pop(name, None)
        self.refused[name] = error
        self.excluded.add(name)

    def may_wait(self, answer: RouteFailed, *, grows: bool) -> bool:
        """Whether a route may exist soon: other peers take over the blocks of dead ones, or a network is repaired.

        grows: the session has a route, which only lacks memory.
        """
        if not isinstance(answer.error, CoverageError | PeerBusy):
            return False
        if isinstance(answer.error, TooLongForPeers) and not self.repairs:  # no present peer has enough memory in total
            return False
        silent = self.silent_hops
        if silent == self.refused.keys() and (silent or answer.was_covered):
            return True
        # All missing peers refuse this client's key, or are not trusted any more.
        forbidden = bool(self.refused) and all(
            isinstance(error, NotAuthorized) and not isinstance(error, WrongKey) for error in self.refused.values()
        )
        return self.repairs and not forbidden and not (grows and isinstance(answer.error, PeerBusy))

    def explanation(self, answer: RouteFailed) -> SplitnetError:
        """Why there is no route. The refusal of a present peer explains more than the lack of other peers."""
        ignored = self.silent_hops if self.repairs else set[str]()
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
    """The first consecutive hops that are not filled, and the replays that fill them; both empty if all are filled.

    sent: log of the activations that the client has sent.
    """
    first = next((index for index, hop in enumerate(hops) if not hop.filled), None)
    if first is None:
        return [], []
    group = list(takewhile(lambda hop: not hop.filled, hops[first:]))
    before = hops[first - 1] if first else None
    if before is not None and not before.relayed:
        # The client cannot relay a hop's replay, because the client does not know the parts of its steps.
        direct = len(list(takewhile(lambda hop: not hop.relayed, group[:-1])))
        group = group[: direct + 1]
        since = min(hop.cached_positions if hop.prefix_hit else 0 for hop in group)
        message = Replay(session, epoch, next_number(), group[-1].blocks[1], since)
        return group, [ReplayRequest(message, before.endpoint, group[-1].endpoint)]
    if before is not None and before.relay_log is not None:
        log, to = before.relay_log, group[0].endpoint
    else:
        # The client begins the replay. Filled hops on its way compute their positions once more.
        log, to = sent, hops[0].endpoint
    until = group[-1].blocks[1]
    since = min(hop.cached_positions if hop.prefix_hit else 0 for hop in group)
    # All rows are sent, because a hop may hold rows of an earlier text.
    steps = (
        Step(
            session,
            epoch,
            next_number(),
            parts,
            forks,
            until,
            log.codec,
            payload,
            rope_length=rope_length,
            labels=labels,
            inputs=inputs,
        )
        for forks, (parts, payload, rope_length, labels, inputs) in zip(
            chain([None if since else ()], repeat(None)), log.replay(since=since), strict=False
        )
    )
    return group, [ReplayRequest(step, to, group[-1].endpoint) for step in steps]
