from __future__ import annotations

import pytest

from scheduler.batching import MovingAverage


def test_the_first_value_counts_in_full_and_later_ones_by_their_share() -> None:
    average = MovingAverage(0.25)
    assert average.value == 0.0
    average.add(8.0)
    assert average.value == 8.0
    average.add(0.0)
    assert average.value == pytest.approx(6.0)


def test_one_with_a_beginning_moves_from_there() -> None:
    average = MovingAverage(0.25, 0.0)
    average.add(8.0)
    assert average.value == pytest.approx(2.0)
