"""How a session's route is made, and made whole again: planned, opened, given the adapter and the KV cache.

    NEW ──> PLANNING ──> OPENING ──> LOADING ──> REPLAYING ──> OPEN
               ^            │           │            │          │
               └────────────┴───────────┴────────────┴──────────┘  a hop is lost, or a better route is there
    any ──> BROKEN  no route: the next use tries again, with the hops that are left
    any ──> CLOSED

A hop that dies is replaced: the peer before it has logged the encoded activations that it sent. Other peers are planned
for just the lost blocks, the route is opened again in a new epoch (messages of the old one are dropped from then on),
the log is sent to the replacement, and what is under way is sent again. The same bytes give the same KV cache. Where
the neighbour died too, the log of the nearest living sender stands in; the last of them is the client's own.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from splitnet.blocks.adapters import Adapter, counted_down, write_groups
from splitnet.errors import (
    CoverageError,
    NotAuthorized,
    OtherWeights,
    PeerBusy,
    PeerLeaving,
    PeerLost,
    SessionLost,
    SplitnetError,
    WrongKey,
)
from splitnet.session.events import AskRoute, Ban, Cause, Effect, Move, NoRoute, Note, Planned, Recovered, Send, Unban
from splitnet.session.liveness import ANSWER_S, Liveness
from splitnet.session.requests import ReplayRequest, RouteHop, most_bytes, next_refill
from splitnet.swarm.events import Kind
from splitnet.swarm.overview import blocks_text, short_key
from splitnet.swarm.plan import ALIKE_AGAIN, HeldBlocks, PlannedHop
from splitnet.wire.codecs import Codec, codec_by_name
from splitnet.wire.endpoints import Endpoint, Relay
from splitnet.wire.fields import STRICT_VERSIONS
from splitnet.wire.log import SentLog
from splitnet.wire.messages import Adapter as AdapterMessage
from splitnet.wire.messages import AdapterLoaded, Message, Open, Opened
from splitnet.wire.messages import Close as CloseMessage


class Phase(StrEnum):
    """Where a session stands."""

    NEW = "new"
    """No hop was asked yet."""
    PLANNING = "planning"
    """A route is being planned, or awaited where nobody serves some blocks."""
    OPENING = "opening"
    """Hops reserve memory and find out whether they reach each other."""
    LOADING = "loading"
    """Hops take over the session's adapter."""
    REPLAYING = "replaying"
    """Hops that lack the session's KV cache compute it from a log."""
    OPEN = "open"
    """Requests travel along the route."""
    BROKEN = "broken"
    """Hops are missing, and nothing is under way."""
    CLOSED = "closed"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.NEW: frozenset({Phase.PLANNING, Phase.CLOSED}),
    Phase.PLANNING: frozenset({Phase.OPENING, Phase.BROKEN, Phase.CLOSED}),
    Phase.OPENING: frozenset({Phase.LOADING, Phase.PLANNING, Phase.CLOSED}),
    Phase.LOADING: frozenset({Phase.REPLAYING, Phase.OPEN, Phase.PLANNING, Phase.OPENING, Phase.BROKEN, Phase.CLOSED}),
    Phase.REPLAYING: frozenset({Phase.OPEN, Phase.PLANNING, Phase.OPENING, Phase.BROKEN, Phase.CLOSED}),
    Phase.OPEN: frozenset({Phase.PLANNING, Phase.OPENING, Phase.LOADING, Phase.BROKEN, Phase.CLOSED}),
    Phase.BROKEN: frozenset({Phase.PLANNING, Phase.OPENING, Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
}
"""Every change that can happen; `tests/unit/test_session_machine.py` compares it with what does happen."""

OPEN_TIMEOUT_S = 10.0
"""In which a hop that lives answers an `Open`; it may have to reach its next hop before."""

POLL_S = 0.5
"""Between two looks for a peer that serves what nobody serves."""

MAX_ATTEMPTS = 8
"""So many routes may fail before an answer comes on one."""

_NOT_BANNED = (SessionLost, PeerBusy, NotAuthorized, OtherWeights)
"""Why a peer may not do for one session without being at fault."""


class PeerSilent(PeerLost):
    """A hop has not answered in time; if it does later, it was only far away."""


@dataclass(slots=True)
class _Making:
    """A route that is being made."""

    began: float
    repairs: bool
    """There was a route before."""
    cause: Cause = Cause.LOST
    reasons: list[str] = field(default_factory=list)
    refused: dict[str, SplitnetError] = field(default_factory=dict)
    """Why peers do not take the session, by name."""
    excluded: set[str] = field(default_factory=set)
    """Of them, those that are not asked again."""
    question: int = 0
    """Number of the route that is being planned; 0: none is."""
    retry_at: float = math.inf
    opened_at: float | None = None

    @property
    def is_forbidden(self) -> bool:
        """Whether nothing is missing but peers that do not accept this client's key, or must not be used any more."""
        refusals = self.refused.values()
        return bool(refusals) and all(
            isinstance(error, NotAuthorized) and not isinstance(error, WrongKey) for error in refusals
        )


class SessionRoute(ABC):
    """A session's route, and how it comes about.

    Args:
        session: id of the session.
        model: fingerprint of the weights.
        blocks: what the hops run, `[start, end)`.
        hidden_size: values per position.
        budget: positions of KV cache to reserve on every hop, over all rows.
        progress_timeout_s: how long hops may work on what is under way without any progress.
        recovery_timeout_s: how long to wait for other peers when blocks are served by nobody any more.
        any_weights: whether it goes on where weights are held otherwise than before, if nobody holds them so.
        answer_s: in which time a hop that lives answers a ping.

    Attributes:
        held: what the weights of blocks are held as, on the last route that stood; empty: none has.
        phase, epoch, hops, adapter, adapter_version, budget: as they are now.
        log: what the client itself has sent; None before the first step.
        recoveries: repairs of the route so far.
        error: why there is no route, until the next `Use`.
        refusal: why the last `Resize` was refused, if nothing else changed.
        chunk_ms: what a chunk of a replay is predicted to take, told by the driver during one; 0: not known.
    """

    def __init__(
        self,
        session: bytes,
        *,
        model: str,
        blocks: tuple[int, int],
        hidden_size: int,
        budget: int,
        progress_timeout_s: float,
        recovery_timeout_s: float,
        any_weights: bool,
        answer_s: Callable[[Endpoint], float],
    ) -> None:
        self.session = session
        self.blocks = blocks
        self.hidden_size = hidden_size
        self.budget = max(1, budget)
        self.phase = Phase.NEW
        self.epoch = 0
        self.hops: list[RouteHop] = []
        self.held: tuple[HeldBlocks, ...] = ()
        self.first_codec: Codec = codec_by_name("none")
        """Codec of the client's own link to the first hop."""
        self.adapter: Adapter | None = None
        self.adapter_version = 0
        self._for_passes = False
        self.log: SentLog | None = None
        self.recoveries: list[Recovered] = []
        self.error: SplitnetError | None = None
        self.refusal: SplitnetError | None = None
        self.chunk_ms = 0.0
        self._model = model
        self._progress_timeout_s = progress_timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._any_weights = any_weights
        self._numbers = itertools.count(1)
        self._replays: dict[int, ReplayRequest] = {}
        self._filling: list[RouteHop] = []
        """Hops that the replays fill."""
        self._making: _Making | None = None
        self._has_stood = False
        """There was a route before."""
        self._asked: dict[Endpoint, float] = {}
        """Hops that are to answer an `Open` or an adapter, and until when."""
        self._failed: dict[Endpoint, SplitnetError] = {}
        """Hops that were asked and cannot."""
        self._members: dict[Endpoint, tuple[int, int]] = {}
        """Who was sent an `Open`, for which blocks, and no `Close` since."""
        self._relays: set[Endpoint] = set()
        """Hops that were opened without a next hop, as they do not reach it."""
        self._opened_budget = 0
        """What the hops were asked to reserve when the route was opened."""
        self._former_budget = 0
        """Before a resize that no route stands with yet; 0: there is none."""
        self._answer_s = answer_s
        self._liveness = Liveness(answer_s)
        self._silenced: dict[Endpoint, str] = {}
        """The names of hops that were given up as they did not answer in time."""
        self._attempts = 0
        self._now = 0.0
        self._effects: list[Effect] = []

    @property
    def is_open(self) -> bool:
        return self.phase is Phase.OPEN

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being made or loaded."""
        return self.phase in (Phase.NEW, Phase.OPEN, Phase.BROKEN, Phase.CLOSED)

    @property
    def first(self) -> Endpoint:
        """The hop that the client sends to."""
        return self.hops[0].endpoint

    @property
    def tail(self) -> Endpoint:
        """The hop that runs the last of the blocks."""
        return self.hops[-1].endpoint

    def next_number(self) -> int:
        """A number for a request."""
        return next(self._numbers)

    def endpoints(self) -> list[Endpoint]:
        """All hops in order."""
        return [hop.endpoint for hop in self.hops]

    def adapted_hops(self) -> dict[Endpoint, int]:
        """Hops with a part of the adapter, and what that takes in messages, in bytes at most."""
        parts = {hop.endpoint: self.adapter.within(*hop.blocks) for hop in self.hops} if self.adapter else {}
        return {
            endpoint: most_bytes(tensor.nbytes for tensor in part.values()) for endpoint, part in parts.items() if part
        }

    def send(self, endpoint: Endpoint, message: Message) -> None:
        """Has a message sent; for requests."""
        self._effects.append(Send(endpoint, message))

    @property
    @abstractmethod
    def _is_used(self) -> bool:
        """Whether anything is under way on the route."""

    @abstractmethod
    def _resume(self) -> None:
        """The route stands: what is under way is sent again."""

    @abstractmethod
    def _end_requests(self, error: SplitnetError) -> None:
        """There will be no route: what is under way gets the error."""

    # What the caller wants.

    def _resize(self, budget: int) -> None:
        """The route is opened anew: a hop that has lost the session meanwhile is found out before it computes."""
        self.refusal = None
        if budget > self.budget:
            self._former_budget = self._former_budget or self.budget
            self.budget = budget
            if self.is_open:
                self._go_on()

    def _use_adapter(self, adapter: Adapter, for_passes: bool) -> None:
        if adapter is not self.adapter:
            self.adapter, self._for_passes = adapter, for_passes
            self.adapter_version += 1
            if self.is_open:
                self._load_adapter()

    def _move(self, event: Move) -> None:
        if self.is_open and not self._is_used:
            making = self._begin_making()
            making.cause = Cause.BETTER_ROUTE
            making.reasons.append("there is a better route")
            self._open_route(event.route, event.codecs)

    # Planning and opening.

    def _begin_making(self) -> _Making:
        if self._making is None:
            self._making = _Making(self._now, repairs=self._has_stood)
        return self._making

    def _reopen(self, lost: dict[Endpoint, SplitnetError], cause: Cause, reason: str = "") -> None:
        """Makes the route whole without the hops that are lost; if nothing waits for it, with the next use."""
        idle = self.is_open and not self._is_used
        making = self._begin_making()
        if not making.reasons:
            making.cause = cause
        if reason:
            making.reasons.append(reason)
        for endpoint, error in lost.items():
            self._give_up(endpoint, error)
        if idle or (self.phase is Phase.BROKEN and not self._is_used):
            self._stop_waiting()
            self._enter(Phase.BROKEN)
            return
        self._attempts += self.phase is not Phase.OPENING  # whoever refuses there is left out, and waited for in time
        if self._attempts > MAX_ATTEMPTS:
            self._fail(next(iter(lost.values()), PeerLost("the route fails again and again: try again later")))
        elif self.phase is not Phase.PLANNING:
            self._go_on()

    def _go_on(self) -> None:
        """Opens the hops that are left, if they make a whole route; otherwise has one planned."""
        making = self._begin_making()
        self._stop_waiting()
        if self.phase is Phase.BROKEN:
            making.began = self._now
        kept = tuple(hop.planned for hop in self.hops if not hop.lost)
        position = self.blocks[0]
        for hop in kept:
            position = hop.end if hop.start == position else -1
        if position == self.blocks[1]:
            self._open_route(kept, ())
        else:
            self._ask_route(fresh=bool(making.refused), unban=False)

    def _ask_route(self, *, fresh: bool, unban: bool) -> None:
        making = self._making
        assert making is not None
        making.question, making.retry_at = self.next_number(), math.inf
        kept = tuple(hop.planned for hop in self.hops if not hop.lost)
        self._enter(Phase.PLANNING)
        self._effects.append(AskRoute(making.question, kept, frozenset(making.excluded), fresh, unban))

    def _planned(self, event: Planned) -> None:
        making = self._making
        if making is None or making.question != event.number or self.phase is not Phase.PLANNING:
            return
        making.question = 0
        if not any(hop.name in making.excluded for hop in event.route):
            self._open_route(event.route, event.codecs)
            return
        self._attempts += 1  # it was lost meanwhile
        if self._attempts > MAX_ATTEMPTS:
            self._fail(PeerLost("peers are lost faster than routes are planned: try again later"))
        else:
            self._ask_route(fresh=True, unban=False)

    def _no_route(self, event: NoRoute) -> None:
        making = self._making
        if making is None or making.question != event.number or self.phase is not Phase.PLANNING:
            return
        making.question = 0
        silent = {name for name, error in making.refused.items() if isinstance(error, PeerLost)}
        # Peers have died, and others will take their blocks; or the network is back in a moment.
        grows = self._former_budget and isinstance(event.error, PeerBusy)
        all_silent = silent == making.refused.keys() and bool(silent or event.was_covered)
        may_come = all_silent or (making.repairs and not grows and not making.is_forbidden)
        in_time = self._now < making.began + self._recovery_timeout_s
        if may_come and in_time and isinstance(event.error, CoverageError | PeerBusy):
            making.excluded -= making.refused.keys() if making.repairs else silent
            making.retry_at = self._now + POLL_S
            return
        # Why a peer that is there refused says more than that nobody else is.
        refusals = [name for name in reversed(making.refused) if name in event.present]
        if making.repairs:
            refusals = [name for name in refusals if name not in silent]
        self._fail(making.refused[refusals[0]] if refusals else event.error)

    def _open_route(self, route: Sequence[PlannedHop], codecs: Sequence[Codec]) -> None:
        """Opens all hops in a new epoch; those that run the same blocks as before keep their caches."""
        before = {(hop.endpoint, hop.blocks): hop for hop in self.hops if not hop.lost}
        hops: list[RouteHop] = []
        for index, planned in enumerate(route):
            hop = before.get((planned.endpoint, (planned.start, planned.end)))
            hops.append(hop if hop is not None else RouteHop(planned, codecs[index + 1]))
        if self.log is None and codecs:
            self.first_codec = codecs[0]
        self.hops, self.chunk_ms = hops, 0.0
        wanted = {hop.endpoint: hop.blocks for hop in hops}
        for endpoint, blocks in list(self._members.items()):
            if wanted.get(endpoint) != blocks:
                self._leave(endpoint)
        for hop in hops:
            hop.relayed = False
        self._enter(Phase.OPENING)
        self._open_hops()

    def _open_hops(self) -> None:
        """Asks all hops, in an epoch of its own: so no answer is taken for that to another question."""
        self.epoch += 1
        self._opened_budget = self.budget
        self._relays = {hop.endpoint for hop in self.hops if hop.relayed}
        self._liveness.heard(self._now)
        for index in range(len(self.hops)):
            self._open_hop(index)

    def _open_hop(self, index: int) -> None:
        hop = self.hops[index]
        previous = self.hops[index - 1] if index else None
        following = self.hops[index + 1] if index + 1 < len(self.hops) and not hop.relayed else None
        message = Open(
            session=self.session,
            epoch=self.epoch,
            model=self._model,
            start=hop.planned.start,
            end=hop.planned.end,
            budget=self.budget,
            codec=hop.codec.code,
            previous=previous.planned.record.key.raw if previous is not None and not previous.relayed else b"",
            next_key=following.planned.record.key.raw if following is not None else b"",
            next_address=following.planned.record.address if following is not None else "",
            next_relays=self._relays_to(hop, following),
            asks_weights=hop.planned.record.version not in STRICT_VERSIONS,
        )
        self._members[hop.endpoint] = hop.blocks
        self._asked[hop.endpoint] = self._now + self._open_timeout_s(hop.endpoint)
        self.send(hop.endpoint, message)

    def _open_timeout_s(self, endpoint: Endpoint) -> float:
        """Longer where round trips are: a link may have to be made, to the hop and from it to the next one."""
        return OPEN_TIMEOUT_S + 2 * (self._answer_s(endpoint) - ANSWER_S)

    def _relays_to(self, hop: RouteHop, following: RouteHop | None) -> tuple[Relay, ...]:
        """Through whom a hop reaches the next one; nothing that it is too old to read."""
        if following is None or not following.endpoint.hidden or hop.planned.record.version in STRICT_VERSIONS:
            return ()
        return following.endpoint.relays

    def _opened(self, hop: RouteHop, message: Opened) -> None:
        if self.phase is Phase.OPENING and self._asked.pop(hop.endpoint, None) is not None:
            hop.relayed |= not message.next_reachable
            hop.cached_positions = message.cached_positions
            hop.weights = message.weights or hop.weights
            if not self._any_weights and (changes := self._changes_of_weights(hop)):
                what = " and ".join(changes)
                text = f"the peer at {hop.endpoint.address} holds {what} in this session: {ALIKE_AGAIN}"
                self._failed[hop.endpoint] = OtherWeights(text)
            self._if_all_answered()

    def _if_all_answered(self) -> None:
        """Goes on once no hop is to answer any more."""
        if self._asked:
            return
        failed, self._failed = self._failed, {}
        busy = [error for error in failed.values() if isinstance(error, PeerBusy)]
        if self._former_budget and self._has_stood and busy and len(busy) == len(failed):
            # Nobody lost anything: the route stands with what it had.
            self.budget, self._former_budget, self.refusal = self._former_budget, 0, busy[0]
            self._go_on()
            return
        if failed:
            self._reopen(failed, cause_of(next(iter(failed.values()))))
        elif self.phase is Phase.OPENING:
            self._all_opened()
        elif self.phase is Phase.LOADING:
            self._all_loaded()

    def _all_opened(self) -> None:
        """All hops have opened the session. If some do not reach their next hop, all are told who is relayed."""
        if self._relays != {hop.endpoint for hop in self.hops if hop.relayed}:
            self._open_hops()
            return
        self._begin_making().opened_at = self._now
        for hop in self.hops:
            hop.opened(wants_cache=self._wants_cache)
        self._load_adapter()

    def _changes_of_weights(self, hop: RouteHop) -> list[str]:
        """Which blocks a hop holds otherwise than the session had them, for people."""
        start, end = hop.blocks
        return [
            f"blocks {blocks_text(max(start, one.start), min(end, one.end))} as {hop.weights} that were {one.weights}"
            for one in self.held
            if one.start < end and one.end > start and one.weights != hop.weights
        ]

    @property
    def _wants_cache(self) -> bool:
        """Whether positions were sent that hops should hold."""
        return self.log is not None and bool(self.log.nbytes)

    # Loading and replaying.

    def _load_adapter(self) -> None:
        """Sends the hops that lack it their parts of the adapter, which are empty where passes alone need one."""
        self._enter(Phase.LOADING)
        self._liveness.heard(self._now)
        for hop in self.hops:
            tensors = self.adapter.within(*hop.blocks) if self.adapter is not None else {}
            if (tensors or self._for_passes) and hop.adapter_version != self.adapter_version:
                self._asked[hop.endpoint] = self._now + self._progress_timeout_s
                for remaining, payload in counted_down(write_groups(tensors)):
                    self.send(
                        hop.endpoint, AdapterMessage(self.session, self.epoch, self.adapter_version, remaining, payload)
                    )
        self._if_all_answered()

    def _adapter_loaded(self, hop: RouteHop, message: AdapterLoaded) -> None:
        if message.version == self.adapter_version and self._asked.pop(hop.endpoint, None) is not None:
            hop.adapter_version = message.version
            self._if_all_answered()

    def _all_loaded(self) -> None:
        if self._making is None:
            self._enter(Phase.OPEN)
        else:
            self._refill()

    def _refill(self) -> None:
        """Has the next hops filled; once all are, the route stands."""
        filling: list[RouteHop] = []
        replays: list[ReplayRequest] = []
        if self.log is not None:
            filling, replays = next_refill(self.hops, self.log, self.session, self.epoch, self.next_number)
        if not filling:
            self._stands()
            return
        self._enter(Phase.REPLAYING)
        self._liveness.heard(self._now)
        self._filling = filling
        self._replays = {replay.number: replay for replay in replays}
        for replay in replays:
            replay.send(self)

    def _replayed(self, replay: ReplayRequest) -> None:
        del self._replays[replay.number]
        if not self._replays:
            for hop in self._filling:
                hop.filled = True
            self._filling = []
            self._refill()

    def _stands(self) -> None:
        """The route is whole: what is under way is sent again."""
        making, self._making = self._making, None
        self._has_stood = True
        changes = [change for hop in self.hops for change in self._changes_of_weights(hop)]
        self.held = tuple(HeldBlocks(*hop.blocks, hop.weights) for hop in self.hops)
        self._enter(Phase.OPEN)
        if self.budget == self._opened_budget:
            self._former_budget = 0
        self._liveness.heard(self._now)
        self._resume()
        if making is not None and making.reasons:
            opened_ms, total_ms = ((at - making.began) * 1000 for at in (making.opened_at or self._now, self._now))
            self.recoveries.append(Recovered(tuple(making.reasons), opened_ms, total_ms, making.cause))
            moved = making.cause is Cause.BETTER_ROUTE
            what = "a session has moved to a better route" if moved else "a route is whole again"
            self._note("rerouted" if moved else "repaired", f"{what} after {total_ms:.0f} ms: {self.route_text}")
        if changes:
            what = " and ".join(changes)
            self._note("weights", f"a session goes on with {what}, as nobody else holds them: it may get other tokens")
        if self.budget > self._opened_budget:
            self._go_on()

    # The end of a hop, or of the route.

    @property
    def route_text(self) -> str:
        """The hops, for people."""
        return " -> ".join(f"{short_key(hop.name)} {blocks_text(*hop.blocks)}" for hop in self.hops)

    def _give_up(self, endpoint: Endpoint, error: SplitnetError) -> None:
        """A hop is lost, or did not take the session."""
        making = self._begin_making()
        hop = self._hop_at(endpoint)
        self._leave(endpoint)
        if hop is None:
            return
        hop.lost = True
        if isinstance(error, PeerSilent):
            self._silenced[endpoint] = hop.name
        making.refused.pop(hop.name, None)
        making.refused[hop.name] = error
        making.excluded.add(hop.name)
        if not isinstance(error, _NOT_BANNED):
            self._effects.append(Ban(hop.name, isinstance(error, PeerLeaving)))
        if making.repairs:
            making.reasons.append(str(error))
            self._note("lost", f"{error}: another peer takes its place", hop.name)
        else:
            self._note("refused", f"{short_key(hop.name)} is left out of a new route: {error}", hop.name)

    def _leave(self, endpoint: Endpoint) -> None:
        """Has a peer forget the session."""
        if self._members.pop(endpoint, None) is not None:
            self.send(endpoint, CloseMessage(self.session))

    def _fail(self, error: SplitnetError) -> None:
        """There is no route for now: what waits gets the error."""
        making = self._making
        if making is not None and making.repairs:
            self._note("failed", f"a route could not be repaired: {error}")
        for name, refused in making.refused.items() if making is not None else ():
            if not isinstance(refused, PeerLost):  # it may have been right, as nothing else did better
                self._effects.append(Unban(name))
        self._end_requests(error)
        self._enter(Phase.BROKEN)

    def _stop_waiting(self) -> None:
        """What was asked of the route that is no more is not awaited."""
        if self._replays:
            for hop in self.hops:
                hop.relay_log = None  # it may be a part of what was to be replayed
        self._asked, self._failed, self._replays, self._filling = {}, {}, {}, []
        self._liveness.stop()

    def _hop_at(self, endpoint: Endpoint) -> RouteHop | None:
        return next((hop for hop in self.hops if hop.endpoint == endpoint and not hop.lost), None)

    def _note(self, kind: Kind, text: str, peer: str = "") -> None:
        self._effects.append(Note(kind, text, peer))

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            assert phase in TRANSITIONS[self.phase], f"{self.phase} -> {phase}"
            self.phase = phase


def cause_of(error: SplitnetError) -> Cause:
    if isinstance(error, PeerLeaving):
        return Cause.LEAVING
    if isinstance(error, SessionLost):
        return Cause.SESSION_LOST
    return Cause.BUSY if isinstance(error, PeerBusy) else Cause.LOST
