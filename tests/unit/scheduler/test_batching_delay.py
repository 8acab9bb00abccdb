"""How long work waits for more: never for what is not expected, never longer than it takes itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.batching import LATELY_S, OWN_WAIT, BatchingDelay

seconds = st.floats(0, 1, allow_subnormal=False)


def test_nothing_is_waited_for_that_was_not_seen() -> None:
    delay = BatchingDelay()
    assert delay.delay_s(1) == 0
    delay.ran(["a"], 0.01, 0.01, 0.0)
    assert delay.delay_s(1) == 0


def test_others_are_waited_for_until_they_are_there() -> None:
    delay = BatchingDelay()
    delay.ran(["a", "b"], 0.01, 0.01, 0.0)
    assert delay.delay_s(1) == pytest.approx(0.01 * OWN_WAIT)
    assert delay.delay_s(2) == 0


def test_who_stays_away_is_forgotten() -> None:
    delay = BatchingDelay()
    delay.ran(["a", "b"], 0.01, 0.01, 0.0)
    delay.ran(["a"], 0.01, 0.01, LATELY_S + 0.1)
    assert delay.delay_s(1) == 0


def test_a_busy_processor_makes_it_wait_longer() -> None:
    alone, among_others = BatchingDelay(), BatchingDelay()
    alone.ran(["a", "b", "c"], 0.01, 0.01, 0.0)
    among_others.ran(["a", "b", "c"], 0.01, 0.008, 0.0)
    assert among_others.delay_s(1) > alone.delay_s(1)
    assert among_others.delay_s(2) == alone.delay_s(2) > 0


@given(st.lists(st.tuples(st.sets(st.integers(0, 5), min_size=1), seconds, seconds), min_size=1), st.integers(1, 6))
def test_never_longer_than_the_work(turns: list[tuple[set[int], float, float]], ready: int) -> None:
    delay = BatchingDelay()
    for number, (sources, took, computed) in enumerate(turns):
        delay.ran(sources, took, computed, number / 10)
    assert 0 <= delay.delay_s(ready) <= max(took for _, took, _ in turns) + 1e-9
