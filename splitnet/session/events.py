"""A session's phases, what happens to it, and what is to be done about it: the words of `SessionState.handle`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from scheduler.liveness import Alive
from splitnet.errors import SplitnetError
from splitnet.swarm.plan import PlannedHop
from splitnet.swarm.swarm import Kind
from splitnet.wire.codecs import Codec
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Chunk, Message
from splitnet.wire.sent_log import SentLog

if TYPE_CHECKING:
    from splitnet.blocks.adapters import Adapter
    from splitnet.session.requests import Batch, Request, StepRequest


class Phase(StrEnum):
    """Where a session stands.

    NEW: no hop was asked yet. PLANNING: a route is being planned, or awaited where no peer serves some blocks. OPENING:
    hops reserve memory and find out whether they reach each other. LOADING: hops take over the session's adapter.
    REPLAYING: hops that lack the session's KV cache compute it from a log. OPEN: requests travel along the route.
    BROKEN: hops are missing, and nothing is under way.
    """

    NEW = "new"
    PLANNING = "planning"
    OPENING = "opening"
    LOADING = "loading"
    REPLAYING = "replaying"
    OPEN = "open"
    BROKEN = "broken"
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
"""Every change that can happen; `tests/unit/session/test_session_machine.py` compares it with what does happen."""


@dataclass(frozen=True, slots=True)
class Use:
    """The caller wants an open route. Does nothing if there is one, or one is being made."""


@dataclass(frozen=True, slots=True)
class LookUpPrefix:
    """The caller begins a text, drops all other rows, and asks which first positions of the text hops have stored.

    Ignored while requests are under way. Once the route is open, `PrefixLookup.hit` is the number of positions that the
    caller need not submit.

    part: the positions whose outputs the caller does not need. encoded: the payload of these positions, by the codec
    of the first link. reach: see `Step`. logs: logs of these positions that exist, by the code of their codec.
    """

    part: Chunk
    encoded: Callable[[Codec], bytes]
    reach: int = 0
    logs: dict[int, SentLog] = field(default_factory=dict[int, SentLog])

    def log(self, codec: Codec, hidden_size: int, salt: bytes | None) -> SentLog:
        """The log of these positions, with their labels. Raises CodecError: they cannot be encoded."""
        log = self.logs.pop(codec.code, None)
        if log is None:
            log = SentLog(codec.code, codec.bytes_per_position(hidden_size), salt)
            log.record((self.part,), None, self.encoded(codec), self.reach)
        return log


@dataclass(frozen=True, slots=True)
class Submit:
    """The caller sends requests, in this order. A route must have stood; if it is broken by now, it is repaired."""

    requests: tuple[Request[Any], ...]


@dataclass(frozen=True, slots=True)
class Backward:
    """The caller sends the gradients of passes that went forward up the route."""

    batch: Batch
    adapter: int  # version that the passes run with; 0: none


@dataclass(frozen=True, slots=True)
class Abandon:
    """The caller awaits these requests no longer."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Resize:
    """The caller wants KV memory for so many positions on every hop; never shrinks."""

    reservation: int


@dataclass(frozen=True, slots=True)
class UseAdapter:
    """The caller wants the blocks to run with other parameters. Nothing may be cached or under way."""

    adapter: Adapter
    for_passes: bool = False  # hops without a part of it get an empty one, as passes name a version for every hop


@dataclass(frozen=True, slots=True)
class Move:
    """The caller leaves a route that works for a better one; ignored while something is under way."""

    route: tuple[PlannedHop, ...]
    codecs: tuple[Codec, ...]


@dataclass(frozen=True, slots=True)
class Distrust:
    """An answer that was accepted turned out to be wrong when it was decoded: the request is done again elsewhere."""

    request: StepRequest
    source: Endpoint
    why: str


@dataclass(frozen=True, slots=True)
class Close:
    """The caller ends the session."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message came from a peer."""

    source: Endpoint
    message: Message


@dataclass(frozen=True, slots=True)
class LinkFailed:
    """The client's own link to a peer is lost or refused."""

    endpoint: Endpoint
    error: SplitnetError


@dataclass(frozen=True, slots=True)
class Planned:
    """A route, as the `AskRoute` of this number wanted it. codecs: of every link, one more than hops."""

    number: int
    route: tuple[PlannedHop, ...]
    codecs: tuple[Codec, ...]


@dataclass(frozen=True, slots=True)
class NoRoute:
    """No route answers the `AskRoute` of this number.

    present: names of all peers that the directory lists. was_covered: all blocks were served at some time.
    """

    number: int
    error: SplitnetError
    present: frozenset[str]
    was_covered: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of `SessionState.wake_at` has come."""


Wish = Use | LookUpPrefix | Submit | Backward | Abandon | Resize | UseAdapter | Move | Distrust | Close  # of the caller
Event = Wish | Received | LinkFailed | Alive[Endpoint] | Planned | NoRoute | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a hop."""

    endpoint: Endpoint
    message: Message


@dataclass(frozen=True, slots=True)
class AskAlive:
    """Ping a hop, naming the session; `Alive` follows if it answers."""

    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class AskRoute:
    """Plan a route; `Planned` or `NoRoute` must follow, with the same number. A newer question replaces it.

    kept: hops that stay if they can, in order. excluded: names of peers that must not be used. fresh: look into the
    directory even if that was done a moment ago. unban: lift the bans of peers that answer now.
    """

    number: int
    kept: tuple[PlannedHop, ...]
    excluded: frozenset[str]
    fresh: bool
    unban: bool


@dataclass(frozen=True, slots=True)
class Ban:
    """Plan without a peer for a while; `leaves`: it said that it goes away."""

    name: str
    leaves: bool


@dataclass(frozen=True, slots=True)
class Unban:
    """A ban was not deserved."""

    name: str


@dataclass(frozen=True, slots=True)
class Note:
    """Tell people what has happened."""

    kind: Kind
    text: str
    peer: str = ""


Effect = Send | AskAlive | AskRoute | Ban | Unban | Note


class Cause(StrEnum):
    """Why a route was repaired.

    LOST: a hop died, hangs, is cut off or answered nonsense. SESSION_LOST: a hop does not hold the session any more.
    LEAVING: a hop has said that it is about to end or to move. BUSY: a hop ran out of memory. STALLED: all hops live,
    but requests got lost between them. BETTER_ROUTE: nothing was lost.
    """

    LOST = "lost"
    SESSION_LOST = "session_lost"
    LEAVING = "leaving"
    BUSY = "busy"
    STALLED = "stalled"
    BETTER_ROUTE = "better_route"


@dataclass(frozen=True, slots=True)
class Recovered:
    """One repair of a route.

    lost: why hops were replaced. opened_ms: until other peers were planned and had opened the session. total_ms: until
    they had the cache, and requests were sent again. cause: of the first hop that was replaced.
    """

    lost: tuple[str, ...]
    opened_ms: float
    total_ms: float
    cause: Cause
