"""The clock by which compute time is measured."""

from __future__ import annotations

import time

import torch


def seconds_after_work(device: torch.device) -> float:
    """`time.perf_counter()` once the device has done all that it was given: calls for a GPU return before that."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
