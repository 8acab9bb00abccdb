"""The best chain of peers for a session."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, groupby, pairwise
from typing import Final

import numpy as np

from scheduler.cost import PROMPT_SHARE, Encoding, block_joules, block_ms, route_ms
from scheduler.facts import CLIENT, Flags, Floats, Hop, Integers, LinkTable, Network, Peer, Route, missing_blocks

MAX_PROGRAMMES: Final = 256
MAX_TRANSITIONS: Final = 2_000_000_000
"""Maximum number of runs of the dynamic program, and maximum number of (block, peer, peer) triples that all runs
together examine; this takes a few seconds. At a limit the search ends with the best route found so far, which may not
be optimal."""

MAX_STAGES: Final = 64
EXACT_STAGES_PEERS: Final = 64
COARSE: Final = 0.05
"""`MAX_STAGES` limits how many bounds of the slowest stage are tried when several steps are in flight. With more than
`EXACT_STAGES_PEERS` peers, each bound is lower than the one before by the share `COARSE`, so that the chain found may
cost this share more than the best chain."""

Path = list[int]  # for each block the index of the peer that runs it


@dataclass(frozen=True, eq=False, slots=True)
class LinkCosts:
    """Costs of a step on the links that a route may use, from a table of all links `[devices, devices]`."""

    table: Floats
    source: int  # the first sender
    members: Integers  # indices of the peers in the table, `[peers]`
    target: int  # the last receiver

    @property
    def from_source(self) -> Floats:
        """Costs from the source to each peer, `[peers]`."""
        return self.table[self.source, self.members]

    @property
    def leave(self) -> Floats:
        """Costs from each peer to the target, `[peers]`."""
        return self.table[self.members, self.target]

    def between(self, senders: Integers, receivers: Integers) -> Floats:
        """Costs `[senders, receivers]`, a copy."""
        return self.table.take(self.members[senders], axis=0).take(self.members[receivers], axis=1)

    def along(self, path: Path) -> Floats:
        """Costs of the links of a path in order, from source to target."""
        stations = [self.source, *(int(self.members[peer]) for peer, _ in groupby(path)), self.target]
        return self.table[stations[:-1], stations[1:]]


@dataclass(frozen=True, eq=False, slots=True)
class Costs:
    """All costs in ms, `[peers]`. Blocks are counted from the first of the route."""

    start: Integers
    end: Integers
    block: Floats  # time of one block
    queue: Floats  # wait before the first block
    links: LinkCosts  # time from sending a step to its arrival
    busy: LinkCosts  # time for which a step occupies a link


def cheapest_chain(costs: Costs, num_blocks: int, in_flight: int) -> Path:
    """The path on which `in_flight` steps, sent at the same time, finish soonest. Every block must have a peer.

    The first step takes the sum of a path's costs; each further step takes the path's slowest stage.
    """
    path = _best_path(costs, num_blocks, np.inf)
    if in_flight == 1:
        return path
    step = 1e-9 if len(costs.block) <= EXACT_STAGES_PEERS else COARSE
    best_ms, best = np.inf, path
    for _ in range(MAX_STAGES):
        total, slowest = sum_of(costs, path), _slowest_of(costs, path)
        if total + (in_flight - 1) * slowest < best_ms:
            best_ms, best = total + (in_flight - 1) * slowest, path
        path = _best_path(costs, num_blocks, slowest * (1 - step))
        if not path or sum_of(costs, path) >= best_ms:
            break
    return best


def _best_path(costs: Costs, num_blocks: int, slowest: float) -> Path:
    """Of the paths on which no stage takes longer than `slowest`, the one with the least sum; empty if none is
    found."""
    blocks = np.arange(num_blocks)
    serves = (costs.start[:, None] <= blocks) & (blocks < costs.end[:, None])
    transitions = MAX_TRANSITIONS if slowest == np.inf else MAX_TRANSITIONS // 16
    limit = min(MAX_PROGRAMMES, transitions // (serves.size * len(serves)))
    order = count(1)
    best_ms, best = np.inf, Path()
    open_cases: list[tuple[float, int, Path, Flags]] = []
    new_cases = [serves]
    number = 0
    while True:
        for case in new_cases:
            bound, path = _least_sum(costs, case) if slowest == np.inf else _least_capped_sum(costs, case, slowest)
            if not path:
                continue
            valid = _without_second_visits(path)
            if (cost := sum_of(costs, valid)) < best_ms and _slowest_of(costs, valid) <= slowest:
                best_ms, best = cost, valid
            number = next(order)
            heapq.heappush(open_cases, (bound, number, path, case))
        if not open_cases or number >= limit:
            return best
        bound, _, path, case = heapq.heappop(open_cases)
        visit = _second_visit(path)
        if visit is None or bound >= best_ms:
            return best
        peer, block = visit
        before, after, instead = case.copy(), case.copy(), case.copy()
        before[peer, block:] = False
        after[peer, : block + 1] = False
        instead[:, block] = False
        instead[peer, block] = True
        new_cases = [before, after, instead]


def sum_of(costs: Costs, path: Path) -> float:
    queues = costs.queue[[peer for peer, _ in groupby(path)]]
    return float(costs.links.along(path).sum() + queues.sum() + costs.block[path].sum())


def _slowest_of(costs: Costs, path: Path) -> float:
    hops = max(float(costs.queue[peer] + len(list(run)) * costs.block[peer]) for peer, run in groupby(path))
    return max(hops, float(costs.busy.along(path).max()))


def _least_sum(costs: Costs, serves: Flags) -> tuple[float, Path]:
    """The least sum and its path, which may visit a peer again; the sum is infinite if there is no path."""
    num_peers, num_blocks = serves.shape
    runners = [np.flatnonzero(serves[:, block]) for block in range(num_blocks)]
    if any(len(peers) == 0 for peers in runners):
        return np.inf, []
    follower = np.zeros((num_blocks, num_peers), dtype=np.int64)  # the peer of block b if this peer ran block b - 1
    run = np.full(num_peers, np.inf)  # the cost from here to the end if the peer runs this block
    run[runners[-1]] = costs.block[runners[-1]] + costs.links.leave[runners[-1]]
    for block in range(num_blocks - 1, 0, -1):
        senders, receivers = runners[block - 1], runners[block]
        switched = costs.links.between(senders, receivers)
        switched += costs.queue[receivers] + run[receivers]
        cheapest = switched.argmin(axis=1)
        switch = switched[np.arange(len(senders)), cheapest]
        stay = run[senders]
        follower[block, senders] = np.where(stay <= switch, senders, receivers[cheapest])
        run = np.full(num_peers, np.inf)
        run[senders] = costs.block[senders] + np.minimum(stay, switch)
    start = costs.links.from_source + costs.queue + run
    peer = int(start.argmin())
    cost = float(start[peer])
    path = [peer]
    for block in range(1, num_blocks):
        peer = int(follower[block, peer])
        path.append(peer)
    return cost, path


def _least_capped_sum(costs: Costs, serves: Flags, slowest: float) -> tuple[float, Path]:
    """`_least_sum` over the paths on which no stage takes longer than `slowest`."""
    num_peers, num_blocks = serves.shape
    links, busy = costs.links, costs.busy
    # entry[b][p]: the remaining cost when p's visit begins at block b. onward[b][p]: when it has ended before b.
    entry = np.full((num_blocks + 1, num_peers), np.inf)
    onward = np.full((num_blocks + 1, num_peers), np.inf)
    leave_at = np.zeros((num_blocks, num_peers), dtype=np.int64)
    follower = np.zeros((num_blocks + 1, num_peers), dtype=np.int64)
    onward[num_blocks] = np.where(busy.leave <= slowest, links.leave, np.inf)
    for block in range(num_blocks - 1, -1, -1):
        running = np.flatnonzero(serves[:, block])
        staying = running
        for end in range(block + 1, num_blocks + 1):
            stage = costs.queue[staying] + (end - block) * costs.block[staying]
            staying, stage = staying[stage <= slowest], stage[stage <= slowest]
            total = stage + onward[end, staying]
            better = total < entry[block, staying]
            entry[block, staying[better]] = total[better]
            leave_at[block, staying[better]] = end
            if end < num_blocks:
                staying = staying[serves[staying, end]]
        senders = np.flatnonzero(serves[:, block - 1]) if block else running[:0]
        if len(senders) and len(running):
            totals = links.between(senders, running) + entry[block, running]
            totals[busy.between(senders, running) > slowest] = np.inf
            totals[senders[:, None] == running[None, :]] = np.inf
            cheapest = totals.argmin(axis=1)
            onward[block, senders] = totals[np.arange(len(senders)), cheapest]
            follower[block, senders] = running[cheapest]
    start = np.where(busy.from_source <= slowest, links.from_source + entry[0], np.inf)
    peer = int(start.argmin())
    cost = float(start[peer])
    path = Path()
    while np.isfinite(cost) and len(path) < num_blocks:
        end = int(leave_at[len(path), peer])
        path += [peer] * (end - len(path))
        if end < num_blocks:
            peer = int(follower[end, peer])
    return cost, path


def _second_visit(path: Sequence[int]) -> tuple[int, int] | None:
    """A peer that the path visits twice, and the first block between the visits that another peer runs; None: no such
    peer."""
    left_at: dict[int, int] = {}
    for block, (previous, peer) in enumerate(pairwise(path), start=1):
        if previous != peer:
            left_at[previous] = block
            if peer in left_at:
                return peer, left_at[peer]
    return None


def _without_second_visits(path: Sequence[int]) -> Path:
    """The path in which each peer also runs all blocks between its two visits, which its span contains."""
    repaired = list(path)
    while (visit := _second_visit(repaired)) is not None:
        peer, block = visit
        last = len(repaired) - 1 - repaired[::-1].index(peer)
        repaired[block : last + 1] = [peer] * (last + 1 - block)
    return repaired


ENERGY_SLOWDOWN: Final = 1.5  # how many times as long as on the fastest route a step may take, by default
MAX_WEIGHTS: Final = 8  # maximum number of weights that are tried; random swarms needed at most four
_ENERGY_ALONE: Final = 1e6  # weight of energy in the first chain: among chains with equal energy the fastest one wins
_SMALL: Final = 1e-9


def thriftiest_chain(costs: Costs, joules: Floats, num_blocks: int, slowdown: float) -> Path:
    """The path with the least energy on which a step takes at most `slowdown` times as long as on the fastest path.

    The search minimizes weighted sums of time and energy, so it may miss a chain with a little less energy. The result
    meets the time bound, and needs no more energy than the fastest chain.

    joules: energy of one block at each peer, `[peers]`.
    """

    def with_weight(weight: float) -> tuple[Path, float, float]:
        path = cheapest_chain(replace(costs, block=costs.block + weight * joules), num_blocks, 1)
        return path, sum_of(costs, path), float(joules[path].sum())

    within, within_ms, within_joules = with_weight(0.0)
    most_ms = within_ms * max(slowdown, 1.0) * (1 + _SMALL)
    alone = _ENERGY_ALONE * max(within_ms, _SMALL) / max(within_joules, _SMALL)
    beyond, beyond_ms, beyond_joules = with_weight(alone)
    if beyond_ms <= most_ms:
        return beyond
    for _ in range(MAX_WEIGHTS):
        saved = within_joules - beyond_joules
        if saved <= _SMALL * within_joules:
            break
        weight = (beyond_ms - within_ms) / saved
        path, path_ms, path_joules = with_weight(weight)
        if path_ms + weight * path_joules >= (within_ms + weight * within_joules) * (1 - _SMALL):
            break  # no chain lies between the two
        if path_ms <= most_ms:
            within, within_ms, within_joules = path, path_ms, path_joules
        else:
            beyond_ms, beyond_joules = path_ms, path_joules
    return within


NEAR_EQUAL: Final = 0.05  # routes that cost at most this share more than the best one count as equally good


class NoRoute(Exception):
    """No chain of peers runs all blocks.

    missing: ranges [start, end) of blocks that no peer serves (excluded peers do not count). full: ranges of blocks
    whose peers have too few free KV positions for this session.
    """

    def __init__(self, missing: list[tuple[int, int]], full: list[tuple[int, int]]) -> None:
        super().__init__(f"blocks served by nobody: {missing}; blocks of full peers only: {full}")
        self.missing = missing
        self.full = full


def best_route(
    peers: Sequence[Peer],
    blocks: tuple[int, int],
    network: Network,
    *,
    encodings: Sequence[Encoding],
    kv_needed: int,
    positions: int = 1,
    prompt: int = 0,
    context: int = 0,
    in_flight: int = 1,
    source: str = CLIENT,
    target: str = CLIENT,
    energy_slowdown: float | None = None,
    rng: random.Random | None = None,
) -> Route:
    """The route over the blocks [start, end) on which `in_flight` steps of `positions` positions finish soonest.

    With one step in flight the route has the least latency, as for chat; with several the highest throughput, as for
    batches and training.
    `energy_slowdown` selects the route with the least energy per step instead, see `thriftiest_chain`.

    Peers with fewer than `kv_needed` free positions are not used. With `rng` the choice among near-equal routes is
    random, so that clients with the same facts spread; without it the best route is returned.

    encodings: the codecs that a link may use. source, target: the sender to the first hop, and the last receiver.
    prompt: positions before the first token, which count with `PROMPT_SHARE`. context: positions that the session then
    holds, see `scheduler.cost.block_ms`.

    Raises NoRoute, and ValueError if two peers have the same id, or if `energy_slowdown` is given with several steps in
    flight.
    """
    by_id = {peer.id: peer for peer in peers}
    if len(by_id) != len(peers):
        raise ValueError("two peers have the same id")
    if energy_slowdown is not None and in_flight > 1:
        raise ValueError("with energy_slowdown, a route is planned for one step in flight")
    first, end = blocks
    usable = [peer for peer in peers if peer.kv_free >= kv_needed]
    if unserved := missing_blocks(usable, end, first):
        missing = missing_blocks(peers, end, first)
        raise NoRoute(missing, [] if missing else unserved)
    usable = [peer for peer in usable if peer.start < end and peer.end > first]
    names = tuple(sorted({CLIENT, source, target, *by_id}))  # all peers, so that the table is filled once
    index = {name: position for position, name in enumerate(names)}
    members = np.array([index[peer.id] for peer in usable])
    table = network.table(names)
    transfer, occupied = _link_costs(table, positions, prompt, tuple(encodings))
    ends = index[source], members, index[target]
    # Raising the cost of each peer by a random share of at most NEAR_EQUAL makes the choice among near-equal routes
    # random. The chosen route costs at most that share more than the best one.
    raised = np.array([1.0 + NEAR_EQUAL * rng.random() if rng else 1.0 for _ in usable])
    # With an energy objective the energy is raised instead, so that the bound on ms holds.
    noise = raised if energy_slowdown is None else 1.0
    costs = Costs(
        start=np.array([peer.start for peer in usable]) - first,
        end=np.array([peer.end for peer in usable]) - first,
        block=np.array([block_ms(peer, positions, prompt, context) for peer in usable]) * noise,
        queue=np.array([peer.queue_ms for peer in usable]) * noise,
        links=LinkCosts(transfer, *ends),
        busy=LinkCosts(occupied, *ends),
    )
    if energy_slowdown is None:
        path = cheapest_chain(costs, end - first, in_flight)
    else:
        joules = np.array([block_joules(peer, positions, prompt, context) for peer in usable]) * raised
        path = thriftiest_chain(costs, joules, end - first, energy_slowdown)
    hops: list[Hop] = []
    for position, run in groupby(path):
        start = hops[-1].end if hops else first
        hops.append(Hop(usable[position].id, start, start + len(list(run))))
    cost = route_ms(
        hops,
        by_id,
        network,
        positions=positions,
        encodings=encodings,
        prompt=prompt,
        context=context,
        in_flight=in_flight,
        source=source,
        target=target,
    )
    return Route(tuple(hops), cost)


@lru_cache(maxsize=4)
def _link_costs(
    table: LinkTable, positions: int, prompt: int, encodings: tuple[Encoding, ...]
) -> tuple[Floats, Floats]:
    """`transfer_ms` and `occupied_ms` of a step on each link, `[senders, receivers]`."""
    occupied = _fastest_occupied_ms(table, positions, encodings)
    if prompt:
        occupied += PROMPT_SHARE * _fastest_occupied_ms(table, prompt, encodings)
    return occupied + table.latency_ms, occupied


def _fastest_occupied_ms(table: LinkTable, positions: int, encodings: tuple[Encoding, ...]) -> Floats:
    soonest = np.full_like(table.latency_ms, np.inf)
    for encoding in encodings:
        per_byte = positions * encoding.bytes_per_position
        constant = encoding.step_ms + positions * encoding.position_ms
        np.minimum(soonest, table.ms_per_byte * per_byte + constant, out=soonest)
    return soonest
