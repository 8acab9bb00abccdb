"""Copies and times of a device that works asynchronously, in place of CUDA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from splitnet.quant import device as device_clock
from splitnet.quant import device as device_copies
from splitnet.quant.device import Stopwatch, milliseconds, to_device, to_host

CPU = torch.device("cpu")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Records copies, and runs all of them when a thread waits. Every tensor is on the CPU."""
    left: list[Callable[[], object]] = []
    own = torch.Tensor.copy_

    def copy(self: torch.Tensor, values: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return own(self, values)
        left.append(lambda: own(self, values))
        return self

    def wait(device: torch.device) -> None:
        while left:
            left.pop(0)()

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(device_copies, "_wait", wait)
    monkeypatch.setattr(device_copies, "_pins", lambda device: True)
    monkeypatch.setattr(device_copies, "_allocated", lambda shape, dtype: torch.full(shape, -7, dtype=dtype))
    return left


def test_copies_to_the_host_are_complete(late: list[Callable[[], object]]) -> None:
    values = torch.randn(3, 64)
    found = to_host(values)
    assert not late and found is not values and torch.equal(found, values)


def test_sources_of_copies_may_change_at_once(late: list[Callable[[], object]]) -> None:
    values, there = torch.randn(3, 64), torch.zeros(3, 64, dtype=torch.bfloat16)
    expected = values.bfloat16()
    device_copies.copy_to_device(values, there)
    assert len(late) == 1  # no thread has waited
    values.zero_()
    late.pop()()
    assert torch.equal(there, expected)


def test_copies_without_pinned_memory(
    late: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nand more")

    monkeypatch.setattr(device_copies, "_allocated", fails)
    device_copies._warn.cache_clear()
    values, there = torch.randn(3, 64), torch.zeros(3, 64)
    for _ in range(2):
        device_copies.copy_to_device(values, there)
        assert not late and torch.equal(there, values) and torch.equal(to_host(values), values)
    (record,) = caplog.records
    assert record.getMessage().endswith("as pinned memory fails: CUDA error: out of memory")


def test_on_the_cpu_nothing_is_copied() -> None:
    values = torch.randn(3, 64)
    assert to_host(values) is values and to_device(values, CPU, torch.float32) is values
    assert to_device(values, CPU, torch.bfloat16).dtype == torch.bfloat16


class Event:
    """An event of a device whose clock advances by 5 ms at every record; its time is known after a wait."""

    now = 0.0

    def record(self, stream: object) -> None:
        Event.now += 5
        self.at, self.done = Event.now, False

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, other: Event) -> float:
        assert other.done
        return other.at - self.at


def test_a_device_without_pinned_memory_and_events_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """The device is CUDA, which this torch was built without."""
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    for proof in (device_copies._pins, device_clock._events_tell):
        proof.cache_clear()
        assert not proof(torch.device("cuda")) and not proof(torch.device("cuda"))
    assert ["pageable memory" in record.getMessage() for record in caplog.records] == [True, False]
    assert "are measured by the clock" in caplog.records[1].getMessage()


@pytest.mark.parametrize("by_events", [True, False])
def test_a_stopwatch_uses_events_where_these_are_right(by_events: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_clock, "_events_tell", lambda device: by_events)
    monkeypatch.setattr(device_clock, "_event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = iter(range(100))
    monkeypatch.setattr(device_clock.time, "perf_counter", lambda: float(next(clock)))
    watch = Stopwatch(CPU)
    watch.stop()
    assert watch.seconds == pytest.approx(0.005 if by_events else 1.0)
    done: list[int] = []
    assert milliseconds(CPU, lambda: done.append(1), 3) == pytest.approx(5.0 if by_events else 1000.0)
    assert len(done) == 4
