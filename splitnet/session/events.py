"""The phases, the events and the effects of a session: the interface of `SessionState.handle`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from scheduler.liveness import PingAnswer
from splitnet.errors import SplitnetError
from splitnet.swarm.plan import PlannedHop
from splitnet.swarm.swarm import Kind
from splitnet.wire.codecs import Codec
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import BlockInput, Chunk, Message
from splitnet.wire.sent_log import SentLog

if TYPE_CHECKING:
    from splitnet.blocks.adapters import AdapterTensors
    from splitnet.session.requests import Batch, Request, StepRequest


class Phase(StrEnum):
    """The state of a session's route.

    NEW: no hop was asked yet. PLANNING: a route is being planned, or awaited because no peer serves some blocks.
    OPENING: hops reserve memory and connect to each other. LOADING: hops load the session's adapter. REPLAYING: hops
    without the session's KV cache compute the cache from a log. OPEN: requests travel along the route. BROKEN: hops are
    missing, and nothing is under way.
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
"""All possible changes of phase; `tests/unit/session/test_machine.py` compares them with the observed ones."""


@dataclass(frozen=True, slots=True)
class Use:
    """The caller needs an open route. Has no effect if the route is open, or being made."""


EncodedPositions = tuple[bytes, Sequence[BlockInput]]
"""The payload of a step with these block inputs."""


@dataclass(frozen=True, slots=True)
class LookUpPrefix:
    """The caller begins a text, drops all other rows, and asks which first positions of the text hops have stored.

    Ignored while requests are under way. Once the route is open, `PrefixLookup.hit` is the number of positions that the
    caller need not submit.

    part: the positions whose outputs the caller does not need. encoded: the payload and the block inputs of these
    positions, by the codec of the first link. rope_length: see `Step`. logs: existing logs of these positions, by the
    code of their codec.
    """

    part: Chunk
    encoded: Callable[[Codec], EncodedPositions]
    rope_length: int = 0
    logs: dict[int, SentLog] = field(default_factory=dict[int, SentLog])

    def log(self, codec: Codec, hidden_size: int, salt: bytes | None) -> SentLog:
        """The log of these positions, with their labels. Raises CodecError: they cannot be encoded."""
        log = self.logs.pop(codec.code, None)
        if log is None:
            log = SentLog(codec.code, codec.bytes_per_position(hidden_size), salt)
            payload, inputs = self.encoded(codec)
            log.record_step((self.part,), None, payload, self.rope_length, (), inputs)
        return log


@dataclass(frozen=True, slots=True)
class Submit:
    """The caller sends requests, in this order. A route must have been open before; a broken route is repaired."""

    requests: tuple[Request[Any], ...]


@dataclass(frozen=True, slots=True)
class Backward:
    """The caller sends back the gradients of passes that have gone forward."""

    batch: Batch
    adapter: int  # version of the adapter that the passes run with; 0: no adapter


@dataclass(frozen=True, slots=True)
class Abandon:
    """The caller gives up these requests."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Resize:
    """The caller needs KV memory for `reservation` positions on every hop; the memory never shrinks."""

    reservation: int


@dataclass(frozen=True, slots=True)
class UseAdapter:
    """The caller sets the adapter of the blocks. Nothing may be cached or under way."""

    adapter: AdapterTensors
    for_passes: bool = False  # hops without tensors get an empty adapter, because passes name a version for every hop


@dataclass(frozen=True, slots=True)
class MoveRoute:
    """The caller leaves a working route for a better one; ignored while requests are under way."""

    route: tuple[PlannedHop, ...]
    codecs: tuple[Codec, ...]


@dataclass(frozen=True, slots=True)
class Distrust:
    """An accepted answer cannot be decoded: the request is done again elsewhere."""

    request: StepRequest
    source: Endpoint
    why: str


@dataclass(frozen=True, slots=True)
class CloseSession:
    """The caller ends the session."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message of a peer has arrived."""

    source: Endpoint
    message: Message


@dataclass(frozen=True, slots=True)
class LinkFailed:
    """The client's own link to a peer is lost or refused."""

    endpoint: Endpoint
    error: SplitnetError


@dataclass(frozen=True, slots=True)
class RoutePlanned:
    """A route for the `AskRoute` with this number. codecs: one for every link, so one more than hops."""

    number: int
    route: tuple[PlannedHop, ...]
    codecs: tuple[Codec, ...]


@dataclass(frozen=True, slots=True)
class RouteFailed:
    """There is no route for the `AskRoute` with this number.

    present: names of all peers in the directory. was_covered: all blocks were served at some time.
    """

    number: int
    error: SplitnetError
    present: frozenset[str]
    was_covered: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of `SessionState.wake_at` has come."""


# of the caller
Wish = Use | LookUpPrefix | Submit | Backward | Abandon | Resize | UseAdapter | MoveRoute | Distrust | CloseSession
Event = Wish | Received | LinkFailed | PingAnswer[Endpoint] | RoutePlanned | RouteFailed | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a hop."""

    endpoint: Endpoint
    message: Message


@dataclass(frozen=True, slots=True)
class AskAlive:
    """Ping a hop about the session; `PingAnswer` follows when the hop answers."""

    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class AskRoute:
    """Plan a route; `RoutePlanned` or `RouteFailed` must follow, with the same number. A newer `AskRoute` replaces this
    one.

    kept: hops that stay if possible, in order. excluded: names of peers that must not be used. fresh: read the
    directory again, even if the last read is recent. unban: unban peers that answer.
    """

    number: int
    kept: tuple[PlannedHop, ...]
    excluded: frozenset[str]
    fresh: bool
    unban: bool


@dataclass(frozen=True, slots=True)
class BanPeer:
    """Plan without a peer for a while. leaves: the peer has announced that it leaves."""

    name: str
    leaves: bool


@dataclass(frozen=True, slots=True)
class Unban:
    """Unban a peer that was not at fault."""

    name: str


@dataclass(frozen=True, slots=True)
class Note:
    """Report an event in a text for people."""

    kind: Kind
    text: str
    peer: str = ""


Effect = Send | AskAlive | AskRoute | BanPeer | Unban | Note


class Cause(StrEnum):
    """Why a route was repaired.

    LOST: a hop died, hangs, is unreachable or sent an unusable answer. SESSION_LOST: a hop has lost the session.
    LEAVING: a hop is about to end or to move. BUSY: a hop ran out of memory. STALLED: all hops live, but requests were
    lost between two hops. BETTER_ROUTE: nothing was lost.
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

    lost: why hops were replaced. opened_ms: time until the replacements had opened the session. total_ms: time until
    they had the cache, and requests were sent again. cause: cause of the first replacement.
    """

    lost: tuple[str, ...]
    opened_ms: float
    total_ms: float
    cause: Cause
