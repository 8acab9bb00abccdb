"""A budget of bytes that others fill: its limit holds, and a new account always gets a part."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from splitnet.limits import Budget


def test_one_account_gets_half_and_the_others_the_rest() -> None:
    budget = Budget(1000)
    taken = [sum(budget.reserve(10, who) for _ in range(200)) for who in ("slow", "other", "third")]
    assert taken == [50, 25, 13]
    assert budget.used == 880
    assert budget.refused == 600 - 88
    assert not budget.reserve(121, "a fourth")
    assert budget.reserve(120, "a fourth"), "the first reservation of an account only has to fit in the rest"


def test_each_level_has_its_limit() -> None:
    budget = Budget(1000, most=(400, 150))
    assert budget.reserve(100, "key", 1)
    assert not budget.reserve(51, "key", 1)
    assert budget.reserve(50, "key", 1)
    assert budget.reserve(150, "key", 2)
    assert budget.reserve(100, "key", 3)
    assert not budget.reserve(1, "key", 4), "the key is at its limit"
    assert budget.reserve(150, "another", 1)
    assert (budget.held_bytes("key"), budget.held_bytes("key", 2), budget.held_bytes("another")) == (400, 150, 150)
    budget.release(150, "key", 2)
    assert (budget.held_bytes("key"), budget.held_bytes("key", 2), budget.used) == (250, 0, 400)


def test_measured_bytes_may_exceed_the_limit() -> None:
    budget = Budget(100)
    budget.set_held(80, "key", 1)
    budget.set_held(70, "key", 2)
    assert (budget.used, budget.held_bytes("key")) == (150, 150)
    assert not budget.reserve(1, "another")
    budget.set_held(0, "key", 1)
    budget.set_held(0, "key", 2)
    assert budget.used == 0


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 2), st.integers(1, 400)),
        max_size=80,
    )
)
def test_sums_are_exact_and_all_bytes_are_released(calls: list[tuple[bool, int, int, int]]) -> None:
    budget = Budget(1000, most=(None, 300))
    held: list[tuple[int, int, int]] = []
    for releases, key, connection, size in calls:
        if releases and held:
            who, where, nbytes = held.pop(size % len(held))
            budget.release(nbytes, who, where)
        elif budget.reserve(size, key, connection):
            held.append((key, connection, size))
        assert budget.used == sum(size for _, _, size in held) <= budget.limit
        assert budget.held_bytes(key) == sum(size for who, _, size in held if who == key)
        assert budget.held_bytes(key, connection) == sum(
            size for who, at, size in held if (who, at) == (key, connection)
        )
    for who, where, nbytes in held:
        budget.release(nbytes, who, where)
    assert budget.used == 0
    assert not budget._held


def test_threads_may_share_an_account() -> None:
    budget = Budget(1 << 40)

    def use(key: int) -> None:
        for _ in range(2000):
            budget.reserve(3, key % 2, key)
            budget.release(3, key % 2, key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert budget.used == 0
