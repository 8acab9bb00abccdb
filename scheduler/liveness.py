"""Whether a peer is alive: the time limits of clients, peers and the directory, and what pings tell of a route's hops.

Times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeVar

# Pings over any link.

ANSWER_S: Final = 1.0  # a peer that does not answer a ping in this time is silent; see `ANSWER_TRIPS` for long links
FIRST_ANSWER_S: Final = 3.0
"""Time limit for the first ping of a new connection: five to six round trips, one of them for TCP. Until any peer has
answered, opening a connection may take this time, too."""

# Time limits on a link with long round trips, in multiples of the latest round trip.
ANSWER_TRIPS: Final = 3  # until a ping is answered
TAKEN_TRIPS: Final = 2  # until a connection is accepted
FIRST_TRIPS: Final = 7  # until the first ping of a connection is answered
MAX_ANSWER_S: Final = 12.0  # longest wait for any answer, because a peer controls how late it answers
# Time limit for a peer on trial: longer than a handshake, and longer than the peer waits for its next hop.
TRIAL_ANSWER_S: Final = 5.0

# The hops of a session.

MIN_SILENCE_S: Final = 0.25  # shortest time without an answer to a request after which hops are pinged
MAX_SILENCE_S: Final = 2.0  # longest such time, unless the step is predicted to take long
SILENT_STEPS: Final = 5.0  # between these bounds hops are pinged after this many times the usual duration of a step
PREDICTED_TIMES: Final = 2.0  # before a long step, hops are pinged only after this many times its predicted duration
LOST_S: Final = MAX_SILENCE_S + ANSWER_S  # a peer that has sent nothing for this time may be lost, or may hang
OPEN_TIMEOUT_S: Final = 10.0  # a live hop answers `Open` in this time, which includes connecting to its next hop
UPLINK_QUEUE_S: Final = 10.0  # longest silence of a hop that the client's own traffic to other peers may explain
MAX_QUEUE_S: Final = 120.0  # longest wait for a peer that reports a long queue, or whose link is busy
DECODE_PROGRESS_S: Final = 30.0  # a hop that works on a decode step for this time without progress counts as lost
PROGRESS_TIMEOUT_S: Final = 120.0  # the same for a prefill
PASS_PROGRESS_S: Final = 600.0  # the same for passes over whole sequences
# After this many rounds of pings in which no hop has work of the session, the session's messages count as lost.
IDLE_CHECKS: Final = 2
RECOVERY_TIMEOUT_S: Final = 30.0  # how long a session waits for new peers when some blocks have no peer

# Which peers routes avoid.

BAN_S: Final = 30.0  # a peer that failed in a session is not used in plans for this time
UNBAN_S: Final = 0.5  # a banned peer that answers in this time is used again, if its blocks have no other peer
SILENT_S: Final = 60.0
"""A peer that was late, or whose link has failed, is avoided for this time. A peer that never answered may not exist,
and is avoided until it answers."""

# Peers that are asked for records.

DIRECTORY_ANSWER_S: Final = 4.0  # a peer answers a question about records in this time
DIRECTORY_SOON_S: Final = 1.0  # if a peer has not reported changes in this time, other peers are asked, too
# How long to wait for other peers after the first answer; later answers count at the next refresh.
DIRECTORY_OTHERS_S: Final = 1.0
DIRECTORY_DOWN_S: Final = 0.5  # if other peers answer, nobody waits longer than this for a peer whose link is not up

# How peers judge each other, and clients.

# A watched peer that has not answered for this time, and whose link is lost, counts as gone.
HOLDER_LOST_S: Final = 2.5
# A watched peer that has not answered for this time counts as gone, even if its link is up.
HOLDER_SILENT_S: Final = 6.0
CLIENT_LOST_S: Final = 30.0  # the sessions of a client whose connection has ended are kept for this time
# Passes do not wait for a link that has accepted no bytes for this time; clients wait up to `MAX_QUEUE_S`.
STUCK_S: Final = 60.0
STALLED_S: Final = 30.0  # a connection ends if bytes wait on it and the other side has accepted none for this time
SOURCE_SILENT_S: Final = 15.0  # a source of weights that sends nothing for this time is given up

Hop = TypeVar("Hop", bound=Hashable)


@dataclass(frozen=True, slots=True)
class PingAnswer(Generic[Hop]):
    """The answer of a hop to a ping; with `late` the answer is still expected."""

    endpoint: Hop
    queue_ms: float  # expected time until the device has done its waiting work, of all sessions
    holds: bool = True  # whether the hop has the session
    # Steps and passes of the session that wait or run at the hop; all those in transit to the next hop count as 1.
    waiting: int = 0
    done: int = 0  # positions of the session that the hop has computed so far; never decreases
    last: int = 0  # highest number of a finished step or pass of the session's epoch
    late: bool = False  # the hop has not answered, but data on its link delays the ping or the pong


class PingVerdict(Enum):
    """The result of a round of pings."""

    SILENT = "silent"  # hops do not answer
    FORGOTTEN = "forgotten"  # hops do not hold the session
    IDLE = "idle"  # all hops live, and none has work of the session
    STUCK = "stuck"  # hops have work of the session, without progress


@dataclass(frozen=True, slots=True)
class Verdict(Generic[Hop]):
    finding: PingVerdict
    hops: tuple[Hop, ...] = ()  # the hops that may have caused the verdict, the likeliest first


def silence_s(usual_ms: float, predicted_ms: float = 0.0) -> float:
    """Seconds to wait for an answer before pinging, from the usual duration and the predicted duration of the step; 0:
    the duration is not known.
    """
    usual_s = SILENT_STEPS * usual_ms / 1000
    silent_s = min(max(usual_s, MIN_SILENCE_S), MAX_SILENCE_S) if usual_ms else MAX_SILENCE_S
    return max(silent_s, PREDICTED_TIMES * predicted_ms / 1000)


class Liveness(Generic[Hop]):
    """Rounds of pings, and the conclusions from their answers. answer_s: seconds in which a live hop answers."""

    def __init__(self, answer_s: Callable[[Hop], float] = lambda _: ANSWER_S) -> None:
        self._answer_s = answer_s
        self._heard_at = 0.0
        self._progress_at = 0.0
        self._marks: dict[Hop, tuple[int, int]] = {}
        self._stragglers: dict[Hop, tuple[int, int]] = {}  # answers that arrived after their round
        self._answers: dict[Hop, PingAnswer[Hop] | None] = {}
        self._until: dict[Hop, float] = {}  # deadline of each answer
        self._idle_checks = 0
        self._moves = 0
        self._rounds = 0

    @property
    def asking(self) -> bool:
        return bool(self._answers)

    def message_received(self, now: float) -> None:
        """Records the arrival of a message that the client waited for."""
        self._heard_at = self._progress_at = now
        self._idle_checks = self._moves = self._rounds = 0
        self._marks, self._stragglers = {}, {}
        self.cancel_round()

    def cancel_round(self) -> None:
        """Cancels the current round."""
        self._answers, self._until = {}, {}

    def wake_at(self, silent_s: float) -> float:
        return self._due_at if self._answers else self._heard_at + silent_s

    def begin_round(self, hops: Sequence[Hop], now: float) -> None:
        """Begins a round: these hops are pinged at `now`. The time without progress counts from the first round on."""
        self._progress_at = self._progress_at if self._rounds else now
        self._rounds += 1
        self._answers = dict.fromkeys(hops)
        self._until = {hop: now + self._answer_s(hop) for hop in hops}

    def add_answer(self, answer: PingAnswer[Hop]) -> bool:
        """Records an answer. Returns whether the round is over."""
        if answer.endpoint in self._answers:
            self._answers[answer.endpoint] = answer
            return None not in self._answers.values()
        if not answer.late:
            self._stragglers[answer.endpoint] = (answer.done, answer.last)
        return False

    def is_late(self, now: float) -> bool:
        return now >= self._due_at

    @property
    def _due_at(self) -> float:
        # Another thread may end the round meanwhile.
        waiting = (self._until.get(hop, math.inf) for hop, answer in self._answers.items() if answer is None)
        return min(waiting, default=math.inf)

    def verdict(self, number: int, parts: int, progress_s: float, now: float) -> Verdict[Hop] | None:
        """Ends a round and returns its result; None: the session keeps waiting.

        number: number of the earliest step or pass without an answer; 0: none. parts: maximum number of parts in which
        a hop may compute this step or pass; a hop that reports more progress lies. progress_s: longest time for which
        hops may work without progress.
        """
        answers, until = self._answers, self._until
        self.cancel_round()
        self._heard_at = now
        silent = tuple(endpoint for endpoint, answer in answers.items() if answer is None and now >= until[endpoint])
        if silent:
            return Verdict(PingVerdict.SILENT, silent)
        told = [answer for answer in answers.values() if answer is not None]
        forgotten = tuple(answer.endpoint for answer in told if not answer.holds)
        if forgotten:
            return Verdict(PingVerdict.FORGOTTEN, forgotten)
        in_time = {answer.endpoint: (answer.done, answer.last) for answer in told if not answer.late}
        marks = self._marks | self._stragglers | in_time
        self._stragglers = {}
        moved = bool(self._marks) and marks != self._marks
        self._marks = marks
        self._moves += moved
        if moved and self._moves <= len(told) * (parts + 1):
            self._progress_at = now
        works = [answer.late or answer.waiting > 0 for answer in told]
        self._idle_checks = 0 if any(works) else 1 if moved else self._idle_checks + 1
        behind = [answer.endpoint for answer in told if answer.late or answer.last < number]
        if self._idle_checks == IDLE_CHECKS:
            self._idle_checks = 0
            # First the hop that did not receive the step or keeps it, then the hops that should have sent it, then
            # others from the tail.
            order = [answer.endpoint for answer in reversed(told)]
            if behind:
                at = [answer.endpoint for answer in told].index(behind[0])
                order = [behind[0], *[answer.endpoint for answer in reversed(told[:at])], *order]
            return Verdict(PingVerdict.IDLE, tuple(dict.fromkeys(order)))
        # An overloaded peer reports its queue and gets more time, within a limit, because the report may be false.
        queued_s = max((MAX_QUEUE_S if answer.late else answer.queue_ms / 1000 for answer in told), default=0.0)
        limit_s = min(max(progress_s, PREDICTED_TIMES * queued_s), max(progress_s, MAX_QUEUE_S))
        if any(works) and now - self._progress_at >= limit_s:
            self._progress_at = now
            stuck = [answer.endpoint for answer, busy in zip(told, works, strict=True) if busy]
            # If the busy hops have finished it, it is in transit: they are slow to send it, or the next hop does not
            # accept it.
            return Verdict(PingVerdict.STUCK, tuple([hop for hop in stuck if hop in behind] or [*stuck, *behind[:1]]))
        return None
