"""How fast a device is said to be, when others compute beside it while it is timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peers import speed
from peers.speed import ObservedSpeed, measure_past, measure_speed
from scheduler.facts import CONTEXTS, PASS_SIZES, ContextCost
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from tests.unit.random_models import random_checkpoint

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
    monkeypatch.setattr(speed, "seconds_after_work", lambda device: span.now_s)
    measured = measure_speed(span)  # pyright: ignore[reportArgumentType]
    assert measured is not None
    assert measured.block_ms == pytest.approx([max(1.0, size / 4) for size in PASS_SIZES])
    expected = zip((PASS_SIZES[0], *PASS_SIZES), passes, strict=True)
    assert span.sizes == [size for size, count in expected for _ in range(count)]


def test_a_size_that_is_slow_by_itself_costs_two_more_passes() -> None:
    span = TimedSpan({10, 11, 12})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "seconds_after_work", lambda device: span.now_s)
        measured = measure_speed(span)  # pyright: ignore[reportArgumentType]
    assert measured is not None
    assert measured.block_ms[3:] == pytest.approx((160.0, 64.0))
    assert span.sizes.count(64) == 3


class Timeline:
    """The clock of a span whose blocks take time for nothing but pairs of a new position and one that it sees."""

    def __init__(self) -> None:
        self.pairs = 0
        self.longest = 0
        self.ms_per_pair = 1e-3

    def of(self, span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = Span.forward

        def timed(this: Span, hidden: torch.Tensor, parts: list[RowChunk], *taps: Any) -> torch.Tensor:
            if this is not span:
                self.pairs += sum(part.count * part.row.length for part in parts)
                self.longest = max(self.longest, *(part.row.length + part.count for part in parts))
            return forward(this, hidden, parts, *taps)

        monkeypatch.setattr(Span, "forward", timed)
        monkeypatch.setattr(speed, "seconds_after_work", lambda device: self.pairs * self.ms_per_pair / 1000)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Span:
    return Span.load(Checkpoint.open(random_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama")), 0, 2)


@pytest.mark.parametrize(("most", "count"), [(1023, 0), (1024, 1), (8192, 2), (10_000, 2)])
def test_what_reading_takes_is_measured_at_the_lengths_that_a_row_may_have(
    llama: Span, most: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeline = Timeline()
    timeline.of(llama, monkeypatch)
    past = measure_past(llama, most)
    assert len(past.ms) == count and timeline.longest <= most
    for context, (step_ms, chunk_ms) in zip(CONTEXTS, past.ms, strict=False):
        assert step_ms == pytest.approx(context * 1e-3, rel=0.15)
        assert chunk_ms == pytest.approx(512 * context * 1e-3, rel=0.15)


def test_a_pass_that_would_take_long_is_derived_from_a_shorter_one(
    llama: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeline = Timeline()
    timeline.ms_per_pair = 1.0  # 64 positions behind 1,024 take a minute
    timeline.of(llama, monkeypatch)
    (_, first), (_, second) = measure_past(llama, 8192).ms
    assert second == pytest.approx(8 * first)
    assert timeline.pairs < 64 * 8192


def test_a_pass_behind_a_long_context_does_not_make_the_device_look_slow() -> None:
    speed = ObservedSpeed((1.0,) * 5, ContextCost(((3.0, 3.0),)))
    speed.observe_pass(1, BLOCKS, 4.0 * BLOCKS, past_ms=3.0)
    assert speed.block_ms == (1.0,) * 5
    speed.observe_pass(1, BLOCKS, 4.0 * BLOCKS)
    assert speed.block_ms[0] > 1.0
