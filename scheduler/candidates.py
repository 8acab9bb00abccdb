"""Which peers are worth planning with, where a swarm has too many for a table of all links between them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
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

FULL_MS: Final = 1e9
"""What a peer without memory for the session seems to cost: behind all others, but before nobody."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def candidates(
    peers: Sequence[Peer],
    blocks: tuple[int, int],
    network: Network,
    *,
    encodings: Sequence[Encoding],
    kv_needed: int,
    positions: int = 1,
    prompt: int = 0,
    source: str = CLIENT,
    target: str = CLIENT,
    exclude: Collection[str] = frozenset(),
    limit: int = LIMIT,
) -> list[Peer]:
    """At most `limit` of the peers, those that the best route over the blocks [start, end) most likely goes through.

    Who plans often with the same facts keeps a `Crowd`. Arguments as for `best_route`, with which the result is meant
    to be planned.
    """
    crowd = Crowd(peers, network, encodings=encodings, positions=positions, prompt=prompt)
    outside = [network.places[name] for name in (source, target) if name in network.places]
    return crowd.near(outside, blocks, kv_needed=kv_needed, exclude=exclude, limit=limit)


class Crowd:
    """The peers of a swarm as one client or another sees them, prepared once for many plans.

    Only the places in `network` are used, not its measured links. positions: of a usual step. prompt: positions that
    come before the first token.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        network: Network,
        *,
        encodings: Sequence[Encoding],
        positions: int = 1,
        prompt: int = 0,
    ) -> None:
        self._peers = peers
        self._index = {peer.id: index for index, peer in enumerate(peers)}
        self._start = np.array([peer.start for peer in peers], dtype=np.int64)
        self._end = np.array([peer.end for peer in peers], dtype=np.int64)
        self._kv_free = np.array([peer.kv_free for peer in peers], dtype=np.int64)
        self._block = np.array([block_ms(peer, positions, prompt) for peer in peers])
        nowhere = Place(Coordinate(), 0.0)
        places = [network.places.get(peer.id) for peer in peers]
        self._known = np.array([place is not None for place in places], dtype=bool)
        rates = np.array([(place or nowhere).bytes_per_ms for place in places])
        rates[rates == 0] = network.unmeasured.bytes_per_ms
        self._fixed = np.array([peer.queue_ms for peer in peers]) + _sending_ms(rates, positions, encodings, prompt)
        coordinates = [(place or nowhere).coordinate for place in places]
        self._vectors = np.array([place.vector for place in coordinates]).reshape(len(peers), DIMENSIONS)
        self._heights = np.array([place.height_ms for place in coordinates])
        self._raised = 1 + np.array([place.error for place in coordinates])
        self._unknown_ms = 2 * network.unmeasured.latency_ms
        self._serving: dict[tuple[int, int], tuple[Integers, Integers]] = {}

    def near(
        self,
        outside: Sequence[Place],
        blocks: tuple[int, int],
        *,
        kv_needed: int,
        exclude: Collection[str] = frozenset(),
        limit: int = LIMIT,
    ) -> list[Peer]:
        """At most `limit` peers for a chain over the blocks [start, end), in the order in which the crowd has them.

        Every block that some peer could run keeps such a peer, and every block that only full peers serve keeps one of
        those, so that `best_route` says the same about what is missing; `limit` is raised to one peer per block for
        that. Peers in `exclude` are left out.

        A peer is judged by the cheapest chain through it, predicted roughly and in time linear in the number of peers:
        the chain runs around one of a few anchors (where it begins and ends, and places far from each other), and a hop
        pays its own queue and passes and the way from the anchor to itself and back.

        outside: where the chain comes from and goes to, as far as that is known.
        """
        first, end = blocks
        present = (self._start < end) & (self._end > first)
        present[[self._index[name] for name in exclude if name in self._index]] = False
        limit = max(limit, end - first)
        if int(present.sum()) > limit:
            present = self._most_likely(present, outside, blocks, kv_needed, limit)
        return [self._peers[index] for index in map(int, np.flatnonzero(present))]

    def _most_likely(
        self, present: NDArray[np.bool_], outside: Sequence[Place], blocks: tuple[int, int], kv_needed: int, limit: int
    ) -> NDArray[np.bool_]:
        first, end = blocks
        starts, ends = self._start.clip(first, end) - first, self._end.clip(first, end) - first
        unusable = np.where(self._kv_free < kv_needed, FULL_MS, 0.0)
        unusable[~present] = np.inf
        through = self._chain_through(starts, ends, unusable, outside, blocks)

        # The best few of each block come first, so that no part of the model is left with one peer that may have died.
        rank = np.full(len(through), len(through))
        few = max(1, limit // (2 * (end - first)))
        serving, begins = self._by_block(starts, ends, blocks)
        for begin, behind in pairwise(begins.tolist()):
            there = serving[begin:behind]
            if len(there) > few:
                there = there[np.argpartition(through[there], few - 1)[:few]]
            there = there[np.argsort(through[there], kind="stable")]
            rank[there] = np.minimum(rank[there], np.arange(len(there)))
        order = np.flatnonzero(present)
        chosen = np.zeros(len(through), dtype=bool)
        chosen[order[np.lexsort((through[order], rank[order]))[:limit]]] = True
        return chosen

    def _chain_through(
        self,
        starts: Integers,
        ends: Integers,
        unusable: Floats,
        outside: Sequence[Place],
        blocks: tuple[int, int],
    ) -> Floats:
        """About how many ms the cheapest chain takes that goes through each of the peers `[peers]`."""
        lengths = ends - starts
        compute = self._block * lengths + self._fixed + unusable
        serving, begins = self._by_block(starts, ends, blocks)
        of_block = np.maximum(lengths, 1)
        ends_of_chain = [np.array(place.coordinate.vector) for place in outside]
        best = np.full(len(compute), np.inf)
        for anchor in _spread_out(self._vectors[self._known], ends_of_chain):
            away = np.where(
                self._known, (_distances(self._vectors, anchor) + self._heights) * self._raised, self._unknown_ms
            )
            hop = compute + away
            cheapest = np.zeros(blocks[1] - blocks[0])
            cheapest[np.diff(begins) > 0] = np.minimum.reduceat(
                (hop / of_block)[serving], begins[:-1][np.diff(begins) > 0]
            )
            cheapest[np.isinf(cheapest)] = 0.0
            before = np.concatenate([[0.0], np.cumsum(cheapest)])
            outer = sum(float(np.linalg.norm(point - anchor)) / 2 for point in ends_of_chain)
            best = np.minimum(best, outer + before[-1] - (before[ends] - before[starts]) + hop)
        return best

    def _by_block(self, starts: Integers, ends: Integers, blocks: tuple[int, int]) -> tuple[Integers, Integers]:
        """Who serves each block, one block after the other, and where each block's peers begin in that row."""
        if blocks not in self._serving:
            rows = [np.flatnonzero((starts <= block) & (block < ends)) for block in range(blocks[1] - blocks[0])]
            begins = np.cumsum([0, *(len(row) for row in rows)])
            self._serving[blocks] = np.concatenate(rows), begins
        return self._serving[blocks]


def _sending_ms(rates: Floats, positions: int, encodings: Sequence[Encoding], prompt: int) -> Floats:
    distinct, where = np.unique(rates, return_inverse=True)
    return np.array([occupied_ms(Link(0.0, float(rate)), positions, encodings, prompt) for rate in distinct])[where]


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
