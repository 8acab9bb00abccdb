"""Brings a session's rows to where a step begins, within the KV memory that the session has reserved."""

from __future__ import annotations

from peers.session import Session
from splitnet.errors import ProtocolError
from splitnet.model.kv_cache import FIRST_CAPACITY
from splitnet.net.messages import Step
from splitnet.net.rows import fork_rows

ROOM_PER_BUDGET = 4
"""Rows are allocated ahead and keep what a rewind frees: how much more than the reserved positions that may be."""


class SessionTooLong(ProtocolError):
    """More positions than the model or the session allows."""


def prepare_rows(session: Session, step: Step) -> None:
    """Forks and crops the rows of `session` for `step`; a step that is refused changes nothing.

    Raises:
        SessionTooLong: the rows would take more memory than the session has reserved.
        ProtocolError: a fork of a row that does not exist, or a gap before the first position.
    """
    rows = session.rows
    lengths = {row_id: row.length for row_id, row in rows.items()}
    room = {row_id: session.room[row_id] for row_id in rows}
    if step.forks is not None:
        lengths = fork_rows(lengths, step.forks, int)
        room = fork_rows(room, step.forks, int)
    new_rows = sum(part.row not in lengths for part in step.parts)
    share = min(FIRST_CAPACITY, (session.budget - sum(lengths.values())) // max(1, new_rows))
    for part in step.parts:
        length, end = lengths.get(part.row, 0), part.start + part.length
        if part.start > length:
            raise ProtocolError(f"row {part.row} has {length} positions, the step begins at {part.start}")
        if part.row not in lengths:
            room[part.row] = max(end, share)
        elif end > room[part.row]:
            room[part.row] = max(2 * end, FIRST_CAPACITY)
        lengths[part.row] = end
    held = sum(lengths.values()) + session.prefix_length * len(lengths)
    if held > session.budget:
        raise SessionTooLong(f"the step needs {held} positions, the session has reserved {session.budget}")
    if sum(room.values()) > ROOM_PER_BUDGET * session.budget:
        raise SessionTooLong(
            f"{len(room)} rows take more memory than the {session.budget} positions that are reserved: "
            "reserve more, or continue with fewer rows"
        )
    if step.forks is not None:
        session.rows = rows = fork_rows(rows, step.forks, lambda row: row.fork())
    session.room = room
    for part in step.parts:
        row = rows.get(part.row)
        if row is not None and part.start < row.length:
            row.crop(part.start)
