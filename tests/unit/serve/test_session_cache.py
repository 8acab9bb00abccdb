"""Which sessions are kept, for whom, and how long."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from splitnet.serve.session_cache import KeepLimits, SessionCache


@dataclass
class Kept:
    """A cache whose sessions are names, and a record of the closed ones."""

    sessions: int = 3
    positions: int = 1000
    now: float = 0.0
    closed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        limits = KeepLimits(self.sessions, self.positions, 60.0)
        self.cache: SessionCache[str] = SessionCache(limits, self.closed.append, lambda: self.now)


def test_the_next_turn_gets_the_session_of_the_one_before() -> None:
    kept = Kept()
    kept.cache.keep_session("me", [1, 2, 3], 10, "three")
    kept.cache.keep_session("me", [1, 2, 3, 4, 5], 10, "five")
    kept.cache.keep_session("me", [9, 9], 10, "other")
    assert kept.cache.take_session("me", [1, 2, 3, 4, 5, 6]) == ("five", 5)
    assert kept.cache.take_session("me", [1, 2, 3, 4, 5, 6]) == ("three", 3)
    assert kept.cache.take_session("me", [1, 2, 3, 4, 5, 6]) is None
    assert not kept.closed


def test_a_session_is_not_taken_for_a_prompt_that_shares_little() -> None:
    kept = Kept()
    kept.cache.keep_session("me", [1, 2, 3, 4, 5], 10, "five")
    assert kept.cache.take_session("me", [1, 2, 9, 9, 9]) is None
    assert kept.cache.take_session("me", []) is None
    assert kept.cache.take_session("me", [1, 2, 3, 9]) == ("five", 3)


def test_the_least_recently_used_session_is_closed_first() -> None:
    kept = Kept(sessions=2)
    kept.cache.keep_session("me", [1], 10, "a")
    kept.cache.keep_session("me", [2], 10, "b")
    taken = kept.cache.take_session("me", [1, 5])
    assert taken is not None
    kept.cache.keep_session("me", [1, 5], 10, "a")
    kept.cache.keep_session("me", [3], 10, "c")
    assert kept.closed == ["b"]


def test_owners_do_not_get_sessions_of_others() -> None:
    kept = Kept(sessions=3)
    kept.cache.keep_session("ann", [1, 2, 3], 10, "ann's")
    assert kept.cache.take_session("bob", [1, 2, 3, 4]) is None
    for name in ("first", "second", "third", "fourth"):
        kept.cache.keep_session("bob", [7], 10, name)
    assert kept.closed == ["first", "second"], "who keeps most loses first"
    assert kept.cache.take_session("ann", [1, 2, 3, 4]) == ("ann's", 3)


def test_positions_are_bounded() -> None:
    kept = Kept(positions=100)
    kept.cache.keep_session("me", [1], 60, "a")
    kept.cache.keep_session("me", [2], 40, "b")
    assert not kept.closed
    kept.cache.keep_session("me", [3], 101, "too much alone")
    assert kept.closed == ["too much alone"]
    kept.cache.keep_session("me", [4], 10, "d")
    assert kept.closed == ["too much alone", "a"]


def test_sessions_expire() -> None:
    kept = Kept()
    kept.cache.keep_session("me", [1], 10, "a")
    kept.now = 30.0
    kept.cache.keep_session("me", [2], 10, "b")
    kept.now = 61.0
    kept.cache.expire()
    assert kept.closed == ["a"]
    assert kept.cache.clear() and not kept.cache.clear()
    assert kept.closed == ["a", "b"]


def test_limits_of_zero_keep_no_session() -> None:
    kept = Kept(sessions=0)
    kept.cache.keep_session("me", [1], 10, "a")
    assert kept.closed == ["a"]


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(st.lists(st.one_of(st.tuples(st.just("keep"), TOKENS), st.tuples(st.just("take"), TOKENS)), max_size=30))
def test_no_session_is_shared_or_lost(does: list[tuple[str, list[int]]]) -> None:
    kept = Kept(sessions=3, positions=12)
    inside: dict[str, list[int]] = {}
    for number, (what, tokens) in enumerate(does):
        if what == "keep":
            inside[str(number)] = tokens
            kept.cache.keep_session("me", tokens, len(tokens), str(number))
        elif (taken := kept.cache.take_session("me", tokens)) is not None:
            name, shared = taken
            assert inside.pop(name)[:shared] == tokens[:shared] and shared >= 1
        for name in kept.closed:
            del inside[name]
        kept.closed.clear()
        assert len(inside) <= 3 and sum(map(len, inside.values())) <= 12
    kept.cache.clear()
    assert set(kept.closed) == set(inside) and len(kept.closed) == len(inside)
