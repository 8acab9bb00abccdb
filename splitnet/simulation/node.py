"""A peer that runs: its queue, its passes, its KV memory, and what it knows of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.coordinates import Coordinate
from scheduler.network import Link, Place
from scheduler.packing import DECODE_POSITIONS, PASS_POSITIONS, next_pass
from scheduler.swarm import Peer, Speed
from splitnet.net.messages import FailureCode
from splitnet.simulation.directory import Record
from splitnet.simulation.world import Device

if TYPE_CHECKING:
    from splitnet.simulation.route import Route
    from splitnet.simulation.session import Session


@dataclass(slots=True, eq=False)
class Parcel:
    """New positions of a session on their way through the hops.

    number: of the request. hop: at which they are, or to which they go. last_hop: at which they end. start: position of
    the first. keep: how many come back. final: the client is told when they are done. remaining: positions that this
    hop has still to run.
    """

    route: Route
    number: int
    hop: int
    last_hop: int
    start: int
    positions: int
    keep: int = 0
    final: bool = True
    replay: bool = False
    remaining: int = 0
    passed_over: int = 0
    arrived_ms: float = 0.0

    @property
    def blocks(self) -> tuple[int, int]:
        """That they go through where they are."""
        _, start, end = self.route.hops[self.hop]
        return start, end


@dataclass(slots=True, eq=False)
class Held:
    """A session at a peer.

    budget: positions that are reserved. cached: that are there. waiting: parcels that wait or run. done: positions
    computed so far. last: highest number of a request of the epoch that is finished.
    """

    session: Session
    epoch: int
    blocks: tuple[int, int]
    budget: int
    cached: int = 0
    waiting: int = 0
    done: int = 0
    last: int = 0


class Node:
    """A device that serves the blocks [start, end) at a time.

    Attributes:
        generation: how often it has changed or lost its blocks; what was under way before is lost.
        latency_ms: of the links to other peers that it has measured, by number.
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
        self.latency_ms: dict[int, float] = {}
        self.slower = 1.0
        self.kv_used = 0
        self.sessions: dict[Session, Held] = {}
        self.ready: list[Parcel] = []
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

    def stop(self, now_ms: float) -> list[Held]:
        """Serves no more, and forgets everything; returns what it held."""
        lost = list(self.sessions.values())
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

    def open(self, session: Session, epoch: int, blocks: tuple[int, int], budget: int) -> FailureCode | None:
        """Takes a session in, or opens it in a newer epoch; or says why not."""
        if not self.serves or not self.start <= blocks[0] < blocks[1] <= self.end:
            return FailureCode.WRONG_BLOCKS
        held = self.sessions.get(session)
        if held is None:
            if self.kv_used + budget > self.device.kv_positions:
                return FailureCode.BUSY
            self.kv_used += budget
            self.sessions[session] = Held(session, epoch, blocks, budget)
            return None
        if held.blocks != blocks:
            return FailureCode.WRONG_BLOCKS
        if epoch > held.epoch:
            held.epoch, held.waiting, held.last = epoch, 0, 0
        return None

    def release(self, session: Session) -> None:
        """Gives the memory of a session back, if it is still there."""
        held = self.sessions.pop(session, None)
        if held is not None:
            self.kv_used -= held.budget

    def _heads(self) -> list[Parcel]:
        """The first of every session: its others wait for that."""
        heads: dict[Session, Parcel] = {}
        for parcel in sorted(self.ready, key=lambda parcel: (parcel.arrived_ms, parcel.number)):
            heads.setdefault(parcel.route.session, parcel)
        return [parcel for parcel in self.ready if heads[parcel.route.session] is parcel]

    def next_pass(self, now_ms: float) -> tuple[list[tuple[Parcel, int]], float]:
        """What runs now, parcels with how many positions of each, and for how many ms."""
        ready = self.ready
        if len(ready) == 1:
            parcel = ready.pop()
            taken = [(parcel, min(parcel.remaining, PASS_POSITIONS))]
        else:
            heads = self._heads()
            counts = next_pass(heads, heads[0].passed_over)
            for parcel in heads:
                parcel.passed_over = 0 if parcel in counts else parcel.passed_over + 1
            self.ready = [parcel for parcel in ready if parcel not in counts]
            taken = list(counts.items())
        start, end = taken[0][0].blocks
        positions = 0
        for _, count in taken:
            positions += count
        block_ms = self.device.speed.at(positions) * self.slower
        took_ms = block_ms * (end - start)
        for parcel, _ in taken:
            if parcel.positions <= DECODE_POSITIONS:
                waited_ms = now_ms - parcel.arrived_ms
                self._waited_ms += waited_ms
                self._steps += 1
                parcel.route.session.met(self, block_ms, waited_ms)
        self.running = True
        self.busy_ms += took_ms
        self._squares += took_ms * took_ms
        self._positions += positions
        return taken, took_ms

    def record(self, now_ms: float, links: Mapping[str, Link]) -> Record:
        """What it publishes, with some of the links that it knows: its load is that of the time since the last record.

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
        return Record(
            self.number,
            peer,
            Place(self.coordinate, self.up_bytes_per_ms),
            links,
            now_ms / 1000,
            len(self.sessions),
            self.served_since_ms / 1000,
        )
