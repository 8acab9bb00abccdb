"""Copies between the CPU and a device: on CUDA through pinned memory, for which the host does not wait."""

from __future__ import annotations

import logging
from functools import cache

import torch

from splitnet.errors import first_line

log = logging.getLogger(__name__)

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
