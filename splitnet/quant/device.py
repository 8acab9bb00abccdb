"""The clock of a device, copies to and from it, and its memory."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from splitnet.errors import OutOfMemory, first_line

log = logging.getLogger(__name__)

_TRIED_SIZE, _TRIED_PRODUCTS = 1024, 8


def seconds_after_work(device: torch.device) -> float:
    """`time.perf_counter()` after the device has finished its work: calls for a GPU return before the GPU has
    finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Measures the time that a device needs for this thread's work, from the creation of this object to `stop`: on CUDA
    with events, so that `stop` does not wait; elsewhere with the clock."""

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
        """The measured time; waits until the device has finished."""
        if self._events is None:
            return self._ended - self._began
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


def milliseconds(device: torch.device, work: Callable[[], object], times: int) -> float:
    """The least time of `work` in `times` runs, after one run that does not count."""
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
    """Whether a device's events measure the same time as the clock."""
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
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError if built without the backend
        fault = first_line(error)
    if fault is not None:
        log.warning("compute times on %s are measured by the clock, as its events are wrong: %s", device, fault)
    return fault is None


def end_threads() -> None:
    """Ends the threads that help this thread to compute; the next computation of this thread starts new helper threads.
    Other threads keep their helper threads.

    libgomp, which torch brings for Linux, starts helper threads for each computing thread. If they outnumber the
    processors, idle helpers sleep, and a decode step takes up to four times as long.
    """
    pause = getattr(linked_with_torch(), "omp_pause_resource_all", None)
    if pause is not None:
        pause(1)  # `omp_pause_soft`: keeps the settings


@cache
def linked_with_torch() -> ctypes.CDLL | None:
    """The library that torch was linked with, including its OpenMP; None: this torch does not reveal it."""
    with suppress(AttributeError, OSError):
        return ctypes.CDLL(torch._C.__file__)
    return None


def copy_to_device(values: Tensor, into: Tensor) -> None:
    """Copies `values` from the CPU to `into`, in the type of `into`. Later work on the device sees the copy."""
    pinned = _pinned(into.device, values.shape, into.dtype)
    # torch reuses pinned memory only after the copy is done.
    into.copy_(values if pinned is None else pinned.copy_(values), non_blocking=pinned is not None)


def to_device(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """As `values.to(device, dtype)`, for tensors without gradients."""
    if values.device.type != "cpu" or device.type == "cpu":
        return values.to(device=device, dtype=dtype)
    found = torch.empty(values.shape, dtype=dtype, device=device)
    copy_to_device(values, found)
    return found


def to_host(values: Tensor) -> Tensor:
    """As `values.cpu()`: the copy is complete when the function returns."""
    pinned = _pinned(values.device, values.shape, values.dtype)
    if pinned is None:
        return values.cpu()
    pinned.copy_(values, non_blocking=True)
    _wait(values.device)
    return pinned


def _wait(device: torch.device) -> None:
    """Waits for this thread's stream, which does the copies."""
    torch.cuda.current_stream(device).record_event().synchronize()


def _pinned(device: torch.device, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """Pinned memory for copies to or from a device; None: copy without pinned memory."""
    try:
        return _allocated(shape, dtype) if _pins(device) else None
    except RuntimeError as error:  # the system has no more pinned memory
        return _warn(device, first_line(error))


def _allocated(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


@cache
def _pins(device: torch.device) -> bool:
    """Whether data that is copied to a device and back through pinned memory stays the same."""
    if device.type != "cuda":
        return False
    try:
        given = torch.randint(0, 256, (2**20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        there, back = torch.empty_like(given, device=device), _allocated(given.shape, given.dtype)
        there.copy_(_allocated(given.shape, given.dtype).copy_(given), non_blocking=True)
        back.copy_(there, non_blocking=True)
        _wait(device)
        fault = None if torch.equal(back, given) else "a copy came back changed"
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError if built without the backend
        fault = first_line(error)
    if fault is not None:
        _warn(device, fault)
    return fault is None


@cache
def _warn(device: torch.device, fault: str) -> None:
    log.warning("activations are copied to and from %s in pageable memory, as pinned memory fails: %s", device, fault)


def free_memory(device: str | torch.device) -> int:
    """Bytes that can still be allocated on a device: on a CPU, the memory that the system offers to new programs."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if device.type == "xpu":
        return torch.xpu.mem_get_info(device)[0]
    for available in (_available_on_linux(), _available_on_windows()):
        if available is not None:
            return available
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


_LARGE_PAGE = 2**21
# Bytes from which a tensor gets large pages; for smaller tensors the C library reuses pieces of freed memory.
WORTH_LARGE_PAGES = 8 * _LARGE_PAGE
_ROOM = 32 * _LARGE_PAGE  # bytes of address space that small weights share; only written pages take memory
_sharing = threading.Lock()
_shared = torch.empty(0, dtype=torch.uint8)  # the unused part of the room for small weights


def in_large_pages(rows: int, row_bytes: int) -> Tensor:
    """Memory `[rows, row_bytes]`, uint8, in large pages where the system has them. A large page may hold several small
    weights.

    The processor caches the addresses of some thousand pages; with small pages all weights have many times more pages.
    Raises MemoryError if the system has no more memory.
    """
    size = rows * row_bytes
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(rows, row_bytes, dtype=torch.uint8)
    global _shared
    # Weights that a caller loads in inference mode share the room with other weights.
    with torch.inference_mode(False), _sharing:
        if size > _ROOM // 4:
            return _mapped(size)[:size].view(rows, row_bytes)
        if size > len(_shared):
            _shared = _mapped(_ROOM)
        found, _shared = _shared[:size].view(rows, row_bytes), _shared[-(-size // 64) * 64 :]
        return found


def new_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """As `like.new_empty(shape)`; on a CPU in large pages if the tensor fills many of them: see `in_large_pages`."""
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < WORTH_LARGE_PAGES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    try:
        return _mapped(size)[:size].view(like.dtype).view(*shape)
    except MemoryError:  # also raised if there are too many mappings
        return like.new_empty(shape)


def move_to_large_pages(block: nn.Module) -> None:
    """Moves the parameters of a block on a CPU to large pages."""
    for parameter in block.parameters():
        if parameter.device.type == "cpu":
            room = in_large_pages(1, parameter.nbytes)[0].view(parameter.dtype).view(parameter.shape)
            parameter.data = room.copy_(parameter.data)
    trim_memory()


def _mapped(size: int) -> Tensor:
    """At least `size` bytes, from the beginning of a large page."""
    try:
        memory = mmap.mmap(-1, size + 2 * _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"the system has no {size} bytes") from error
    mapped = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -mapped.data_ptr() % _LARGE_PAGE
    with suppress(OSError):  # a kernel without large pages; a last page that is not full stays small
        memory.madvise(mmap.MADV_HUGEPAGE, begin, size // _LARGE_PAGE * _LARGE_PAGE)
    return mapped[begin : begin + -(-size // _LARGE_PAGE) * _LARGE_PAGE]


def give_back_memory() -> None:
    """Returns the memory of unused objects, such as blocks in reference cycles, to the system. The garbage collector
    ignores frozen objects, so this function unfreezes all objects; the C library would keep free memory in pieces that
    are too small for the next blocks."""
    global _shared
    with _sharing:
        _shared = _shared[:0].clone()
    gc.unfreeze()
    gc.collect()
    for accelerator in (torch.cuda, torch.mps, torch.xpu):
        if accelerator.is_available():
            accelerator.empty_cache()
    trim_memory()


def trim_memory() -> None:
    """Returns free memory of the C library to the system: some hundred MiB after a long pass."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # from `malloc.h` of glibc


def keep_freed_memory() -> None:
    """Makes the C library keep some of the memory that a pass frees for the next pass, in this whole process.

    The system hands memory from glibc out again page by page, which costs a quarter of a prefill or more. The values
    are the largest that glibc would learn itself. They are not set if the environment configures malloc.
    """
    told = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in told or "MALLOC_MMAP_THRESHOLD_" in os.environ or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    mallopt = _of_c_library("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_TRIM_THRESHOLD, 64 * 2**20)


def _of_c_library(name: str) -> Any:
    """A function of glibc; None: this is another C library."""
    with suppress(TypeError, OSError):  # on Windows `CDLL(None)` raises TypeError
        return getattr(ctypes.CDLL(None), name, None)
    return None


class _MemoryStatus(ctypes.Structure):
    """`MEMORYSTATUSEX` of Windows."""

    _fields_ = (
        *(("bytes", ctypes.c_uint32), ("load", ctypes.c_uint32), ("all", ctypes.c_uint64)),
        *(("available", ctypes.c_uint64), ("others", ctypes.c_uint64 * 5)),
    )


def _available_on_windows() -> int | None:
    libraries: Any = getattr(ctypes, "windll", None)
    status = _MemoryStatus(bytes=ctypes.sizeof(_MemoryStatus))
    if libraries is None or not libraries.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return status.available


def _available_on_linux(root: Path = Path("/")) -> int | None:
    """The memory that the kernel reports as available, or less if a control group (of a container or a unit) leaves
    less. root: folder of the system's files."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    if kib is None:
        return None
    return max(0, min([kib * 1024, *(left for group in _control_groups(root) for left in _left_in(group))]))


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that bound the memory of this process, in both versions: its own group and the
    groups above it, as far as they are mounted."""
    paths: dict[str, str] = {}  # of the process's own group, by the type of the mount
    try:
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                paths["cgroup" if controllers else "cgroup2"] = path
        for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            where, _, what = line.partition(" - ")
            kind, *_, options = what.split()
            if kind in paths and (kind == "cgroup2" or "memory" in options.split(",")):
                # In this file a space is \040.
                top, point = (re.sub(r"\\(\d{3})", lambda n: chr(int(n[1], 8)), each) for each in where.split()[3:5])
                folder, own = root / point.lstrip("/"), PurePosixPath(paths[kind])
                # In another namespace than the mount's, paths do not lead to the group.
                is_below = own.is_relative_to(top) and ".." not in own.parts
                yield from accumulate(own.relative_to(top).parts if is_below else (), Path.joinpath, initial=folder)
    except (OSError, ValueError):  # the system lacks these files, or they have another format
        return


def _left_in(group: Path) -> Iterator[int]:
    """The bytes that each limit of a control group leaves. The cache of unused files counts as free, because the kernel
    takes it back."""
    for limit, used, reclaimed in _LIMITS:
        with suppress(OSError, ValueError):  # files of the other version are missing; "max" is not a number
            statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            yield (
                int((group / limit).read_text(encoding="ascii"))
                - int((group / used).read_text(encoding="ascii"))
                + int(statistics.get(reclaimed, 0))
            )


_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.high", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@contextmanager
def guarded(model: str, start: int, end: int, block_bytes: int, device: torch.device) -> Iterator[None]:
    """Refuses blocks that cannot fit, and turns the allocator's errors into OutOfMemory with the number of blocks that
    would fit."""
    free = free_memory(device)
    fitting = min(end - start, free // block_bytes)
    advice = (
        f"at most {fitting} fit: use --blocks {start}:{start + fitting}"
        if fitting
        else "not even one fits: use another device"
    )
    message = (
        f"blocks {start}:{end} of {model} take {(end - start) * block_bytes / 2**30:.2f} GiB, {device} has "
        f"{free / 2**30:.2f} GiB free: {advice}, or smaller --weights"
    )
    if fitting < end - start:
        raise OutOfMemory(message)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(message) from error
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed. torch raises some of these errors as a bare RuntimeError."""
    by_type = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return by_type or any(text in str(error) for text in ("allocate memory", "out of memory"))
