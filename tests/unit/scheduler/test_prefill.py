"""How a long prefill is cut."""

from __future__ import annotations

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from scheduler.batching import SIZES, best_step


def test_one_hop_takes_the_largest_steps() -> None:
    """There is nothing to do at the same time, and every step costs something by itself."""
    assert best_step(4096, lambda count: 5.0 + count, lambda count: 5.0 + count) == SIZES[-1]


def test_many_hops_share_the_work() -> None:
    assert best_step(512, lambda count: 8.0 * count, lambda count: float(count)) == SIZES[0]


def test_hops_that_are_slow_with_few_positions_get_more() -> None:
    assert best_step(512, lambda count: 3 * max(200.0, count), lambda count: max(200.0, count)) >= 256


@given(st.integers(65, 10_000), st.floats(0, 100), st.floats(0.001, 10), st.integers(1, 16))
def test_no_other_size_is_sooner(positions: int, step_ms: float, position_ms: float, hops: int) -> None:
    def slowest_hop_ms(count: int) -> float:
        return step_ms + position_ms * count

    def prefill_ms(size: int) -> float:
        size = min(size, positions)
        return hops * slowest_hop_ms(size) + (ceil(positions / size) - 1) * slowest_hop_ms(size)

    best = best_step(positions, lambda count: hops * slowest_hop_ms(count), slowest_hop_ms)
    assert all(prefill_ms(best) <= prefill_ms(size) * (1 + 1e-9) for size in SIZES)
