"""Which waiting steps a device runs together in its next pass, and how busy its passes keep it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Final, Protocol, TypeVar

# A step with at most this many positions is a decode step: a token per row, or a window of drafts.
DECODE_POSITIONS: Final = 16
PASS_POSITIONS: Final = 512  # maximum number of positions in a pass, and in a step of a replay
MAX_PASSED_OVER: Final = 4  # consecutive passes that may leave out a ready step; the next pass then includes the step


class Waiting(Protocol):
    """A step. remaining: positions that have not run, at least 1. blocks: the blocks [start, end) that the step
    needs."""

    @property
    def remaining(self) -> int: ...

    @property
    def blocks(self) -> tuple[int, int]: ...


UNSENT_BYTES: Final = 1 << 20
"""Bytes that may wait for the link to the next hop. While more wait, the peer computes no further prompt for that hop:
then the peer can still choose which prompt to send next, and tokens wait for fewer prompts."""

W = TypeVar("W", bound=Waiting)


def next_pass(waiting: Sequence[W], passed_over: int, max_positions: int = PASS_POSITIONS) -> dict[W, int]:
    """The steps of the next pass, with the number of positions of each.

    Decode comes first, so that a token never waits for more than one pass of prefill; then prefill fills the pass up.
    All steps of a pass go through the same blocks. A step that `MAX_PASSED_OVER` passes left out leads the next pass,
    with half of its positions reserved.

    waiting: at most one step of each session, hashed by identity; the one that has waited longest comes first.
    passed_over: passes that have left out the first step of `waiting`.
    """
    decode = [step for step in waiting if step.remaining <= DECODE_POSITIONS]
    prefill = [step for step in waiting if step.remaining > DECODE_POSITIONS]
    leader = (decode or prefill)[0]
    kept = 0
    if passed_over >= MAX_PASSED_OVER:
        leader = waiting[0]
        kept = min(leader.remaining, -(-max_positions // 2))
    left = max_positions - kept
    counts: dict[W, int] = {leader: kept} if kept else {}
    blocks = leader.blocks
    for step in decode + prefill:
        if step.blocks == blocks:
            count = min(step.remaining - counts.get(step, 0), left)
            if count:
                counts[step] = counts.get(step, 0) + count
                left -= count
    return counts


class MovingAverage:
    """Exponential moving average; `share`: weight of the latest value.

    start: the average before the first value; None: `value` is 0 until the first value, which counts in full.
    """

    __slots__ = ("_begun", "_share", "value")

    def __init__(self, share: float, start: float | None = None) -> None:
        self.value = start or 0.0
        self._begun = start is not None
        self._share = share

    def add(self, value: float) -> float:
        """Adds the latest value. Returns the average."""
        self.value += (self._share if self._begun else 1.0) * (value - self.value)
        self._begun = True
        return self.value


OWN_WAIT = 0.1  # wait for the next source of work, as a fraction of the duration of a pass
# Additional wait, as a multiple of the time for which the thread of a pass had no processor: other processes use it.
SHARED_WAIT = 3.0
LATELY_S = 1.0  # a source that has brought work within this time may bring more
_LEARNING = 0.1


class BatchingDelay:
    """How long to wait for more work before a pass. One thread at a time may use it; any thread may call
    `forget_source`."""

    def __init__(self) -> None:
        self._took_s = MovingAverage(_LEARNING)
        self._delayed_s = MovingAverage(_LEARNING)
        self._seen: dict[Hashable, float] = {}

    def observe_pass(self, sources: Iterable[Hashable], took_s: float, computed_s: float, now: float) -> None:
        """Records a pass of these sources that took `took_s`; its thread had a processor for `computed_s`."""
        self._took_s.add(took_s)
        self._delayed_s.add(max(0.0, took_s - computed_s))
        self._seen.update(dict.fromkeys(sources, now))
        seen = list(self._seen.items())
        if any(now - at > LATELY_S for _, at in seen):
            self._seen = {source: at for source, at in seen if now - at <= LATELY_S}

    def forget_source(self, source: Hashable) -> None:
        self._seen.pop(source, None)

    def delay_s(self, ready: int) -> float:
        """Seconds to wait if `ready` sources are ready, at most the duration of a pass; 0: no more sources are
        expected."""
        if ready >= len(self._seen):
            return 0.0
        took_s = self._took_s.value
        # Wait longer only until half of the expected sources are ready: otherwise all peers of a machine would wait for
        # each other.
        shared = SHARED_WAIT * self._delayed_s.value if 2 * ready < len(self._seen) else 0.0
        return min(OWN_WAIT * took_s + shared, took_s)


HALF_LIFE_S = 10.0
_WINDOW_MS = 1000 * HALF_LIFE_S / math.log(2)  # effective length, in ms, of an average with this half-life
SHARE = 0.2  # weight of the latest pass in the average


class Load:
    """How busy a device has been: averages over recent passes, which fade while the device is idle.

    Clients plan with these values for half a minute, so the length of the queue at one moment would tell them too
    little.
    """

    def __init__(self) -> None:
        self._wait_ms = MovingAverage(SHARE, 0.0)
        self._batch = MovingAverage(SHARE, 0.0)
        self._squares = 0.0
        self.last_at = 0.0  # when the last pass began, in seconds

    def observe(self, now: float, waits_ms: Sequence[float], others: Sequence[int], took_ms: float = 0.0) -> None:
        """Records a pass that lasted `took_ms`.

        waits_ms: waits of the decode steps that began in the pass; waits of prefill, which yields to decode, are left
        out. others: for each decode step, the positions of other sessions in the pass.
        """
        fade = self._fade(now)
        self._wait_ms.value *= fade
        self._batch.value *= fade
        self._squares = self._squares * fade + took_ms * took_ms
        self.last_at = now
        for wait_ms in waits_ms:
            self._wait_ms.add(wait_ms)
        for batch in others:
            self._batch.add(batch)

    def estimate_at(self, now: float) -> tuple[float, float]:
        """Ms that a decode step waits for its pass, and positions of other sessions that share this pass.

        If few steps were observed, a step that arrives at any time finds a running pass with a mean remainder of (sum
        of squares of passes) / (twice the time).
        """
        fade = self._fade(now)
        return max(self._wait_ms.value, self._squares / _WINDOW_MS / 2) * fade, self._batch.value * fade

    def _fade(self, now: float) -> float:
        return 0.5 ** (max(0.0, now - self.last_at) / HALF_LIFE_S)
