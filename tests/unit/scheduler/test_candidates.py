from __future__ import annotations

import math

import numpy as np

from scheduler.candidates import by_use, ms_per_block
from scheduler.facts import Link, Network, Peer, Speed


def peer(name: str, start: int, end: int, block_ms: float = 1.0) -> Peer:
    return Peer(name, start, end, Speed.of(block_ms, 0.0))


def test_the_cost_of_a_link_is_spread_over_the_blocks_gained() -> None:
    start, end = np.array([0, 2, 4, 5, 0]), np.array([6, 8, 12, 12, 4])
    found = ms_per_block((0, 4), 12, start, end, np.full(5, 2.0), np.full(5, 8.0))
    assert found.tolist() == [2 + 8 / 2, 2 + 8 / 4, 2 + 8 / 8, math.inf, math.inf]


def test_a_peer_of_the_last_blocks_measures_the_peers_before_it() -> None:
    found = ms_per_block((8, 12), 12, np.array([0, 8, 0]), np.array([8, 12, 7]), np.full(3, 2.0), np.full(3, 8.0))
    assert found.tolist() == [2 + 8 / 8, math.inf, math.inf]


def test_near_fast_peers_of_the_next_blocks_come_first() -> None:
    own = peer("own", 0, 4)
    others = [peer("far", 4, 8), peer("near", 4, 8), peer("long", 4, 12), peer("slow", 4, 8, 50.0)]
    others.append(peer("beside", 0, 4))
    links = {("own", other.id): Link(40.0 if other.id == "far" else 10.0, 1000.0) for other in others}
    assert [each.id for each in by_use(own, others, 12, Network(links))] == ["long", "near", "far", "slow"]
    assert by_use(own, [], 12, Network(links)) == []
