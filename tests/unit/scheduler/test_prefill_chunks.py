"""The size of the steps of a long prefill."""

from __future__ import annotations

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from scheduler.prefill_chunks import CHUNK_SIZES, best_chunk


def test_a_single_hop_gets_the_largest_steps() -> None:
    """With one hop, no steps overlap, and every step has a fixed cost."""
    assert best_chunk(4096, lambda count: 5.0 + count, lambda count: 5.0 + count) == CHUNK_SIZES[-1]


def test_many_hops_get_small_steps() -> None:
    assert best_chunk(512, lambda count: 8.0 * count, lambda count: float(count)) == CHUNK_SIZES[0]


def test_hops_with_a_high_fixed_cost_get_large_steps() -> None:
    assert best_chunk(512, lambda count: 3 * max(200.0, count), lambda count: max(200.0, count)) >= 256


@given(st.integers(65, 10_000), st.floats(0, 100), st.floats(0.001, 10), st.integers(1, 16))
def test_no_other_size_is_faster(positions: int, step_ms: float, position_ms: float, hops: int) -> None:
    def slowest_hop_ms(count: int) -> float:
        return step_ms + position_ms * count

    def prefill_ms(size: int) -> float:
        size = min(size, positions)
        return hops * slowest_hop_ms(size) + (ceil(positions / size) - 1) * slowest_hop_ms(size)

    best = best_chunk(positions, lambda count: hops * slowest_hop_ms(count), slowest_hop_ms)
    assert all(prefill_ms(best) <= prefill_ms(size) * (1 + 1e-9) for size in CHUNK_SIZES)
