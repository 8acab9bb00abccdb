"""A peer that runs: its queue, its passes, its KV memory, and what it knows of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.coordinates import Coordinate
from scheduler.network import Link, Place
from scheduler.packing import DECODE_POSITIONS, PASS_POSITIONS, next_pass
from scheduler.simulation.directory import Record
from scheduler.simulation.world import Device, device_id
from scheduler.swarm import Peer, Speed

if TYPE_CHECKING:
    from scheduler.simulation.session import Session


@dataclass(slots=True, eq=False)
class Step:
    """New positions of a session on their way through the hops.

    epoch: of the session; a step of an older one is dropped. hop: at which it is, or to which it goes. last_hop: at
    which it ends. remaining: positions that this hop has still to run. final: no further step belongs to it.
    """

    session: Session
    epoch: int
    hop: int
    last_hop: int
    positions: int
    final: bool = True
    replay: bool = False
    remaining: int = 0
    passed_over: int = 0
    arrived_ms: float = 0.0

    @property
    def blocks(self) -> tuple[int, int]:
        """That it goes through where it is."""
        _, start, end = self.session.hops[self.hop]
        return start, end


class Node:
    """A device that serves the blocks [start, end) at a time.

    Attributes:
        generation: how often it has changed or lost its blocks; what was under way before is lost.
        measured: links to other peers, by number.
        slower: factor to the time of a pass, while its owner works with the device.
    """

    def __init__(self, device: Device, span: tuple[int, int], coordinate: Coordinate, up_bytes_per_ms: float) -> None:
        self.device = device
        self.number = device.number
        self.id = device.id
        self.start, self.end = span
        self.serves = False
        self.gone = False
        self.generation = 0
        self.coordinate = coordinate
        self.up_bytes_per_ms = up_bytes_per_ms
        self.measured: dict[int, Link] = {}
        self.slower = 1.0
        self.kv_used = 0
        self.sessions: dict[Session, None] = {}
        self.ready: list[Step] = []
        self.running = False
        self.uplink_free_ms = 0.0
        self.busy_ms = 0.0
        self.served_since_ms = 0.0
        self.served_ms = 0.0
        self._begin_interval(0.0)

    def _begin_interval(self, now_ms: float) -> None:
        self._interval_began_ms = now_ms
        self._squares = 0.0
        self._positions = 0
        self._waited_ms = 0.0
        self._steps = 0

    def begin(self, now_ms: float) -> None:
        """Serves from now on."""
        self.serves = True
        self.served_since_ms = now_ms
        self._begin_interval(now_ms)

    def stop(self, now_ms: float) -> list[Session]:
        """Serves no more, and forgets everything; returns whose sessions that were."""
        lost = list(self.sessions)
        self.sessions.clear()
        if self.serves:
            self.account(now_ms)
        self.serves = False
        self.generation += 1
        self.kv_used = 0
        self.ready.clear()
        self.running = False
        return lost

    def account(self, now_ms: float) -> None:
        """Counts the time for which it has served."""
        self.served_ms += now_ms - self.served_since_ms
        self.served_since_ms = now_ms

    def reserve(self, session: Session, positions: int) -> bool:
        """Takes KV memory for a session; False: there is not enough."""
        if self.kv_used + positions > self.device.kv_positions:
            return False
        self.kv_used += positions
        self.sessions[session] = None
        return True

    def release(self, session: Session, positions: int) -> None:
        """Gives the memory of a session back, if it is still there."""
        if session in self.sessions:
            del self.sessions[session]
            self.kv_used -= positions

    def next_pass(self, now_ms: float) -> tuple[list[tuple[Step, int]], float]:
        """What runs now, steps with how many positions of each, and for how many ms."""
        ready = self.ready
        if len(ready) == 1:
            step = ready.pop()
            taken = [(step, min(step.remaining, PASS_POSITIONS))]
        else:
            counts = next_pass(ready, ready[0].passed_over)
            for step in ready:
                step.passed_over = 0 if step in counts else step.passed_over + 1
            self.ready = [step for step in ready if step not in counts]
            taken = list(counts.items())
        start, end = taken[0][0].blocks
        positions = 0
        for _, count in taken:
            positions += count
        block_ms = self.device.speed.at(positions) * self.slower
        took_ms = block_ms * (end - start)
        for step, _ in taken:
            if step.positions <= DECODE_POSITIONS:
                waited_ms = now_ms - step.arrived_ms
                self._waited_ms += waited_ms
                self._steps += 1
                step.session.met(self, block_ms, waited_ms)
        self.running = True
        self.busy_ms += took_ms
        self._squares += took_ms * took_ms
        self._positions += positions
        return taken, took_ms

    def record(self, now_ms: float) -> Record:
        """What it publishes: its load is that of the time since the last record.

        A new step that comes at any time finds a pass under way that has a mean of (sum of squares of passes) / (twice
        the time) still to go; where steps were seen to wait longer, as sessions on other blocks came between, that
        counts in proportion to how busy the device was. In a pass it will meet the positions that come meanwhile.
        """
        elapsed = max(now_ms - self._interval_began_ms, 1.0)
        residual = self._squares / elapsed / 2
        waited = self._waited_ms / self._steps * min(1.0, self._steps / elapsed) if self._steps else 0.0
        batch = self._positions / elapsed * 2 * residual
        self._begin_interval(now_ms)
        peer = Peer(
            self.id,
            self.start,
            self.end,
            Speed(tuple(ms * self.slower for ms in self.device.speed.block_ms)),
            max(residual, waited),
            batch,
            self.device.kv_positions - self.kv_used,
        )
        links = {device_id(number): link for number, link in self.measured.items()}
        return Record(
            self.number,
            peer,
            Place(self.coordinate, self.up_bytes_per_ms),
            links,
            now_ms / 1000,
            len(self.sessions),
            self.served_since_ms / 1000,
        )
