"""The dynamic batching delay: no wait for sessions that are not expected, and never longer than the pass itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.batching import LATELY_S, OWN_WAIT, BatchingDelay

seconds = st.floats(0, 1, allow_subnormal=False)


def test_no_wait_for_sessions_that_have_not_been_seen() -> None:
    delay = BatchingDelay()
    assert delay.delay_s(1) == 0
    delay.observe_pass(["a"], 0.01, 0.01, 0.0)
    assert delay.delay_s(1) == 0


def test_the_wait_ends_when_all_expected_sessions_have_arrived() -> None:
    delay = BatchingDelay()
    delay.observe_pass(["a", "b"], 0.01, 0.01, 0.0)
    assert delay.delay_s(1) == pytest.approx(0.01 * OWN_WAIT)
    assert delay.delay_s(2) == 0


def test_an_absent_session_is_forgotten() -> None:
    delay = BatchingDelay()
    delay.observe_pass(["a", "b"], 0.01, 0.01, 0.0)
    delay.observe_pass(["a"], 0.01, 0.01, LATELY_S + 0.1)
    assert delay.delay_s(1) == 0


def test_the_delay_is_longer_on_a_busy_processor() -> None:
    alone, among_others = BatchingDelay(), BatchingDelay()
    alone.observe_pass(["a", "b", "c"], 0.01, 0.01, 0.0)
    among_others.observe_pass(["a", "b", "c"], 0.01, 0.008, 0.0)
    assert among_others.delay_s(1) > alone.delay_s(1)
    assert among_others.delay_s(2) == alone.delay_s(2) > 0


@given(st.lists(st.tuples(st.sets(st.integers(0, 5), min_size=1), seconds, seconds), min_size=1), st.integers(1, 6))
def test_the_delay_never_exceeds_the_longest_pass(turns: list[tuple[set[int], float, float]], ready: int) -> None:
    delay = BatchingDelay()
    for number, (sources, took, computed) in enumerate(turns):
        delay.observe_pass(sources, took, computed, number / 10)
    assert 0 <= delay.delay_s(ready) <= max(took for _, took, _ in turns) + 1e-9
