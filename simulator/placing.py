"""Which blocks the peers of a simulation serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from scheduler.coordinates import Coordinate
from scheduler.facts import Peer
from scheduler.moves import Move, Willingness, best_move
from scheduler.placement import Spans, best_span, block_ms, work_ms
from simulator.directory import Floats, View, one_way_ms, points_of
from simulator.node import Node
from simulator.world import Device, World


class Placing(Protocol):
    """Chooses blocks for peers, and sometimes others. check_s: mean time after which a peer asks for others.

    announces_joining: whether a device that joins tells the others before it has loaded its blocks.
    """

    check_s: float
    announces_joining: bool

    def founders(self, devices: Sequence[Device]) -> list[tuple[int, int]]:
        """Spans of the devices that are there from the start, who have joined one after the other."""
        ...

    def join(self, device: Device, place: Coordinate, view: View) -> tuple[int, int]:
        """The span of a device that joins those in view. place: where it believes that it stands."""
        ...

    def move(self, node: Node, view: View) -> tuple[int, int] | None:
        """The span that a peer should serve instead, or None."""
        ...


class OwnPlacing:
    """`choose_span` for those that join, and `best_move` for those that are there.

    A move that `best_move` wants confirmed is done when two looks at different views name it; what was announced in
    between is part of the views.

    by_distance: whether peers count less the farther they are from one that joins.
    """

    announces_joining = False

    def __init__(self, world: World, *, by_distance: bool = True) -> None:
        self._by_distance = by_distance
        self.check_s = world.settings.look_s
        self._world = world
        self._settings = world.settings
        self._max_blocks = {device.id: device.max_blocks for device in world.devices}
        self._named: tuple[View | None, Move | None] = (None, None)
        self._announced: dict[str, tuple[View, Move]] = {}

    def founders(self, devices: Sequence[Device]) -> list[tuple[int, int]]:
        whole = (Peer(device.id, 0, 1, device.speed, sending_ms=self._world.sending_ms(device)) for device in devices)
        spans = Spans.of(whole, self._settings.num_blocks)
        places = [self._world.coordinates[device.number] for device in devices]
        vectors, heights = points_of(places)
        for index, device in enumerate(devices):
            before = spans.of_some(np.arange(index))
            away_ms = self._away_ms(places[index], vectors[:index], heights[:index])
            spans.start[index], spans.end[index] = best_span(
                before, self._settings.num_blocks, device.max_blocks, self._block_ms(device), away_ms
            )
        return list(zip(spans.start.tolist(), spans.end.tolist(), strict=True))

    def join(self, device: Device, place: Coordinate, view: View) -> tuple[int, int]:
        away_ms = self._away_ms(place, *view.coordinates)
        return best_span(view.spans, self._settings.num_blocks, device.max_blocks, self._block_ms(device), away_ms)

    def _away_ms(self, place: Coordinate, vectors: Floats, heights: Floats) -> Floats | float:
        return one_way_ms(place, vectors, heights) if self._by_distance else 0.0

    def _block_ms(self, device: Device) -> float:
        return float(block_ms(work_ms(device.speed), device.max_blocks, self._world.sending_ms(device)))

    def move(self, node: Node, view: View) -> tuple[int, int] | None:
        if self._named[0] is not view:
            self._named = view, self._best(view)
        move = self._named[1]
        if move is None or move.peer != node.id:
            self._announced.pop(node.id, None)
            return None
        if move.confirm:
            before = self._announced.setdefault(node.id, (view, move))
            held_s = view.at_s - before[0].at_s
            if before[1] != move or held_s < self._settings.refresh_s + self._settings.view_s:
                return None
        self._announced.pop(node.id, None)
        return move.start, move.end

    def _best(self, view: View) -> Move | None:
        willingness = Willingness(
            sessions={name: record.sessions for name, record in view.records.items()},
            load_s={name: self._settings.load_s * self._max_blocks[name] for name in view.records},
            settled_s={name: view.at_s - record.settled_at_s for name, record in view.records.items()},
        )
        return best_move(
            [*view.peers, *view.arriving],
            self._settings.num_blocks,
            max_blocks=self._max_blocks,
            willingness=willingness,
            moving={peer.id: (peer.start, peer.end) for peer in view.arriving},
        )
