"""Which waiting steps a device runs together in its next pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from math import ceil
from typing import Final, Protocol, TypeVar

from scheduler.load import MovingAverage

DECODE_POSITIONS: Final = 16
"""A step with at most so many positions is decoding: a token per row, or a window of drafts."""

PASS_POSITIONS: Final = 512
"""Most positions of a pass, and of a step of a replay."""

MAX_PASSED_OVER: Final = 4
"""Passes that may leave out a step that is ready; then one is made for it."""


class Waiting(Protocol):
    """A step that waits.

    remaining: positions that are still to run, at least 1. blocks: that it goes through, [start, end).
    """

    @property
    def remaining(self) -> int: ...

    @property
    def blocks(self) -> tuple[int, int]: ...


UNSENT_BYTES: Final = 1 << 20
"""While more waits for the way to the next hop, no prompt is computed that goes there: which of them is sent next can
still be chosen, and tokens need not wait behind them all."""

W = TypeVar("W", bound=Waiting)


def next_pass(waiting: Sequence[W], passed_over: int, max_positions: int = PASS_POSITIONS) -> dict[W, int]:
    """The steps of the next pass, with how many positions of each.

    Decode comes first, so that a token never waits for more than one pass of somebody's prefill; then prefill fills the
    pass up. All of a pass goes through the same blocks. A step that `MAX_PASSED_OVER` passes left out leads the next
    one, and half of it is kept for it.

    Args:
        waiting: at most one step of each session, hashed by identity; who has waited longest comes first.
        passed_over: passes that have left out the first of them.
        max_positions: of a pass.
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


SIZES: Final = (64, 128, 256, 512)
"""Positions of a step. Smaller ones use the devices badly, larger ones make the hops wait for each other."""


def best_step(positions: int, latency_ms: Callable[[int], float], slowest_hop_ms: Callable[[int], float]) -> int:
    """The size of steps with which `positions` positions are through soonest, the largest of those that are as good.

    Args:
        latency_ms: of a step through the route, by its positions.
        slowest_hop_ms: by how much a step behind it comes later: what it keeps the slowest hop or link busy for.
    """

    def prefill_ms(size: int) -> float:
        size = min(size, positions)
        return latency_ms(size) + (ceil(positions / size) - 1) * slowest_hop_ms(size)

    return min(reversed(SIZES), key=prefill_ms)


OWN_WAIT = 0.1
"""How long the next one is waited for, as a part of the time that the work takes."""

SHARED_WAIT = 3.0
"""How much longer, as a part of the time for which it had no processor: others want it, and use it meanwhile.

Until half of those who are expected are there: of one group the processors of a machine would wait for each other.
"""

LATELY_S = 1.0
"""Who has brought work within so many seconds may bring more."""

_LEARNING = 0.1


class BatchingDelay:
    """Tells how long to wait, from what was seen before. One thread uses it at a time; `left` may come from any."""

    def __init__(self) -> None:
        self._took_s = MovingAverage(_LEARNING)
        self._delayed_s = MovingAverage(_LEARNING)
        self._seen: dict[Hashable, float] = {}

    def ran(self, sources: Iterable[Hashable], took_s: float, computed_s: float, now: float) -> None:
        """Takes in that work of these sources was done together.

        Args:
            took_s: seconds that it took.
            computed_s: for how many of them its thread had a processor.
            now: when it was done, in seconds.
        """
        self._took_s.add(took_s)
        self._delayed_s.add(max(0.0, took_s - computed_s))
        self._seen.update(dict.fromkeys(sources, now))
        seen = list(self._seen.items())
        if any(now - at > LATELY_S for _, at in seen):
            self._seen = {source: at for source, at in seen if now - at <= LATELY_S}

    def left(self, source: Hashable) -> None:
        """Nothing more comes from a source."""
        self._seen.pop(source, None)

    def delay_s(self, ready: int) -> float:
        """Seconds to wait for the next one when the work of so many sources is ready; 0: no more are expected.

        At most what the work itself takes.
        """
        if ready >= len(self._seen):
            return 0.0
        took_s = self._took_s.value
        shared = SHARED_WAIT * self._delayed_s.value if 2 * ready < len(self._seen) else 0.0
        return min(OWN_WAIT * took_s + shared, took_s)
