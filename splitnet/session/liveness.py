"""Whether the hops of a route live and work, while something is awaited of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from splitnet.session.events import Alive
from splitnet.wire.endpoints import Endpoint

MIN_SILENCE_S = 0.25
MAX_SILENCE_S = 2.0
SILENT_STEPS = 5.0
"""Without any answer for so many times what a step usually takes, but within these bounds, the hops are asked whether
they live. With `ANSWER_S` that bounds the time until a peer that hangs, or is cut off, is found out.
"""

PATIENCE = 2.0
"""A long step is given so many times what it is predicted to take before anybody is asked."""

ANSWER_S = 1.0
"""A peer that does not answer a ping in this time counts as lost, unless its round trips are long: see `Liveness`."""

MAX_QUEUE_S = 120.0
"""How long a peer that says that its queue is long is waited for, and one whose link is busy."""

IDLE_CHECKS = 2
"""So many times in a row no hop has anything of the session to do: what was under way was lost between two of them."""


class Finding(Enum):
    """What a round of pings says."""

    SILENT = "silent"
    """Hops do not answer."""
    FORGOTTEN = "forgotten"
    """Hops do not hold the session."""
    IDLE = "idle"
    """All hops live, and none has anything of the session to do."""
    STUCK = "stuck"
    """Hops have something to do, and it does not go on."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Attributes:
    hops: whom it concerns, the likeliest first.
    """

    finding: Finding
    hops: tuple[Endpoint, ...] = ()


def silence_s(usual_ms: float, predicted_ms: float = 0.0) -> float:
    """How long to wait for an answer before asking.

    Args:
        usual_ms: what such a step usually takes; 0: not known.
        predicted_ms: what it is predicted to take; 0: not known.
    """
    usual_s = SILENT_STEPS * usual_ms / 1000
    silent_s = min(max(usual_s, MIN_SILENCE_S), MAX_SILENCE_S) if usual_ms else MAX_SILENCE_S
    return max(silent_s, PATIENCE * predicted_ms / 1000)


class Liveness:
    """Rounds of pings, and what follows from their answers. All times in seconds of the caller's clock.

    Args:
        answer_s: in which time a hop that lives answers a ping.
    """

    def __init__(self, answer_s: Callable[[Endpoint], float] = lambda _: ANSWER_S) -> None:
        self._answer_s = answer_s
        self._heard_at = 0.0
        self._progress_at = 0.0
        self._marks: dict[Endpoint, tuple[int, int]] = {}
        self._stragglers: dict[Endpoint, tuple[int, int]] = {}
        """What was answered after the round in which it was asked."""
        self._answers: dict[Endpoint, Alive | None] = {}
        self._until: dict[Endpoint, float] = {}
        """By when each has to answer."""
        self._idle_checks = 0
        self._moves = 0
        self._rounds = 0

    @property
    def asking(self) -> bool:
        """A round is under way."""
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
        """When there is something to do."""
        return self._due_at if self._answers else self._heard_at + silent_s

    def ask(self, hops: Sequence[Endpoint], now: float) -> None:
        """A round begins: these hops are pinged now. From the first one on they have to show progress."""
        self._progress_at = self._progress_at if self._rounds else now
        self._rounds += 1
        self._answers = dict.fromkeys(hops)
        self._until = {hop: now + self._answer_s(hop) for hop in hops}

    def answered(self, answer: Alive) -> bool:
        """Takes an answer in; tells whether the round is over."""
        if answer.endpoint in self._answers:
            self._answers[answer.endpoint] = answer
            return None not in self._answers.values()
        if not answer.late:
            self._stragglers[answer.endpoint] = (answer.done, answer.last)
        return False

    def is_late(self, now: float) -> bool:
        """Whether a round is over, as its time is up."""
        return now >= self._due_at

    @property
    def _due_at(self) -> float:
        waiting = (self._until[hop] for hop, answer in self._answers.items() if answer is None)
        return min(waiting, default=math.inf)

    def verdict(self, number: int, parts: int, progress_s: float, now: float) -> Verdict | None:
        """Ends a round; None: there is nothing to do but to wait.

        Args:
            number: the lowest that is awaited; 0: not of a step or pass.
            parts: in how many each hop may compute what is awaited; progress beyond that is made up.
            progress_s: how long hops may work on something without any progress.
            now: the time.
        """
        answers, until = self._answers, self._until
        self.stop()
        self._heard_at = now
        silent = tuple(endpoint for endpoint, answer in answers.items() if answer is None and now >= until[endpoint])
        if silent:
            return Verdict(Finding.SILENT, silent)
        told = [answer for answer in answers.values() if answer is not None]
        forgotten = tuple(answer.endpoint for answer in told if answer.holds is False)
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
        # A peer of version 0.1.0 says only whether its device is busy, for whomever.
        works = [
            answer.late or (answer.waiting > 0 if answer.holds is not None else answer.queue_ms > 0) for answer in told
        ]
        self._idle_checks = 0 if any(works) else 1 if moved else self._idle_checks + 1
        behind = [
            answer.endpoint for answer in told if answer.late or (answer.holds is not None and answer.last < number)
        ]
        if self._idle_checks == IDLE_CHECKS:
            self._idle_checks = 0
            # Whom it did not come to, or who keeps it; then who should have sent it; then all others from the tail on.
            order = [answer.endpoint for answer in reversed(told)]
            if behind:
                at = [answer.endpoint for answer in told].index(behind[0])
                order = [behind[0], *[answer.endpoint for answer in reversed(told[:at])], *order]
            return Verdict(Finding.IDLE, tuple(dict.fromkeys(order)))
        # An overloaded peer says so, and is given the time; one that only says so, not for ever.
        queued_s = max((MAX_QUEUE_S if answer.late else answer.queue_ms / 1000 for answer in told), default=0.0)
        patience_s = min(max(progress_s, PATIENCE * queued_s), max(progress_s, MAX_QUEUE_S))
        if any(works) and now - self._progress_at >= patience_s:
            self._progress_at = now
            stuck = [answer.endpoint for answer, busy in zip(told, works, strict=True) if busy]
            # If those are done with it, it is on its way: they are slow to send it on, or the next does not take it.
            return Verdict(Finding.STUCK, tuple([hop for hop in stuck if hop in behind] or [*stuck, *behind[:1]]))
        return None
