"""How many blocks a client runs itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.local_share import best_share


def test_a_fast_client_takes_all_it_can_and_a_slow_one_nothing() -> None:
    def route_ms(first: int) -> float:
        return 20.0 * (first < 10) + (10 - first) * 2.0

    assert best_share([0, 3, 10], 1.0, route_ms) == 10
    assert best_share([0, 3], 1.0, route_ms) == 3
    assert best_share([0, 3, 10], 50.0, route_ms) == 0


def test_what_nobody_serves_is_run_here() -> None:
    assert best_share([0, 4, 10], 50.0, lambda first: None if first < 4 else 1.0) == 4


def test_no_route_at_all() -> None:
    with pytest.raises(ValueError):
        best_share([0, 4], 1.0, lambda _: None)


@given(st.sets(st.integers(0, 40), min_size=1), st.floats(0, 10), st.lists(st.floats(0, 100), min_size=41, max_size=41))
def test_no_other_candidate_is_sooner(candidates: set[int], block_ms: float, rest_ms: list[float]) -> None:
    best = best_share(candidates, block_ms, lambda first: rest_ms[first])
    assert best in candidates
    assert all(best * block_ms + rest_ms[best] <= count * block_ms + rest_ms[count] for count in candidates)
