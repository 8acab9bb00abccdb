"""Which waiting steps a device runs together in its next pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

DECODE_POSITIONS: Final = 16
"""A step with at most so many positions is decoding: a token per row, or a window of drafts."""

PASS_POSITIONS: Final = 512
"""Most positions of a pass, and of a step of a replay."""

PATIENCE: Final = 4
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
    pass up. All of a pass goes through the same blocks. A step that `PATIENCE` passes left out leads the next one, and
    half of it is kept for it.

    Args:
        waiting: at most one step of each session, hashed by identity; who has waited longest comes first.
        passed_over: passes that have left out the first of them.
        max_positions: of a pass.
    """
    decode = [step for step in waiting if step.remaining <= DECODE_POSITIONS]
    prefill = [step for step in waiting if step.remaining > DECODE_POSITIONS]
    leader = (decode or prefill)[0]
    kept = 0
    if passed_over >= PATIENCE:
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
