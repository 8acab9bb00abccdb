"""The best chain of peers for a session."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Final

import numpy as np

from scheduler.chain_search import Costs, Floats, LinkCosts, cheapest_chain
from scheduler.cost import PROMPT_SHARE, block_joules, block_ms, route_ms
from scheduler.encoding import Encoding
from scheduler.network import CLIENT, LinkTable, Network
from scheduler.swarm import Hop, Peer, Route, missing_blocks
from scheduler.thrift import thriftiest_chain

NEAR_EQUAL: Final = 0.05
"""Routes that cost at most this share more than the best one count as equally good."""


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
    blocks: tuple[int, int],
    network: Network,
    *,
    encodings: Sequence[Encoding],
    kv_needed: int,
    positions: int = 1,
    prompt: int = 0,
    in_flight: int = 1,
    source: str = CLIENT,
    target: str = CLIENT,
    exclude: Collection[str] = frozenset(),
    energy_slowdown: float | None = None,
    rng: random.Random | None = None,
) -> Route:
    """The route over the blocks [start, end) on which `in_flight` steps of `positions` positions are done soonest.

    One step in flight asks for the least latency, as chat does; several for throughput, as batches and training do.

    With `energy_slowdown` the one with the least energy for a step, among those on which it takes at most so many times
    as long as on the fastest; see `scheduler.thrift`.

    Peers in `exclude` and peers with fewer than `kv_needed` free positions are not used. With `rng` the choice among
    near-equal routes is random, so that clients that know the same facts spread; without it the best one is returned.

    encodings: the codecs that a link may use. source, target: who sends to the first hop, and who gets from the last.
    prompt: positions that come before the first token, which count with `PROMPT_SHARE`.

    Raises NoRoute, and ValueError if two peers have the same id, or for energy with several steps in flight.
    """
    by_id = {peer.id: peer for peer in peers}
    if len(by_id) != len(peers):
        raise ValueError("the ids of the peers differ")
    if energy_slowdown is not None and in_flight > 1:
        raise ValueError("a route with little energy is planned for one step in flight")
    first, end = blocks
    present = [peer for peer in peers if peer.id not in exclude]
    usable = [peer for peer in present if peer.kv_free >= kv_needed]
    if unserved := missing_blocks(usable, end, first):
        missing = missing_blocks(present, end, first)
        raise NoRoute(missing, [] if missing else unserved)
    usable = [peer for peer in usable if peer.start < end and peer.end > first]
    names = tuple(sorted({CLIENT, source, target, *by_id}))  # of all peers, so that the table is filled once
    index = {name: position for position, name in enumerate(names)}
    members = np.array([index[peer.id] for peer in usable])
    table = network.table(names)
    transfer, occupied = _link_costs(table, positions, prompt, tuple(encodings))
    ends = index[source], members, index[target]
    # Raising the cost of each peer by a random share of at most NEAR_EQUAL makes the choice among near-equal routes
    # random, and the one chosen costs at most that share more than the best.
    raised = np.array([1.0 + NEAR_EQUAL * rng.random() if rng else 1.0 for _ in usable])
    noise = raised if energy_slowdown is None else 1.0  # else it is the energy that is raised: the bound on ms holds
    queue = np.array([peer.queue_ms for peer in usable]) * noise
    costs = Costs(
        start=np.array([peer.start for peer in usable]) - first,
        end=np.array([peer.end for peer in usable]) - first,
        block=np.array([block_ms(peer, positions, prompt) for peer in usable]) * noise,
        queue=queue,
        links=LinkCosts(transfer, *ends),
        busy=LinkCosts(occupied, *ends),
    )
    if energy_slowdown is None:
        path = cheapest_chain(costs, end - first, in_flight)
    else:
        joules = np.array([block_joules(peer, positions, prompt) for peer in usable]) * raised
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
    occupied = _soonest(table, positions, encodings)
    if prompt:
        occupied += PROMPT_SHARE * _soonest(table, prompt, encodings)
    return occupied + table.latency_ms, occupied


def _soonest(table: LinkTable, positions: int, encodings: tuple[Encoding, ...]) -> Floats:
    soonest = np.full_like(table.latency_ms, np.inf)
    for encoding in encodings:
        per_byte = positions * encoding.bytes_per_position
        constant = encoding.step_ms + positions * encoding.position_ms
        np.minimum(soonest, table.ms_per_byte * per_byte + constant, out=soonest)
    return soonest
