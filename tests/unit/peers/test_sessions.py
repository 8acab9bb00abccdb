"""Admission: what sessions have reserved never exceeds the KV memory, and comes back when they end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers.sessions import (
    LEASE_S,
    LONGEST_LEASE_S,
    MAX_SESSIONS,
    MIN_RESERVATION,
    WANTED_S,
    HopSession,
    SessionTable,
)
from splitnet.errors import PeerBusy
from splitnet.security.identity import AuthorizedKeys, KeyOptions
from splitnet.wire.codecs import CODECS
from splitnet.wire.endpoints import Connection
from splitnet.wire.sent_log import SentLog


class Granted(AuthorizedKeys):
    """Keys by name; others get what strangers do."""

    def __init__(self, **granted: KeyOptions) -> None:
        super().__init__(None)
        self._granted = granted

    def options_of(self, curve_raw: bytes) -> KeyOptions:
        return self._granted.get(curve_raw.decode(), KeyOptions())


def session(name: int, reservation: int, used_at: float = 0.0, owner: bytes = b"owner") -> HopSession:
    return HopSession(
        id=name.to_bytes(16, "big"),
        owner=owner,
        reply_to=Connection(b"client", b"owner"),
        epoch=1,
        start=0,
        end=4,
        reservation=reservation,
        codec=CODECS["none"],
        next=None,
        log=SentLog(0, 4),
        used_at=used_at,
    )


def test_a_session_is_found_by_its_id_until_it_is_removed() -> None:
    table = SessionTable(1000)
    first, second = session(1, 100), session(2, 200)
    table.add_session(first)
    table.add_session(second)
    assert (table.get(first.id), table.get(second.id), table.get(b"other")) == (first, second, None)
    assert list(table) == [first, second]
    table.remove(first)
    assert (table.get(first.id), len(table), first.closed, second.closed) == (None, 1, True, False)
    assert table.free_positions == 800


def test_removing_twice_frees_once() -> None:
    table = SessionTable(1000)
    one = session(1, 100)
    table.add_session(one)
    table.remove(one)
    table.remove(one)
    assert table.free_positions == 1000


def test_what_does_not_fit_is_refused_with_what_is_free() -> None:
    table = SessionTable(1000)
    table.add_session(session(1, 900))
    with pytest.raises(PeerBusy, match="101 bytes: 100 of 1000 are free"):
        table.add_session(session(2, 101))
    table.add_session(session(3, 100))
    assert table.free_positions == 0


def test_a_session_grows_where_there_is_room_and_never_shrinks() -> None:
    table = SessionTable(1000)
    one = session(1, 300)
    table.add_session(one)
    table.resize(one, 800)
    table.resize(one, 100)
    assert (one.reservation, table.free_positions) == (800, 200)
    with pytest.raises(PeerBusy):
        table.resize(one, 1001)
    assert (one.reservation, table.free_positions) == (800, 200)


def test_rows_with_states_take_their_place_before_any_position() -> None:
    table = SessionTable(1000, row_bytes=100)
    one = session(1, 300)
    assert table.free_positions == 900, "a session has a row at least"
    table.add_session(one)
    assert table.free_positions == 500
    table.hold_rows(one, 4)
    assert table.free_positions == 200
    with pytest.raises(PeerBusy, match="400 bytes: 300 of 1000 are free"):
        table.hold_rows(one, 8)
    with pytest.raises(PeerBusy):
        table.add_session(session(2, 201))
    table.hold_rows(one, 0)
    assert table.free_positions == 500
    table.hold_rows(one, 3)
    table.remove(one)
    table.hold_rows(one, 3)  # its last step may still run
    assert table.free_positions == 900


def test_the_smallest_session_takes_something_even_where_there_is_little() -> None:
    table = SessionTable(MIN_RESERVATION + 1)
    table.add_session(session(1, 0))
    assert table.free_positions == 1
    with pytest.raises(PeerBusy):
        table.add_session(session(2, 0))
    tiny = SessionTable(5)
    tiny.add_session(session(1, 0))
    assert tiny.free_positions == 0


def test_the_number_of_sessions_is_bounded() -> None:
    table = SessionTable(10 * MIN_RESERVATION * MAX_SESSIONS)
    for name in range(MAX_SESSIONS):
        table.add_session(session(name, 1))
    with pytest.raises(PeerBusy, match=str(MAX_SESSIONS)):
        table.add_session(session(MAX_SESSIONS, 1))


def test_only_idle_sessions_expire() -> None:
    table = SessionTable(1000, idle_s=60)
    old, young = session(1, 100, used_at=0), session(2, 100, used_at=50)
    table.add_session(old)
    table.add_session(young)
    assert table.expire(60) == []
    assert table.expire(61) == [old]
    assert old.closed
    assert (list(table), table.free_positions) == ([young], 900)


operations = st.lists(
    st.tuples(st.sampled_from(["add", "resize", "remove", "expire"]), st.integers(0, 9), st.integers(0, 600)),
    max_size=60,
)


@given(operations)
def test_what_is_reserved_is_what_the_sessions_hold(steps: list[tuple[str, int, int]]) -> None:
    table = SessionTable(2000, idle_s=100)
    made: dict[int, HopSession] = {}
    for kind, name, amount in steps:
        current = made.get(name)
        try:
            if kind == "add" and current is None:
                current = session(name, amount, used_at=amount)
                table.add_session(current)
                made[name] = current
            elif kind == "resize" and current is not None:
                table.resize(current, amount)
            elif kind == "remove" and current is not None:
                table.remove(made.pop(name))
            elif kind == "expire":
                for expired in table.expire(amount):
                    assert amount - expired.used_at > 100
                    del made[int.from_bytes(expired.id, "big")]
        except PeerBusy:
            assert amount > table.free_positions or amount < MIN_RESERVATION
        assert table.free_positions == 2000 - sum(held.reservation for held in made.values()) >= 0
        assert set(table) == set(made.values())
        assert not any(held.closed for held in made.values())


def opens(table: SessionTable, name: int, reservation: int, now: float, owner: bytes) -> HopSession:
    """What the service does with an `Open`."""
    opened = session(name, reservation, now, owner)
    table.make_room(opened, reservation, now)
    table.add_session(opened)
    return opened


def test_one_key_has_everything_until_another_comes_and_what_makes_no_steps_makes_room() -> None:
    table = SessionTable(1000)
    first = opens(table, 1, 1000, 0.0, b"greedy")
    with pytest.raises(PeerBusy, match=r"no KV memory for 400 bytes: 0 of 1000 are free; .* try again in 10 s"):
        opens(table, 2, 400, 1.0, b"other")
    first.used_at = 9.0  # opened again and again, which is no step
    second = opens(table, 2, 400, 11.0, b"other")
    assert first.closed and list(table) == [second]
    # While others are within their share, who goes on is not ended.
    third = opens(table, 3, 500, 12.0, b"greedy")
    third.stepped_at = 30.0
    with pytest.raises(PeerBusy, match="close sessions"):
        opens(table, 4, 200, 31.0, b"other")
    assert not third.closed and not second.closed


def test_a_key_beyond_its_share_ends_after_its_longest_lease_though_it_makes_steps() -> None:
    table = SessionTable(1000)
    held = [opens(table, name, 250, 0.0, b"greedy") for name in range(4)]
    for one in held:
        one.stepped_at = LONGEST_LEASE_S
    with pytest.raises(PeerBusy):
        opens(table, 8, 300, LONGEST_LEASE_S - 1, b"other")
    opens(table, 8, 300, LONGEST_LEASE_S, b"other")
    assert [one.closed for one in held] == [True, True, False, False], "as many as it takes"


def test_who_has_its_share_gets_no_more_while_others_want_some() -> None:
    table = SessionTable(1000)
    opens(table, 1, 800, 0.0, b"greedy")
    with pytest.raises(PeerBusy):
        opens(table, 2, 400, 1.0, b"other")
    with pytest.raises(PeerBusy, match=r"others wait for KV memory of this peer, .* or try again in 14 s"):
        opens(table, 3, 100, 2.0, b"greedy")
    opens(table, 3, 100, 1.0 + WANTED_S + 1, b"greedy")


def test_shares_go_by_weight_and_a_key_has_its_own_bound() -> None:
    table = SessionTable(1000, keys=Granted(friend=KeyOptions(weight=3.0), guest=KeyOptions(kv=300)))
    opens(table, 1, 1000, 0.0, b"greedy")
    with pytest.raises(PeerBusy, match=r"your key may reserve 300 bytes .* larger kv="):
        opens(table, 2, 301, 1.0, b"guest")
    assert not opens(table, 3, 700, 20.0, b"friend").closed
    with pytest.raises(PeerBusy):
        opens(table, 4, 301, 40.0, b"stranger")  # a quarter is 250
    opens(table, 5, 200, 50.0, b"guest")


def test_nobody_is_ended_for_a_session_that_its_key_may_not_have() -> None:
    table = SessionTable(1000, keys=Granted(guest=KeyOptions(kv=300)))
    idle = opens(table, 1, 1000, 0.0, b"greedy")
    with pytest.raises(PeerBusy, match="larger kv="):
        opens(table, 2, 400, 20.0, b"guest")
    assert not idle.closed


def test_many_tiny_sessions_of_a_key_make_room_for_another() -> None:
    table = SessionTable(10 * MIN_RESERVATION * MAX_SESSIONS)
    for name in range(MAX_SESSIONS):
        opens(table, name, 1, 0.0, b"greedy")
    with pytest.raises(PeerBusy, match=str(MAX_SESSIONS)):
        opens(table, MAX_SESSIONS, 1, 1.0, b"other")
    opens(table, MAX_SESSIONS, 1, 1 + LEASE_S, b"other")
    assert len(table) == MAX_SESSIONS


def test_asking_without_pause_does_not_keep_a_key_from_its_share() -> None:
    table = SessionTable(1000)
    opens(table, 1, 1000, 0.0, b"greedy")
    for tenth in range(10, 100):
        with pytest.raises(PeerBusy):
            opens(table, 2, 400, tenth / 10, b"other")
    assert any(not _refused(table, now / 10) for now in range(100, 106))


def _refused(table: SessionTable, now: float) -> bool:
    try:
        opens(table, 2, 400, now, b"other")
    except PeerBusy:
        return True
    return False


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 900), st.integers(0, 40)), max_size=60))
def test_a_key_within_its_share_is_never_ended_for_another(steps: list[tuple[int, int, int, int]]) -> None:
    table = SessionTable(1000)
    now = 0.0
    for key, name, reservation, after_s in steps:
        now += after_s
        owner = bytes([key])
        if table.get((100 * key + name).to_bytes(16, "big")) is not None:
            continue
        held = {other: sum(it.reservation for it in table if it.owner == other) for other in {it.owner for it in table}}
        one_more = session(100 * key + name, reservation, now, owner)
        ended = table.make_room(one_more, reservation, now)
        keys = {owner, *held, *table._wanted}
        for one in ended:
            assert held[one.owner] > 1000 / len(keys)
            held[one.owner] -= one.reservation
        try:
            table.add_session(one_more)
        except PeerBusy:
            assert not ended
        by_key = [table.memory.held_bytes(key) for key in {it.owner for it in table}]
        assert table.memory.used == sum(it.reservation for it in table) == sum(by_key) <= 1000
