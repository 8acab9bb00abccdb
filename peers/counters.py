"""The counters of a peer for `peers/peer_metrics.py`. They are fast enough to be updated in every decode step.

Each counter has one writer at a time: the engine, or the thread that holds the lock of the service.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from peers.power import EnergyMeter
from peers.sessions import PassWork, Work
from scheduler.batching import DECODE_POSITIONS
from splitnet.wire.endpoints import Destination, Endpoint
from splitnet.wire.messages import FailureCode, Forward, Gradient, Message, Payload, Result, Step, Tapped

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
POSITIONS = tuple(2.0**power for power in range(13))
ROWS = tuple(2.0**power for power in range(9))

OTHER_CODEC = -1  # in place of a codec, for messages without activations and gradients
_ENCODED = frozenset((Step, Result, Tapped, Forward, Gradient))


class WorkKind(StrEnum):
    """The kinds of work that a peer does for clients."""

    DECODE = "decode"  # a step of at most `DECODE_POSITIONS` positions
    PREFILL = "prefill"
    REPLAY = "replay"  # a step of positions that another peer has computed before, after a failover or a re-plan
    FORWARD = "forward"
    BACKWARD = "backward"


class PassKind(StrEnum):
    """The kinds of passes on the device."""

    STEPS = "steps"
    FORWARD = "forward"
    BACKWARD = "backward"


class SessionEnd(StrEnum):
    CLOSED = "closed"  # the client has closed the session
    EXPIRED = "expired"
    REVOKED = "revoked"  # the owner of the peer has removed the client's key from the list
    HANDED_OVER = "handed_over"  # the client has closed the session, after it replaced the leaving peer
    DROPPED = "dropped"  # the peer has ended or moved before the client replaced it


class Histogram:
    """Counts of values by bucket. bounds: the largest value of each bucket, ascending; the last bucket has no bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0  # sum of all values

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class WorkCounts:
    """Counts for one kind of work: steps or passes, their positions, and their seconds from arrival to the first
    pass."""

    steps: int = 0
    positions: int = 0
    waits: Histogram = field(default_factory=lambda: Histogram(SECONDS))


@dataclass
class PassHistograms:
    """Histograms for one kind of pass: seconds, positions and rows of each pass."""

    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    positions: Histogram = field(default_factory=lambda: Histogram(POSITIONS))
    rows: Histogram = field(default_factory=lambda: Histogram(ROWS))

    def observe(self, seconds: float, positions: int, rows: int) -> None:
        self.seconds.observe(seconds)
        self.positions.observe(positions)
        self.rows.observe(rows)


class TrafficCounter:
    """Bytes of messages with their headers, by codec and by whether this peer opened the link. Thread-safe."""

    def __init__(self) -> None:
        self._sent: Counter[tuple[bool, int]] = Counter()
        self._received: Counter[tuple[bool, int]] = Counter()
        self._lock = threading.Lock()

    def totals(self) -> tuple[Counter[tuple[bool, int]], Counter[tuple[bool, int]]]:
        with self._lock:
            return self._sent.copy(), self._received.copy()

    def count(self, other: Destination, message: Message | None, frames: Sequence[Payload], *, sent: bool) -> None:
        """Counts a sent or received message. message: None: the frames are not a message."""
        codec: int = message.codec if type(message) in _ENCODED else OTHER_CODEC  # pyright: ignore
        key = (isinstance(other, Endpoint), codec)
        size = sum(map(len, frames))
        with self._lock:
            (self._sent if sent else self._received)[key] += size


class Counters:
    """The counters of a peer since its start; a move to other blocks keeps them."""

    def __init__(self, energy: EnergyMeter | None = None) -> None:
        self.energy = energy or EnergyMeter()
        self.work = {kind: WorkCounts() for kind in WorkKind}
        self.passes = {kind: PassHistograms() for kind in PassKind}
        # Number of requests that were answered with a failure, by its code.
        self.refused = dict.fromkeys(FailureCode, 0)
        self.opened = 0  # number of sessions that were admitted
        self.ended = dict.fromkeys(SessionEnd, 0)
        self.moves = 0
        self.traffic = TrafficCounter()
        # Kept as attributes, because a look-up by enum takes longer than the counting.
        self._decode, self._prefill = self.work[WorkKind.DECODE], self.work[WorkKind.PREFILL]
        self._replay = self.work[WorkKind.REPLAY]
        self.step_passes = self.passes[PassKind.STEPS]

    def step_began(self, work: Work) -> None:
        """Counts the wait of a step that begins its first pass."""
        self._of(work).waits.observe(work.wait_ms / 1000)

    def step_computed(self, work: Work, count: int) -> None:
        """Counts the next `count` positions of a step, which a pass has computed."""
        counts = self._of(work)
        counts.positions += count
        if not work.remaining:
            counts.steps += 1

    def sequences_passed(self, kind: PassKind, work: PassWork, lengths: Sequence[int], seconds: float) -> None:
        """Counts a pass over whole sequences of these lengths."""
        counts = self.work[WorkKind(kind.value)]
        positions = sum(lengths)
        counts.steps += 1
        counts.positions += positions
        counts.waits.observe(work.wait_ms / 1000)
        self.passes[kind].observe(seconds, positions, len(lengths))

    def _of(self, work: Work) -> WorkCounts:
        if work.step.replay_until:
            return self._replay
        return self._decode if work.total <= DECODE_POSITIONS else self._prefill
