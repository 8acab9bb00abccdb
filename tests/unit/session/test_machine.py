"""Under all faults, a session returns correct values or one clear error, and its peers hold nothing at the end."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.liveness import ANSWER_S, MAX_QUEUE_S, MAX_SILENCE_S, OPEN_TIMEOUT_S, PingAnswer
from splitnet import errors
from splitnet.errors import NotAuthorized, OtherWeights, PeerBusy, PeerLost, SplitnetError, WrongKey
from splitnet.session import events, failover, prefix_lookup
from splitnet.session.events import TRANSITIONS, Distrust, LinkFailed, Phase, Received, Resize, Use, UseAdapter
from splitnet.session.machine import POLL_S
from splitnet.wire import sent_log
from splitnet.wire.endpoints import Endpoint, Relay
from splitnet.wire.messages import Failure, FailureCode, Fork
from tests.tiers import examples
from tests.unit.session_world import CLIENT, PAGE, SPANS, Faulty, Kind, PeerModel, World, adapter, tags_of

index = st.integers(0, 1 << 16)
peer = st.integers(0, len(SPANS) - 1)
ADAPTERS = [None, adapter(1), adapter(2)]

SLOW = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
MANY = settings(deadline=None, suppress_health_check=SLOW)


@pytest.fixture(scope="module", autouse=True)
def small_pages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (prefix_lookup, sent_log):
            patch.setattr(module, "PAGE", PAGE)
        yield


def text_of(which: int, length: int) -> tuple[bytes, ...]:
    """Texts with common beginnings: each starts with the first `which` positions of text 12."""
    return tuple(bytes((1, 1 if at < which else 2 + which, at, 0)) for at in range(length))


class Trouble(RuleBasedStateMachine):
    """Faults of networks and peers, and calls of the caller, at any time."""

    world: World

    LIES: Sequence[str]
    """Faults of one peer that must not make a request fail."""

    @initialize(
        kind=st.sampled_from(Kind),
        seed=st.integers(0, 1 << 16),
        opens=st.booleans(),
        which=st.sampled_from(ADAPTERS),
        taps=st.sampled_from([(), (1, 3), (2,)]),
    )
    def begin(self, kind: Kind, seed: int, opens: bool, which: Any, taps: tuple[int, ...] = ()) -> None:
        self.world = World(reservation=64, seed=seed, kind=kind, taps=taps)
        if which is not None:
            self.world.feed(UseAdapter(which, for_passes=isinstance(self, Passes)))
            self.world.tags = tags_of(which)
        if opens:
            self.world.feed(Use())
            self.world.settle()
            self.check_that_it_works()

    @property
    def is_rough(self) -> bool:
        return self.world.kind is Kind.ROUGH

    def _link(self, at: int) -> tuple[str, str]:
        links = self.world.busy_links()
        return links[at % len(links)]

    @precondition(lambda self: not self.world.state.is_open)
    @rule()
    def use(self) -> None:
        self.world.feed(Use())

    @precondition(lambda self: not self.world.is_at_rest)
    @rule()
    def settle(self) -> None:
        self.world.settle()

    @precondition(lambda self: self.world.busy_links())
    @rule(count=st.integers(1, 12), at=index)
    def deliver(self, count: int, at: int) -> None:
        for step in range(count):
            if self.world.busy_links():
                self.world.deliver(self._link(at + step))

    @precondition(lambda self: self.is_rough and self.world.busy_links())
    @rule(at=index, what=st.sampled_from(["oldest", "newest", "repeat"]))
    def lose_or_repeat(self, at: int, what: str) -> None:
        if what == "repeat":
            self.world.deliver(self._link(at), keep=True)
        else:
            self.world.lose(self._link(at), newest=what == "newest")

    @precondition(lambda self: self.is_rough or not self.world.busy_links())  # elsewhere no link is slow
    @precondition(lambda self: self.world.questions or self.world.state.wake_at < math.inf)
    @rule()
    def answer_or_wait(self) -> None:
        if self.world.questions:
            self.world.answer()
        else:
            self.world.tick()

    def _peer(self, at: int) -> PeerModel:
        """Usually a peer of the route."""
        hops = [self.world.at(hop.endpoint) for hop in self.world.state.hops]
        return hops[at % len(hops)] if hops and at % 8 else self.world.peers[at % len(SPANS)]

    @rule(at=index)
    def part_or_join(self, at: int) -> None:
        """Breaks or restores the connection between two neighbouring hops."""
        hops = self.world.state.hops
        if len(hops) > 1:
            first = at % (len(hops) - 1)
            self.world.apart ^= {(hops[first].name, hops[first + 1].name)}

    @precondition(lambda self: self.is_rough or self.world.is_at_rest)
    @rule(at=index, behind=st.booleans(), restarts=st.integers(1, 3))
    def part_or_join_and_reopen(self, at: int, behind: bool, restarts: int) -> None:
        """Several hops, starting with the first or second of the two, also restart, so the session notices."""
        hops = self.world.state.hops
        self.part_or_join(at)
        if len(hops) > 1:
            first = at % (len(hops) - 1) + behind
            for hop in hops[first : first + restarts]:
                self.world.at(hop.endpoint).forget()

    @precondition(lambda self: self.world.kind is Kind.CALM)
    @rule(at=index, what=st.sampled_from(["kill", "leave"]))
    def go_away(self, at: int, what: str) -> None:
        """A peer fails or leaves while other peers still serve all blocks."""
        peer = self._peer(at)
        if self.world.can_spare(peer):
            if what == "kill":
                self.world.kill(peer)
            else:
                peer.leave()

    @precondition(lambda self: self.is_rough)
    @rule(at=index, what=st.sampled_from(["kill", "forget", "leave", "fill up", "start"]))
    def trouble(self, at: int, what: str) -> None:
        peer = self._peer(at)
        match what:
            case "kill":
                self.world.kill(peer)
            case "forget":
                peer.forget()
            case "leave":
                peer.leave()
            case "fill up":
                peer.full ^= True
            case _:
                for each in self.world.peers:
                    each.alive, each.leaves, each.full = True, False, False

    @precondition(lambda self: self.world.kind is Kind.LIAR and all(each.fault is None for each in self.world.peers))
    @rule(at=index, lie=index)
    def begin_to_lie(self, at: int, lie: int) -> None:
        self._peer(at).fault = self.LIES[lie % len(self.LIES)]

    @precondition(lambda self: self.is_rough)
    @rule(at=index, fault=st.sampled_from([None, *Faulty.KINDS, *Faulty.WITH_STEPS, *Faulty.OTHERS]))
    def misbehave(self, at: int, fault: str | None) -> None:
        for each in self.world.peers:
            each.fault = None
        self._peer(at).fault = fault

    @invariant()
    def values_are_right(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        for each in world.peers:
            each.alive, each.leaves, each.full, each.fault = True, False, False, None
        world.settle()
        assert all(each.request.is_done or each.request.error is not None for each in world.asked)
        assert all(each.answered for each in world.batches)
        # All live again: the session can be used.
        world.feed(Use())
        world.settle()
        assert world.state.is_open, world.state.error
        self.check_that_it_works()
        world.close()

    def check_that_it_works(self) -> None:
        raise NotImplementedError


class Steps(Trouble):
    """A session with KV caches: prompts, tokens, windows, rewinds, forks."""

    LIES = (*Faulty.KINDS, *Faulty.WITH_STEPS)

    @precondition(lambda self: self.world.ready and len(self.world.asked) < 12)
    @rule(length=st.integers(1, 3), keep=st.integers(0, 3))
    def prompt(self, length: int, keep: int) -> None:
        log = self.world.state.log
        if (log.positions if log is not None else 0) + length <= self.world.state.reservation:
            self.world.submit([(None, 0, length, min(keep, length))])

    @precondition(lambda self: not self.world.state.in_flight_count and len(self.world.asked) < 12)
    @precondition(lambda self: self.world.ready or self.world.state.phase in (Phase.NEW, Phase.BROKEN))
    @rule(which=st.integers(0, 12), length=st.integers(1, 14), at_once=st.booleans())
    def begin_text(self, which: int, length: int, at_once: bool) -> None:
        if length > self.world.state.reservation:
            return
        self.world.begin_text(text_of(which, length))
        if at_once:
            self.world.settle()
            self.send_text()

    @precondition(lambda self: self.world.text is not None and not self.world.state.in_flight_count)
    @rule()
    def send_text(self) -> None:
        if self.world.state.is_open and self.world.state.is_settled:
            self.world.send_text()
        elif self.world.state.is_settled:  # The error has been reported to the caller.
            self.world.text, self.world.restarts = None, True

    @rule(at=index, some=st.integers(0, 15))
    def lose_pages(self, at: int, some: int) -> None:
        """A peer frees the memory of some pages."""
        peer = self._peer(at)
        peer.pages = {name: page for index, (name, page) in enumerate(peer.pages.items()) if some >> index % 4 & 1}

    @precondition(lambda self: not self.world.state.hops)
    @rule(at=peer)
    def hold_otherwise(self, at: int) -> None:
        """The peer holds its weights in another format than its record says."""
        self.world.peers[at].record.dtype = "int8"

    @precondition(lambda self: self.world.ready and self.world.rows and not self.world.restarts)
    @rule(at=index, length=st.integers(1, 2))
    def go_on(self, at: int, length: int) -> None:
        rows = list(self.world.rows)
        row = rows[at % len(rows)]
        log = self.world.state.log
        if (log.positions if log is not None else 0) + length <= self.world.state.reservation:
            self.world.submit([(row, len(self.world.rows[row]), length, 1)])

    @precondition(lambda self: self.world.ready and self.world.rows and not self.world.restarts)
    @rule(at=index, steps=st.integers(2, 12))
    def window(self, at: int, steps: int) -> None:
        for _ in range(steps):
            self.go_on(at, 1)

    @precondition(lambda self: self.world.ready and self.world.rows and not self.world.restarts)
    @rule(at=index, back=st.integers(1, 3))
    def rewind(self, at: int, back: int) -> None:
        rows = list(self.world.rows)
        row = rows[at % len(rows)]
        start = max(0, len(self.world.rows[row]) - back)
        for each in self.world.asked:
            for part in each.request.message.parts if not each.request.is_done and each.request.error is None else ():
                if part.row == row and part.start < start < part.start + part.length:
                    start = part.start  # The row starts before a step in flight, not inside it.
                if part.row == row and start < part.start + part.length and len(each.request.message.parts) > 1:
                    return  # The other rows of that step would end, too.
        self.world.submit([(row, start, 1, 1)])

    @precondition(lambda self: self.world.is_at_rest and self.world.ready and self.world.rows)
    @rule(at=index, turns=st.lists(st.integers(0, 1), min_size=2, max_size=4))
    def part_and_join_by_turns(self, at: int, turns: list[int]) -> None:
        """After each change follows a step that appends a position or replaces the last one."""
        for back in turns:
            self.part_or_join_and_reopen(at, behind=True, restarts=1)
            if self.world.ready and self.world.rows and not self.world.restarts:
                self.rewind(at, 1) if back else self.go_on(at, 1)
            self.world.settle()

    @precondition(lambda self: self.world.ready and self.world.rows and not self.world.restarts)
    @precondition(lambda self: self.is_rough)
    @rule(at=index, back=st.integers(1, 3))
    def rewind_and_lose(self, at: int, back: int) -> None:
        self.rewind(at, back)
        first = self.world.at(self.world.state.first_hop).name
        if self.world.links.get((CLIENT, first)):
            self.world.lose((CLIENT, first), newest=True)

    @precondition(lambda self: self.world.ready and self.world.rows and not self.world.restarts)
    @precondition(lambda self: not self.world.state.in_flight_count)
    @rule(at=index)
    def fork(self, at: int) -> None:
        rows = list(self.world.rows)
        source = rows[at % len(rows)]
        length = len(self.world.rows[source])
        if 2 * length + 2 <= self.world.state.reservation:
            new = self.world.new_row_id()
            forks = (Fork(source, source), Fork(new, source))
            self.world.submit([(source, length, 1, 1), (new, length, 1, 1)], forks)

    @precondition(lambda self: self.world.ready)
    @rule(more=st.integers(1, 40))
    def resize(self, more: int) -> None:
        self.world.feed(Resize(self.world.state.reservation + more))

    @precondition(lambda self: any(not each.request.is_done for each in self.world.asked))
    @rule()
    def abandon(self) -> None:
        """Abandons rejected drafts: the next positions replace those of the drafts."""
        first = next(at for at, each in enumerate(self.world.asked) if not each.request.is_done)
        for each in self.world.asked[first:]:
            for part in each.request.message.parts:
                if part.row in self.world.rows:
                    self.world.rows[part.row] = self.world.rows[part.row][: part.start]
        self.world.rows = {row: values for row, values in self.world.rows.items() if values}
        self.world.abandon_from(first)

    def check_that_it_works(self) -> None:
        self.world.restarts, self.world.text = True, None
        self.world.submit([(None, 0, 2, 1)])
        self.world.settle()
        assert self.world.asked[-1].request.is_done, self.world.asked[-1].request.error


class Passes(Trouble):
    """A session that trains: forward and backward passes of batches, with adapters that change."""

    LIES = Faulty.KINDS

    @property
    def adapter(self) -> Any:
        return self.world.state.adapter

    @precondition(lambda self: self.world.ready and len(self.world.batches) < 6)
    @rule(batch=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=2), min_size=1, max_size=3))
    def forward(self, batch: list[list[int]]) -> None:
        self.world.submit_batch(batch, self.adapter)

    @precondition(lambda self: self.world.ready and any(each.is_forward for each in self.world.batches))
    @rule()
    def back(self) -> None:
        asked = next(each for each in self.world.batches if each.is_forward)
        if asked.adapter is None or asked.adapter is self.world.state.adapter:
            self.world.send_back(asked)

    @precondition(lambda self: self.world.ready and not self.world.state.in_flight_count)
    @rule(which=st.sampled_from(ADAPTERS[1:]))
    def use_adapter(self, which: Any) -> None:
        self.world.feed(UseAdapter(which, for_passes=True))

    def check_that_it_works(self) -> None:
        self.world.submit_batch([[1, 2], [1]], self.adapter)
        self.world.settle()
        self.world.send_back(self.world.batches[-1])
        self.world.settle()
        last = self.world.batches[-1]
        assert last.batch.is_done, [each.error for each in last.batch.passes]


TestSteps = Steps.TestCase
TestSteps.settings = settings(MANY, max_examples=examples(400), stateful_step_count=40, derandomize=True)
TestPasses = Passes.TestCase
TestPasses.settings = settings(MANY, max_examples=examples(200), stateful_step_count=40, derandomize=True)


TROUBLES = ["kill", "forget", "leave", "fill up", "start", "start"]
FAULTS = [None, *Faulty.KINDS, *Faulty.WITH_STEPS, *Faulty.OTHERS]


def wander(seed: int, kind: Kind, turns: int = 60) -> World:
    """Runs many texts, mostly with the beginning of an earlier text, with random faults in between."""
    chance, run = random.Random(seed), Steps()
    run.begin(kind=kind, seed=seed, opens=chance.random() < 0.5, which=chance.choice(ADAPTERS), taps=())
    world, state = run.world, run.world.state
    for _ in range(turns):
        some, at = chance.randrange(16), chance.randrange(1 << 16)
        rests, pending = world.is_at_rest, world.text is not None
        can_go_on = world.ready and bool(world.rows) and not world.restarts
        actions: list[Callable[[], object]] = [run.settle] * 2
        if world.busy_links():
            actions += [lambda some=some, at=at: run.deliver(some, at)] * 2
            if kind is Kind.ROUGH:
                actions.append(lambda at=at: run.lose_or_repeat(at, chance.choice(["oldest", "newest"])))
        if (kind is Kind.ROUGH or not world.busy_links()) and (world.questions or state.wake_at < math.inf):
            actions.append(run.answer_or_wait)
        if not state.in_flight_count and (world.ready or state.phase in (Phase.NEW, Phase.BROKEN)):
            which, length = chance.randrange(13), chance.randrange(1, 15)
            actions += [lambda which=which, length=length: run.begin_text(which, length, chance.random() < 0.5)] * 4
        if pending and not state.in_flight_count:
            actions += [run.send_text] * 3
        if can_go_on:
            actions += [lambda at=at, some=some: run.go_on(at, 1 + some % 2)] * 2
            actions += [lambda at=at, some=some: run.rewind(at, 1 + some % 3), lambda at=at: run.window(at, 3)]
            if not state.in_flight_count:
                actions.append(lambda at=at: run.fork(at))
            if kind is Kind.ROUGH:
                actions.append(lambda at=at: run.rewind_and_lose(at, 2))
        if world.ready:
            actions.append(lambda: run.resize(8))
        if any(not each.request.is_done for each in world.asked) and world.ready:
            actions.append(run.abandon)
        actions += [lambda at=at, some=some: run.lose_pages(at, some), lambda at=at: run.part_or_join(at)]
        if kind is Kind.ROUGH or rests:
            actions.append(lambda at=at: run.part_or_join_and_reopen(at, behind=at % 2 > 0, restarts=1 + at % 3))
        if kind is Kind.CALM:
            actions.append(lambda at=at: run.go_away(at, chance.choice(["kill", "leave"])))
        elif kind is Kind.ROUGH:
            actions.append(lambda at=at: run.trouble(at, chance.choice(TROUBLES)))
            actions.append(lambda at=at: run.misbehave(at, chance.choice(FAULTS)))
        elif all(each.fault is None for each in world.peers):
            actions.append(lambda at=at: run.begin_to_lie(at, at))
        chance.choice(actions)()
    run.teardown()
    return world


@pytest.mark.parametrize("kind", Kind)
def test_texts_with_reused_pages_get_the_same_values_as_without(kind: Kind) -> None:
    worlds = [wander(seed, kind) for seed in range(examples(200))]
    assert sum(world.recalled for world in worlds) > len(worlds) // 4, "hardly any text was recalled"


@pytest.mark.parametrize("fault", [*Faulty.KINDS, *Faulty.WITH_STEPS])
@settings(MANY, max_examples=examples(25))
@given(at=peer, seed=st.integers(0, 1 << 16), losses=st.lists(st.integers(0, 40), max_size=2))
def test_one_faulty_peer_among_honest_peers_fails_no_request(fault: str, at: int, seed: int, losses: list[int]) -> None:
    """Two lost messages do not make a request fail either."""
    world = World(seed=seed, taps=(1, 2, 3))
    world.peers[at].fault = fault
    # Each block of the lying peer is also served by another peer.
    world.feed(Use())
    world.settle()
    row = world.new_row_id()
    world.submit([(row, 0, 3, 1)])
    for turn in range(6):
        if turn in losses and world.busy_links():
            world.lose(world.busy_links()[0])
        world.settle()
        assert all(each.request.is_done for each in world.asked), [each.request.error for each in world.asked]
        world.submit([(row, 3 + turn, 1, 1)])
    world.settle()
    assert all(each.request.is_done for each in world.asked)
    assert world.now < 60.0
    world.close()


def fall_silent_while_it_opens(world: World) -> None:
    """Makes the first hop of the route fall silent. Another peer serves the same span."""
    first, twin, tail = world.peers[:3]
    world.peers = [first, tail]
    world.feed(Use())
    world.answer()
    first.alive = False
    world.gone.add(first.name)
    world.peers = [first, twin, tail]


@pytest.mark.parametrize("hidden", [False, True])
def test_a_hop_that_is_silent_while_a_route_opens_is_replaced_early(hidden: bool) -> None:
    """A hop behind a relay gets more time, because connecting to it may take long."""
    world = World(seed=1)
    first, twin, tail = world.peers[:3]
    if hidden:
        first.endpoint = replace(first.endpoint, relays=(Relay("tcp://127.0.0.1:99", bytes(32)),))
        first.record.endpoint = first.endpoint
    fall_silent_while_it_opens(world)
    world.settle()
    assert world.state.endpoints() == [twin.endpoint, tail.endpoint]
    assert (world.now >= OPEN_TIMEOUT_S) == hidden
    assert world.now >= MAX_SILENCE_S + ANSWER_S


def test_the_wait_for_a_hop_with_a_busy_link_is_bounded() -> None:
    """The ping and the `Open` message wait behind other data that is sent to the hop."""
    world = World(seed=1)
    first = world.peers[0]
    fall_silent_while_it_opens(world)
    while first.endpoint in world.state.endpoints():
        while links := world.busy_links():
            world.deliver(links[0])
        if world.questions:
            world.answer()
        world.feed(PingAnswer(first.endpoint, 0.0, late=True))
        world.tick()
    assert MAX_QUEUE_S <= world.now < MAX_QUEUE_S + OPEN_TIMEOUT_S
    world.settle()
    assert world.state.is_open


def test_a_hop_that_answers_late_is_unbanned_and_its_next_answer_gets_more_time() -> None:
    world = World(seed=1)
    world.feed(Use())
    world.settle()
    patience = dict[Endpoint, float]()
    world.state._liveness._answer_s = lambda endpoint: patience.get(endpoint, ANSWER_S)
    world.submit([(None, 0, 2, 1)])
    first = world.at(world.state.first_hop)
    world.links.clear()
    while not world.questions:
        assert world.tick()
    assert world.now == pytest.approx(MAX_SILENCE_S + ANSWER_S)
    assert first.name in world.banned
    world.feed(PingAnswer(first.endpoint, 0.0, holds=True, waiting=1))
    assert first.name not in world.banned, "it has answered"
    world.settle()
    assert world.asked[-1].request.is_done
    # The second time, the round trips of the hop are known.
    patience = dict.fromkeys(world.state.endpoints(), 4.5)
    began = world.now
    world.submit([(None, 0, 2, 1)])
    world.links.clear()
    while world.state.is_open:
        assert world.tick()
    assert world.now == pytest.approx(began + MAX_SILENCE_S + 4.5)


@pytest.mark.parametrize("error", [NotAuthorized, WrongKey, PeerLost])
def test_a_hop_that_revokes_the_clients_key_ends_the_session_at_once(error: type[SplitnetError]) -> None:
    """The peer closes the connection and refuses new ones. It may serve again under another key."""
    world = World(seed=1)
    world.peers = [world.peers[0], world.peers[2]]
    world.feed(Use())
    world.settle()
    world.submit([(None, 0, 2, 1)])
    began, last = world.now, world.peers[1]
    world.kill(last)
    world.feed(LinkFailed(last.endpoint, error("what its link says then")))
    world.settle()
    failed = world.asked[0].request.error
    assert failed is not None
    if error is NotAuthorized:
        assert isinstance(failed, NotAuthorized) and world.now - began <= POLL_S
    else:
        assert world.now - began >= 30.0


@pytest.mark.parametrize("refills", [False, True])
def test_a_hop_that_reads_no_messages_is_replaced(refills: bool) -> None:
    """The hop before it reports, without end, that data of the session is on its way."""
    world = World(seed=1)
    world.peers = [*world.peers[:4], *world.peers[5:7]]
    world.banned = {peer.name: 60.0 for peer in world.peers[4:]}
    world.feed(Use())
    world.settle()
    row = world.new_row_id()
    world.submit([(row, 0, 3, 1)])
    world.settle()
    _, second = (world.at(endpoint) for endpoint in world.state.endpoints())
    twin = next(peer for peer in world.peers if peer.span == second.span and peer is not second)
    if refills:
        world.kill(second)
        twin.dams, second.alive = True, True
    else:
        second.dams = True
    world.submit([(row, 3, 1, 1)])
    world.settle()
    assert world.asked[-1].request.is_done
    assert world.now < 3 * 120.0


def test_failures_of_a_step_that_was_not_sent_are_ignored() -> None:
    world = World(seed=1)
    world.feed(Use())
    world.settle()
    world.submit([(None, 0, 2, 1)])
    world.kill(world.at(world.state.tail))
    assert world.reaches(Phase.OPENING)
    number, liars = world.asked[0].request.number, [hop.endpoint for hop in world.state.hops[:2]]
    for liar in liars:
        failure = Failure(world.state.session, world.state.epoch, number, FailureCode.BAD_MESSAGE, "")
        world.feed(Received(liar, failure))
    world.settle()
    assert len(liars) == 2 and world.asked[0].request.is_done


def test_failures_of_an_abandoned_route_are_ignored() -> None:
    """The replaced hop does not know the session, and the hop before it passes that error on."""
    world = World(seed=1, kind=Kind.CALM)
    world.feed(Use())
    world.settle()
    world.submit([(None, 0, 2, 1)])
    first, second = world.state.hops[:2]
    world.submit([(world.asked[-1].request.message.parts[0].row, 2, 1, 1)])
    world.at(second.endpoint).leave()
    while world.state.phase is not Phase.PLANNING:
        world.deliver((second.name, CLIENT))
    for each in world.asked:
        number = each.request.number
        failure = Failure(world.state.session, world.state.epoch, number, FailureCode.UNKNOWN_SESSION, "")
        world.feed(Received(first.endpoint, failure))
    world.settle()
    assert world.state.first_hop == first.endpoint
    assert all(each.request.is_done for each in world.asked)


@pytest.mark.parametrize("then", ["a step", "doubt", "a way back"])
def test_requests_sent_just_after_a_hop_has_left_wait_for_its_replacement(then: str) -> None:
    """The message that a hop leaves arrives after the caller has found the route open."""
    world = World(seed=1, kind=Kind.CALM)
    world.feed(Use())
    world.settle()
    if then == "doubt":
        world.submit([(None, 0, 2, 1)])
    elif then == "a way back":
        world.submit_batch([[2], [1]], None)
    world.settle()
    leaves = world.state.hops[-1]
    world.at(leaves.endpoint).leave()
    while world.state.phase is not Phase.BROKEN:
        world.deliver((leaves.name, CLIENT))
    if then == "a step":
        world.submit([(None, 0, 2, 1)])
    elif then == "doubt":
        world.feed(Distrust(world.asked[0].request, leaves.endpoint, "is wrong"))
        assert not world.asked[0].request.is_done
    else:
        world.send_back(world.batches[0])
    world.settle()
    assert world.state.is_open and not world.state.in_flight_count
    assert all(each.request.is_done for each in world.asked)


@pytest.mark.parametrize("repairs", [False, True])
def test_a_new_session_that_is_too_long_for_all_peers_fails_at_once(repairs: bool) -> None:
    setup, kinds = failover.RouteSetup(0.0, repairs), (errors.TooLongForPeers, PeerBusy)
    waits = [setup.may_wait(events.RouteFailed(1, kind(""), frozenset(), True), grows=False) for kind in kinds]
    assert waits == [repairs, True]


def test_a_step_that_a_later_step_undid_is_not_sent_again() -> None:
    """The undone step builds on positions that the later step replaced; its sender gets an error."""
    world = World(seed=1, kind=Kind.CALM)
    world.feed(Use())
    world.settle()
    row = world.new_row_id()
    world.submit([(row, 0, 3, 1)])
    world.settle()
    world.submit([(row, 3, 2, 1)])
    world.submit([(row, 3, 1, 1)])
    undone, later = (each.request for each in world.asked[-2:])
    assert undone.error is not None and world.state.in_flight_count == 1
    world.kill(world.at(world.state.tail))
    world.settle()
    assert later.is_done and not undone.is_done and world.state.recoveries
    world.close()


def test_hops_that_restart_between_two_adapters_stay_on_the_route() -> None:
    world = World(seed=1, kind=Kind.CALM)
    world.feed(Use())
    world.settle()
    route = world.state.endpoints()
    for tag in range(1, 5):
        for each in world.peers:
            each.forget()
        world.feed(UseAdapter(adapter(tag)))
        world.settle()
    assert world.state.endpoints() == route


@pytest.mark.parametrize(("any_weights", "has_twin"), [(False, True), (False, False), (True, True)])
def test_a_hop_that_restarts_with_other_weights_is_replaced(any_weights: bool, has_twin: bool) -> None:
    """The record of the peer may still name the old weights. If other weights are allowed, the hop stays and the user
    is told."""
    world = World(seed=1, any_weights=any_weights)
    first, _, second, twin = world.peers[:4]
    world.peers = [first, second]
    world.feed(Use())
    world.settle()
    world.submit([(None, 0, 3, 1)])
    world.settle()
    if has_twin:
        world.peers.append(twin)
    second.forget()
    second.weights = "int4"
    world.submit([(None, 0, 2, 1)])
    world.settle()
    request, told = world.asked[-1].request, [note.text for note in world.told if note.kind == "weights"]
    if any_weights:
        assert request.is_done and world.state.endpoints() == [first.endpoint, second.endpoint]
        assert len(told) == 1 and "blocks 2..3 as int4 instead of float32" in told[0]
    elif has_twin:
        assert request.is_done and world.state.endpoints() == [first.endpoint, twin.endpoint] and not told
    else:
        assert isinstance(request.error, OtherWeights)
        assert "blocks 2..3 as int4 instead of float32" in str(request.error)
    assert second.name not in world.banned, "it did nothing wrong"


@pytest.mark.parametrize("at", [0, 2])
def test_a_hop_that_sends_no_hidden_states_is_replaced(at: int) -> None:
    """The session first opens the route again, because the hidden states may have been lost on the way."""
    world = World(seed=1, taps=(1, 3))
    first, twin, tail, last = world.peers[:4]
    world.peers = [first, tail]
    world.feed(Use())
    world.settle()
    world.peers = [first, twin, tail, last]
    (first if at == 0 else tail).fault = "keeps taps"
    world.submit([(None, 0, 3, 1)])
    world.settle()
    assert world.asked[-1].request.is_done
    assert world.state.endpoints() == ([twin.endpoint, tail.endpoint] if at == 0 else [first.endpoint, last.endpoint])


def test_hidden_states_of_a_step_may_come_after_the_output_of_the_next() -> None:
    """Hidden states come from another hop than the tail. Repeated or late copies are ignored."""
    world = World(seed=1, taps=(1,))
    first, _, tail = world.peers[:3]
    world.peers = [first, tail]
    world.feed(Use())
    world.settle()
    row, own = world.new_row_id(), (first.name, CLIENT)
    for start in range(3):
        world.submit([(row, start, 1, 1)])
    while links := [link for link in world.busy_links() if link != own]:
        world.deliver(links[0])
    requests = [each.request for each in world.asked]
    assert [request.result is not None for request in requests] == [True] * 3
    assert not any(request.is_done for request in requests)
    for _ in range(3):
        world.deliver(own, keep=True)
        world.deliver(own)
    assert all(request.is_done for request in requests) and not world.state.recoveries


def test_a_relay_log_of_a_new_row_alone_is_not_replayed_to_the_next_hop() -> None:
    world = World(seed=1, kind=Kind.CALM)
    world.feed(Use())
    world.settle()
    row = world.new_row_id()
    world.submit([(row, 0, 2, 1)])
    world.settle()
    first, second = world.state.hops[:2]
    world.apart = {(first.name, second.name)}
    world.feed(Resize(100))
    world.settle()
    assert world.state.hops[0].relayed
    world.submit([(None, 0, 2, 1)])
    world.settle()
    world.at(second.endpoint).forget()
    world.feed(Resize(120))
    world.settle()
    world.submit([(row, 2, 1, 1)])
    world.settle()
    assert world.asked[-1].request.is_done and not world.state.recoveries


def test_a_replay_of_a_hop_ends_before_a_relayed_link() -> None:
    """The client cannot relay a replay of another hop, because it does not know the parts of its steps."""

    def opened(seed: int) -> World:
        world = World(seed=seed, kind=Kind.CALM)
        world.feed(Use())
        world.settle()
        return world

    world = next(world for world in map(opened, range(64)) if len(world.state.hops) > 2)
    first, second, third = world.state.hops[:3]
    row = world.new_row_id()
    world.submit([(row, 0, 2, 1)])
    world.settle()
    world.apart = {(second.name, third.name)}
    world.at(second.endpoint).forget()
    world.at(third.endpoint).forget()
    world.submit([(row, 2, 1, 1)])
    world.settle()
    assert world.state.endpoints()[:3] == [first.endpoint, second.endpoint, third.endpoint]
    assert world.asked[-1].request.is_done and world.state.recoveries


def test_a_relay_log_from_before_hops_reached_each_other_is_not_replayed() -> None:
    """The log of relayed steps lacks the steps that the first hop has pushed itself since."""

    def opened(seed: int) -> World:
        world = World(seed=seed, kind=Kind.CALM)
        world.feed(Use())
        world.settle()
        return world

    world = next(world for world in map(opened, range(64)) if len(world.state.hops) > 1)
    first, second = world.state.hops[:2]
    row = world.new_row_id()
    world.submit([(row, 0, 2, 1)])
    world.settle()
    for apart, starts in ((True, [1]), (False, [1, 1]), (True, [2])):
        world.apart = {(first.name, second.name)} if apart else set()
        world.at(second.endpoint).forget()
        for start in starts:
            world.submit([(row, start, 1, 1)])
            world.settle()
    assert world.state.endpoints()[:2] == [first.endpoint, second.endpoint]


def test_an_answer_from_a_hop_before_the_tail_does_not_show_a_lost_step() -> None:
    """When a hop before the tail answers the second of two steps, this does not show that the first was lost."""
    run = Steps()
    run.begin(kind=Kind.LIAR, seed=0, opens=True, which=None)
    run.resize(more=1)
    run.settle()
    run.fork(at=0)
    run.begin_to_lie(at=1, lie=Steps.LIES.index("for the tail"))
    run.prompt(keep=0, length=1)
    run.settle()
    run.teardown()


def test_a_relay_log_of_an_interrupted_replay_is_not_replayed() -> None:
    world = World(seed=1, kind=Kind.CALM)
    world.feed(Use())
    world.settle()
    rows = [world.new_row_id(), world.new_row_id()]
    for row in rows:
        world.submit([(row, 0, 2, 1)])
    world.settle()
    first, second = world.state.hops[:2]
    world.apart = {(first.name, peer.name) for peer in world.peers}
    world.at(second.endpoint).forget()
    world.feed(Resize(100))
    assert world.reaches(Phase.REPLAYING)
    world.deliver((CLIENT, first.name))
    world.deliver((first.name, CLIENT))
    world.at(second.endpoint).leave()
    world.settle()
    assert world.state.endpoints() != [first.endpoint, second.endpoint]
    world.submit([(rows[1], 2, 1, 1)])
    world.settle()
    assert world.asked[-1].request.is_done and len(world.state.recoveries) <= 1


def test_a_step_may_not_undo_only_some_rows_of_a_step_in_flight() -> None:
    """If the undone step were lost, its other rows would continue from the state that it was to replace."""
    world = World(seed=1)
    world.feed(Use())
    world.settle()
    row, new = world.new_row_id(), world.new_row_id()
    world.submit([(row, 0, 3, 1)])
    world.settle()
    world.submit([(row, 3, 1, 1), (new, 3, 1, 1)], (Fork(row, row), Fork(new, row)))
    world.settle()
    world.submit([(row, 4, 2, 1)])
    world.settle()
    world.rows[row] = world.rows[row][:4]
    world.submit([(row, 4, 1, 1), (new, 4, 1, 1)])
    first = world.at(world.state.first_hop).name
    world.lose((CLIENT, first))
    world.submit([(new, 1, 1, 1)])
    refused = world.asked.pop()
    assert refused.request.error is not None and "some rows" in str(refused.request.error)
    world.submit([(row, 5, 1, 1)])
    world.settle()
    assert all(each.request.is_done for each in world.asked)


def test_a_refused_reservation_leaves_the_session_unchanged() -> None:
    world = World(reservation=8)
    world.feed(Use())
    world.settle()
    row = world.new_row_id()
    world.submit([(row, 0, 3, 1)])
    world.settle()
    route = world.state.endpoints()
    for each in world.peers:
        each.full = True
    for _ in range(2):
        world.feed(Resize(20))
        world.settle()
        assert isinstance(world.state.refusal, PeerBusy)
        assert world.state.is_open and world.state.reservation == 8
    world.submit([(row, 3, 1, 1)])
    world.settle()
    assert world.asked[-1].request.is_done and world.state.endpoints() == route
    world.close()


ROUTE_PHASES = [Phase.PLANNING, Phase.OPENING, Phase.LOADING, Phase.REPLAYING, Phase.OPEN]
ALL_AT_ONCE = ["killed", "forget", "apart", "refuses adapters", "fails replays", "forgets in replays", "internal"]


def befall(world: World, what: str) -> None:
    """The same fault at all peers, or the loss of the last hop."""
    match what:
        case "lost tail":
            if world.state.hops:
                world.kill(world.at(world.state.tail))
        case "killed":
            for each in world.peers:
                world.kill(each)
        case "forget":
            for each in world.peers:
                each.forget()
        case "apart":
            world.apart = {(one.name, other.name) for one in world.peers for other in world.peers}
        case fault:
            for each in world.peers:
                each.fault = fault


def changes_after(trouble: str, phase: Phase, which: Any, *, repairs: bool, seed: int) -> set[tuple[Phase, Phase]]:
    """The changes of phase of a session whose first or repaired route is in `phase` when the fault occurs."""
    world = World(seed=seed)
    world.feed(Use())
    if repairs:
        world.settle()
        world.submit([(None, 0, 2, 1)])
        world.settle()
        world.kill(world.at(world.state.tail))
    if which is not None:
        world.feed(UseAdapter(which))
        world.tags = tags_of(which)
    world.feed(Use())
    if not world.reaches(phase):
        return set()
    befall(world, trouble)
    if world.ready and not repairs:
        world.submit([(None, 0, 1, 1)])
    world.feed(Use())
    world.settle()
    for each in world.peers:
        each.alive, each.fault = True, None
    world.feed(Use())
    world.settle()
    assert world.state.is_open, world.state.error
    world.close()
    return world.seen


def test_the_table_of_transitions_is_complete_and_exact() -> None:
    """Every transition of the table occurs in a run. A transition outside the table raises AssertionError."""
    cases = product([*ALL_AT_ONCE, "lost tail"], ROUTE_PHASES, ADAPTERS[:2], [False, True], range(4))
    seen = {
        change
        for trouble, phase, which, repairs, seed in cases
        for change in changes_after(trouble, phase, which, repairs=repairs, seed=seed)
    }
    world = World(seed=1)
    world.feed(Use())
    world.settle()
    # An adapter for an open route.
    world.feed(UseAdapter(adapter(1)))
    world.settle()
    table = {(before, after) for before, afters in TRANSITIONS.items() for after in afters}
    closed = {(before, Phase.CLOSED) for before in TRANSITIONS if before is not Phase.CLOSED}
    assert table == seen | world.seen | closed
