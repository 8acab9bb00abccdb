"""The clock by which compute time is measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache

import torch

from splitnet.errors import first_line

log = logging.getLogger(__name__)

_TRIED_SIZE, _TRIED_PRODUCTS = 1024, 8


def seconds_after_work(device: torch.device) -> float:
    """`time.perf_counter()` once the device has done all that it was given: calls for a GPU return before that."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Measures from now to `stop` what a device takes for what this thread gives it meanwhile.

    On CUDA by events, so that `stop` does not wait; elsewhere by the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = (_event(), _event()) if _events_tell(device) else None
        self._ended = self._began = time.perf_counter()
        if self._events is not None:
            self._events[0].record(torch.cuda.current_stream(device))

    def stop(self) -> None:
        if self._events is not None:
            self._events[1].record(torch.cuda.current_stream(self._device))
        else:
            self._ended = seconds_after_work(self._device)

    @property
    def seconds(self) -> float:
        """What was measured; waits until the device has done it."""
        if self._events is None:
            return self._ended - self._began
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


def milliseconds(device: torch.device, work: Callable[[], object], times: int) -> float:
    """The least that `work` takes of some times, after one that does not count."""
    work()
    found: list[float] = []
    for _ in range(times):
        seconds_after_work(device)
        watch = Stopwatch(device)
        work()
        watch.stop()
        found.append(watch.seconds * 1000)
    return min(found)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


@cache
def _events_tell(device: torch.device) -> bool:
    """Whether events of a device measure what its work takes by the clock."""
    if device.type != "cuda":
        return False
    try:
        square = torch.zeros(_TRIED_SIZE, _TRIED_SIZE, device=device)
        torch.mm(square, square)
        stream, began, ended = torch.cuda.current_stream(device), _event(), _event()
        before = seconds_after_work(device)
        began.record(stream)
        for _ in range(_TRIED_PRODUCTS):
            torch.mm(square, square)
        ended.record(stream)
        by_clock = (seconds_after_work(device) - before) * 1000
        by_events = began.elapsed_time(ended)
        fault = None if by_clock / 10 <= by_events <= 1.1 * by_clock else f"{by_events:.3g} ms for {by_clock:.3g}"
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without
        fault = first_line(error)
    if fault is not None:
        log.warning("compute times on %s are those of the clock, as its events do not tell them: %s", device, fault)
    return fault is None
