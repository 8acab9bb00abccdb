"""Moving averages stay among the values, and the latest count more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.average import MovingAverage

values = st.lists(st.floats(-1e6, 1e6), min_size=1)


@given(values, st.floats(0, 1))
def test_it_begins_with_the_first_value_and_stays_among_all(given_values: list[float], share: float) -> None:
    average = MovingAverage(share)
    assert average.add(given_values[0]) == given_values[0]
    for value in given_values[1:]:
        average.add(value)
    assert average.value is not None
    assert min(given_values) - 1e-6 <= average.value <= max(given_values) + 1e-6


def test_the_share_is_that_of_the_latest_value() -> None:
    assert MovingAverage(0.25, 1.0).add(5.0) == pytest.approx(2.0)
