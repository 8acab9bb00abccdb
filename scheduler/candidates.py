"""The choice of peers to plan with, for swarms that are too large for a table of all links between peers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from copy import copy
from itertools import pairwise
from math import ceil
from typing import Final

import numpy as np

from scheduler.batching import PASS_POSITIONS
from scheduler.cost import PROMPT_SHARE, Encoding, past_ms
from scheduler.facts import DIMENSIONS, PASS_SIZES, Coordinate, Flags, Floats, Integers, Network, NetworkPlace, Peer

# Maximum number of candidates. A search over as many peers takes about 5 ms on one CPU core; docs/simulation.md shows
# what more candidates would gain.
LIMIT: Final = 300
ANCHORS: Final = 8  # points around which a chain might run
KEPT_PARTS: Final = 8  # ranges of blocks for which an index caches who serves each block
FULL_MS: Final = 1e9  # cost of a peer without memory for the session, which puts the peer after all others


def measurement_rounds(peers: int) -> tuple[int, ...]:
    """The numbers of peers, by rounds, to which a client measures its links before its first plan (docs/scheduling.md).

    The first round measures links to any peers, which locates the client; two more measure links to likely peers. Each
    measurement takes 2 KB.
    """
    likely = min(16 + peers // 120, 34)
    return 32, likely, likely


class CandidateIndex:
    """The peers of a swarm, prepared once for many plans. Of `network`, only the places of devices are used."""

    def __init__(self, peers: Sequence[Peer], network: Network) -> None:
        self._peers = list(peers)
        self._index = {peer.id: index for index, peer in enumerate(peers)}
        self._start = np.array([peer.start for peer in peers], dtype=np.int64)
        self._end = np.array([peer.end for peer in peers], dtype=np.int64)
        self._load = np.array([(peer.queue_ms, peer.batch, peer.kv_free) for peer in peers]).reshape(len(peers), 3)
        self._speed = np.array([peer.speed.block_ms for peer in peers]).reshape(len(peers), len(PASS_SIZES))
        nowhere = NetworkPlace(Coordinate(), 0.0)
        places = [network.places.get(peer.id) for peer in peers]
        self._known = np.array([place is not None for place in places], dtype=bool)
        self._rates = np.array([(place or nowhere).bytes_per_ms for place in places])
        self._rates[self._rates == 0] = network.unmeasured.bytes_per_ms
        coordinates = [(place or nowhere).coordinate for place in places]
        vectors = np.array([place.vector for place in coordinates]).reshape(len(peers), DIMENSIONS)
        self._vectors = np.ascontiguousarray(vectors.T)
        self._heights = np.array([place.height_ms for place in coordinates])
        self._raised = 1 + np.array([place.error for place in coordinates])
        self._unknown_ms = 2 * network.unmeasured.latency_ms
        self._serving: dict[tuple[int, int], tuple[Integers, Integers]] = {}

    def corrected(self, peers: Iterable[Peer]) -> CandidateIndex:
        """A copy of the index with new facts about some peers. Raises ValueError if a peer's blocks differ."""
        crowd = copy(self)
        crowd._peers, crowd._load, crowd._speed = list(self._peers), self._load.copy(), self._speed.copy()
        indices: list[int] = []
        for peer in peers:
            index = self._index[peer.id]
            if (peer.start, peer.end) != (self._peers[index].start, self._peers[index].end):
                raise ValueError(f"{peer.id} serves other blocks than when the index was made")
            crowd._peers[index] = peer
            indices.append(index)
        if indices:
            anew = [crowd._peers[index] for index in indices]
            crowd._load[indices] = [(peer.queue_ms, peer.batch, peer.kv_free) for peer in anew]
            crowd._speed[indices] = [peer.speed.block_ms for peer in anew]
        return crowd

    def near(
        self,
        outside: Sequence[NetworkPlace],
        blocks: tuple[int, int],
        *,
        encodings: Sequence[Encoding],
        kv_needed: int,
        positions: int = 1,
        prompt: int = 0,
        context: int = 0,
        exclude: Collection[str] = frozenset(),
        limit: int = LIMIT,
        everywhere: bool = True,
    ) -> list[Peer]:
        """At most `limit` peers for a chain over the blocks [start, end), in the order of the index.

        Each block keeps a peer that could run it; a block that only full peers serve keeps a full peer, so that
        `best_route` reports the same missing blocks. With `everywhere`, `limit` is raised to at least one peer per
        block, so that every block can keep one. Peers in `exclude` are left out.

        A peer is rated by the cheapest chain through it, predicted roughly and in time linear in the number of peers:
        the chain runs around one of a few anchors (its two ends, and places far from each other), and the cost
        of a hop is its queue wait, its passes and the round trip between the anchor and the peer.

        outside: known places where the chain begins and ends. Other arguments: see `best_route`.
        """
        first, end = blocks
        present = (self._start < end) & (self._end > first)
        present[[self._index[name] for name in exclude if name in self._index]] = False
        limit = max(limit, end - first) if everywhere else limit
        if int(present.sum()) > limit:
            queue, batch, kv_free = self._load.T
            block = _block_ms(self._speed, batch, positions, prompt)
            if context:
                block += np.array([past_ms(peer, positions, prompt, context) for peer in self._peers])
            fixed = queue + _sending_ms(self._rates, positions, encodings, prompt)
            fixed += np.where(kv_free < kv_needed, FULL_MS, 0.0)
            fixed[~present] = np.inf
            present = self._most_likely(present, outside, blocks, block, fixed, limit)
        return [self._peers[index] for index in map(int, np.flatnonzero(present))]

    def beside_silent(self, silent: Collection[str], answered: Collection[str]) -> set[str]:
        """Peers that are probably silent, too: each has two silent peers nearer to it than any peer that answered.

        One silent peer says little about others, but a whole site may lose power, and a region its network link. Peers
        without a known place are never returned. If no peer answered, the result is empty.
        """
        lost, alive = (
            self._vectors[
                :, [index for name in names if (index := self._index.get(name)) is not None and self._known[index]]
            ]
            for names in (silent, answered)
        )
        if lost.shape[1] < 2 or not alive.shape[1]:
            return set()
        second = np.partition(_squares(self._vectors, lost), 1, axis=1)[:, 1]
        told = self._known & (second < _squares(self._vectors, alive).min(axis=1))
        return {self._peers[index].id for index in map(int, np.flatnonzero(told))}.difference(answered)

    def _most_likely(
        self,
        present: Flags,
        outside: Sequence[NetworkPlace],
        blocks: tuple[int, int],
        block: Floats,
        fixed: Floats,
        limit: int,
    ) -> Flags:
        first, end = blocks
        starts, ends = self._start.clip(first, end) - first, self._end.clip(first, end) - first
        compute = block * (ends - starts) + fixed

        # Approximate ms of the cheapest chain through each of the peers `[peers]`.
        through = np.full(len(compute), np.inf)
        of_block = np.maximum(ends - starts, 1)
        least = _LeastOfBlocks(starts, ends, end - first)
        ends_of_chain = [np.array(place.coordinate.vector) for place in outside]
        for anchor, apart in _farthest_points(self._vectors, self._known & present, ends_of_chain):
            away = np.where(self._known, (apart + self._heights) * self._raised, self._unknown_ms)
            hop = compute + away
            cheapest = least.least_of(hop / of_block)
            cheapest[np.isinf(cheapest)] = 0.0
            before = np.concatenate([[0.0], np.cumsum(cheapest)])
            outer = sum(float(np.linalg.norm(point - anchor)) / 2 for point in ends_of_chain)
            through = np.minimum(through, outer + before[-1] - (before[ends] - before[starts]) + hop)

        # The best peers of each block come first, so that every block keeps some peers.
        others = np.ones(len(through), dtype=bool)
        few = max(1, limit // (2 * (end - first)))
        serving, begins = self._by_block(starts, ends, blocks)
        costs = through[serving]
        for begin, behind in pairwise(begins.tolist()):
            there, cost = serving[begin:behind], costs[begin:behind]
            if len(there) > few:
                there = there[cost.argmin() if few == 1 else cost.argpartition(few - 1)[:few]]
            others[there] = False
        order = np.flatnonzero(present)
        chosen = np.zeros(len(through), dtype=bool)
        chosen[order[np.lexsort((through[order], others[order]))[:limit]]] = True
        return chosen

    def _by_block(self, starts: Integers, ends: Integers, blocks: tuple[int, int]) -> tuple[Integers, Integers]:
        """The peers of each block, block by block in one array, and where each block's peers begin in that array."""
        found = self._serving.get(blocks)
        if found is None:
            rows = [np.flatnonzero((starts <= block) & (block < ends)) for block in range(blocks[1] - blocks[0])]
            found = np.concatenate(rows), np.cumsum([0, *(len(row) for row in rows)])
            if len(self._serving) >= KEPT_PARTS:
                self._serving.clear()
            self._serving[blocks] = found
        return found


class _LeastOfBlocks:
    """Finds the least value among the spans `[start, end)` that contain each of `count` blocks.

    Each span is covered by two ranges whose length is the largest power of two that fits, so that each value is read
    only twice.
    """

    def __init__(self, starts: Integers, ends: Integers, count: int) -> None:
        self._spans = np.flatnonzero(ends > starts)
        starts, ends = starts[self._spans], ends[self._spans]
        level = np.frexp(ends - starts)[1].astype(np.int64) - 1
        self._shape = int(level.max(initial=0)) + 1, count
        self._first, self._last = level * count + starts, level * count + ends - (1 << level)

    def least_of(self, values: Floats) -> Floats:
        """The least values, `[count]`; infinite for a block that no span contains."""
        table = np.full(self._shape, np.inf)
        for places in (self._first, self._last):
            np.minimum.at(table.reshape(-1), places, values[self._spans])
        for level in range(len(table) - 1, 0, -1):
            half = 1 << (level - 1)
            np.minimum(table[level - 1], table[level], out=table[level - 1])
            np.minimum(table[level - 1, half:], table[level, :-half], out=table[level - 1, half:])
        return table[0]


def _block_ms(speed: Floats, batch: Floats, positions: int, prompt: int) -> Floats:
    """`scheduler.cost.block_ms` for all peers at once."""
    token_ms = _speed_at(speed, positions + batch)
    if not prompt:
        return token_ms
    passes = ceil(prompt / PASS_POSITIONS)
    return token_ms + PROMPT_SHARE * passes * _speed_at(speed, np.full(1, prompt / passes))


def _speed_at(speed: Floats, positions: Floats) -> Floats:
    """`Speed.block_ms_at` for all peers."""
    sizes = np.array(PASS_SIZES, dtype=np.float64)
    above = np.searchsorted(sizes, positions).clip(1, len(sizes) - 1)
    low, high = sizes[above - 1], sizes[above]
    share = ((positions - low) / (high - low)).clip(0.0, 1.0)
    rows = np.arange(len(speed))
    between = speed[rows, above - 1] * (1 - share) + speed[rows, above] * share
    return between * np.maximum(positions / sizes[-1], 1.0)


def _sending_ms(rates: Floats, positions: int, encodings: Sequence[Encoding], prompt: int) -> Floats:
    """`scheduler.cost.occupied_ms` for links with these rates."""
    step_ms = np.minimum.reduce(
        [each.step_ms + positions * (each.position_ms + each.bytes_per_position / rates) for each in encodings]
    )
    return step_ms + PROMPT_SHARE * _sending_ms(rates, prompt, encodings, 0) if prompt else step_ms


def _farthest_points(vectors: Floats, among: Flags, first: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
    """The points in `first`, then points of `among` that are far from the earlier ones, each with its distances to all.

    Source: Gonzalez, 1985 (farthest-first traversal).
    """
    anchors = [(point, _distances(vectors, point)) for point in first or [np.zeros(DIMENSIONS)]]
    if among.any():
        apart = np.where(among, np.minimum.reduce([distances for _, distances in anchors]), -1.0)
        while len(anchors) < ANCHORS:
            farthest = vectors[:, int(apart.argmax())]
            anchors.append((farthest, _distances(vectors, farthest)))
            np.minimum(apart, anchors[-1][1], out=apart)
    return anchors


def _distances(vectors: Floats, point: Floats) -> Floats:
    """Distances from the points `[DIMENSIONS, points]` to one point."""
    return np.sqrt(_squares(vectors, point[:, None])[:, 0])


def _squares(vectors: Floats, others: Floats) -> Floats:
    """Squared distances from the points `[DIMENSIONS, points]` to others: `[points, others]`."""
    squares = np.zeros((vectors.shape[1], others.shape[1]))
    for mine, theirs in zip(vectors, others, strict=True):
        squares += (mine[:, None] - theirs) ** 2
    return squares


def ms_per_block(
    span: tuple[int, int], num_blocks: int, start: Integers, end: Integers, block_ms: Floats, latency_ms: Floats
) -> Floats:
    """Ms per block that a chain gains when it continues to each of the other peers `[peers]`; inf: no gain.

    span: the blocks [start, end) of the peer that the chain has reached. If these are the last blocks, the chain comes
    from the other peers instead. start, end: spans of the other peers. block_ms: time of one block for a token, by
    other peer. latency_ms: latencies of the links to the other peers.
    """
    if span[1] < num_blocks:
        gained = np.where(start <= span[1], end - span[1], 0)
    else:
        gained = np.where(end >= span[0], span[0] - start, 0)
    blocks = np.maximum(gained, 1)
    return np.where(gained > 0, (latency_ms + blocks * block_ms) / blocks, np.inf)


def by_use(own: Peer, others: Sequence[Peer], num_blocks: int, network: Network) -> list[Peer]:
    """The peers to which a chain may continue, the most useful first, according to the links that are known now."""
    costs = ms_per_block(
        (own.start, own.end),
        num_blocks,
        np.array([peer.start for peer in others], dtype=np.int64),
        np.array([peer.end for peer in others], dtype=np.int64),
        np.array([peer.speed.block_ms_at(1) for peer in others]),
        np.array([network.link(own.id, peer.id).latency_ms for peer in others]),
    )
    return [others[index] for index in map(int, costs.argsort(kind="stable")) if np.isfinite(costs[index])]
