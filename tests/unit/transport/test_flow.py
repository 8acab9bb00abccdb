"""Waiting bytes are counted by receiver, without tracking every message."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitnet.limits import Budget
from splitnet.transport.flow import LARGE_BYTES, TRACKED_BYTES, Backlog
from splitnet.wire.endpoints import Connection

LARGE = TRACKED_BYTES + 1


class Parcel:
    """A message that ZeroMQ holds until `done`."""

    done = False


def receiver(number: int) -> Connection:
    return Connection(b"%d" % number, bytes([number]) * 32)


def sent(backlog: Backlog, number: int, size: int) -> Parcel | None:
    """Sends a message that is tracked."""
    counted = backlog.reserve_room(receiver(number), size)
    if not counted:
        return None
    backlog.add_message(receiver(number), counted, parcel := Parcel())
    return parcel


def test_small_messages_are_counted_together() -> None:
    budget = Budget(1 << 30)
    backlog = Backlog(budget)
    size = TRACKED_BYTES // 4
    assert size <= LARGE_BYTES
    assert [backlog.untracked(receiver(1), size) for _ in range(5)] == [True] * 4 + [False]
    assert budget.used == 0
    assert backlog.reserve_room(receiver(1), size) == 5 * size
    assert budget.held_bytes(receiver(1).curve) == 5 * size
    backlog.add_message(receiver(1), 5 * size, None)
    assert budget.used == 0, "a message that ZeroMQ does not take is not held"
    assert backlog.untracked(receiver(1), size)


def test_a_slow_receiver_gets_half_of_the_room_and_sent_messages_free_it() -> None:
    budget = Budget(100 * LARGE)
    backlog = Backlog(budget)
    parcels = [parcel for _ in range(100) if (parcel := sent(backlog, 1, LARGE)) is not None]
    assert len(parcels) == 50
    assert budget.refused == 50
    assert sent(backlog, 2, 40 * LARGE)
    for parcel in parcels:
        parcel.done = True
    assert sent(backlog, 1, 20 * LARGE)
    assert budget.held_bytes(receiver(1).curve) == 20 * LARGE


def test_held_bytes_are_those_of_unsent_messages() -> None:
    backlog = Backlog(Budget(100 * LARGE))
    parcels = [parcel for number in (1, 2, 1) if (parcel := sent(backlog, number, LARGE)) is not None]
    assert [backlog.held_bytes(receiver(number)) for number in (1, 2, 3)] == [2 * LARGE, LARGE, 0]
    parcels[2].done = True
    assert [backlog.held_bytes(receiver(number)) for number in (1, 2, 3)] == [LARGE, LARGE, 0]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30 * LARGE), st.booleans()), max_size=60))
def test_unsent_bytes_are_held_and_within_the_limit(messages: list[tuple[int, int, bool]]) -> None:
    budget = Budget(100 * LARGE)
    backlog = Backlog(budget)
    waiting: list[tuple[int, Parcel]] = []
    for number, size, one_is_sent in messages:
        if one_is_sent and waiting:
            waiting.pop(size % len(waiting))[1].done = True
        if not backlog.untracked(receiver(number), size):
            small = backlog._small.get(receiver(number).routing_id, 0)
            parcel = sent(backlog, number, size)
            if parcel is not None:
                waiting.append((size + small, parcel))
        assert sum(size for size, _ in waiting) <= budget.used <= budget.limit
    for _, parcel in waiting:
        parcel.done = True
    backlog._forget_sent()
    assert budget.used == 0
