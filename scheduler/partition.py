"""How to cut a model over devices that are all known beforehand, for `splitnet plan`.

`scheduler/placement.py` is for swarms that grow peer by peer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Final

import numpy as np

from scheduler.cost import Encoding, block_ms, occupied_ms, route_ms, transfer_ms
from scheduler.facts import CLIENT, Flags, Floats, Hop, Integers, Network, Peer, Route, Speed
from scheduler.prefill_chunks import CHUNK_SIZES

# Maximum number of devices for which the optimum is computed. This takes a tenth of a second; each further device would
# triple the time.
EXACT_DEVICES: Final = 15
STARTS: Final = 8
MAX_CHAINS: Final = 60_000
"""Local searches begin with each of `STARTS` devices, then near the best chain so far, up to `MAX_CHAINS` examined
chains: some tenths of a second."""

_FORBIDDEN_LINK: Final = 1e9
_MISSING_BLOCK: Final = 1e10
_SMALL: Final = 1e-9


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """The model to cut, and the costs in ms, `[devices]`.

    links: `[devices + 1, devices + 1]` from sender to receiver; the last row and column belong to the client; infinite
    where a link must not be used.
    """

    num_blocks: int
    capacity: Integers  # blocks for which a device has memory
    block: Floats  # cost of one block
    hop: Floats  # cost of a hop in addition to blocks and links
    links: Floats


@dataclass(frozen=True, slots=True)
class Chain:
    """Devices in the order of the chain, and the number of blocks of each."""

    devices: tuple[int, ...]
    blocks: tuple[int, ...]


def cheapest_order(problem: Problem, *, everyone: bool = False) -> Chain | None:
    """The cheapest chain; None if no chain holds all blocks. Among equally cheap chains, one with the fewest devices.

    everyone: see `fastest_partition`.
    """
    usable = np.flatnonzero(problem.capacity > 0)
    if not len(usable) or problem.capacity.sum() < problem.num_blocks:
        return None
    if everyone and len(usable) > problem.num_blocks:
        return None
    corners = np.append(usable, len(problem.capacity))
    part = Problem(
        problem.num_blocks,
        problem.capacity[usable],
        problem.block[usable],
        problem.hop[usable],
        problem.links[np.ix_(corners, corners)],
    )
    order = _exact(part, everyone) if len(usable) <= EXACT_DEVICES else _searched(part, everyone)
    if order is None:
        return None
    members = np.zeros((1, len(usable)), dtype=bool)
    members[0, order] = True
    blocks, _ = _assign_blocks(part, members)
    return Chain(tuple(usable[order].tolist()), tuple(blocks[0, order].tolist()))


def _assign_blocks(problem: Problem, members: Flags) -> tuple[Integers, Integers]:
    """The blocks of each device `[cases, devices]` and the remaining blocks `[cases]`, for sets of devices.

    Remaining blocks are those that do not fit. Their number is negative if a set has more devices than there are
    blocks.
    """
    by_speed = np.argsort(problem.block, kind="stable")
    room = np.where(members, problem.capacity - 1, 0)[:, by_speed]
    spare = problem.num_blocks - members.sum(axis=1)
    before = np.cumsum(room, axis=1) - room
    extra = np.clip(spare[:, None] - before, 0, room)
    blocks = np.zeros(members.shape, dtype=np.int64)
    blocks[:, by_speed] = extra
    return blocks + members, spare - extra.sum(axis=1)


def _work(problem: Problem, members: Flags) -> Floats:
    """Cost of the blocks of sets of devices `[cases]`, with a penalty where the blocks do not fit."""
    blocks, remaining = _assign_blocks(problem, members)
    return blocks @ problem.block + members @ problem.hop + np.abs(remaining) * _MISSING_BLOCK


def _cost(problem: Problem, links: Floats, orders: Integers) -> Floats:
    """Costs of chains of the same length `[cases]`; orders: `[cases, length]`."""
    members = np.zeros((len(orders), len(problem.capacity)), dtype=bool)
    np.put_along_axis(members, orders, True, axis=1)
    path = links[-1, orders[:, 0]] + links[orders[:, -1], -1] + links[orders[:, :-1], orders[:, 1:]].sum(axis=1)
    return _work(problem, members) + path


def _exact(problem: Problem, everyone: bool) -> list[int] | None:
    """The optimum over all subsets and their orders; None if no chain is feasible."""
    count = len(problem.capacity)
    sets = np.arange(1 << count)
    members = (sets[:, None] >> np.arange(count) & 1).astype(bool)
    sizes = members.sum(axis=1)
    links = problem.links[:-1, :-1]
    path = np.full((len(sets), count), np.inf)  # cost of the links from the client through the set to its last device
    previous = np.zeros((len(sets), count), dtype=np.int64)
    path[1 << np.arange(count), np.arange(count)] = problem.links[-1, :-1]
    for size in range(2, count + 1):
        layer = sets[sizes == size]
        for last in range(count):
            with_last = layer[members[layer, last]]
            choices = path[with_last ^ (1 << last)] + links[:, last]
            chosen = choices.argmin(axis=1)
            previous[with_last, last] = chosen
            path[with_last, last] = choices[np.arange(len(with_last)), chosen]
    tours = path + problem.links[:-1, -1]
    total = tours.min(axis=1) + _work(problem, members)
    if everyone:
        total[:-1] = np.inf
    least = float(total.min())
    if not least < _FORBIDDEN_LINK:
        return None
    equals = np.flatnonzero(total <= least + _SMALL)
    best = int(equals[sizes[equals].argmin()])
    last, order = int(tours[best].argmin()), list[int]()
    while best:
        order.append(last)
        best, last = best ^ (1 << last), int(previous[best, last])
    return order[::-1]


def _searched(problem: Problem, everyone: bool) -> list[int] | None:
    """The best result of many local searches, an iterated local search (Lourenço, Martin and Stützle, 2003).

    None if no chain is feasible. Deterministic.
    """
    links = np.minimum(problem.links, _FORBIDDEN_LINK)
    count = len(problem.capacity)
    rng = random.Random(count)
    alone = problem.block * problem.num_blocks + links[-1, :-1] + links[:-1, -1]
    seeds = [int(seed) for seed in np.argsort(alone, kind="stable")[:STARTS]]
    best = np.inf, 0, list[int]()
    looked_at = 0
    while seeds or looked_at < MAX_CHAINS:
        if seeds:
            seed = seeds.pop(0)
            order = [seed, *(device for device in range(count) if device != seed)] if everyone else [seed]
        else:
            order = _perturbed(best[2], count, everyone, rng)
        order, cost, chains = _local_optimum(problem, links, order, everyone)
        looked_at += chains
        if not best[2] or (round(cost, 9), len(order)) < best[:2]:
            best = round(cost, 9), len(order), order
    return best[2] if best[0] < _FORBIDDEN_LINK else None


def _local_optimum(problem: Problem, links: Floats, order: list[int], everyone: bool) -> tuple[list[int], float, int]:
    """A chain that no single change makes cheaper, its cost, and how many chains were examined."""
    cost = float(_cost(problem, links, np.array([order]))[0])
    looked_at = 1
    while True:
        better = cost - _SMALL
        groups = [_same_devices(order)]
        if not everyone:
            groups += _other_devices(order, len(problem.capacity))
        for group in groups:
            if len(group):
                looked_at += len(group)
                costs = _cost(problem, links, group)
                place = int(costs.argmin())
                if costs[place] < better:
                    better, order = float(costs[place]), group[place].tolist()
        if better == cost - _SMALL:
            return order, cost, looked_at
        cost = better


def _perturbed(order: list[int], count: int, everyone: bool, rng: random.Random) -> list[int]:
    """The chain with a few devices moved, removed or inserted."""
    shaken = list(order)
    for _ in range(rng.randint(1, 3)):
        others = [device for device in range(count) if device not in shaken]
        place = rng.randrange(len(shaken))
        if everyone:
            shaken.insert(place, shaken.pop(rng.randrange(len(shaken))))
        elif others and (len(shaken) == 1 or rng.random() < 0.7):
            shaken.insert(rng.randint(0, len(shaken)), rng.choice(others))
        elif len(shaken) > 1:
            del shaken[place]
    return shaken


def _same_devices(order: list[int]) -> Integers:
    """Chains of the same devices with a run of neighbours moved or reversed, `[cases, length]`."""
    found: list[list[int]] = []
    for start in range(len(order)):
        for end in range(start + 1, len(order) + 1):
            run, rest = order[start:end], order[:start] + order[end:]
            found.append(order[:start] + run[::-1] + order[end:])
            if len(run) <= 3:
                found += [rest[:place] + run + rest[place:] for place in range(len(rest) + 1)]
    return np.array(found)


def _other_devices(order: list[int], count: int) -> list[Integers]:
    """Chains with one device removed, one exchanged, and one inserted; each `[cases, length]`."""
    others = [device for device in range(count) if device not in order]
    places = range(len(order))
    less = [order[:place] + order[place + 1 :] for place in places] if len(order) > 1 else []
    exchanged = [[*order[:place], other, *order[place + 1 :]] for place in places for other in others]
    more = [[*order[:place], other, *order[place:]] for place in range(len(order) + 1) for other in others]
    return [np.array(group, dtype=np.int64) for group in (less, exchanged, more)]


# Ms of a hop in addition to blocks, codecs and links: messages, threads, dispatch (docs/benchmarks.md).
HOP_MS: Final = 0.9


@dataclass(frozen=True, slots=True)
class Device:
    """A device that could be a peer."""

    id: str
    max_blocks: int  # number of blocks that fit into its memory
    speed: Speed
    hop_ms: float = HOP_MS
    watts: float = 0.0  # power while it computes; 0: unknown

    def peer(self, start: int, end: int) -> Peer:
        return Peer(self.id, start, end, self.speed, queue_ms=self.hop_ms, watts=self.watts)


class DoesNotFit(Exception):
    """The devices have memory for too few blocks. missing: blocks that do not fit."""

    def __init__(self, missing: int) -> None:
        super().__init__(f"the devices lack memory for {missing} blocks")
        self.missing = missing


def fastest_partition(
    devices: Sequence[Device],
    num_blocks: int,
    network: Network,
    *,
    encodings: Sequence[Encoding],
    everyone: bool = False,
) -> Route:
    """The chain with the shortest time of a single token, from the client through all blocks and back. Its cost is this
    time in ms.

    The chain is optimal if at most `EXACT_DEVICES` devices have memory for a block; else a local search finds it.

    everyone: all devices with memory for a block take part, even where fewer would be faster.

    Raises DoesNotFit if the model is too big for all devices together, and ValueError if two devices have the same id,
    or `everyone` is set and there are more devices than blocks.
    """
    problem = _problem(devices, num_blocks, network, encodings, 1)
    chain = cheapest_order(problem, everyone=everyone)
    if chain is None:
        raise ValueError("there are more devices than blocks, so that not all can take part")
    return _route(chain, devices, network, encodings, 1)


def widest_partition(
    devices: Sequence[Device],
    num_blocks: int,
    network: Network,
    *,
    encodings: Sequence[Encoding],
    positions: int = 1,
) -> Route:
    """The chain with the fastest slowest stage, a device or a link, which sets the pace of many concurrent steps.

    Among chains with equally fast slowest stages, the one on which a step takes the shortest time. When the chain is
    optimal: see `fastest_partition`.

    positions: positions of a step, which are the tokens of the sessions that share a pass.

    Raises DoesNotFit if the model is too big for all devices together, and ValueError if two devices have the same id.
    """
    problem = _problem(devices, num_blocks, network, encodings, positions)
    names = [*(device.id for device in devices), CLIENT]
    busy = np.array([[occupied_ms(network.link(a, b), positions, encodings) for b in names] for a in names])
    most = int(problem.capacity.max())
    stages = problem.hop[:, None] + np.arange(1, most + 1) * problem.block[:, None]
    paces = np.unique(np.concatenate([stages.ravel(), busy.ravel()]))

    def within(pace: float) -> Chain | None:
        """The fastest chain on which no stage takes longer than `pace`."""
        at_pace = np.floor((pace - problem.hop + _SMALL) / np.maximum(problem.block, _SMALL)).clip(0, num_blocks)
        capacity = np.minimum(problem.capacity, at_pace.astype(np.int64))
        links = np.where(busy <= pace + _SMALL, problem.links, np.inf)
        return cheapest_order(replace(problem, capacity=capacity, links=links))

    low, high = 0, len(paces) - 1  # the slowest of all stages allows every chain
    best = within(float(paces[high]))
    while low < high:
        middle = (low + high) // 2
        chain = within(float(paces[middle]))
        if chain is None:
            low = middle + 1
        else:
            best, high = chain, middle
    assert best is not None, "a model that fits has a chain"
    return _route(best, devices, network, encodings, positions)


def tokens_per_s(
    hops: Sequence[Hop],
    peers: Mapping[str, Peer],
    network: Network,
    *,
    encodings: Sequence[Encoding],
    sessions: int = 1,
    client_ms: float = 0.0,
) -> float:
    """Tokens per second of all sessions together, if each session decodes one token after the other without pause.

    Sessions are divided into groups that share each pass, with the best number of groups. A round takes the trip time
    of a group, or the time of all groups at the slowest stage, if that is longer. client_ms: time
    between a token's arrival and the next step.
    """
    best = 0.0
    for groups in range(1, sessions + 1):
        positions = -(-sessions // groups)
        one, two = (
            route_ms(hops, peers, network, positions=positions, encodings=encodings, in_flight=steps)
            for steps in (1, 2)
        )
        round_ms = max(one + client_ms, groups * (two - one))
        best = max(best, sessions * 1000 / round_ms)
    return best


def first_token_ms(
    hops: Sequence[Hop],
    peers: Mapping[str, Peer],
    network: Network,
    *,
    encodings: Sequence[Encoding],
    prompt: int,
    client_ms: float = 0.0,
) -> float:
    """Ms until the first token of a prompt, cut into equal steps of the best size among `CHUNK_SIZES`.

    The average step reads half of the prompt as context.
    """
    route = partial(route_ms, hops, peers, network, encodings=encodings, context=prompt // 2)
    counts = {-(-prompt // size) for size in CHUNK_SIZES}
    return client_ms + min(route(positions=-(-prompt // steps), in_flight=steps) for steps in counts)


def _problem(
    devices: Sequence[Device], num_blocks: int, network: Network, encodings: Sequence[Encoding], positions: int
) -> Problem:
    """Raises DoesNotFit and ValueError as `fastest_partition` does."""
    if len({device.id for device in devices}) != len(devices):
        raise ValueError("two devices have the same id")
    if (missing := num_blocks - sum(device.max_blocks for device in devices)) > 0:
        raise DoesNotFit(missing)
    names = [*(device.id for device in devices), CLIENT]
    return Problem(
        num_blocks,
        np.array([device.max_blocks for device in devices], dtype=np.int64).clip(0, num_blocks),
        np.array([block_ms(device.peer(0, 1), positions) for device in devices]),
        np.array([device.hop_ms for device in devices]),
        np.array([[transfer_ms(network.link(a, b), positions, encodings) for b in names] for a in names]),
    )


def _route(
    chain: Chain, devices: Sequence[Device], network: Network, encodings: Sequence[Encoding], positions: int
) -> Route:
    ends = np.cumsum([0, *chain.blocks]).tolist()
    hops = tuple(
        Hop(devices[device].id, start, end) for device, (start, end) in zip(chain.devices, pairwise(ends), strict=True)
    )
    peers = {device.id: device.peer(0, 1) for device in devices}
    return Route(hops, route_ms(hops, peers, network, positions=positions, encodings=encodings))
