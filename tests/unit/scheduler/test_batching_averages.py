from __future__ import annotations

import pytest

from scheduler.batching import MovingAverage


def test_the_first_value_sets_the_average_and_later_values_move_it() -> None:
    average = MovingAverage(0.25)
    assert average.value == 0.0
    average.add(8.0)
    assert average.value == 8.0
    average.add(0.0)
    assert average.value == pytest.approx(6.0)


def test_an_average_with_an_initial_value_moves_from_it() -> None:
    average = MovingAverage(0.25, 0.0)
    average.add(8.0)
    assert average.value == pytest.approx(2.0)
