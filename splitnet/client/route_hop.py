"""A hop of a session's route, and what the session knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from splitnet.client.planner import PlannedHop
from splitnet.errors import ProtocolError
from splitnet.net.codecs import Codec
from splitnet.net.endpoints import Endpoint
from splitnet.net.messages import Result, Step
from splitnet.net.sent_log import SentLog


@dataclass(slots=True, eq=False)
class RouteHop:
    """Stays the same object for as long as the peer runs the same blocks of the session."""

    planned: PlannedHop
    codec: Codec
    """What this hop encodes its output with. Its log is written with it, so it never changes."""
    relayed: bool = False
    """It does not reach its next hop, so the client relays its output."""
    relay_log: SentLog | None = None
    """What the client has relayed; None if that is not all of it."""
    cached_positions: int = 0
    """What it held of the session when it was opened last."""
    filled: bool = False
    """It holds the KV cache that the session wants."""
    weights: str = ""
    """What its blocks are held as, as its record or itself has said last."""
    adapter_version: int = 0
    """Of the adapter that it has taken over; 0: none."""
    lost: bool = False
    """It was given up, and is not replaced yet."""
    endpoint: Endpoint = field(init=False)

    def __post_init__(self) -> None:
        self.endpoint = self.planned.endpoint
        self.weights = self.planned.record.dtype

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def blocks(self) -> tuple[int, int]:
        return self.planned.start, self.planned.end

    def forget(self) -> None:
        """What it holds of the session counts no more."""
        self.filled, self.adapter_version, self.relay_log = False, 0, None

    def opened(self, *, wants_cache: bool) -> None:
        """The route is open. The hop may have lost the session since it was opened before.

        Args:
            wants_cache: the session has sent positions.
        """
        if not self.cached_positions:
            self.filled, self.adapter_version = False, 0
        if not wants_cache:
            self.filled = True
        if not self.relayed:
            self.relay_log = None  # what the hop pushes itself would be missing in it

    def log_relayed(self, step: Step, result: Result) -> None:
        """Takes in what the client relays; a log is of use only from where the session holds nothing else."""
        begins = step.forks == () or step.replay_until  # all rows are dropped, or sent again
        if self.relay_log is None and begins and not any(part.start for part in step.parts):
            self.relay_log = SentLog(result.codec, len(result.payload) // step.positions)
        if self.relay_log is not None:
            try:
                self.relay_log.record(step.parts, step.forks, result.payload, step.reach)
            except ProtocolError:  # its rows were filled by a replay that did not come this way
                self.relay_log = None
