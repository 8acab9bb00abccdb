"""Which waiting steps a device runs in its next pass when several clients' keys share it; see `fair_shares.py`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from scheduler.fair_shares import CHUNK_S, SLACK, FairShares
from scheduler.packing import DECODE_POSITIONS, Waiting


class Owned(Waiting, Protocol):
    """A step of a client.

    total: positions that it began with. owner: the key. left: positions that its session has still room for, before it.
    """

    @property
    def total(self) -> int: ...

    @property
    def owner(self) -> Hashable: ...

    @property
    def left(self) -> int: ...


W = TypeVar("W", bound=Owned)


class FairPasses(Generic[W]):
    """No clock: `now` is in seconds.

    Args:
        pass_s: seconds that a pass of so many positions takes.
        weight: of a key, in proportion to which keys share the device.

    Attributes:
        shares: what keys have had.
    """

    def __init__(self, pass_s: Callable[[int], float], weight: Callable[[Any], float] = lambda key: 1.0) -> None:
        self.shares = FairShares[Any](weight)
        self._pass_s = pass_s
        self._turn_of: dict[Hashable, Hashable] = {}
        """In whose turn a key's prefill runs, if that is another's."""

    def chunk_s(self, now: float) -> float:
        """How long a piece of prefill or of a pass over whole sequences may take, in seconds."""
        return max(CHUNK_S, 2 * self._pass_s(1), self.shares.quiet_s(now))

    def positions_within(self, seconds: float) -> int:
        """The most positions of which a pass takes so long, at least one."""
        low, high = 1, 1 << 16
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._pass_s(middle) <= seconds else (low, middle - 1)
        return low

    def prefill_turn(self, waiting: Sequence[W], first: Hashable, now: float) -> list[W]:
        """The steps of which prefill runs in a turn of `first`: its own, or one of another key that has less to come.

        Prompts that share a device in turns are all done late. With the shortest first (Schrage 1968) half of them are
        done in a fraction of the time, and hardly one later. What decoding gets is the same: `first` pays, and no key
        goes ahead for long, nor lets all others have its turns, so that nobody waits for ever.

        Args:
            waiting: at most one step of each session.
        """
        own = [step for step in waiting if step.owner == first]
        self._turn_of = {}
        if any(step.remaining <= DECODE_POSITIONS for step in own) or not self.shares.lets_others(first):
            return own
        bulk = [step for step in waiting if step.remaining > DECODE_POSITIONS]
        may = {key: key == first or self.shares.may_go_ahead(key, now) for key in {step.owner for step in bulk}}
        shortest = min((step for step in bulk if may[step.owner]), key=lambda step: (step.left, step.owner != first))
        if shortest.owner == first:
            return own
        self._turn_of = {shortest.owner: first}
        return [shortest]

    def decode_pass(
        self, waiting: Sequence[W], ranked: Sequence[Hashable], max_positions: int, now: float
    ) -> dict[W, int]:
        """A decode step of each key that may join, more of all in turns, then prefill, as long as they cost little.

        Args:
            waiting: at most one step of each session; the first key of `ranked` decodes.
            ranked: their keys, who has had least first.
            max_positions: of the pass.
        """
        self._turn_of = {}
        steps: dict[Hashable, list[W]] = {key: [] for key in ranked}
        for step in waiting:
            if step.remaining <= DECODE_POSITIONS:
                steps[step.owner].append(step)
        blocks = steps[ranked[0]][0].blocks
        lanes = [(self.shares.may_join(key), [step for step in steps[key] if step.blocks == blocks]) for key in ranked]
        due = sum(lane[0].remaining for may_join, lane in lanes if may_join and lane)
        limit_s = max(SLACK * self._pass_s(due), self.shares.quiet_s(now))
        counts: dict[W, int] = {}
        positions = 0
        for turn in range(max(len(lane) for _, lane in lanes)):
            for may_join, lane in lanes:
                if turn < len(lane):
                    total = positions + lane[turn].remaining
                    is_due = may_join and not turn
                    if total <= max_positions and (is_due or self._pass_s(total) <= limit_s):
                        counts[lane[turn]] = lane[turn].remaining
                        positions = total
        left = min(max_positions, self.positions_within(SLACK * self._pass_s(due))) - positions
        for key in ranked:
            for step in (step for step in waiting if step.owner == key):
                if left > 0 and step.remaining > DECODE_POSITIONS and step.blocks == blocks:
                    counts[step] = min(step.remaining, left)
                    left -= counts[step]
        return counts

    def ran(self, chosen: Sequence[tuple[W, int]], seconds: float, now: float) -> None:
        """Charges a pass to the keys whose positions it had; prefill that joined decode as in a piece of its own."""
        decode = [(step, count) for step, count in chosen if step.total <= DECODE_POSITIONS]
        bulk = [(step, count) for step, count in chosen if step.total > DECODE_POSITIONS]
        bulk_s = seconds if bulk else 0.0
        if decode and bulk:
            in_piece = self.positions_within(self.chunk_s(now))
            bulk_s = min(seconds, self._pass_s(in_piece) * sum(count for _, count in bulk) / in_piece)
        for part, took_s in ((decode, seconds - bulk_s), (bulk, bulk_s)):
            positions = sum(count for _, count in part)
            for step, count in part:
                own_s = took_s * count / positions
                payer = self._turn_of.get(step.owner, step.owner) if part is bulk else step.owner
                self.shares.charge(payer, own_s, now, bulk=part is bulk)
                if part is bulk:
                    self.shares.had_turn(step.owner, payer, own_s, now)
        self._turn_of = {}
