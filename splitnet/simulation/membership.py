"""Devices that join, publish what they know of themselves, move to other blocks, and leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from scheduler.coordinates import Coordinate
from scheduler.swarm import Peer
from splitnet.simulation.directory import Directory, View
from splitnet.simulation.events import Events
from splitnet.simulation.node import Held, Node
from splitnet.simulation.placing import Placing
from splitnet.simulation.world import USED_SLOWER, Device, World, measured_to

MEASURED_LINKS: Final = 16
"""Links that a record holds at most."""

PROBES: Final = 4
"""Peers to which a peer measures the round trip each time before it publishes."""

JOIN_PROBES: Final = 32
"""Round trips that a device measures before it joins."""


class Membership:
    """All peers, and the directory of their facts. Times in ms.

    leaving: called when a peer stops serving sessions, unless it crashed.

    Attributes:
        nodes: of all devices that have joined so far, by id.
        view: the facts that clients have.
        moves: how often peers changed their blocks.
        record_bytes: size of the largest record.
    """

    def __init__(
        self, world: World, placing: Placing, events: Events, leaving: Callable[[Node, list[Held]], None]
    ) -> None:
        self.nodes: dict[str, Node] = {}
        self.moves = 0
        self.record_bytes = 0
        self._world = world
        self._settings = world.settings
        self._placing = placing
        self._events = events
        self._leaving = leaving
        self._num_blocks = world.settings.num_blocks
        self._directory = Directory(world.settings.record_ttl_s, world.settings.num_blocks)
        # Streams of their own, so that the choices of one part do not change what happens in the others.
        self._rng = np.random.default_rng([world.settings.seed, 1])
        self._place_founders()
        self.view: View = self._directory.view(0.0)
        self._events.at(self._settings.view_s * 1000, self._read_directory, None)

    def close(self) -> None:
        """Ends the accounts of those that still serve."""
        for node in self.nodes.values():
            if node.serves:
                node.account(self._events.now)

    def _place_founders(self) -> None:
        present = [device for device in self._world.devices if device.joins_s == 0]
        for device, span in zip(present, self._placing.founders(present), strict=True):
            self._new_node(device, span, self._world.coordinates[device.number]).begin(0.0)
        nodes = list(self.nodes.values())
        by_block = [[node for node in nodes if node.start <= block < node.end] for block in range(self._num_blocks)]
        for node in nodes:
            onward = by_block[node.end % self._num_blocks]
            for index in self._draws(len(onward), 2 * MEASURED_LINKS):
                self._measure(node, onward[index])
            self._directory.publish(node.record(0.0))
            self._events.at(self._rng.random() * self._settings.refresh_s * 1000, self._publish, node)
        for device in self._world.devices:
            if device.joins_s > 0:
                self._events.at(device.joins_s * 1000, self._join, device)

    def _draws(self, count: int, times: int) -> list[int]:
        """So many numbers below `count`; none if that is 0."""
        drawn: list[int] = self._rng.integers(0, count, times).tolist() if count else []
        return drawn

    def _new_node(self, device: Device, span: tuple[int, int], coordinate: Coordinate) -> Node:
        node = Node(device, span, coordinate, float(self._world.geography.up[device.number]))
        self.nodes[device.id] = node
        self._events.at(device.leaves_s * 1000, self._leave, node)
        for begin_s, end_s in device.used_s:
            self._events.at(begin_s * 1000, self._slow_down, (node, USED_SLOWER))
            self._events.at(end_s * 1000, self._slow_down, (node, 1.0))
        if self._settings.moves:
            self._events.at(self._next_check_ms(), self._consider_move, node)
        return node

    def _slow_down(self, item: tuple[Node, float]) -> None:
        node, factor = item
        node.slower = factor

    def _next_check_ms(self) -> float:
        return self._events.now + 2000 * self._placing.check_s * float(self._rng.random())

    def _read_directory(self, _: None) -> None:
        self.view = self._directory.view(self._events.now / 1000)
        self._events.at(self._events.now + self._settings.view_s * 1000, self._read_directory, None)

    def _join(self, device: Device) -> None:
        coordinate = Coordinate()
        numbers = self.view.numbers
        for index in self._draws(len(numbers), JOIN_PROBES):
            theirs = self.view.records[self.view.peers[index].id].place.coordinate
            other = int(numbers[index])
            coordinate = measured_to(self._rng, self._world.geography, device.number, coordinate, other, theirs)
        node = self._new_node(device, self._placing.join(device, self.view), coordinate)
        ready_ms = self._events.now + self._load_ms(node)
        if self._placing.announces_joining:
            self._announce(node, ready_ms)
        self._events.at(ready_ms, self._begin, node)

    def _load_ms(self, node: Node) -> float:
        return self._settings.load_s * 1000 * (node.end - node.start)

    def _announce(self, node: Node, ready_ms: float) -> None:
        peer = Peer(node.id, node.start, node.end, node.device.speed)
        self._directory.announce(peer, ready_ms / 1000 + self._settings.refresh_s)

    def _begin(self, node: Node) -> None:
        if not node.gone:
            node.begin(self._events.now)
            self._publish(node)

    def _publish(self, node: Node) -> None:
        if node.gone or not node.serves:
            return
        serving = self.view.serving[node.end % self._num_blocks]
        for _ in range(PROBES // 2):
            if len(self.view.peers):
                self._probe(node, int(self._rng.integers(len(self.view.peers))))
            if len(serving):
                self._probe(node, int(serving[int(self._rng.random() * len(serving))]))
        record = node.record(self._events.now)
        self.record_bytes = max(self.record_bytes, record.size_bytes)
        self._directory.publish(record)
        self._events.at(self._events.now + self._settings.refresh_s * 1000, self._publish, node)

    def _probe(self, node: Node, index: int) -> None:
        other = self.nodes[self.view.peers[index].id]
        if not other.serves:
            node.measured.pop(other.number, None)
        elif other is not node:
            self._measure(node, other)
            node.coordinate = measured_to(
                self._rng, self._world.geography, node.number, node.coordinate, other.number, other.coordinate
            )

    def _measure(self, node: Node, other: Node) -> None:
        """Keeps the nearest of the peers to which a token goes from this one, and what is left of the others."""
        node.measured[other.number] = self._world.geography.link(node.number, other.number)
        if len(node.measured) > MEASURED_LINKS:
            del node.measured[max(node.measured, key=lambda number: node.measured[number].latency_ms)]

    def _consider_move(self, node: Node) -> None:
        if node.gone:
            return
        self._events.at(self._next_check_ms(), self._consider_move, node)
        span = self._placing.move(node, self.view) if node.serves else None
        if span is None or span == (node.start, node.end):
            return
        self.moves += 1
        self._leaving(node, node.stop(self._events.now))
        node.start, node.end = span
        node.measured.clear()
        ready_ms = self._events.now + self._load_ms(node)
        self._announce(node, ready_ms)
        self._events.at(ready_ms, self._begin, node)

    def _leave(self, node: Node) -> None:
        node.gone = True
        if not node.device.crashes or not node.serves:
            self._directory.withdraw(node.id)
        lost = node.stop(self._events.now)
        if not node.device.crashes:
            self._leaving(node, lost)
