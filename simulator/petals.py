"""The rules of Petals, rewritten from its paper and its documented behaviour, for comparison.

Borzunov et al., "Distributed Inference and Fine-tuning of Large Language Models Over The Internet" (NeurIPS 2023),
section 3 and appendix. Numbers that the paper does not give come from the program in November 2026
(bigscience-workshop/petals): 18 ms overhead per hop, 150 ms for a link that was not measured, 10 s for a server without
free cache, and rebalancing below 75% of the possible throughput.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from scheduler.facts import Coordinate, Hop, Link
from scheduler.route import NoRoute
from simulator.clients import RouteTask, SimulatedPlan
from simulator.node import Node
from simulator.simulated_directory import DirectoryView
from simulator.world import SimulatedDevice, World

OVERHEAD_MS: Final = 18.0
UNKNOWN_MS: Final = 150.0
FULL_MS: Final = 10_000.0
BALANCE_QUALITY: Final = 0.75
CHECK_S: Final = 120.0
LEAST_GAIN: Final = 1e-3
ROUNDS: Final = 10
"""Rounds in which all servers move in turns until the swarm counts as balanced; Petals has no such limit."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class PetalsRouting:
    """The shortest path over servers, where a route uses each server up to the end of its blocks.

    push: servers send to each other, and a link costs the latency that the sending server has measured, or
    `UNKNOWN_MS`. Without it all activations pass through the client, which knows the round trip to each server exactly,
    unlike Petals' own client. The costs ignore load.
    """

    replans = False
    has_coordinates = False

    def __init__(self, world: World, *, push: bool) -> None:
        self.through_client = not push
        self._world = world

    def route(self, plan: RouteTask, view: DirectoryView, rng: random.Random) -> SimulatedPlan:
        first, end = plan.blocks
        usable = np.ones(len(view.peers), dtype=bool)
        usable[[view.index[name] for name in plan.exclude if name in view.index]] = False
        penalty = np.where(view.kv_free < plan.kv_needed, FULL_MS, 0.0)
        one_way = self._world.geography.one_way_from(plan.client.number, view.numbers)
        if self.through_client:
            following, cost = self._through_client(view, usable, 2 * one_way + penalty, first, end)
        else:
            following, cost = self._pushing(view, usable, one_way, penalty, plan, first, end)
        hops: list[Hop] = []
        block, index = first, following[first]
        while True:
            stop = min(end, int(view.end[index]))
            hops.append(Hop(view.peers[index].id, block, stop))
            if stop == end:
                return SimulatedPlan(hops, cost)
            block, index = stop, following[stop] if self.through_client else following[num_boundaries(view) + index]

    def _through_client(
        self, view: DirectoryView, usable: NDArray[np.bool_], hop_ms: Floats, first: int, end: int
    ) -> tuple[dict[int, int], float]:
        """The best server for each block at which one may begin, and the cost from the first block on."""
        left = np.full(end + 1, np.inf)
        left[end] = 0.0
        following: dict[int, int] = {}
        for block in range(end - 1, first - 1, -1):
            serving = view.serving[block][usable[view.serving[block]]]
            if not len(serving):
                raise NoRoute([(block, block + 1)], [])
            stop = np.minimum(view.end[serving], end)
            cost = hop_ms[serving] + OVERHEAD_MS + (stop - block) * view.decode_ms[serving] + left[stop]
            best = int(cost.argmin())
            following[block], left[block] = int(serving[best]), float(cost[best])
        return following, float(left[first])

    def _pushing(
        self,
        view: DirectoryView,
        usable: NDArray[np.bool_],
        one_way: Floats,
        penalty: Floats,
        plan: RouteTask,
        first: int,
        end: int,
    ) -> tuple[dict[int, int], float]:
        """As `_through_client`; the entry at the number of boundaries + i is the server after server i."""
        following: dict[int, int] = {}
        left = np.where(view.end >= end, one_way, np.inf)  # from the end of a server's last block on
        base = num_boundaries(view)

        def enter(block: int) -> tuple[Integers, Floats]:
            serving = view.serving[block][usable[view.serving[block]]]
            if not len(serving):
                raise NoRoute([(block, block + 1)], [])
            stop = np.minimum(view.end[serving], end)
            compute = OVERHEAD_MS + (stop - block) * view.decode_ms[serving]
            return serving, compute + penalty[serving] + left[serving]

        for block in range(end - 1, first, -1):
            senders = np.flatnonzero((view.end == block) & usable)
            if not len(senders):
                continue
            serving, cost = enter(block)
            cheapest = int(cost.argmin())
            left[senders] = float(cost[cheapest]) + UNKNOWN_MS
            following.update(dict.fromkeys((base + senders).tolist(), int(serving[cheapest])))
            entered = np.full(len(usable), np.inf)
            entered[serving] = cost
            sender, receiver, link_ms = view.links_behind(block)
            by_link = entered[receiver] + link_ms
            order = np.lexsort((by_link, sender))
            order = order[usable[sender[order]]]
            _, firsts = np.unique(sender[order], return_index=True)
            for link in order[firsts].tolist():
                if by_link[link] < left[sender[link]]:
                    following[base + int(sender[link])], left[sender[link]] = int(receiver[link]), by_link[link]
        serving, cost = enter(first)
        source = self._world.number_of.get(plan.source)
        away = one_way[serving]
        if source is not None:
            nothing: Mapping[str, Link] = {}
            links = view.records[plan.source].links if plan.source in view.records else nothing
            away = np.array(
                [
                    links[view.peers[index].id].latency_ms if view.peers[index].id in links else UNKNOWN_MS
                    for index in map(int, serving)
                ]
            )
        total = cost + away
        best = int(total.argmin())
        following[first] = int(serving[best])
        return following, float(total[best])


def num_boundaries(view: DirectoryView) -> int:
    """The number of boundaries between blocks, including both ends of the model."""
    return view.num_blocks + 1


class PetalsPlacing:
    """A server joins where throughput is lowest, and moves if rebalancing could raise the throughput enough.

    The throughput of a server is the lesser of its network's and its arithmetic's: requests per second of positions
    that each run half of its blocks.
    """

    check_s = CHECK_S
    announces_joining = True

    def __init__(self, world: World) -> None:
        self._world = world
        self._num_blocks = world.settings.num_blocks
        self._rng = np.random.default_rng([world.settings.seed, 2])
        self._balanced: tuple[DirectoryView | None, float] = (None, 0.0)
        self._summed: tuple[DirectoryView | None, Floats, Floats] = (None, np.zeros(0), np.zeros(0))

    def _throughput(self, device: SimulatedDevice) -> float:
        """Positions per ms."""
        geography = self._world.geography
        rate = min(geography.up[device.number], geography.down[device.number])
        by_network = float(rate) / (2.0 * self._world.settings.hidden)
        by_arithmetic = 256 / device.speed.block_ms_at(256) / ((device.max_blocks + 1) / 2)
        return min(by_network, by_arithmetic)

    def founders(self, devices: Sequence[SimulatedDevice]) -> list[tuple[int, int]]:
        throughput = np.zeros(self._num_blocks)
        spans: list[tuple[int, int]] = []
        for device in devices:
            start = _weakest(throughput, device.max_blocks)
            throughput[start : start + device.max_blocks] += self._throughput(device)
            spans.append((start, start + device.max_blocks))
        return spans

    def _of_view(self, view: DirectoryView) -> tuple[Floats, Floats]:
        """The throughput of each block, and of each server; servers that are loading count as serving."""
        if self._summed[0] is view:
            return self._summed[1].copy(), self._summed[2]
        numbers: list[int] = view.numbers.tolist()
        each = [self._throughput(self._world.devices[number]) for number in numbers]
        throughput = np.zeros(self._num_blocks)
        for peer, value in zip(view.peers, each, strict=True):
            throughput[peer.start : peer.end] += value
        for peer in view.arriving:
            throughput[peer.start : peer.end] += self._throughput(self._world.devices[self._world.number_of[peer.id]])
        self._summed = view, throughput, np.array(each)
        return throughput.copy(), self._summed[2]

    def join(self, device: SimulatedDevice, place: Coordinate, view: DirectoryView) -> tuple[int, int]:
        throughput, _ = self._of_view(view)
        start = _weakest(throughput, device.max_blocks)
        return start, start + device.max_blocks

    def move(self, node: Node, view: DirectoryView) -> tuple[int, int] | None:
        """In Petals every server simulates all moves; here they are simulated once for each view."""
        throughput, each = self._of_view(view)
        initial = float(throughput.min())
        own = self._throughput(node.device)
        if node.id not in view.index:
            return None
        throughput[node.start : node.end] -= own * (1 + LEAST_GAIN)
        if initial > LEAST_GAIN * own and throughput.min() <= 0:
            return None
        start = _weakest(throughput, node.end - node.start)
        if start == node.start:
            return None
        if self._balanced[0] is not view:
            self._balanced = view, self._balance(view, each)
        balanced = self._balanced[1]
        if balanced <= initial or initial / balanced >= BALANCE_QUALITY - LEAST_GAIN:
            return None
        return start, start + node.end - node.start

    def _balance(self, view: DirectoryView, each: Floats) -> float:
        """The throughput of the weakest block when no server wants to move any more."""
        start, length = view.start.copy(), view.end - view.start
        throughput, _ = self._of_view(view)
        for _ in range(ROUNDS):
            moved = False
            for index in self._rng.permutation(len(start)).tolist():
                begin, size, own = int(start[index]), int(length[index]), float(each[index])
                throughput[begin : begin + size] -= own * (1 + LEAST_GAIN)
                new = _weakest(throughput, size)
                throughput[begin : begin + size] += own * LEAST_GAIN
                throughput[new : new + size] += own
                moved = moved or new != begin
                start[index] = new
            if not moved:
                break
        return float(throughput.min())


def _weakest(throughput: Floats, length: int) -> int:
    """The start of the span whose sorted throughputs are the lowest in lexicographic order."""
    windows = np.sort(sliding_window_view(throughput, length), axis=1)
    candidates = np.flatnonzero(windows[:, 0] == windows[:, 0].min())
    if len(candidates) > 1:
        candidates = candidates[[int(np.lexsort(windows[candidates].T[::-1])[0])]]
    return int(candidates[0])
