"""The clock by which compute time is measured."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from contextlib import suppress
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


_SOFT = 1
"""`omp_pause_soft`: what was set stays."""


def end_threads() -> None:
    """Ends the threads that help this one to compute; when it computes again, it gets new ones. Others keep theirs.

    libgomp, which torch brings for Linux, has threads for each one that computes, as long as that lives. Where all of
    them are more than the processors, they sleep whenever they have nothing to do, and a decode step, which has work
    for them every few microseconds, takes up to four times as long. So who computes no more calls this.
    """
    pause = getattr(linked_with_torch(), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)


@cache
def linked_with_torch() -> ctypes.CDLL | None:
    """What torch itself was linked with, whatever that is called, its OpenMP too; None: such a torch does not tell."""
    with suppress(AttributeError, OSError):
        return ctypes.CDLL(torch._C.__file__)
    return None


_PROVEN_BYTES = 2**20


def put(values: torch.Tensor, into: torch.Tensor) -> None:
    """Copies `values`, of the CPU, in the type of `into`. What is given to the device later finds them there."""
    pinned = _pinned(into.device, values.shape, into.dtype)
    # torch gives pinned memory to others only when the copy is done.
    into.copy_(values if pinned is None else pinned.copy_(values), non_blocking=pinned is not None)


def to_device(values: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """As `values.to(device, dtype)`, of which no gradient is wanted."""
    if values.device.type != "cpu" or device.type == "cpu":
        return values.to(device=device, dtype=dtype)
    found = torch.empty(values.shape, dtype=dtype, device=device)
    put(values, found)
    return found


def to_host(values: torch.Tensor) -> torch.Tensor:
    """As `values.cpu()`: all of them are there when it returns."""
    pinned = _pinned(values.device, values.shape, values.dtype)
    if pinned is None:
        return values.cpu()
    pinned.copy_(values, non_blocking=True)
    _wait(values.device)
    return pinned


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given by this thread's stream, which is the one that copies."""
    torch.cuda.current_stream(device).record_event().synchronize()


def _pinned(device: torch.device, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
    """Memory to copy to or from that device; None: it is to be done as usual."""
    if not _pins(device):
        return None
    try:
        return _allocated(shape, dtype)
    except RuntimeError as error:  # the system has no more of it
        _warn(device, first_line(error))
        return None


def _allocated(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


@cache
def _pins(device: torch.device) -> bool:
    """Whether what is copied there and back through pinned memory comes back as it was."""
    if device.type != "cuda":
        return False
    try:
        given = torch.randint(0, 256, (_PROVEN_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        there, back = torch.empty_like(given, device=device), _allocated(given.shape, given.dtype)
        there.copy_(_allocated(given.shape, given.dtype).copy_(given), non_blocking=True)
        back.copy_(there, non_blocking=True)
        _wait(device)
        fault = None if torch.equal(back, given) else "what was copied came back otherwise"
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without
        fault = first_line(error)
    if fault is not None:
        _warn(device, fault)
    return fault is None


@cache
def _warn(device: torch.device, fault: str) -> None:
    """Once for each reason."""
    log.warning("activations are copied to and from %s in pageable memory, as pinned memory fails: %s", device, fault)
