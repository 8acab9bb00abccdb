"""Whether a peer lives: every threshold that says so, and what rounds of pings say of the hops of a route.

The thresholds of clients, peers and their directory stand in one table. Times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeVar

# A ping over any link.

ANSWER_S: Final = 1.0  # a peer that answers no ping in this time is silent; but see `ANSWER_TRIPS`
FIRST_ANSWER_S: Final = 3.0
"""The first ping of a link whose connection was taken: five to six round trips, one of them TCP's. Until any peer has
answered, a connection may take this time, too."""

ANSWER_TRIPS: Final = 3  # where round trips are long, a link that is up gives an answer in this many of the latest ones
TAKEN_TRIPS: Final = 2  # and a connection is taken in this many
FIRST_TRIPS: Final = 7  # and the first ping of a link is answered in this many
MAX_ANSWER_S: Final = 12.0  # no answer is waited for longer, as peers decide how late they answer
TRIAL_ANSWER_S: Final = 5.0  # of a peer that is tried out: more than a handshake, and than it waits for its next hop

# The hops of a session.

MIN_SILENCE_S: Final = 0.25  # hops are pinged after at least this time without an answer to a request
MAX_SILENCE_S: Final = 2.0  # and after at most this time, if the step is not predicted to take long
SILENT_STEPS: Final = 5.0  # between these bounds they are pinged after so many times what a step usually takes
PREDICTED_TIMES: Final = 2.0  # a long step is given so many times what it is predicted to take before hops are pinged
LOST_S: Final = MAX_SILENCE_S + ANSWER_S  # a peer that gave no sign of life for this time may be lost, or hangs
OPEN_TIMEOUT_S: Final = 10.0  # a hop that lives answers `Open` in this time; it may have to reach its next hop before
UPLINK_QUEUE_S: Final = 10.0  # longest silence of a hop that is put down to what the client's uplink sends to others
MAX_QUEUE_S: Final = 120.0  # longest wait for a peer that says that its queue is long, or whose link is busy
DECODE_PROGRESS_S: Final = 30.0  # a hop that works on a decode step for this time without progress counts as lost
PROGRESS_TIMEOUT_S: Final = 120.0  # the same for a prefill
PASS_PROGRESS_S: Final = 600.0  # the same for passes over whole sequences
IDLE_CHECKS: Final = 2  # rounds of pings in which no hop has work of the session: what was under way was lost
RECOVERY_TIMEOUT_S: Final = 30.0  # how long a session waits for other peers when some blocks are not served any more

# Which peers routes avoid.

BAN_S: Final = 30.0  # a peer that failed in a session is not planned with for this time
UNBAN_S: Final = 0.5  # a banned peer that answers in this time is planned with again, if no other serves its blocks
SILENT_S: Final = 60.0
"""A peer that was late, or whose link has failed, is avoided for this time. One that never answered may not exist, and
is avoided until it answers."""

# Peers that are asked for records.

DIRECTORY_ANSWER_S: Final = 4.0  # a peer answers a question about records in this time
DIRECTORY_SOON_S: Final = 1.0  # others are asked, too, if one has not told in this time what has changed
DIRECTORY_OTHERS_S: Final = 1.0  # others are waited for this time after the first answer; later ones count next time
DIRECTORY_DOWN_S: Final = 0.5  # a peer to which no link comes up in this time is not waited for if others answer

# What peers think of each other, and of clients.

HOLDER_LOST_S: Final = 2.5  # a watched peer that has not answered for this time, and whose link is lost, is gone
HOLDER_SILENT_S: Final = 6.0  # the same, whatever its link says
CLIENT_LOST_S: Final = 30.0  # the sessions of a client whose connection has ended are kept for this time
STUCK_S: Final = 60.0  # no pass waits for a link that accepted no bytes for this time; clients wait `MAX_QUEUE_S`
STALLED_S: Final = 30.0  # a connection ends on which bytes wait and the other side has accepted none for this time
SOURCE_SILENT_S: Final = 15.0  # a source of weights that sends nothing for this time is not waited for

Hop = TypeVar("Hop", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Alive(Generic[Hop]):
    """A hop has answered a ping, or is about to."""

    endpoint: Hop
    queue_ms: float  # how long its device has something to do, for any session
    holds: bool = True  # it knows the session
    waiting: int = 0  # steps and passes of the session that wait or run there; 1 for all on its way to the next hop
    done: int = 0  # positions of the session computed there so far; only grows
    last: int = 0  # highest number of a step or pass of the session's epoch that was finished there
    late: bool = False  # it has not answered, but its link carries something, behind which the ping or the pong waits


class Finding(Enum):
    """What a round of pings says."""

    SILENT = "silent"  # hops do not answer
    FORGOTTEN = "forgotten"  # hops do not hold the session
    IDLE = "idle"  # all hops live, and none has anything of the session to do
    STUCK = "stuck"  # hops have something to do, and it does not go on


@dataclass(frozen=True, slots=True)
class Verdict(Generic[Hop]):
    finding: Finding
    hops: tuple[Hop, ...] = ()  # those that it concerns, the likeliest first


def silence_s(usual_ms: float, predicted_ms: float = 0.0) -> float:
    """How long to wait for an answer before asking, by what such a step usually and this one is predicted to take.
    0: not known."""
    usual_s = SILENT_STEPS * usual_ms / 1000
    silent_s = min(max(usual_s, MIN_SILENCE_S), MAX_SILENCE_S) if usual_ms else MAX_SILENCE_S
    return max(silent_s, PREDICTED_TIMES * predicted_ms / 1000)


class Liveness(Generic[Hop]):
    """Rounds of pings, and what follows from their answers. `answer_s`: in which time a hop that lives answers."""

    def __init__(self, answer_s: Callable[[Hop], float] = lambda _: ANSWER_S) -> None:
        self._answer_s = answer_s
        self._heard_at = 0.0
        self._progress_at = 0.0
        self._marks: dict[Hop, tuple[int, int]] = {}
        self._stragglers: dict[Hop, tuple[int, int]] = {}  # what was answered after the round in which it was asked
        self._answers: dict[Hop, Alive[Hop] | None] = {}
        self._until: dict[Hop, float] = {}  # by when each has to answer
        self._idle_checks = 0
        self._moves = 0
        self._rounds = 0

    @property
    def asking(self) -> bool:
        return bool(self._answers)

    def heard(self, now: float) -> None:
        """Something has come of what is awaited."""
        self._heard_at = self._progress_at = now
        self._idle_checks = self._moves = self._rounds = 0
        self._marks, self._stragglers = {}, {}
        self.stop()

    def stop(self) -> None:
        """A round that is under way counts no more."""
        self._answers, self._until = {}, {}

    def wake_at(self, silent_s: float) -> float:
        return self._due_at if self._answers else self._heard_at + silent_s

    def ask(self, hops: Sequence[Hop], now: float) -> None:
        """A round begins: these hops are pinged now. From the first one on they have to show progress."""
        self._progress_at = self._progress_at if self._rounds else now
        self._rounds += 1
        self._answers = dict.fromkeys(hops)
        self._until = {hop: now + self._answer_s(hop) for hop in hops}

    def answered(self, answer: Alive[Hop]) -> bool:
        """Takes an answer in; tells whether the round is over."""
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
        """Ends a round; None: there is nothing to do but to wait.

        number: the lowest that is awaited; 0: not of a step or pass. parts: in how many each hop may compute it;
        progress beyond that is made up. progress_s: how long hops may work on something without any progress.
        """
        answers, until = self._answers, self._until
        self.stop()
        self._heard_at = now
        silent = tuple(endpoint for endpoint, answer in answers.items() if answer is None and now >= until[endpoint])
        if silent:
            return Verdict(Finding.SILENT, silent)
        told = [answer for answer in answers.values() if answer is not None]
        forgotten = tuple(answer.endpoint for answer in told if not answer.holds)
        if forgotten:
            return Verdict(Finding.FORGOTTEN, forgotten)
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
            # The hop that did not get it or keeps it, then those that should have sent it, then others from the tail.
            order = [answer.endpoint for answer in reversed(told)]
            if behind:
                at = [answer.endpoint for answer in told].index(behind[0])
                order = [behind[0], *[answer.endpoint for answer in reversed(told[:at])], *order]
            return Verdict(Finding.IDLE, tuple(dict.fromkeys(order)))
        # An overloaded peer says so, and is given the time; one that only says so, not for ever.
        queued_s = max((MAX_QUEUE_S if answer.late else answer.queue_ms / 1000 for answer in told), default=0.0)
        limit_s = min(max(progress_s, PREDICTED_TIMES * queued_s), max(progress_s, MAX_QUEUE_S))
        if any(works) and now - self._progress_at >= limit_s:
            self._progress_at = now
            stuck = [answer.endpoint for answer, busy in zip(told, works, strict=True) if busy]
            # If those are done with it, it is on its way: they are slow to send it on, or the next does not take it.
            return Verdict(Finding.STUCK, tuple([hop for hop in stuck if hop in behind] or [*stuck, *behind[:1]]))
        return None
