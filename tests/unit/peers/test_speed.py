"""How fast a device is said to be, when others compute beside it while it is timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peers import engine
from peers.engine import measure_speed
from scheduler.facts import PASS_SIZES

BLOCKS = 2


class TimedSpan:
    """Takes 1 ms per block and four positions, and ten times as long in the passes named by their numbers."""

    start, end, hidden_size, device = 0, BLOCKS, 8, torch.device("cpu")

    def __init__(self, disturbed: set[int]) -> None:
        self.now_s = 0.0
        self.sizes: list[int] = []
        self._disturbed = disturbed

    def new_row(self) -> None: ...

    def forward(self, hidden: torch.Tensor, parts: Any) -> None:
        slow = 10 if len(self.sizes) in self._disturbed else 1
        self.sizes.append(len(hidden))
        self.now_s += slow * BLOCKS * max(1.0, len(hidden) / 4) / 1000


@pytest.mark.parametrize(
    ("disturbed", "passes"),
    [
        (set[int](), [1, 3, 3, 3, 1, 1]),
        ({11}, [1, 3, 3, 3, 1, 2]),
        ({10}, [1, 3, 3, 3, 2, 1]),
        ({10, 12, 13}, [1, 3, 3, 3, 2, 3]),
        ({1, 4, 9}, [1, 3, 3, 3, 1, 1]),
    ],
)
def test_a_long_pass_that_was_disturbed_is_timed_again(
    disturbed: set[int], passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    span = TimedSpan(disturbed)
    monkeypatch.setattr(engine, "seconds_after_work", lambda device: span.now_s)
    measured = measure_speed(span)  # pyright: ignore[reportArgumentType]
    assert measured is not None
    assert measured.block_ms == pytest.approx([max(1.0, size / 4) for size in PASS_SIZES])
    expected = zip((PASS_SIZES[0], *PASS_SIZES), passes, strict=True)
    assert span.sizes == [size for size, count in expected for _ in range(count)]


def test_a_size_that_is_slow_by_itself_costs_two_more_passes() -> None:
    span = TimedSpan({10, 11, 12})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "seconds_after_work", lambda device: span.now_s)
        measured = measure_speed(span)  # pyright: ignore[reportArgumentType]
    assert measured is not None
    assert measured.block_ms[3:] == pytest.approx((160.0, 64.0))
    assert span.sizes.count(64) == 3
