"""How much memory a device has left, and errors that say how many blocks would fit."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splitnet.errors import OutOfMemory

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""As `malloc.h` of glibc has them."""


def free_memory(device: str | torch.device) -> int:
    """Bytes that can still be allocated on a device: on a CPU, what the system says is available to new programs."""
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
_ROOM = 32 * _LARGE_PAGE
"""Bytes of address space that small weights share. The system gives memory for what is written."""

_sharing = threading.Lock()
_shared = torch.empty(0, dtype=torch.uint8)
"""What is left of the room for small weights. It is freed when the last weight in it is."""


def in_large_pages(rows: int, row_bytes: int) -> torch.Tensor:
    """Memory `[rows, row_bytes]`, uint8, in large pages where the system has them; for weights, which stay.

    The processor remembers where some thousand pages are; of small ones all weights have many times more. A large page
    holds several small weights.

    Raises:
        MemoryError: the system has no more.
    """
    size = rows * row_bytes
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(rows, row_bytes, dtype=torch.uint8)
    global _shared
    # Weights that a caller loads in inference mode share it with others.
    with torch.inference_mode(False), _sharing:
        if size > _ROOM // 4:
            return _mapped(size)[:size].view(rows, row_bytes)
        if size > len(_shared):
            _shared = _mapped(_ROOM)
        found, _shared = _shared[:size].view(rows, row_bytes), _shared[-(-size // 64) * 64 :]
        return found


def move_to_large_pages(block: nn.Module) -> None:
    """Moves the parameters of a block on a CPU there."""
    for parameter in block.parameters():
        if parameter.device.type == "cpu":
            room = in_large_pages(1, parameter.nbytes)[0].view(parameter.dtype).view(parameter.shape)
            parameter.data = room.copy_(parameter.data)
    trim_memory()


def _mapped(size: int) -> torch.Tensor:
    """So many bytes and more, from the beginning of a large page on."""
    try:
        memory = mmap.mmap(-1, size + 2 * _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"the system has no {size} bytes") from error
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    mapped = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -mapped.data_ptr() % _LARGE_PAGE
    return mapped[begin : begin + -(-size // _LARGE_PAGE) * _LARGE_PAGE]


def give_back_memory() -> None:
    """Gives the memory of objects that are not needed any more back to the system.

    Blocks are parts of cycles, so they wait for the collector, and not even it frees what was frozen; and the C library
    keeps what is freed for later, in pieces that the next blocks may not fit into.
    """
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
    """Gives what is free within the C library back to the system: after a long pass that is some hundred MiB."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Has the C library keep some of what a pass frees for the next one, in this whole process.

    glibc gives memory at the end of a thread's heap back to the system, which hands it out again page by page: a
    quarter of a prefill, and more. It learns from what is freed to keep more, but only up to the largest piece, where
    a pass has many. Set is the most that it would learn, unless the environment says what to do.
    """
    told = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in told or "MALLOC_MMAP_THRESHOLD_" in os.environ or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    mallopt = _of_c_library("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_TRIM_THRESHOLD, 64 * 2**20)


def _of_c_library(name: str) -> Any:
    """A function of glibc; None: there is another C library."""
    with suppress(TypeError, OSError):  # on Windows none is named by None
        return getattr(ctypes.CDLL(None), name, None)
    return None


class _MemoryStatus(ctypes.Structure):
    """`MEMORYSTATUSEX` of Windows."""

    _fields_ = (
        ("bytes", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("all", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _available_on_windows() -> int | None:
    libraries: Any = getattr(ctypes, "windll", None)
    status = _MemoryStatus(bytes=ctypes.sizeof(_MemoryStatus))
    if libraries is None or not libraries.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return status.available


def _available_on_linux() -> int | None:
    """What the kernel says is available, or less if a control group (a container's limit) leaves less."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    if kib is None:
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        used = int((group / "memory.current").read_text(encoding="utf-8")) - int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return kib * 1024  # no control group, or one without a limit ("max")
    return max(0, min(kib * 1024, limit - used))


@contextmanager
def guarded(model: str, start: int, end: int, block_bytes: int, device: torch.device) -> Iterator[None]:
    """Refuses to load what cannot fit, and turns the allocator's errors into ours.

    Raises:
        OutOfMemory: with how many blocks would fit.
    """
    free = free_memory(device)
    fitting = min(end - start, free // block_bytes)
    advice = f"at most {fitting} fit: use --blocks {start}:{start + fitting}" if fitting else "not even one fits"
    message = (
        f"blocks {start}:{end} of {model} take {(end - start) * block_bytes / 2**30:.2f} GiB, {device} has "
        f"{free / 2**30:.2f} GiB free: {advice}, or smaller --weights"
    )
    if fitting < end - start:
        raise OutOfMemory(message)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(message) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # what torch's CPU allocator says
            raise
        raise OutOfMemory(message) from error
