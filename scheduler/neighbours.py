"""Which other peers a peer should know its links to: those to which a good chain may go on from it.

A table of all links of a swarm is not to be had, and coordinates are off by a fifth, so that among many peers some pair
always seems nearer than it is. But a good chain goes from each peer to one of the few that are near to it and fast. If
every peer measures and publishes those, chains are planned with links as they are (docs/scheduling.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scheduler.network import Network
from scheduler.swarm import Peer

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def ms_per_block(
    span: tuple[int, int], num_blocks: int, start: Integers, end: Integers, block_ms: Floats, latency_ms: Floats
) -> Floats:
    """What each block costs that a chain gains when it goes on to each of the others `[peers]`; inf: it gains none.

    span: of the peer that the chain has come to, [start, end). To a peer of the last blocks chains come, instead.
    start, end: of the others. block_ms: of one block and token. latency_ms: of the links to them.
    """
    if span[1] < num_blocks:
        gained = np.where(start <= span[1], end - span[1], 0)
    else:
        gained = np.where(end >= span[0], span[0] - start, 0)
    blocks = np.maximum(gained, 1)
    return np.where(gained > 0, (latency_ms + blocks * block_ms) / blocks, np.inf)


def by_use(own: Peer, others: Sequence[Peer], num_blocks: int, network: Network) -> list[Peer]:
    """Those of the others to which a chain may go on, the most useful first, by what is known of links now."""
    costs = ms_per_block(
        (own.start, own.end),
        num_blocks,
        np.array([peer.start for peer in others], dtype=np.int64),
        np.array([peer.end for peer in others], dtype=np.int64),
        np.array([peer.speed.at(1) for peer in others]),
        np.array([network.link(own.id, peer.id).latency_ms for peer in others]),
    )
    return [others[index] for index in map(int, costs.argsort(kind="stable")) if np.isfinite(costs[index])]
