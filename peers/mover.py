"""When a peer moves to other blocks: all peers look at the same facts, and the one that they name goes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.moves import Move, Willingness, best_move
from scheduler.swarm import missing_blocks
from splitnet.net.facts import expected_facts_of, facts_of
from splitnet.net.identity import PublicKey
from splitnet.net.records import PeerRecord

log = logging.getLogger(__name__)

FEW = 3
"""Servers of a block that may all be lost at once."""


@dataclass(frozen=True, slots=True)
class _Announced:
    """A move that waits until all that may leave the same blocks have spoken since.

    issued: when the records of all others were, by key.
    """

    move: Move
    issued: dict[str, float]


class Mover:
    """Decides for one peer. See `scheduler.moves` for the rules, and why peers do not leave a block together.

    Args:
        num_blocks: of the model.
        position_bytes: that a position takes on links; 0: what peers can send does not count.

    Attributes:
        lacking: blocks were served by nobody when it decided last, and nobody was on the way to them.
    """

    def __init__(self, num_blocks: int, position_bytes: float = 0.0) -> None:
        self.lacking = False
        self._num_blocks = num_blocks
        self._position_bytes = position_bytes
        self._announced: _Announced | None = None

    @property
    def intended(self) -> tuple[int, int] | None:
        """The span of a move that is announced but not done yet."""
        return (self._announced.move.start, self._announced.move.end) if self._announced else None

    def decide(self, own: PeerRecord, others: Sequence[PeerRecord], now: float) -> tuple[int, int] | None:
        """The span `[start, end)` to move to now, or None.

        Args:
            own: this peer's record as of now.
            others: all other records.
            now: Unix time in seconds.
        """
        expected = [expected_facts_of(record) for record in others if record.serves or record.moving_to]
        self.lacking = bool(missing_blocks([facts_of(own), *expected], self._num_blocks))
        move = self._named(own, others, now)
        if move is None:
            self._announced = None
            return None
        if move.confirm:
            if self._announced is None or self._announced.move != move:
                self._announced = _Announced(move, {record.key.text: record.issued_at for record in others})
            before = self._announced.issued
            if any(
                record.issued_at <= before.get(record.key.text, 0.0) for record in others if _may_leave(record, own)
            ):
                return None
        self._announced = None
        return move.start, move.end

    def guarded(self, own: PeerRecord, others: Sequence[PeerRecord], now: float) -> list[PeerRecord]:
        """The peers whose loss this one would have to make up for: few serve some block, and this is the one to move.

        Args:
            own, others, now: as for `decide`.
        """
        guarded: dict[PublicKey, PeerRecord] = {}
        if own.max_blocks:
            for holders in self._few_holders(own, others):
                lost = {record.key for record in holders}
                if self._named(own, [record for record in others if record.key not in lost], now) is not None:
                    guarded |= {record.key: record for record in holders}
        return list(guarded.values())

    def _few_holders(self, own: PeerRecord, others: Sequence[PeerRecord]) -> list[list[PeerRecord]]:
        """Who serves a block, for the blocks that only one to `FEW` others serve; each group once."""
        groups: dict[frozenset[PublicKey], list[PeerRecord]] = {}
        serving = [record for record in others if record.serves]
        edges = sorted({edge for record in serving for edge in (record.start, record.end)} | {own.start, own.end})
        for block in edges:  # between these all blocks have the same
            holders = [record for record in serving if record.start <= block < record.end]
            if 0 < len(holders) <= FEW and not own.start <= block < own.end:
                groups[frozenset(record.key for record in holders)] = holders
        return list(groups.values())

    def _named(self, own: PeerRecord, others: Sequence[PeerRecord], now: float) -> Move | None:
        """The best move, if it is this peer's."""
        if not own.max_blocks:
            return None
        present = [own, *(record for record in others if record.serves or record.moving_to)]
        move = best_move(
            [facts_of(record, self._position_bytes) for record in present],
            self._num_blocks,
            max_blocks={record.key.text: record.max_blocks for record in present if record.max_blocks},
            willingness=Willingness(
                sessions={record.key.text: record.sessions for record in present},
                settled_s={record.key.text: now - record.placed_at for record in present},
            ),
            moving={record.key.text: record.moving_to for record in others if record.moving_to},
        )
        return move if move is not None and move.peer == own.key.text else None


def _may_leave(record: PeerRecord, own: PeerRecord) -> bool:
    """Whether this peer could leave a block that the own one serves."""
    return record.serves and record.max_blocks > 0 and record.start < own.end and own.start < record.end
