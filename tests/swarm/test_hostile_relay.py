"""Attacks on relays and by relays: bounds hold, memory is bounded, and members are served."""

from __future__ import annotations

import time
from contextlib import ExitStack

import psutil
import pytest

from splitnet.nat import punch, unreachable
from splitnet.nat.relay import RelayBounds
from tests.attacks import relay as attacks
from tests.attacks.transport import in_background
from tests.unit.nat.test_stream import World, ask, to, wait_until

pytestmark = pytest.mark.swarm

SECONDS = 2.0
MOST_MIB = 64
"""Allowed growth of a relay: a buffer of 128 KiB for each direction of 256 streams."""


@pytest.mark.default_cases(kind=("Floods",))
@pytest.mark.parametrize("kind", attacks.HOSTILE)
def test_an_unreachable_peer_is_reached_despite_hostile_relays(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also asserts bounds on the memory and descriptors of the process."""
    monkeypatch.setattr(unreachable, "JOIN_S", 1.5)  # wait for a silent relay; three are tried at a time
    attacks.hostile_helpers(kind, seconds=SECONDS)


@pytest.mark.default_cases(name=("flood",))
@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_members_are_served_despite_strangers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punch, "PUNCH_S", 0.0)
    bounds, attack = RelayBounds(), attacks.ATTACKS[name]
    with ExitStack() as stack:
        world = World(stack)
        helper = world.helper(bounds=bounds)
        node, hidden = world.hidden()
        member = world.node()
        ask(member, to(node, hidden.relays), b"before")
        events, before = sum(helper.events.values()), psutil.Process().memory_info().rss
        with in_background(attack, world.relays()[0], seconds=60) as strangers:
            wait_until(lambda: sum(helper.events.values()) > events or helper._handshakes)
            asked, least = 0, time.monotonic() + SECONDS
            while asked < 10 or time.monotonic() < least:
                assert strangers.is_alive()
                ask(member, to(node, hidden.relays), b"meanwhile")
                if asked % 10 == 0:
                    newcomer = world.node()
                    ask(newcomer, to(node, hidden.relays), b"new")
                    newcomer.transport.close()
                asked += 1
                assert sum(map(len, helper._handshakes.values())) <= bounds.handshakes
                assert helper.reservations <= bounds.reservations_of_host + 1
                assert helper.streams.taken <= 2 * bounds.streams_of_host, "members and strangers are at two hosts"
        grown = psutil.Process().memory_info().rss - before
        assert grown < MOST_MIB << 20
        wait_until(lambda: helper.reservations == 1 and not helper._handshakes)
