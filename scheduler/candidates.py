"""Which peers are worth planning with, where a swarm has too many for a table of all links between them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scheduler.coordinates import DIMENSIONS, Coordinate
from scheduler.cost import block_ms, occupied_ms
from scheduler.encoding import Encoding
from scheduler.network import CLIENT, Link, Network, Place
from scheduler.swarm import Peer

LIMIT: Final = 300
"""Peers that a plan takes about 10 ms for on one CPU core; what the others would have added: docs/simulation.md."""

ANCHORS: Final = 8
"""Places around which a chain might run."""

Floats = NDArray[np.float64]


def candidates(
    peers: Sequence[Peer],
    blocks: tuple[int, int],
    network: Network,
    *,
    encodings: Sequence[Encoding],
    kv_needed: int,
    positions: int = 1,
    source: str = CLIENT,
    target: str = CLIENT,
    exclude: Collection[str] = frozenset(),
    limit: int = LIMIT,
) -> list[Peer]:
    """At most `limit` of the peers, those that the best route over the blocks [start, end) most likely goes through.

    Every block that some peer could run keeps such a peer, and every block that only full peers serve keeps one of
    those, so that `best_route` says the same about what is missing; `limit` is raised to one peer per block for that.

    A peer is judged by the cheapest chain through it, foretold roughly and in time linear in the number of peers: the
    chain runs around one of a few anchors (where the client is, and places far from each other), and a hop pays its own
    queue and passes and the way from the anchor to itself and back. Only coordinates are used for that, not the
    measured links. The order of the result is that of `peers`.

    Arguments as for `best_route`, with which the result is meant to be planned.
    """
    first, end = blocks
    present = [peer for peer in peers if peer.start < end and peer.end > first and peer.id not in exclude]
    limit = max(limit, end - first)
    if len(present) <= limit:
        return present
    starts = np.array([max(peer.start, first) for peer in present]) - first
    ends = np.array([min(peer.end, end) for peer in present]) - first
    full = np.array([peer.kv_free < kv_needed for peer in present])
    through = _chain_through(present, starts, ends, network, (source, target), positions, encodings)
    through[full] += 1e12  # behind all others, but before nobody

    # The best few of each block come first, so that no part of the model is left with one peer that may have died.
    rank = np.full(len(present), len(present))
    order = np.argsort(through, kind="stable")
    few = max(1, limit // (2 * (end - first)))
    for block in range(end - first):
        serving = order[(starts[order] <= block) & (block < ends[order])][:few]
        rank[serving] = np.minimum(rank[serving], np.arange(len(serving)))
    chosen = np.lexsort((through, rank))[:limit]
    return [present[index] for index in np.sort(chosen)]


def _chain_through(
    peers: Sequence[Peer],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    network: Network,
    outside: tuple[str, str],
    positions: int,
    encodings: Sequence[Encoding],
) -> Floats:
    """About how many ms the cheapest chain takes that goes through each of the peers `[peers]`."""
    lengths = ends - starts
    compute = np.array([block_ms(peer, positions) for peer in peers]) * lengths
    compute += np.array([peer.queue_ms for peer in peers])
    nowhere = Place(Coordinate(), 0.0)
    places = [network.places.get(peer.id) for peer in peers]
    known = np.array([place is not None for place in places])
    rates = np.array([place.bytes_per_ms if place else 0.0 for place in places])
    rates[rates == 0] = network.unmeasured.bytes_per_ms
    compute += _sending_ms(rates, positions, encodings)
    coordinates = [(place or nowhere).coordinate for place in places]
    vectors = np.array([coordinate.vector for coordinate in coordinates]).reshape(len(peers), DIMENSIONS)
    heights = np.array([coordinate.height_ms for coordinate in coordinates])
    raised = 1 + np.array([coordinate.error for coordinate in coordinates])

    ends_of_chain = [np.array(network.places[name].coordinate.vector) for name in outside if name in network.places]
    anchors = _spread_out(vectors[known], ends_of_chain)
    best = np.full(len(peers), np.inf)
    for anchor in anchors:
        away = np.where(known, (_distances(vectors, anchor) + heights) * raised, 2 * network.unmeasured.latency_ms)
        hop = compute + away
        per_block = hop / lengths
        cheapest = np.array(
            [
                per_block[(starts <= block) & (block < ends)].min(initial=np.inf)
                for block in range(int(ends.max(initial=0)))
            ]
        )
        cheapest[np.isinf(cheapest)] = 0.0
        before = np.concatenate([[0.0], np.cumsum(cheapest)])
        outer = sum(float(np.linalg.norm(point - anchor)) / 2 for point in ends_of_chain)
        best = np.minimum(best, outer + before[-1] - (before[ends] - before[starts]) + hop)
    return best


def _sending_ms(rates: Floats, positions: int, encodings: Sequence[Encoding]) -> Floats:
    distinct, where = np.unique(rates, return_inverse=True)
    return np.array([occupied_ms(Link(0.0, float(rate)), positions, encodings) for rate in distinct])[where]


def _spread_out(vectors: Floats, first: Sequence[Floats]) -> list[Floats]:
    """The points in `first`, then points far from all chosen before (Gonzalez, 1985: farthest-first traversal)."""
    anchors = list(first) or [np.zeros(DIMENSIONS)]
    if len(vectors):
        apart = np.min([_distances(vectors, anchor) for anchor in anchors], axis=0)
        while len(anchors) < ANCHORS:
            farthest = vectors[int(apart.argmax())]
            anchors.append(farthest)
            apart = np.minimum(apart, _distances(vectors, farthest))
    return anchors


def _distances(vectors: Floats, point: Floats) -> Floats:
    return np.sqrt(((vectors - point) ** 2).sum(axis=1))
