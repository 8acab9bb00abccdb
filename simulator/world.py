"""The policy-independent part of a simulation: devices, their lifetimes, client requests, and the order of events."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import numpy as np

from scheduler.cost import Encoding, encodings_of
from scheduler.facts import CLIENT, DIMENSIONS, Coordinate, Speed
from simulator.geography import Access, Geography, MeasuredGeography, read_latencies


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """All inputs of a simulation; the same settings give the same result.

    peers: mean number of live peers. clients: each with one session. sessions_per_peer_hour: arrival rate. num_blocks,
    hidden: of the model. refresh_s: how often a peer publishes its facts. record_ttl_s: lifetime of a published record.
    look_s: how often a peer measures links, before a publication, and considers other blocks. view_s: how often clients
    read all facts. load_s: to load one block. uptime: factor to the time that devices stay; infinite for no churn.
    own_use: whether owners work with their devices. moves: whether peers may change their blocks. jitter: mean share by
    which a message's latency exceeds the link's. loss: share of messages that are sent twice. window_bytes: bytes that
    a connection sends before any are confirmed; infinite: all at once. wait_limit_s: how long a client without a route
    waits for one, or for the next token. replan_s: how often a session looks for a better route; corrects: whether it
    applies the errors of earlier predictions. burst: all clients arrive within a second. dark: half way through, all
    devices in Europe fall silent for good. probes: numbers of peers to which a client measures its links, first random
    ones, then the likeliest of its routes; None: as real clients do. latencies: a file of measured round trips, instead
    of generated ones. liars: part of the devices that say they are `LIE` times as fast as they are, and without load.
    """

    peers: int = 1000
    clients: int = 1000
    sessions_per_peer_hour: float = 2.0
    seed: int = 1
    num_blocks: int = 80
    hidden: int = 8192
    refresh_s: float = 30.0
    look_s: float = 30.0
    record_ttl_s: float = 90.0
    view_s: float = 30.0
    load_s: float = 1.0
    uptime: float = 1.0
    own_use: bool = True
    moves: bool = True
    jitter: float = 0.05
    loss: float = 0.005
    window_bytes: float = 14_480.0
    wait_limit_s: float = 30.0
    replan_s: float = 10.0
    corrects: bool = True
    burst: bool = False
    dark: bool = False
    probes: tuple[int, ...] | None = None
    latencies: Path | None = None
    liars: float = 0.0

    @property
    def duration_s(self) -> float:
        """How long clients arrive; in a burst, how long tokens are counted."""
        if self.burst:
            return BURST_COUNTS_S
        return self.clients / (self.peers * self.sessions_per_peer_hour / 3600)

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        return encodings_of({"none": 4.0 * self.hidden, "int8": 1.03 * self.hidden})


LIE: Final = 5.0

BURST_AT_S: Final = 60.0
BURST_COUNTS_S: Final = 240.0

SCENARIOS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "light": {"sessions_per_peer_hour": 10.0},
        "heavy": {"sessions_per_peer_hour": 30.0},
        "burst": {"burst": True},
        "dark": {"sessions_per_peer_hour": 20.0, "dark": True},
    }
)
"""Settings for what clients and devices do, by scenario."""

RULES: Final = frozenset(
    [
        "refresh_s",
        "look_s",
        "record_ttl_s",
        "view_s",
        "load_s",
        "moves",
        "replan_s",
        "corrects",
        "probes",
        "wait_limit_s",
    ]
)
"""The settings that do not change the devices and requests of a world."""


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A kind of device. share: of all devices.

    decode_ms: to read a block's weights. prefill_ms: arithmetic of a position in a block. blocks: smallest and largest
    number of blocks that owners allow. kv_positions: that all sessions may reserve together. uptime_h: mean lifetime.
    wired: whether its link is that of a data centre. own_use: whether its owner works with it from time to time, which
    slows it down.
    """

    name: str
    share: float
    decode_ms: float
    prefill_ms: float
    blocks: tuple[int, int]
    kv_positions: int
    uptime_h: float
    wired: bool = False
    own_use: bool = True


KINDS: Final[Sequence[DeviceKind]] = (
    DeviceKind("data centre GPU", 0.03, 0.5, 0.005, (16, 48), 64_000, 24.0, wired=True, own_use=False),
    DeviceKind("desktop GPU", 0.22, 1.2, 0.02, (8, 20), 24_000, 4.0),
    DeviceKind("laptop GPU", 0.20, 3.0, 0.07, (4, 8), 12_000, 1.5),
    DeviceKind("unified memory", 0.20, 5.0, 0.2, (8, 24), 24_000, 2.0),
    DeviceKind("desktop CPU", 0.20, 12.0, 1.0, (8, 24), 16_000, 4.0),
    DeviceKind("board", 0.15, 16.0, 4.0, (2, 5), 4_000, 12.0, own_use=False),
)
"""A block of 0.9 GB, as of a model of 70 billion parameters with 8 bits each, read at 1800 down to 55 GB/s."""

ACCESSES: Final[Sequence[tuple[float, tuple[float, float], tuple[float, float], tuple[float, float]]]] = (
    # Share; one-way delay in ms, Mbit/s up and Mbit/s down, each as a range
    (0.35, (0.5, 2.0), (100.0, 900.0), (200.0, 1000.0)),
    (0.40, (2.5, 7.0), (10.0, 50.0), (100.0, 1000.0)),
    (0.25, (5.0, 10.0), (4.0, 20.0), (20.0, 150.0)),
)
"""Fibre; cable; telephone line or radio."""
DATA_CENTRE: Final = (1.0, (0.5, 0.7), (1000.0, 1000.0), (1000.0, 1000.0))
BYTES_PER_MS: Final = 125.0
"""Bytes per ms in one Mbit/s."""


@dataclass(frozen=True, slots=True)
class SimulatedDevice:
    """A device that serves blocks.

    number: in the geography. crashes: it leaves without notice. resets: it crashes, but its machine runs on and ends
    the connections. used_s: begin and end of each time in which its owner works with it. lies: about speed and load.
    """

    number: int
    id: str
    kind: DeviceKind
    speed: Speed
    max_blocks: int
    kv_positions: int
    joins_s: float
    leaves_s: float
    crashes: bool
    used_s: Sequence[tuple[float, float]] = ()
    resets: bool = False
    lies: bool = False

    @property
    def is_silent(self) -> bool:
        """Whether other devices get no sign when it leaves."""
        return self.crashes and not self.resets


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """A client, by its number in the geography, that requests `output` tokens after `prompt` tokens at a time."""

    number: int
    at_s: float
    prompt: int
    output: int

    @property
    def positions(self) -> int:
        return self.prompt + self.output


class World:
    """Devices and requests drawn from the seed; the same for every policy."""

    def __init__(self, settings: SimulationSettings) -> None:
        self.settings = settings
        rng = np.random.default_rng(settings.seed)
        lifetimes = _lifetimes(rng, settings)
        kinds = [kind for kind, _, _ in lifetimes]
        accesses = [_draw_access(rng, kind.wired) for kind in kinds]
        accesses += [_draw_access(rng, False) for _ in range(settings.clients)]
        if settings.latencies is None:
            self.geography = Geography(rng, accesses)
        else:
            self.geography = MeasuredGeography(rng, accesses, read_latencies(settings.latencies))
        self.devices = [
            _draw_device(rng, number, kind, joins, leaves, settings.num_blocks)
            for number, (kind, joins, leaves) in enumerate(lifetimes)
        ]
        self.requests = draw_requests(rng, settings, len(self.devices))
        # A separate generator, so that all other values are the same without `own_use`.
        use = np.random.default_rng([settings.seed, 6])
        self.devices = [
            replace(device, used_s=_draw_use(use, device, settings.duration_s)) if settings.own_use else device
            for device in self.devices
        ]
        if settings.dark:
            at_s = settings.duration_s / 2
            self.devices = [
                replace(device, leaves_s=at_s, crashes=True)
                if device.joins_s < at_s < device.leaves_s and self.geography.is_european(device.number)
                else device
                for device in self.devices
            ]
        liars = np.random.default_rng([settings.seed, 7]).random(len(self.devices)) < settings.liars
        self.devices = [replace(each, lies=bool(lies)) for each, lies in zip(self.devices, liars, strict=True)]
        self._know_devices(rng)

    @classmethod
    def from_devices(
        cls,
        settings: SimulationSettings,
        geography: Geography,
        devices: Sequence[SimulatedDevice],
        requests: Sequence[SimulatedRequest],
    ) -> World:
        """A world with these devices, numbered from 0 in order, and requests; only coordinates are drawn."""
        world = cls.__new__(cls)
        world.settings, world.geography = settings, geography
        world.devices, world.requests = list(devices), list(requests)
        world._know_devices(np.random.default_rng(settings.seed))
        return world

    def _know_devices(self, rng: np.random.Generator) -> None:
        self.number_of = {device.id: device.number for device in self.devices}
        self.coordinates = _settled_coordinates(rng, self.geography, self.devices)

    def with_rules(self, **rules: Any) -> World:
        """The same world with other settings, of those in `RULES`.

        Raises ValueError for a setting on which the world itself depends.
        """
        if drawn := rules.keys() - RULES:
            raise ValueError(f"the world depends on {', '.join(sorted(drawn))}")
        other = copy(self)
        other.settings = replace(self.settings, **rules)
        return other

    def sending_ms(self, device: SimulatedDevice) -> float:
        """Ms for which the output of one position occupies the device's uplink."""
        least = min(encoding.bytes_per_position for encoding in self.settings.encodings)
        return least / float(self.geography.up[device.number])

    def names_for(self, client: int) -> dict[str, int]:
        """The number of each device by its name, and the client's."""
        return {**self.number_of, CLIENT: client}


def draw_requests(rng: np.random.Generator, settings: SimulationSettings, first_client: int) -> list[SimulatedRequest]:
    """Requests, one per client, ordered by time; first_client: number of the first client in the geography."""
    arrivals = np.sort(rng.uniform(0.0, settings.duration_s, settings.clients))
    if settings.burst:
        arrivals = BURST_AT_S + arrivals / settings.duration_s
    prompts = np.clip(rng.lognormal(np.log(200), 1.0, settings.clients), 8, 4096).astype(int)
    outputs = np.clip(rng.lognormal(np.log(100), 0.8, settings.clients), 4, 1024).astype(int)
    return [
        SimulatedRequest(first_client + client, float(at), int(prompt), int(output))
        for client, (at, prompt, output) in enumerate(zip(arrivals, prompts, outputs, strict=True))
    ]


def device_id(number: int) -> str:
    return f"p{number:06d}"


def _lifetimes(rng: np.random.Generator, settings: SimulationSettings) -> list[tuple[DeviceKind, float, float]]:
    """Kinds of devices with their times of joining and leaving; on average as many join as leave."""
    shares = np.array([kind.share for kind in KINDS])
    lifetimes: list[tuple[DeviceKind, float, float]] = []
    drawn: list[int] = rng.choice(len(KINDS), size=settings.peers, p=shares / shares.sum()).tolist()
    for kind in drawn:
        joins, uptime_s = 0.0, 3600 * KINDS[kind].uptime_h * settings.uptime
        while joins < settings.duration_s:  # one place in the swarm, taken by one device after the other
            leaves = joins + (float(rng.exponential(uptime_s)) if np.isfinite(uptime_s) else np.inf)
            lifetimes.append((KINDS[kind], joins, leaves))
            joins = leaves
    return sorted(lifetimes, key=lambda lifetime: lifetime[1])


def _draw_access(rng: np.random.Generator, wired: bool) -> Access:
    shares = [access[0] for access in ACCESSES]
    _, delay, up, down = DATA_CENTRE if wired else ACCESSES[int(rng.choice(len(ACCESSES), p=shares))]
    return Access(
        float(rng.uniform(*delay)),
        BYTES_PER_MS * _log_uniform(rng, *up),
        BYTES_PER_MS * _log_uniform(rng, *down),
    )


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _draw_device(
    rng: np.random.Generator, number: int, kind: DeviceKind, joins: float, leaves: float, num_blocks: int
) -> SimulatedDevice:
    slower = float(rng.lognormal(0.0, 0.25))
    return SimulatedDevice(
        number=number,
        id=device_id(number),
        kind=kind,
        speed=Speed.of(kind.decode_ms * slower, kind.prefill_ms * slower),
        max_blocks=min(num_blocks, int(rng.integers(kind.blocks[0], kind.blocks[1] + 1))),
        kv_positions=int(kind.kv_positions * rng.uniform(0.5, 1.5)),
        joins_s=joins,
        leaves_s=leaves,
        crashes=bool(rng.random() < 0.5),
    )


USED_EVERY_S: Final = 2 * 3600.0
USED_FOR_S: Final = 600.0
USED_SLOWER: Final = 3.0
"""How often and for how long a device's owner works with it, on average, and how many times as slow it is then."""


def _draw_use(rng: np.random.Generator, device: SimulatedDevice, end_s: float) -> list[tuple[float, float]]:
    used: list[tuple[float, float]] = []
    at_s = device.joins_s + float(rng.exponential(USED_EVERY_S))
    while device.kind.own_use and at_s < end_s:
        until_s = at_s + float(rng.exponential(USED_FOR_S))
        used.append((at_s, until_s))
        at_s = until_s + float(rng.exponential(USED_EVERY_S))
    return used


FOUNDERS: Final = 300
FOUNDING_ROUNDS: Final = 240
NEWCOMER_ROUNDS: Final = 32


def _settled_coordinates(
    rng: np.random.Generator, geography: Geography, devices: Sequence[SimulatedDevice]
) -> list[Coordinate]:
    """The coordinates of the devices that exist from the start, by their own measurements.

    The first devices have measured round trips to random others for two hours, once in 30 s; each later device measured
    some to earlier devices when it joined, as in a growing swarm.
    """
    count = sum(device.joins_s == 0 for device in devices)
    coordinates: list[Coordinate] = [Coordinate()] * count
    founders = min(count, FOUNDERS)
    for _ in range(FOUNDING_ROUNDS if founders > 1 else 0):
        others: list[int] = ((np.arange(founders) + rng.integers(1, founders, founders)) % founders).tolist()
        for number, other in enumerate(others):
            coordinates[number] = measured_to(rng, geography, number, coordinates[number], other, coordinates[other])
    for number in range(founders, count):
        others = rng.integers(0, number, NEWCOMER_ROUNDS).tolist()
        for other in others:
            coordinates[number] = measured_to(rng, geography, number, coordinates[number], other, coordinates[other])
    return coordinates


def measured_to(
    rng: np.random.Generator, geography: Geography, number: int, own: Coordinate, other: int, theirs: Coordinate
) -> Coordinate:
    """The coordinate of a device after a round trip to another, measured up to 10% too long."""
    rtt_ms = 2 * geography.one_way_ms(number, other) * (1 + 0.1 * rng.random())
    return own.moved_by(theirs, rtt_ms, tuple(rng.normal(size=DIMENSIONS).tolist()))


Subject = TypeVar("Subject")


class Events:
    """Planned events and the clock. Of two events at the same time, the event that was planned first comes first.

    Attributes:
        now: in ms.
        done: number of events that have happened.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.done = 0
        self._order = count()
        self._planned: list[tuple[float, int, Callable[[Any], None], Any]] = []

    def schedule(self, ms: float, act: Callable[[Subject], None], subject: Subject) -> None:
        """Plans `act(subject)`."""
        heapq.heappush(self._planned, (ms, next(self._order), act, subject))

    def next_before(self, end_ms: float) -> bool:
        """Runs the next event and returns True; False if none is planned before `end_ms`."""
        if not self._planned or self._planned[0][0] > end_ms:
            return False
        self.now, _, act, subject = heapq.heappop(self._planned)
        act(subject)
        self.done += 1
        return True
