"""Brings a session's rows to where a step begins, within the KV memory that the session has reserved.

Whatever rows a session has: a step fits if all positions that they hold fit the budget. Rows are allocated ahead, so
that most steps move nothing; what they take ahead is a fixed share of the budget, which rows that do not grow give back
to those that do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peers.session import Session, Work
from splitnet.errors import ProtocolError
from splitnet.model.kv_cache import FIRST_CAPACITY, RowCache
from splitnet.net.messages import Step
from splitnet.net.rows import fork_rows

AHEAD = 1 / 8
"""Of the budget: what rows may take beyond it. Less of it means that rows of a full session are moved more often."""


class SessionTooLong(ProtocolError):
    """More positions than the model or the session allows."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """A row that is to begin as a copy of another."""

    source: RowCache

    @property
    def length(self) -> int:
        return self.source.length

    @property
    def prefix_length(self) -> int:
        return self.source.prefix_length


def room_for(budget: int) -> int:
    """Positions that the rows of a session with this budget are allocated for at most, all together."""
    return budget + int(budget * AHEAD)


def rows_after(session: Session, step: Step) -> set[int]:
    """The rows of `session` once it has run `step`."""
    kept = session.rows if step.forks is None else (fork.row for fork in step.forks)
    return {*kept, *(part.row for part in step.parts)}


def goes_on(session: Session, step: Step) -> bool:
    """Whether `step` adds to the only row of `session`, where that has room: as decode steps do, nearly always."""
    if step.forks is not None or len(step.parts) != 1 or len(session.rows) != 1:
        return False
    part = step.parts[0]
    row = session.rows.get(part.row)
    if row is None or part.start != row.length:
        return False
    end = part.start + part.length
    return end <= row.room and row.prefix_length + end <= session.budget


def is_quick(work: Work) -> bool:
    """Whether a step takes as long as its positions: no row is copied or moved, or has some to run once more."""
    session, step = work.session, work.step
    if step.forks is not None:
        return False
    for part in step.parts:
        row = session.rows.get(part.row)
        if row is None:
            if session.rows:  # which may give back what they have ahead
                return False
        elif row.room < part.start + part.length or (row.has_states and min(part.start, row.computed) < row.length):
            return False
    return True


def prepare_rows(session: Session, step: Step) -> None:
    """Forks and crops the rows of `session` for `step`, and gives them room; a step that is refused changes nothing.

    Raises:
        SessionTooLong: the rows would hold more positions than the session has reserved.
        ProtocolError: a fork of a row that does not exist, or a gap before the first position.
    """
    if goes_on(session, step):
        return
    rows: dict[int, RowCache | _Copy] = dict(session.rows)
    if step.forks is not None:
        rows = fork_rows(rows, step.forks, lambda row: row if isinstance(row, _Copy) else _Copy(row))
    starts = {part.row: part.start for part in step.parts}
    ends = {row_id: row.prefix_length + row.length for row_id, row in rows.items()}
    for part in step.parts:
        row = rows.get(part.row)
        length, before = (row.length, row.prefix_length) if row is not None else (0, session.prefix_length)
        if part.start > length:
            raise ProtocolError(f"row {part.row} has {length} positions, the step begins at {part.start}")
        ends[part.row] = before + part.start + part.length
    held = sum(ends.values())
    if held > session.budget:
        raise SessionTooLong(f"the step needs {held} positions, the session has reserved {session.budget}")
    present = {row_id: row.prefix_length + row.room for row_id, row in rows.items() if not isinstance(row, _Copy)}
    room = shared_room(ends, present, room_for(session.budget))

    def fit(row_id: int, row: RowCache) -> None:
        row.crop(starts.get(row_id, row.length))
        row.room = room[row_id] - row.prefix_length

    copies = {row_id: row for row_id, row in rows.items() if isinstance(row, _Copy)}
    sources = {id(copy.source) for copy in copies.values()}
    # What is dropped or shrinks does so first, so that copies find its memory free.
    session.rows = {row_id: row for row_id, row in rows.items() if not isinstance(row, _Copy)}
    late = {row_id: row for row_id, row in session.rows.items() if id(row) in sources}
    for row_id, row in session.rows.items():
        if row_id not in late:
            fit(row_id, row)
    forked = {
        row_id: copy.source.fork(starts.get(row_id), room[row_id] - copy.prefix_length)
        for row_id, copy in copies.items()
    }
    for row_id, row in late.items():
        fit(row_id, row)
    session.rows |= forked
    session.new_room = {row_id: room[row_id] - session.prefix_length for row_id in starts if row_id not in session.rows}


def shared_room(ends: Mapping[int, int], present: Mapping[int, int], total: int) -> dict[int, int]:
    """How many positions each row is allocated for; within `total`, if the rows' ends are.

    Args:
        ends: by row, where it will end after the step.
        present: by row that exists, what it is allocated for now.
    """
    growing = [row for row, end in ends.items() if end > present.get(row, 0)]
    if not growing:
        return {row: present[row] for row in ends}
    room = {row: present[row] for row in ends if row not in growing}
    spare = total - sum(ends.values())
    free = total - sum(room.values()) - sum(ends[row] for row in growing)
    wanted = {row: max(ends[row], FIRST_CAPACITY - ends[row]) for row in growing}
    if free < min(spare // 2, sum(wanted.values())):
        room = {row: ends[row] for row in room}  # those that do not grow give back what they have ahead
        free = spare
    share = free // len(growing) if not room else free // 2 // len(growing)
    return room | {row: ends[row] + min(wanted[row], share) for row in growing}
