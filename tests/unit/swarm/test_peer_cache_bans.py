"""Bans: the peers that a client plans without."""

from __future__ import annotations

import math
from dataclasses import replace

from scheduler.liveness import BAN_S
from splitnet.swarm.peer_cache import Bans
from tests.unit.swarm.test_measure import Clock, record
from tests.unit.swarm.test_swarm import RECORD


def test_a_ban_ends() -> None:
    clock = Clock()
    bans = Bans(clock)
    bans.ban_peer("a")
    assert bans.keys() == {"a"}
    clock.now += BAN_S
    assert bans.keys() == set()


def test_a_lost_peer_may_be_unbanned() -> None:
    bans, peer = Bans(Clock()), record()
    bans.ban_peer(peer.key.text)
    assert bans.may_be_unbanned([peer, record()]) == [peer]
    bans.lift(peer.key.text)
    assert bans.keys() == set()


def test_a_peer_that_left_may_be_unbanned_only_when_it_serves_again() -> None:
    bans, peer = Bans(Clock()), replace(RECORD, placed_at=1.0)
    bans.ban_peer(peer.key.text, peer)
    assert bans.may_be_unbanned([peer]) == []
    assert bans.may_be_unbanned([replace(peer, placed_at=2.0, serves=False)]) == []
    assert bans.may_be_unbanned([moved := replace(peer, placed_at=2.0)]) == [moved]


def test_a_later_failure_does_not_shorten_a_ban() -> None:
    clock = Clock()
    bans = Bans(clock)
    bans.ban_peer("a", seconds=math.inf)
    bans.ban_peer("a")
    clock.now += BAN_S
    bans.lift("a")
    assert bans.keys() == {"a"}
