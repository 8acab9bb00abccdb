"""The pool of links: which links stay open, and how many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from splitnet.security.identity import Identity
from splitnet.transport.pool import BRIEF_S, LinkPool
from splitnet.wire.endpoints import Endpoint, LinkState, Relay
from tests.tiers import examples

MOST = 3
KEEP_S = 60.0
KEEP_UNREACHED_S = 15.0
KEY = Identity.generate().public


@cache
def peer(number: int) -> Endpoint:
    return Endpoint(f"tcp://192.0.2.1:{1 + number}", KEY)


class FakeLinking:
    """Links whose states the test sets; an opened link is connecting."""

    def __init__(self) -> None:
        self.open: dict[Endpoint, LinkState] = {}

    def connect(self, endpoint: Endpoint) -> None:
        self.open.setdefault(endpoint, LinkState.CONNECTING)

    def disconnect(self, endpoint: Endpoint) -> None:
        del self.open[endpoint]

    def link_state(self, endpoint: Endpoint) -> LinkState:
        return self.open.get(endpoint, LinkState.CONNECTING)


class Fixture:
    def __init__(self, keep_unreached_s: float = KEEP_UNREACHED_S) -> None:
        self.linking = FakeLinking()
        self.pool = LinkPool(self.linking, most=MOST, keep_s=KEEP_S, keep_unreached_s=keep_unreached_s)

    def touch(self, number: int, state: LinkState | None = None) -> bool:
        """Counts a message and opens its link, as the transport does."""
        allowed = self.pool.touch(peer(number))
        if allowed:
            self.linking.connect(peer(number))
            if state is not None:
                self.linking.open[peer(number)] = state
        return allowed

    @property
    def open(self) -> set[int]:
        return {number for number in range(100) if peer(number) in self.linking.open}


@pytest.fixture
def links() -> Fixture:
    return Fixture()


def test_a_link_is_closed_some_time_after_its_last_use(links: Fixture) -> None:
    links.touch(1, LinkState.UP)
    links.pool.tick(100.0)
    links.pool.tick(100.0 + KEEP_S)
    links.touch(1)
    links.pool.tick(101.0 + KEEP_S)
    links.pool.tick(101.0 + 2 * KEEP_S)
    assert links.open == {1}
    links.pool.tick(102.0 + 2 * KEEP_S)
    assert links.open == set() and len(links.pool) == 0


@pytest.mark.parametrize("state", [LinkState.DOWN, LinkState.REFUSED, LinkState.CONNECTING])
def test_a_link_that_is_not_up_is_closed_sooner(links: Fixture, state: LinkState) -> None:
    links.touch(1, state)
    links.pool.tick(100.0)
    links.pool.tick(100.0 + KEEP_UNREACHED_S)
    assert links.open == {1}
    links.pool.tick(101.0 + KEEP_UNREACHED_S)
    assert links.open == set()


def test_the_failure_of_a_closed_link_is_remembered_for_a_while(links: Fixture) -> None:
    links.touch(1, LinkState.DOWN)
    links.pool.tick(0.0)
    links.pool.tick(100.0)
    assert links.open == set() and links.pool.link_state(peer(1)) is LinkState.DOWN
    links.touch(1)
    assert links.pool.link_state(peer(1)) is LinkState.DOWN, "until the link is up, or fails again"
    links.touch(1, LinkState.UP)
    assert links.pool.link_state(peer(1)) is LinkState.UP
    links.pool.tick(101.0)
    links.pool.tick(101.0 + KEEP_S + 1)
    assert links.open == set() and links.pool.link_state(peer(1)) is LinkState.CONNECTING


def test_remembered_failures_of_closed_links_are_bounded(links: Fixture) -> None:
    links.touch(1, LinkState.DOWN)
    links.pool.tick(0.0)
    for now in (100.0, 100.0 + KEEP_S):
        links.pool.tick(now)
    assert links.pool.link_state(peer(1)) is LinkState.DOWN
    links.pool.tick(101.0 + KEEP_S)
    assert links.pool.link_state(peer(1)) is LinkState.CONNECTING


def test_links_in_use_stay(links: Fixture) -> None:
    assert links.pool.acquire(peer(1)) and links.pool.acquire(peer(1))
    links.pool.release(peer(1))
    links.pool.tick(0.0)
    links.pool.tick(1e6)
    assert links.open == {1}
    links.pool.release(peer(1))
    links.pool.tick(1e6)
    links.pool.tick(2e6)
    assert links.open == set()


def test_the_link_used_longest_ago_makes_room(links: Fixture) -> None:
    for number in (1, 2, 3, 1, 4):
        assert links.touch(number, LinkState.UP)
    assert links.open == {1, 3, 4}


def test_a_link_that_failed_makes_room_first(links: Fixture) -> None:
    for number, state in ((1, LinkState.UP), (2, LinkState.CONNECTING), (3, LinkState.DOWN), (4, LinkState.UP)):
        assert links.touch(number, state)
    assert links.open == {1, 2, 4}


def test_a_link_to_a_hidden_peer_counts_as_two(links: Fixture) -> None:
    for number in (1, 2, 3):
        assert links.touch(number, LinkState.UP)
    hidden = dataclasses.replace(peer(4), relays=(Relay("tcp://192.0.2.2:1", bytes(32)),))
    assert links.pool.acquire(hidden) and set(links.linking.open) == {peer(3), hidden}
    other = dataclasses.replace(hidden, address="tcp://192.0.2.1:6")
    assert not links.pool.touch(other) and not links.pool.acquire(other)
    assert set(links.linking.open) == {peer(3), hidden}


def test_links_in_use_make_no_room(links: Fixture) -> None:
    for number in range(MOST):
        assert links.pool.acquire(peer(number))
    assert not links.pool.acquire(peer(9)) and not links.touch(9)
    assert links.pool.acquire(peer(1)) and links.touch(1)
    assert links.open == {0, 1, 2}


def test_without_a_delay_a_link_that_is_not_up_is_closed_with_its_last_user() -> None:
    links = Fixture(keep_unreached_s=0.0)
    links.pool.acquire(peer(1))
    links.pool.release(peer(1))
    assert links.open == set()


class Machine(RuleBasedStateMachine):
    """For any order of calls: links in use are open, and the number of links is bounded."""

    def __init__(self) -> None:
        super().__init__()
        self.links = Fixture()
        self.users: list[int] = []
        self.now = 0.0

    numbers = st.integers(0, 6)

    @rule(number=numbers)
    def acquire(self, number: int) -> None:
        allowed = self.links.pool.acquire(peer(number))
        assert allowed == (number in self.users or len(set(self.users)) < MOST)
        if allowed:
            self.users.append(number)

    @rule(choose=st.runner().flatmap(lambda self: st.sampled_from(self.users or [None])))
    def release(self, choose: int | None) -> None:
        if choose is not None:
            self.users.remove(choose)
            self.links.pool.release(peer(choose))

    @rule(number=numbers, state=st.sampled_from(LinkState))
    def touch(self, number: int, state: LinkState) -> None:
        assert self.links.touch(number, state) == (number in self.users or len(set(self.users)) < MOST)

    @rule(seconds=st.floats(0, 100))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.links.pool.tick(self.now)

    @invariant()
    def links_are_bounded(self) -> None:
        assert set(self.users) <= self.links.open
        assert len(self.links.open) == len(self.links.pool) <= MOST


Machine.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
TestMachine: Callable[..., object] = Machine.TestCase


def test_links_that_had_no_users_are_closed_sooner() -> None:
    linking = FakeLinking()
    pool = LinkPool(linking, most=10, keep_s=KEEP_S, keep_unreached_s=KEEP_UNREACHED_S, keep_unused_s=BRIEF_S)
    hidden = dataclasses.replace(peer(7), relays=(Relay("tcp://192.0.2.9:1", KEY.raw),))
    used, asked = peer(6), peer(5)
    assert pool.acquire(used)
    for endpoint in (hidden, asked, peer(1)):
        assert pool.touch(endpoint)
        linking.open[endpoint] = LinkState.UP
    linking.open[used], linking.open[peer(1)] = LinkState.UP, LinkState.CONNECTING
    pool.release(used)
    pool.tick(100.0)
    pool.tick(100.0 + BRIEF_S)
    assert len(linking.open) == 4, "an answer may come"
    pool.tick(100.1 + BRIEF_S)
    assert linking.open.keys() == {used, hidden, peer(1)}
    pool.tick(100.1 + KEEP_S)
    assert linking.open.keys() == set()
    assert pool.touch(used)
    linking.open[used] = LinkState.UP
    pool.tick(200.0)
    pool.tick(200.1 + BRIEF_S)
    assert linking.open.keys() == set(), "it had users before it was closed"


def test_an_unused_link_stays_open_for_the_answer_to_a_message_that_waited_for_its_handshake() -> None:
    linking, handshake_s = FakeLinking(), 3 * BRIEF_S
    pool = LinkPool(linking, most=10, keep_s=KEEP_S, keep_unreached_s=handshake_s, keep_unused_s=BRIEF_S)
    assert pool.touch(peer(1))
    linking.open[peer(1)] = LinkState.CONNECTING
    pool.tick(100.0)
    linking.open[peer(1)] = LinkState.UP
    pool.restart_idle_time(peer(1))
    pool.tick(100.0 + handshake_s)
    pool.tick(100.0 + handshake_s + BRIEF_S)
    assert linking.open.keys() == {peer(1)}
    pool.tick(100.1 + handshake_s + BRIEF_S)
    assert linking.open.keys() == set()
    pool.restart_idle_time(peer(1))
    assert not len(pool)
