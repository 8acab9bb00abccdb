"""A running peer: its queue, its passes, its KV memory and its records; and the routes through peers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from scheduler.batching import DECODE_POSITIONS, PASS_POSITIONS, UNSENT_BYTES, BatchingDelay, Load, next_pass
from scheduler.cost import Encoding
from scheduler.facts import Coordinate, Link, NetworkPlace, Peer, Speed
from scheduler.fairness import FairPasses
from simulator.simulated_directory import Record
from simulator.world import LIE, SimulatedDevice
from splitnet.wire.messages import FailureCode

Hops = list[tuple["Node", int, int]]
"""The nodes that run blocks [start, end)."""


@dataclass(slots=True)
class Wire:
    """The cost of sending a step from one device to the next, directly or through the client.

    token_ms: of one position, without the latency. stations: numbers of the devices along the wire, including both
    ends; links: between them; encodings: one of each link. last_ms: arrival time of the latest transfer over each link.
    """

    latency_ms: float
    token_ms: float
    stations: tuple[int, ...]
    links: tuple[Link, ...]
    encodings: tuple[Encoding, ...]
    last_ms: list[float]

    def in_order(self, index: int, arrival_ms: float) -> float:
        """The arrival time of a transfer over a link, which cannot overtake earlier transfers."""
        self.last_ms[index] = max(self.last_ms[index], arrival_ms)
        return self.last_ms[index]


@dataclass(frozen=True, slots=True, eq=False)
class NodeRoute:
    """The hops of a session in one epoch.

    client: its number. reserved: positions that the session has reserved. wires: before each hop, and after the last.
    """

    client: int
    reserved: int
    epoch: int
    hops: Hops
    wires: list[Wire]


MIN_WAIT_MS: Final = 0.1
"""The least interval: time must advance, or an awaited event would never be late."""


@dataclass(slots=True, eq=False)
class Parcel:
    """New positions of a session in transit through the hops.

    number: of the request. hop: index of the current or the next hop. last_hop: index of the final hop. start: first
    position. keep: number of outputs that return to the client. final: the client is notified at the end. remaining:
    positions that this hop has still to run. follows: it arrived while others of its session waited there.
    """

    route: NodeRoute
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
    follows: bool = False
    arrived_ms: float = 0.0

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks that the parcel runs through at its hop."""
        _, start, end = self.route.hops[self.hop]
        return start, end

    @property
    def total(self) -> int:
        return self.positions

    @property
    def remaining_reservation(self) -> int:
        """Positions of the session's reservation that are still to come."""
        return self.route.reserved - self.start - self.positions + self.remaining

    @property
    def owner(self) -> int:
        """Each client has a separate key."""
        return self.route.client


@dataclass(slots=True, eq=False)
class HeldSession:
    """A session at a peer.

    client: number of the client, which has one session. reservation: reserved positions. cached: positions in the KV
    cache. waiting: parcels that wait or run. done: positions computed so far. last: highest number of a finished
    request of the epoch. sending: parcels in transit to the next hop.
    """

    client: int
    epoch: int
    blocks: tuple[int, int]
    reservation: int
    cached: int = 0
    waiting: int = 0
    done: int = 0
    last: int = 0
    sending: int = 0


@dataclass(frozen=True, slots=True)
class AwaitedClient:
    """The client that a device waits for (None: any client), and the beginning of the wait."""

    key: int | None
    since_ms: float


class Node:
    """A device that serves the blocks [start, end) at a time.

    Attributes:
        generation: how often the device has changed or lost its blocks; passes of earlier generations are ignored.
        latency_ms: latencies of its measured links to other peers, by number. links: its published links.
        published: records since it began to serve its blocks.
        slower: factor of the time of a pass while the owner works with the device.
        sending_ms: see `Peer`.
        awaited: set while it has work and waits for more.
    """

    def __init__(
        self,
        device: SimulatedDevice,
        span: tuple[int, int],
        coordinate: Coordinate,
        up_bytes_per_ms: float,
        sending_ms: float,
    ) -> None:
        self.device = device
        self.number = device.number
        self.id = device.id
        self.start, self.end = span
        self.serves = False
        self.gone = False
        self.generation = 0
        self.coordinate = coordinate
        self.up_bytes_per_ms = up_bytes_per_ms
        self.sending_ms = sending_ms
        self.latency_ms: dict[int, float] = {}
        self.links: Mapping[str, Link] = {}
        self.published = 0
        self.slower = 1.0
        self.kv_used = 0
        self.sessions: dict[int, HeldSession] = {}
        self.ready: list[Parcel] = []
        self.running = False
        self.awaited: AwaitedClient | None = None
        self.busy_ms = 0.0
        self.served_since_ms = 0.0
        self.served_ms = 0.0
        self._forget_load()

    def _forget_load(self) -> None:
        self._fair = FairPasses[Parcel](self._pass_s)
        self._load = Load()
        self._delay = BatchingDelay()
        self._gathered = False
        self._gathers_from, self._gathers_until_ms = 0, 0.0

    def block_ms(self, positions: int) -> float:
        """Ms of a pass through one block at present."""
        return self.device.speed.block_ms_at(positions) * self.slower

    def _pass_s(self, positions: int) -> float:
        return self.block_ms(positions) * (self.end - self.start) / 1000

    def begin_serving(self, now_ms: float) -> None:
        """Begins to serve."""
        self.serves = True
        self.served_since_ms = now_ms

    def stop_serving(self, now_ms: float) -> list[HeldSession]:
        """Stops serving and clears all state. Returns the sessions that it held."""
        lost = list(self.sessions.values())
        self.sessions.clear()
        if self.serves:
            self.account(now_ms)
        self.serves = False
        self.generation += 1
        self.kv_used = 0
        self.ready.clear()
        self.running = False
        self.awaited = None
        self._forget_load()
        return lost

    def account(self, now_ms: float) -> None:
        """Adds the serving time since the last call."""
        self.served_ms += now_ms - self.served_since_ms
        self.served_since_ms = now_ms

    def open_session(self, client: int, epoch: int, blocks: tuple[int, int], reservation: int) -> FailureCode | None:
        """Opens the session of a client, or moves it to a newer epoch. Returns the reason of a refusal, or None."""
        if not self.serves or not self.start <= blocks[0] < blocks[1] <= self.end:
            return FailureCode.WRONG_BLOCKS
        held = self.sessions.get(client)
        if held is None:
            if self.kv_used + reservation > self.device.kv_positions:
                return FailureCode.BUSY
            self.kv_used += reservation
            self.sessions[client] = HeldSession(client, epoch, blocks, reservation)
            return None
        if held.blocks != blocks:
            return FailureCode.WRONG_BLOCKS
        if epoch > held.epoch:
            held.epoch, held.waiting, held.last, held.sending = epoch, 0, 0, 0
        return None

    def release_session(self, client: int) -> None:
        """Releases the memory of a session, if the peer holds it."""
        held = self.sessions.pop(client, None)
        if held is not None:
            self.kv_used -= held.reservation
            self._delay.forget_source(client)

    def _heads(self, held: bool) -> list[Parcel]:
        """The first parcel of each session, before its other parcels; if `held`, without prompts for a next hop."""
        heads: dict[int, Parcel] = {}
        for parcel in sorted(self.ready, key=lambda parcel: (parcel.arrived_ms, parcel.number)):
            heads.setdefault(parcel.owner, parcel)
        return [
            parcel
            for parcel in self.ready
            if heads[parcel.owner] is parcel
            and not (held and parcel.remaining > DECODE_POSITIONS and parcel.hop < parcel.last_hop)
        ]

    def add_parcel(self, parcel: Parcel, now_ms: float) -> None:
        """Adds an arrived parcel."""
        parcel.arrived_ms = now_ms
        self.ready.append(parcel)
        self._fair.shares.work_arrived(parcel.owner, now_ms / 1000)

    def remove_parcel(self, parcel: Parcel, now_ms: float) -> None:
        """Removes an arrived parcel that is done or was given up."""
        self._fair.shares.work_done(parcel.owner, now_ms / 1000)

    def next_pass(self, now_ms: float, sent_ms: float) -> tuple[list[tuple[Parcel, int]], float]:
        """The parcels of the next pass, with the number of positions of each, and the ms of the pass.

        Without parcels, the ms for which the node waits for others, see `awaited`. sent_ms: when the uplink's queue
        will be sent.
        """
        now = now_ms / 1000
        shares = self._fair.shares
        awaited, self.awaited = self.awaited, None
        if awaited is not None and awaited.key is not None:
            shares.charge(awaited.key, now - awaited.since_ms / 1000, now)
        if gathers_ms := self._gathers_ms(now_ms):
            self.awaited = AwaitedClient(None, now_ms)
            return [], max(MIN_WAIT_MS, gathers_ms)
        held_ms = sent_ms - UNSENT_BYTES / self.up_bytes_per_ms - now_ms
        heads = self._heads(held_ms > 0)
        if not heads:
            self.awaited = AwaitedClient(None, now_ms)
            return [], max(MIN_WAIT_MS, held_ms)
        if shares.contended(now):
            ranked = shares.ranked(dict.fromkeys(parcel.owner for parcel in heads))
            own = [parcel for parcel in heads if parcel.owner == ranked[0]]
            chunk_s = self._fair.chunk_s(now)
            waits = shares.awaited(ranked[0], min(self._pass_s(own[0].remaining), chunk_s), now)
            if waits is not None:
                self.awaited = AwaitedClient(waits[0], now_ms)
                return [], max(MIN_WAIT_MS, waits[1] * 1000)
            shares.begin_rounds(ranked[0])
            if any(parcel.remaining > DECODE_POSITIONS for parcel in own):
                turn = self._fair.prefill_turn(heads, ranked[0], now)
                counts = self._packed(turn, min(PASS_POSITIONS, self._fair.positions_within(chunk_s)))
            else:
                counts = self._fair.decode_pass(heads, ranked, PASS_POSITIONS, now)
        elif len(self.ready) == 1:
            counts = {heads[0]: min(heads[0].remaining, PASS_POSITIONS)}
        else:
            counts = self._packed(heads, PASS_POSITIONS)
        self.ready = [parcel for parcel in self.ready if parcel not in counts]
        taken = list(counts.items())
        start, end = taken[0][0].blocks
        positions = sum(counts.values())
        took_ms = self.block_ms(positions) * (end - start)
        waits_ms: list[float] = []
        others: list[int] = []
        for parcel, count in taken:
            if parcel.positions <= DECODE_POSITIONS:
                others.append(positions - count)
                if not parcel.follows:
                    waits_ms.append(now_ms - parcel.arrived_ms)
        self.running = True
        self._gathered, self._gathers_from = False, 0
        self.busy_ms += took_ms
        self._load.observe(now, waits_ms, others, took_ms)
        return taken, took_ms

    def _gathers_ms(self, now_ms: float) -> float:
        """Ms of further waiting for work before the next pass. Like a real peer, the node waits longer when more work
        arrives."""
        ready = len({parcel.owner for parcel in self.ready})
        if not self._gathered and ready > self._gathers_from:
            delay_ms = self._delay.delay_s(ready) * 1000
            self._gathers_from, self._gathers_until_ms = ready, now_ms + delay_ms
        left_ms = 0.0 if self._gathered else self._gathers_until_ms - now_ms
        self._gathered = left_ms <= 1e-6
        return 0.0 if self._gathered else left_ms

    def _packed(self, heads: list[Parcel], most: int) -> dict[Parcel, int]:
        counts = next_pass(heads, heads[0].passed_over, most)
        for parcel in heads:
            parcel.passed_over = 0 if parcel in counts else parcel.passed_over + 1
        return counts

    def end_pass(self, taken: list[tuple[Parcel, int]], took_ms: float, now_ms: float) -> None:
        """Records the end of a pass."""
        self.running = False
        self._fair.charge_pass(taken, took_ms / 1000, now_ms / 1000)
        if sum(count for _, count in taken) <= DECODE_POSITIONS * len(taken):
            sessions = (parcel.owner for parcel, _ in taken if parcel.owner in self.sessions)
            self._delay.observe_pass(sessions, took_ms / 1000, took_ms / 1000, now_ms / 1000)

    def load_at(self, now_ms: float) -> tuple[float, float]:
        """Ms that a step waits, and positions of others in its pass, as told: see `scheduler/batching.py`."""
        if self.device.lies:
            return 0.0, 0.0
        return self._load.estimate_at(now_ms / 1000)

    def told_ms(self, ms: float) -> float:
        """What the peer says about a time of computing."""
        return ms / LIE if self.device.lies else ms

    def record(self, now_ms: float) -> Record:
        """The record of the node, with the facts that real peers publish: see `peers/running_peer.py`."""
        wait_ms, batch = self.load_at(now_ms)
        peer = Peer(
            self.id,
            self.start,
            self.end,
            Speed(tuple(self.told_ms(ms * self.slower) for ms in self.device.speed.block_ms)),
            wait_ms,
            batch,
            self.device.kv_positions - (0 if self.device.lies else self.kv_used),
            sending_ms=self.sending_ms,
        )
        return Record(
            self.number,
            peer,
            NetworkPlace(self.coordinate, self.up_bytes_per_ms),
            self.links,
            now_ms / 1000,
            len(self.sessions),
            self.served_since_ms / 1000,
        )
