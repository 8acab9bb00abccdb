"""Which blocks the peers of a simulation serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from scheduler.coordinates import Coordinate
from scheduler.placement import Spans, best_span
from scheduler.simulation.directory import View
from scheduler.simulation.world import Device, World


class Placing(Protocol):
    """Chooses blocks for peers, and sometimes others."""

    def founders(self, devices: Sequence[Device]) -> list[tuple[int, int]]:
        """Spans of the devices that are there from the start, who have joined one after the other."""
        ...

    def join(self, device: Device, coordinate: Coordinate, view: View) -> tuple[int, int]:
        """The span of a device that joins those in view."""
        ...

    def move(self, device: Device, span: tuple[int, int], view: View) -> tuple[int, int] | None:
        """The span that a device should serve instead, or None."""
        ...


class OwnPlacing:
    """`choose_span` for those that join."""

    def __init__(self, world: World) -> None:
        self._num_blocks = world.settings.num_blocks

    def founders(self, devices: Sequence[Device]) -> list[tuple[int, int]]:
        start, end = np.zeros((2, len(devices)), dtype=np.int64)
        ms = np.array([device.speed.at(1) for device in devices])
        names = [device.id for device in devices]
        for index, device in enumerate(devices):
            before = Spans(names[:index], start[:index], end[:index], ms[:index])
            start[index], end[index] = best_span(before, self._num_blocks, device.max_blocks)
        return list(zip(start.tolist(), end.tolist(), strict=True))

    def join(self, device: Device, coordinate: Coordinate, view: View) -> tuple[int, int]:
        return best_span(view.spans, self._num_blocks, device.max_blocks)

    def move(self, device: Device, span: tuple[int, int], view: View) -> tuple[int, int] | None:
        return None
