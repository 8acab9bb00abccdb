"""The fastest chain of peers for a step.

A dynamic programme over (block boundary, peer) finds the cheapest sequence of peers; spans may be entered and left in
the middle. A peer holds one KV cache per session, so a route may visit it once only, which the programme alone does not
see: it would leave a slow peer for a fast one and come back. Where that happens, a best-first branch and bound (Land
and Doig, 1960) splits the case: the peer runs blocks before the visit of the other, or after it, or instead of it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count, groupby, pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scheduler.cost import block_ms, route_ms, transfer_ms
from scheduler.swarm import CLIENT, Hop, Network, Peer, Route, missing_blocks

NEAR_EQUAL: Final = 0.05
"""Routes that cost at most this share more than the best one count as equally good."""

MAX_PROGRAMMES: Final = 256
MAX_TRANSITIONS: Final = 2_000_000_000
"""How often the dynamic programme may run, and how many (block, peer, peer) it may look at in all those runs.

After that the best route found so far is taken, which may not be the optimum: a few seconds at most for any swarm.
"""

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class NoRoute(Exception):
    """No chain of peers runs all blocks.

    missing: ranges [start, end) of blocks that nobody serves (of the peers that were not excluded).
    full: ranges of blocks whose peers have no KV positions left for this session.
    """

    def __init__(self, missing: list[tuple[int, int]], full: list[tuple[int, int]]) -> None:
        super().__init__(f"blocks served by nobody: {missing}; blocks of full peers only: {full}")
        self.missing = missing
        self.full = full


def best_route(
    peers: Sequence[Peer],
    num_blocks: int,
    network: Network,
    *,
    positions: int = 1,
    bytes_per_position: float,
    kv_needed: int,
    exclude: Collection[str] = frozenset(),
    rng: random.Random | None = None,
) -> Route:
    """The route over all blocks on which a step of `positions` tokens is fastest.

    Peers in `exclude` and peers with fewer than `kv_needed` free positions are not used. With `rng` the choice among
    near-equal routes is random, so that clients that know the same facts spread; without it the best one is returned.
    Raises NoRoute, and ValueError if two peers have the same id.
    """
    by_id = {peer.id: peer for peer in peers}
    if len(by_id) != len(peers):
        raise ValueError("the ids of the peers differ")
    present = [peer for peer in peers if peer.id not in exclude]
    usable = [peer for peer in present if peer.kv_free >= kv_needed]
    if unserved := missing_blocks(usable, num_blocks):
        missing = missing_blocks(present, num_blocks)
        raise NoRoute(missing, [] if missing else unserved)
    blocks = np.arange(num_blocks)
    serves = np.array([(peer.start <= blocks) & (blocks < peer.end) for peer in usable])
    costs = _Costs.of(usable, network, positions, positions * bytes_per_position, rng)
    path = _best_path(costs, serves)
    hops: list[Hop] = []
    for index, run in groupby(path):
        start = hops[-1].end if hops else 0
        hops.append(Hop(usable[index].id, start, start + len(list(run))))
    cost_ms = route_ms(hops, by_id, network, positions=positions, bytes_per_position=bytes_per_position)
    return Route(tuple(hops), cost_ms)


@dataclass(frozen=True, slots=True)
class _Costs:
    """All costs in ms, peers by their index."""

    block: Floats  # [peers]: one block
    first: Floats  # [peers]: from the client into the peer, its queue included
    enter: Floats  # [peers, peers]: from one peer into another, its queue included
    leave: Floats  # [peers]: from the peer back to the client

    @classmethod
    def of(
        cls, peers: Sequence[Peer], network: Network, positions: int, num_bytes: float, rng: random.Random | None
    ) -> _Costs:
        # Raising the costs of each peer by a random share of at most NEAR_EQUAL makes the choice among near-equal
        # routes random, and the one chosen costs at most that share more than the best: noise only ever adds, and it
        # adds at most that share to the best route.
        noise = np.array([1.0 + NEAR_EQUAL * rng.random() if rng else 1.0 for _ in peers])
        queue = np.array([peer.queue_ms for peer in peers])
        index = {peer.id: position for position, peer in enumerate(peers)}
        transfer = np.full((len(peers), len(peers)), transfer_ms(network.unmeasured, num_bytes))
        for (sender, receiver), link in network.measured.items():
            if sender in index and receiver in index:
                transfer[index[sender], index[receiver]] = transfer_ms(link, num_bytes)
        np.fill_diagonal(transfer, np.inf)
        first = np.array([transfer_ms(network.link(CLIENT, peer.id), num_bytes) for peer in peers])
        return cls(
            block=noise * np.array([block_ms(peer, positions) for peer in peers]),
            first=noise * (first + queue),
            enter=noise * (transfer + queue),
            leave=np.array([transfer_ms(network.link(peer.id, CLIENT), num_bytes) for peer in peers]),
        )


def _best_path(costs: _Costs, serves: Flags) -> list[int]:
    """For each block the index of the peer that runs it; the blocks of each peer are contiguous."""
    limit = min(MAX_PROGRAMMES, MAX_TRANSITIONS // (serves.size * len(serves)))
    order = count(1)
    best_ms, best = np.inf, list[int]()
    open_cases: list[tuple[float, int, list[int], Flags]] = []
    new_cases = [serves]
    number = 0
    while True:
        for case in new_cases:
            bound, path = _cheapest_path(costs, case)
            if not path:
                continue
            valid = _without_second_visits(path)
            if (cost := _path_ms(costs, valid)) < best_ms:
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


def _path_ms(costs: _Costs, path: Sequence[int]) -> float:
    changes = sum(float(costs.enter[sender, peer]) for sender, peer in pairwise(path) if sender != peer)
    return float(costs.first[path[0]] + costs.block[path].sum() + costs.leave[path[-1]]) + changes


def _cheapest_path(costs: _Costs, serves: Flags) -> tuple[float, list[int]]:
    """The cheapest path and its cost when peers may be visited again; infinite cost if there is none."""
    num_peers, num_blocks = len(serves), serves.shape[1]
    everyone = np.arange(num_peers)
    follower = np.empty((num_blocks, num_peers), dtype=np.int64)  # who runs block b after this peer ran block b - 1
    remaining = costs.leave  # [peers]: cost from here to the client when this peer ran the block before
    run = remaining
    for block in range(num_blocks - 1, -1, -1):
        run = np.where(serves[:, block], costs.block + remaining, np.inf)
        runners = np.flatnonzero(serves[:, block])
        if len(runners) == 0:
            return np.inf, []
        switched = costs.enter[:, runners] + run[runners]
        cheapest = switched.argmin(axis=1)
        switch = switched[everyone, cheapest]
        follower[block] = np.where(run <= switch, everyone, runners[cheapest])
        remaining = np.minimum(run, switch)
    start = costs.first + run
    peer = int(start.argmin())
    cost = float(start[peer])
    path = [peer]
    for block in range(1, num_blocks):
        peer = int(follower[block, peer])
        path.append(peer)
    return cost, path


def _second_visit(path: Sequence[int]) -> tuple[int, int] | None:
    """A peer that the path visits twice and the first block that another runs in between, if there is one."""
    left_at: dict[int, int] = {}
    for block, (previous, peer) in enumerate(pairwise(path), start=1):
        if previous != peer:
            left_at[previous] = block
            if peer in left_at:
                return peer, left_at[peer]
    return None


def _without_second_visits(path: Sequence[int]) -> list[int]:
    """The path with everything between two visits of a peer given to that peer, whose span holds it all."""
    repaired = list(path)
    while (visit := _second_visit(repaired)) is not None:
        peer, block = visit
        last = len(repaired) - 1 - repaired[::-1].index(peer)
        repaired[block : last + 1] = [peer] * (last + 1 - block)
    return repaired
