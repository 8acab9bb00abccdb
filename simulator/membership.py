"""Devices that join, choose their blocks, publish their facts, move to other blocks, and leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from scheduler.candidates import Floats, Integers, ms_per_block
from scheduler.facts import DIMENSIONS, Coordinate, Link, Peer
from scheduler.peer_moves import PeerMove, Willingness, best_move
from scheduler.placement import Spans, best_span, block_ms, work_ms
from simulator.node import HeldSession, Node
from simulator.simulated_directory import DirectoryView, SimulatedDirectory, one_way_ms, points_of
from simulator.world import USED_SLOWER, Events, SimulatedDevice, World, device_id, measured_to


class Placing(Protocol):
    """Chooses blocks for peers, and new blocks later. check_s: mean interval at which a peer asks for new blocks.

    announces_joining: whether a joining device announces itself before it has loaded its blocks.
    """

    check_s: float
    announces_joining: bool

    def founders(self, devices: Sequence[SimulatedDevice]) -> list[tuple[int, int]]:
        """Spans of the devices that exist from the start, as if they had joined one after the other."""
        ...

    def join(self, device: SimulatedDevice, place: Coordinate, view: DirectoryView) -> tuple[int, int]:
        """The span of a device that joins the peers in view. place: its own estimate."""
        ...

    def move(self, node: Node, view: DirectoryView) -> tuple[int, int] | None:
        """The span that a peer should serve instead, or None."""
        ...


class OwnPlacing:
    """`choose_span` for joining peers, and `best_move` for present ones.

    A move that `best_move` wants confirmed is done when two different views name it. The views include earlier
    announcements.

    by_distance: whether distant peers count less for a joining one.
    """

    announces_joining = False

    def __init__(self, world: World, *, by_distance: bool = True) -> None:
        self._by_distance = by_distance
        self.check_s = world.settings.look_s
        self._world = world
        self._settings = world.settings
        self._max_blocks = {device.id: device.max_blocks for device in world.devices}
        self._named: tuple[DirectoryView | None, PeerMove | None] = (None, None)
        self._announced: dict[str, tuple[DirectoryView, PeerMove]] = {}

    def founders(self, devices: Sequence[SimulatedDevice]) -> list[tuple[int, int]]:
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

    def join(self, device: SimulatedDevice, place: Coordinate, view: DirectoryView) -> tuple[int, int]:
        away_ms = self._away_ms(place, *view.coordinates)
        return best_span(view.spans, self._settings.num_blocks, device.max_blocks, self._block_ms(device), away_ms)

    def _away_ms(self, place: Coordinate, vectors: Floats, heights: Floats) -> Floats | float:
        return one_way_ms(place, vectors, heights) if self._by_distance else 0.0

    def _block_ms(self, device: SimulatedDevice) -> float:
        return float(block_ms(work_ms(device.speed), device.max_blocks, self._world.sending_ms(device)))

    def move(self, node: Node, view: DirectoryView) -> tuple[int, int] | None:
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

    def _best(self, view: DirectoryView) -> PeerMove | None:
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


MEASURED_LINKS: Final = 16
"""Maximum number of links in a record."""

USEFUL_PROBES: Final = 8
"""A peer measures its links to this many unmeasured peers, the most useful ones to which a chain may continue, before
each publication, and to half as many random ones. These measurements also improve its coordinate.
"""

FIRST_PROBES: Final = 32
"""The number of unmeasured peers to which a peer measures its links when it begins to serve blocks."""

FOUNDING_PROBES: Final = 256
"""This number for peers that exist from the start, which have served for hours."""

JOIN_PROBES: Final = 32
"""Number of round trips that a device measures before it joins."""


class Membership:
    """All peers, and the directory of their facts. Times in ms.

    leaving: called when a peer stops serving sessions, unless it is silent.

    Attributes:
        nodes: by id, of all devices that have joined.
        view: the facts that clients have.
        moves: how often peers changed their blocks.
        record_bytes: size of the largest record.
    """

    def __init__(
        self, world: World, placing: Placing, events: Events, leaving: Callable[[Node, list[HeldSession]], None]
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
        self._records_per_look = max(1, round(world.settings.look_s / world.settings.refresh_s))
        self._directory = SimulatedDirectory(world.settings.record_ttl_s, world.settings.num_blocks)
        # Separate streams, so that the choices of one part do not change the events of the others.
        self._rng = np.random.default_rng([world.settings.seed, 1])
        self.view: DirectoryView = self._directory.view(0.0)
        self._place_founders()
        self.view = self._directory.view(0.0)
        self._events.schedule(self._settings.view_s * 1000, self._read_directory, None)

    def close(self) -> None:
        """Adds the last serving time of the peers that still serve."""
        for node in self.nodes.values():
            if node.serves:
                node.account(self._events.now)

    def _place_founders(self) -> None:
        present = [device for device in self._world.devices if device.joins_s == 0]
        for device, span in zip(present, self._placing.founders(present), strict=True):
            self._new_node(device, span, self._world.coordinates[device.number]).begin_serving(0.0)
        for node in self.nodes.values():
            self._directory.publish(node.record(0.0))
        self.view = self._directory.view(0.0)
        for node in self.nodes.values():
            self._measure_links(node, FOUNDING_PROBES)
            node.links = self._useful_links(node)
            self._directory.publish(node.record(0.0))
            self._events.schedule(self._rng.random() * self._settings.refresh_s * 1000, self._publish, node)
        for device in self._world.devices:
            if device.joins_s > 0:
                self._events.schedule(device.joins_s * 1000, self._join, device)

    def _draws(self, count: int, times: int) -> list[int]:
        """`times` random numbers below `count`; none if count is 0."""
        drawn: list[int] = self._rng.integers(0, count, times).tolist() if count else []
        return drawn

    def _new_node(self, device: SimulatedDevice, span: tuple[int, int], coordinate: Coordinate) -> Node:
        up_bytes_per_ms = float(self._world.geography.up[device.number])
        node = Node(device, span, coordinate, up_bytes_per_ms, self._world.sending_ms(device))
        self.nodes[device.id] = node
        self._events.schedule(device.leaves_s * 1000, self._leave_swarm, node)
        for begin_s, end_s in device.used_s:
            self._events.schedule(begin_s * 1000, self._slow_down, (node, USED_SLOWER))
            self._events.schedule(end_s * 1000, self._slow_down, (node, 1.0))
        if self._settings.moves:
            self._events.schedule(self._next_check_ms(), self._consider_move, node)
        return node

    def _slow_down(self, item: tuple[Node, float]) -> None:
        node, factor = item
        node.slower = factor

    def _next_check_ms(self) -> float:
        return self._events.now + 2000 * self._placing.check_s * float(self._rng.random())

    def _read_directory(self, _: None) -> None:
        self.view = self._directory.view(self._events.now / 1000)
        self._events.schedule(self._events.now + self._settings.view_s * 1000, self._read_directory, None)

    def _join(self, device: SimulatedDevice) -> None:
        coordinate = Coordinate()
        numbers = self.view.numbers
        for index in self._draws(len(numbers), JOIN_PROBES):
            theirs = self.view.records[self.view.peers[index].id].place.coordinate
            other = int(numbers[index])
            coordinate = measured_to(self._rng, self._world.geography, device.number, coordinate, other, theirs)
        node = self._new_node(device, self._placing.join(device, coordinate, self.view), coordinate)
        ready_ms = self._events.now + self._load_ms(node)
        if self._placing.announces_joining:
            self._announce(node, ready_ms)
        self._events.schedule(ready_ms, self._begin_serving, node)

    def _load_ms(self, node: Node) -> float:
        return self._settings.load_s * 1000 * (node.end - node.start)

    def _announce(self, node: Node, ready_ms: float) -> None:
        peer = Peer(node.id, node.start, node.end, node.device.speed)
        self._directory.announce_move(peer, ready_ms / 1000 + self._settings.refresh_s)

    def _begin_serving(self, node: Node) -> None:
        if not node.gone:
            node.begin_serving(self._events.now)
            self._measure_links(node, FIRST_PROBES)
            node.published = 0
            self._publish(node)

    def _publish(self, node: Node) -> None:
        if node.gone or not node.serves:
            return
        if node.published % self._records_per_look == 0:
            self._measure_links(node, USEFUL_PROBES)
            node.links = self._useful_links(node)
        node.published += 1
        record = node.record(self._events.now)
        self.record_bytes = max(self.record_bytes, record.size_bytes)
        self._directory.publish(record)
        self._events.schedule(self._events.now + self._settings.refresh_s * 1000, self._publish, node)

    def _measure_links(self, node: Node, count: int) -> None:
        """Measures links to `count` of the most useful peers, and to half as many random ones for the coordinate."""
        view, half = self.view, max(1, count // 2)
        likely = (self.nodes[view.peers[index].id] for index in self._useful(node))
        useful = [other.number for other in islice((each for each in likely if self._can_ask(node, each)), count)]
        drawn = (self.nodes[view.peers[index].id] for index in self._draws(len(view.peers), half))
        numbers = [*useful, *(each.number for each in drawn if self._can_ask(node, each))]
        if not numbers:
            return
        latencies = self._world.geography.one_way_from(node.number, np.array(numbers, dtype=np.int64))
        node.latency_ms.update(zip(useful, latencies.tolist(), strict=False))
        round_trips: list[float] = (2 * latencies * (1 + 0.1 * self._rng.random(len(numbers)))).tolist()
        direction: tuple[float, ...] = tuple(self._rng.normal(size=DIMENSIONS).tolist())
        order: list[int] = self._rng.permutation(len(numbers)).tolist()
        for index in order:
            place = self.nodes[device_id(numbers[index])].coordinate
            node.coordinate = node.coordinate.moved_by(place, round_trips[index], direction)

    def _can_ask(self, node: Node, other: Node) -> bool:
        return other.serves and other is not node

    def _useful(self, node: Node) -> Iterator[int]:
        """Indices in the view of peers with unmeasured links, the most useful ones first."""
        view = self.view
        beside = self._beside(node)
        serving = beside[~self._measured(node, beside)]
        vectors, heights = view.coordinates
        costs = self._ms_per_block(node, serving, one_way_ms(node.coordinate, vectors[serving], heights[serving]))
        return map(int, serving[costs.argsort(kind="stable")])

    def _measured(self, node: Node, indices: Integers) -> NDArray[np.bool_]:
        """Whether the node has measured its link to each of these peers of the view."""
        return np.isin(self.view.numbers[indices], list(node.latency_ms))

    def _useful_links(self, node: Node) -> dict[str, Link]:
        """The most useful measured links of the node, as many as fit into a record."""
        view = self.view
        beside = self._beside(node)
        serving = beside[self._measured(node, beside)]
        latency_ms = np.array([node.latency_ms[number] for number in view.numbers[serving].tolist()])
        best = self._ms_per_block(node, serving, latency_ms).argsort(kind="stable")[:MEASURED_LINKS]
        numbers: list[int] = view.numbers[serving[best]].tolist()
        return {device_id(number): self._world.geography.link(node.number, number) for number in numbers}

    def _beside(self, node: Node) -> Integers:
        """Peers that serve the block after the node's last block, or, if that is the model's last, the block before its
        first."""
        if node.end < self._num_blocks:
            return self.view.serving[node.end]
        return self.view.serving[node.start - 1] if node.start else np.zeros(0, dtype=np.int64)

    def _ms_per_block(self, node: Node, serving: Integers, latency_ms: Floats) -> Floats:
        view, span = self.view, (node.start, node.end)
        return ms_per_block(
            span, self._num_blocks, view.start[serving], view.end[serving], view.decode_ms[serving], latency_ms
        )

    def _consider_move(self, node: Node) -> None:
        if node.gone:
            return
        self._events.schedule(self._next_check_ms(), self._consider_move, node)
        span = self._placing.move(node, self.view) if node.serves else None
        if span is None or span == (node.start, node.end):
            return
        self.moves += 1
        self._leaving(node, node.stop_serving(self._events.now))
        node.start, node.end = span
        ready_ms = self._events.now + self._load_ms(node)
        self._announce(node, ready_ms)
        self._events.schedule(ready_ms, self._begin_serving, node)

    def _leave_swarm(self, node: Node) -> None:
        node.gone = True
        if not node.device.crashes or not node.serves:
            self._directory.withdraw(node.id)
        lost = node.stop_serving(self._events.now)
        if not node.device.is_silent:
            self._leaving(node, lost)
