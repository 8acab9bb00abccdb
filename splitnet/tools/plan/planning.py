"""The best partition of a model over known devices, and the output of `splitnet plan`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Final

from scheduler.batching import PASS_POSITIONS
from scheduler.cost import BlockWork, Encoding, encodings_of, hop_joules, hop_ms, roofline, transfer_ms
from scheduler.facts import CLIENT, CONTEXTS, PASS_SIZES, ContextCost, Hop, Peer, Speed
from scheduler.partition import (
    EXACT_DEVICES,
    Device,
    DoesNotFit,
    fastest_partition,
    first_token_ms,
    tokens_per_s,
    widest_partition,
)
from splitnet.blocks.model_sizes import ModelSizes
from splitnet.cli.tables import table
from splitnet.errors import OutOfMemory
from splitnet.tools.plan.devices_file import DevicesFile, KnownDevice, MachineSpeed
from splitnet.wire.codecs import CODECS

MOST_SESSIONS: Final = 16
"""Default number of sessions for the reported throughput; fewer if the memory does not suffice for so many."""


@dataclass(frozen=True)
class Demand:
    """The purpose of the partition."""

    context: int  # positions of a session
    prompt: int  # prompt positions among them
    sessions: int  # sessions for which each device has memory
    throughput: bool  # whether to optimize the sessions' total throughput, instead of the latency of one session


@dataclass(frozen=True)
class PlannedSpan:
    """A device of the plan with its blocks `[start, end)`; memory in bytes."""

    device: KnownDevice
    start: int
    end: int
    memory_used: int
    kv_memory: int  # the memory that the device's blocks leave for KV caches
    kv_needed: int  # the size of KV caches for all sessions, each as long as the context
    max_blocks: int  # how many blocks fit in the device's memory together with such caches
    ms_per_token: float  # time of a decode step
    joules_per_token: float | None  # None if the power of the device is unknown


@dataclass(frozen=True)
class UsedLink:
    """A link of the plan, with the names of its two ends. ms_per_token: time of a decode step, including latency."""

    sender: str
    receiver: str
    latency_ms: float
    ms_per_token: float


@dataclass(frozen=True)
class Plan:
    """The best partition, and the alternatives to compare it with."""

    sizes: ModelSizes
    demand: Demand
    client: str
    client_ms: float | None  # time of the head in a decode step; None if the client's machine is unknown
    spans: tuple[PlannedSpan, ...]
    links: tuple[UsedLink, ...]
    tokens_per_s: float  # speed of one session while it decodes
    first_token_ms: float  # time from sending the prompt, in an open session, to the first token
    longest_first_token_ms: float  # the same time for a prompt that fills the context
    left_out: Mapping[str, int]  # devices without blocks in the plan, and how many blocks fit in their memory
    sessions: int
    all_tokens_per_s: float  # total speed of `sessions` sessions
    # For each device that could hold all blocks: tokens/s of one session or, for throughput, of all sessions together.
    alone: Mapping[str, float]
    # The same speed for the best route through all devices; None if the plan is this route, or there is no such route.
    everyone: float | None
    exact: bool  # whether no other partition is better by the cost model


def joules_of(spans: Sequence[PlannedSpan]) -> float | None:
    """Joules of a token on all devices; None if the energy of a device is unknown."""
    known = [span.joules_per_token for span in spans if span.joules_per_token is not None]
    return sum(known) if len(known) == len(spans) else None


def amount(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


class ModelTooBig(OutOfMemory):
    """The devices together cannot hold the model. missing_bytes: missing memory for weights and KV caches."""

    def __init__(self, message: str, missing_blocks: int, missing_bytes: int) -> None:
        super().__init__(message)
        self.missing_blocks = missing_blocks
        self.missing_bytes = missing_bytes


def make_plan(sizes: ModelSizes, file: DevicesFile, demand: Demand) -> Plan:
    """The best partition of a model over the devices of a file. Raises ModelTooBig with the missing memory."""
    return _PartitionSearch(sizes, file, demand).best_partition()


class _PartitionSearch:
    def __init__(self, sizes: ModelSizes, file: DevicesFile, demand: Demand) -> None:
        self._sizes = sizes
        self._file = file
        self._demand = demand
        self._known = {device.name: device for device in file.devices}
        self._kv_bytes = sizes.kv_bytes * demand.context + sizes.state_bytes  # for a session and block
        self._encodings: Sequence[Encoding] = encodings_of(
            {name: codec.bytes_per_position(sizes.hidden_size) for name, codec in CODECS.items()}
        )
        needed = sizes.block_bytes + demand.sessions * self._kv_bytes
        self._devices = [
            Device(device.name, max(0, self._room(device) // needed), self._speed(device), watts=device.watts)
            for device in file.devices
        ]
        self._peers: dict[str, Peer] = {device.id: device.peer(0, 1) for device in self._devices}
        # A step of a prefill reads only the keys and values of its own row, up to its own position.
        self._reading: dict[str, Peer] = {
            name: replace(
                peer, speed=self._speed(self._known[name], cached=False), context_cost=self._past(self._known[name])
            )
            for name, peer in self._peers.items()
        }
        self._client_ms = self._head_ms()

    def best_partition(self) -> Plan:
        demand = self._demand
        try:
            hops = self._widest() if demand.throughput else self._fastest()
        except DoesNotFit as error:
            raise self._too_big(error.missing) from None
        usable = [device for device in self._devices if device.max_blocks]
        everyone = None
        if len(hops) < len(usable) <= self._sizes.num_blocks:
            everyone = self._worth(self._fastest(everyone=True))
        sessions = demand.sessions if demand.sessions > 1 else min(MOST_SESSIONS, self._sessions_with_room(hops))
        used = {hop.peer for hop in hops}
        return Plan(
            sizes=self._sizes,
            demand=demand,
            client=self._file.client_host or "client",
            client_ms=self._client_ms,
            spans=tuple(self._span(hop) for hop in hops),
            links=self._links(hops),
            tokens_per_s=self._tokens_per_s(hops, 1),
            first_token_ms=self._first_token_ms(hops, demand.prompt),
            longest_first_token_ms=self._first_token_ms(hops, demand.context),
            left_out={
                device.id: min(device.max_blocks, self._sizes.num_blocks)
                for device in self._devices
                if device.id not in used
            },
            sessions=sessions,
            all_tokens_per_s=self._tokens_per_s(hops, sessions),
            alone={
                device.id: self._worth([Hop(device.id, 0, self._sizes.num_blocks)])
                for device in self._devices
                if device.max_blocks >= self._sizes.num_blocks
            },
            everyone=everyone,
            exact=len(usable) <= EXACT_DEVICES,
        )

    def _room(self, device: KnownDevice) -> int:
        """Bytes of a device for blocks and KV caches. On the client's device, the client part is subtracted."""
        return device.memory - (self._sizes.client_part_bytes if device.name == self._file.client_host else 0)

    def _machine(self, device: KnownDevice) -> MachineSpeed:
        """The given speed of the machine, or the speed that follows from the times of a block."""
        if isinstance(device.speed, MachineSpeed):
            return device.speed
        most, sizes = PASS_SIZES[-1], self._sizes
        return MachineSpeed(
            sizes.block_bytes / device.speed.block_ms_at(1),
            sizes.flops_per_position * most / device.speed.block_ms_at(most),
        )

    def _past(self, device: KnownDevice) -> ContextCost:
        """The cost of context: reading keys and values, or computing attention with heads as wide as hidden states."""
        machine, sizes = self._machine(device), self._sizes
        ms = [(context * sizes.kv_bytes / machine.bytes_per_ms, context / machine.flops_per_ms) for context in CONTEXTS]
        arithmetic = 4 * PASS_POSITIONS * sizes.hidden_size  # two products, of two operations each
        return ContextCost(tuple((reading, max(reading, arithmetic * each)) for reading, each in ms))

    def _speed(self, device: KnownDevice, *, cached: bool = True) -> Speed:
        """The speed of a device. cached: each position of a pass belongs to another session, whose KV cache is read."""
        cache_bytes, sessions = self._kv_bytes if cached else 0, max(self._demand.sessions, MOST_SESSIONS)
        if isinstance(device.speed, Speed):
            cache_ms = cache_bytes / self._machine(device).bytes_per_ms
            pairs = zip(PASS_SIZES, device.speed.block_ms, strict=True)
            return Speed(tuple(ms + min(size, sessions) * cache_ms for size, ms in pairs))
        work = BlockWork(
            dense_bytes=self._sizes.block_bytes - self._sizes.expert_bytes,
            expert_bytes=self._sizes.expert_bytes,
            expert_share=self._sizes.expert_share,
            cache_bytes=cache_bytes,
            sessions=sessions,
            flops=self._sizes.flops_per_position,
        )
        return roofline(work, bytes_per_ms=device.speed.bytes_per_ms, flops_per_ms=device.speed.flops_per_ms)

    def _head_ms(self) -> float | None:
        host = self._known.get(self._file.client_host or "")
        return None if host is None else self._sizes.head_bytes / self._machine(host).bytes_per_ms

    def _fastest(self, everyone: bool = False) -> Sequence[Hop]:
        blocks, network = self._sizes.num_blocks, self._file.network
        return fastest_partition(self._devices, blocks, network, encodings=self._encodings, everyone=everyone).hops

    def _widest(self) -> Sequence[Hop]:
        """The route with the highest total throughput of all sessions; tries several numbers of sessions per pass."""
        candidates = [self._fastest()]
        widest = partial(widest_partition, self._devices, self._sizes.num_blocks, self._file.network)
        positions = 1
        while positions <= self._demand.sessions:
            candidates.append(widest(encodings=self._encodings, positions=positions).hops)
            positions *= 2
        return max(candidates, key=lambda hops: (round(self._worth(hops), 6), -len(hops)))

    def _worth(self, hops: Sequence[Hop]) -> float:
        return self._tokens_per_s(hops, self._demand.sessions if self._demand.throughput else 1)

    def _tokens_per_s(self, hops: Sequence[Hop], sessions: int) -> float:
        speed = partial(tokens_per_s, hops, self._peers, self._file.network, encodings=self._encodings)
        return speed(sessions=sessions, client_ms=self._client_ms or 0.0)

    def _first_token_ms(self, hops: Sequence[Hop], prompt: int) -> float:
        first_ms = partial(first_token_ms, hops, self._reading, self._file.network, encodings=self._encodings)
        return first_ms(prompt=prompt, client_ms=self._client_ms or 0.0)

    def _sessions_with_room(self, hops: Sequence[Hop]) -> int:
        return min(
            (self._room(self._known[hop.peer]) // (hop.end - hop.start) - self._sizes.block_bytes) // self._kv_bytes
            for hop in hops
        )

    def _span(self, hop: Hop) -> PlannedSpan:
        device, blocks = self._known[hop.peer], hop.end - hop.start
        room = self._room(device)
        weights, caches = blocks * self._sizes.block_bytes, blocks * self._demand.sessions * self._kv_bytes
        return PlannedSpan(
            device,
            hop.start,
            hop.end,
            memory_used=device.memory - room + weights + caches,
            kv_memory=room - weights,
            kv_needed=caches,
            max_blocks=min(self._sizes.num_blocks, room // (self._sizes.block_bytes + caches // blocks)),
            ms_per_token=hop_ms(self._peers[hop.peer], blocks, 1),
            joules_per_token=hop_joules(self._peers[hop.peer], blocks),
        )

    def _links(self, hops: Sequence[Hop]) -> tuple[UsedLink, ...]:
        host = self._file.client_host
        client = f"client on {host}" if host else "client"
        used: list[UsedLink] = []
        for sender, receiver in pairwise([CLIENT, *(hop.peer for hop in hops), CLIENT]):
            link = self._file.network.link(sender, receiver)
            token_ms = transfer_ms(link, 1, self._encodings)
            used.append(UsedLink(sender or client, receiver or client, link.latency_ms, token_ms))
        return tuple(used)

    def _too_big(self, missing: int) -> ModelTooBig:
        sizes, demand = self._sizes, self._demand
        per_block = sizes.block_bytes + demand.sessions * self._kv_bytes
        room = sizes.num_blocks - missing
        caches = f"{demand.sessions} sessions" if demand.sessions > 1 else "a session"
        return ModelTooBig(
            f"{sizes.name} in {sizes.held_as} does not fit: the devices have memory for {room} of its "
            f"{sizes.num_blocks} blocks, {amount(missing * per_block)} are missing ({amount(per_block)} a block, with "
            f"the KV cache of {caches} of {demand.context} tokens): add a device or memory, or use smaller --weights "
            "or --context",
            missing,
            missing * per_block,
        )


def title(plan: Plan) -> str:
    sizes, demand = plan.sizes, plan.demand
    sessions = f"{demand.sessions} sessions" if demand.sessions > 1 else "a session"
    caches = f"KV caches for {sessions} of {demand.context} tokens"
    return f"{sizes.name}, {sizes.num_blocks} blocks in {sizes.held_as}, with {caches}"


def device_table(plan: Plan) -> str:
    """The devices in the order of the route, with their blocks and memory."""
    energy = ["J/token"] * any(span.device.watts for span in plan.spans)
    figures = ["at most", "memory used", "KV caches", "ms/token", *energy]
    rows = [
        [
            span.device.name,
            f"{span.start}..{span.end - 1}" if span.end - span.start > 1 else str(span.start),
            str(span.max_blocks),
            f"{amount(span.memory_used)} of {amount(span.device.memory)}",
            amount(span.kv_needed),
            f"{span.ms_per_token:.1f}",
            *(["?" if span.joules_per_token is None else f"{span.joules_per_token:.3g}"] * len(energy)),
        ]
        for span in plan.spans
    ]
    rows += [[name, "none", str(blocks), "", "", "", *[""] * len(energy)] for name, blocks in plan.left_out.items()]
    name, head_ms = ("client", "?") if plan.client_ms is None else (f"client on {plan.client}", f"{plan.client_ms:.1f}")
    rows.append([name, "head", "", "", "", head_ms, *[""] * len(energy)])
    return table(["device", "blocks", *figures], rows, figures)


def link_table(plan: Plan) -> str:
    """The links in the order of the route, from the client and back to the client."""
    figures = ["latency ms", "ms/token"]
    rows = [
        (f"{link.sender} -> {link.receiver}", f"{link.latency_ms:.1f}", f"{link.ms_per_token:.1f}")
        for link in plan.links
    ]
    return table(["link", *figures], rows, figures)


def summary(plan: Plan) -> Iterator[str]:
    """The expected speed, and whether fewer devices would be faster."""
    together = f", {plan.all_tokens_per_s:.1f} tokens/s for {plan.sessions} sessions together" * (plan.sessions > 1)
    yield (
        f"Expect {plan.tokens_per_s:.1f} tokens/s for one session{together}, and {plan.first_token_ms / 1000:.2f} s to "
        f"the first token of a prompt of {plan.demand.prompt}."
    )
    yield (
        f"These are tokens in a text of {plan.demand.context}; a prompt of this length gets its first token in "
        f"{plan.longest_first_token_ms / 1000:.2f} s."
    )
    if plan.sessions <= 1:
        yield f"There is memory for one session of {plan.demand.context} tokens; --sessions makes room for more."
    joules = joules_of(plan.spans)
    if joules is not None:
        yield f"A token takes {joules:.3g} J on the devices, without the client and the network."
    yield from _comparison(plan)
    if plan.client_ms is None:
        yield "The client's time for the head is not in these figures: name the device that it runs on (client: host:)."
    if not plan.exact:
        yield "With so many devices the partition comes from a local search: a slightly better one may exist."


def _comparison(plan: Plan) -> Iterator[str]:
    names = [span.device.name for span in plan.spans]
    unit = f"tokens/s for {plan.sessions} sessions together" if plan.demand.throughput else "tokens/s"
    everyone = f": a route through all would give {plan.everyone:.1f} {unit}" if plan.everyone is not None else ""
    if len(names) == 1:
        yield f"{names[0]} alone is faster than any route through several devices{everyone}."
        if names[0] == plan.client:
            yield "The client runs on it too, so you need no splitnet for this: run the model there with transformers."
        return
    if everyone:
        yield f"These {len(names)} devices are faster than more of them{everyone}."
    if plan.alone:
        best = max(plan.alone, key=lambda name: plan.alone[name])
        yield f"{best} alone would give {plan.alone[best]:.1f} {unit}."
    else:
        yield "No device has memory for the model alone."
