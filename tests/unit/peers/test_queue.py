"""The order in which steps get to the device."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from peers.queue import MAX_SESSION_PASSES, STUCK_S, WorkQueue
from peers.sessions import HopSession, PassWork, Work
from scheduler.batching import DECODE_POSITIONS, MAX_PASSED_OVER, UNSENT_BYTES
from scheduler.fairness import AHEAD_S
from splitnet.errors import PeerBusy
from splitnet.security.identity import Identity
from splitnet.wire.codecs import CODECS
from splitnet.wire.endpoints import Connection, Endpoint
from splitnet.wire.messages import Chunk, Fork, Forward, Step
from splitnet.wire.sent_log import SentLog
from tests.tiers import examples

PASS = 64
"""Positions of a pass in these tests."""

WAIT_S = 20.0


NEXT, OTHER_NEXT = (Endpoint(f"tcp://127.0.0.1:{port}", Identity.generate().public) for port in (1, 2))
FOLLOWING = (None, NEXT, OTHER_NEXT)


def session(
    name: int,
    start: int = 0,
    end: int = 4,
    owner: bytes = b"owner",
    *,
    reservation: int = 1 << 20,
    following: Endpoint | None = None,
) -> HopSession:
    return HopSession(
        id=name.to_bytes(16, "big"),
        owner=owner,
        reply_to=Connection(b"client", b"owner"),
        epoch=1,
        start=start,
        end=end,
        reservation=reservation,
        codec=CODECS["none"],
        next=following,
        log=SentLog(0, 4),
        used_at=0.0,
    )


def work(
    owner: HopSession,
    *lengths: int,
    number: int = 0,
    forks: tuple[Fork, ...] | None = None,
    start: int | None = None,
    replay_until: int = 0,
) -> Work:
    begins = 1000 * number if start is None else start
    parts = tuple(Chunk(row, begins, length, 1) for row, length in enumerate(lengths, start=1))
    return Work(owner, Step(owner.id, 1, number, parts, forks, replay_until, 0), sum(lengths), 0.0)


def training(owner: HopSession, positions: int = 5) -> PassWork:
    forward = Forward(owner.id, 1, 1, 0, (positions,), False, 0, 0, 0)
    return PassWork(owner, forward, owner.reply_to, 0.0)


def run_pass(queue: WorkQueue, positions: int = PASS) -> list[tuple[Work, int]]:
    """What the engine does with a pass, without a device."""
    chosen = queue.take_steps(positions)
    for item, count in chosen:
        item.done += count
    for item, _ in chosen:
        queue.release_work(item)
    return chosen


def test_decode_comes_before_prefill_and_prefill_fills_the_pass() -> None:
    queue = WorkQueue()
    prefill, decode = session(1), session(2)
    queue.put_step(work(prefill, 200))
    queue.put_step(work(decode, 1))
    chosen = run_pass(queue)
    assert [(item.session, count) for item, count in chosen] == [(decode, 1), (prefill, PASS - 1)]


def test_a_pass_waits_for_a_session_that_is_about_to_come() -> None:
    queue = WorkQueue()
    sessions = [session(1), session(2)]
    queue.delay.observe_pass([owner.id for owner in sessions], WAIT_S, 0.0, 0.0)
    queue.put_step(work(sessions[0], 1))
    with ThreadPoolExecutor(1) as threads:
        gathered = threads.submit(queue.gather)
        queue.put_step(work(sessions[1], 1))
        gathered.result(WAIT_S / 2)
    assert {item.session.id for item, _ in queue.take_steps(PASS)} == {owner.id for owner in sessions}


def test_a_pass_waits_for_nobody_when_nobody_is_expected_or_the_queue_is_closed() -> None:
    queue = WorkQueue()
    owner, other = session(1), session(2)
    queue.delay.observe_pass([owner.id], WAIT_S, 0.0, 0.0)
    queue.put_step(work(owner, 1))
    queue.gather()
    queue.delay.observe_pass([owner.id, other.id], WAIT_S, 0.0, 0.0)
    with ThreadPoolExecutor(1) as threads:
        gathered = threads.submit(queue.gather)
        queue.close()
        gathered.result(WAIT_S / 2)


def test_a_session_that_has_ended_is_not_waited_for() -> None:
    queue = WorkQueue()
    owner, ended = session(1), session(2)
    queue.delay.observe_pass([owner.id, ended.id], WAIT_S, 0.0, 0.0)
    queue.put_step(work(owner, 1))
    assert queue.take_short(WAIT_S, lambda _: True) is None
    queue.discard(ended)
    assert queue.take_short(WAIT_S, lambda _: True) is not None


def test_windows_that_a_later_step_takes_back_do_not_run() -> None:
    queue = WorkQueue()
    owner = session(1)
    running = work(owner, 4, number=1, start=10)
    queue.put_step(running)
    assert queue.take_steps(PASS) == [(running, 4)]
    for number, start in ((2, 14), (3, 18), (4, 22)):
        queue.put_step(work(owner, 4, number=number, start=start))
    instead = work(owner, 4, number=5, start=12)
    queue.put_step(instead)
    assert list(owner.queue_state.steps) == [running, instead]
    assert queue.queued_positions == owner.waiting_size == 8
    running.done = 4
    queue.release_work(running)
    assert run_pass(queue) == [(instead, 4)]


def test_what_a_later_step_does_not_take_back_runs() -> None:
    """What begins before it, rows beside it, forks, replays, and what was sent after it."""
    for earlier, number, start in (
        (work(session(1), 4, number=2, start=10), 3, 14),
        (work(session(1), 2, 2, number=2, start=10), 3, 10),
        (work(session(1), 4, forks=(Fork(1, 1),), number=2, start=10), 3, 10),
        (work(session(1), 4, replay_until=4, number=2, start=10), 3, 10),
        (work(session(1), 4, number=2, start=10), 1, 10),
    ):
        queue = WorkQueue()
        queue.put_step(earlier)
        queue.put_step(work(earlier.session, 4, number=number, start=start))
        assert len(earlier.session.queue_state.steps) == 2


def test_a_speculated_window_is_decode_and_a_longer_step_is_not() -> None:
    queue = WorkQueue()
    long, window = session(1), session(2)
    queue.put_step(work(long, DECODE_POSITIONS + 1))
    queue.put_step(work(window, DECODE_POSITIONS))
    assert [item.session for item, _ in run_pass(queue)] == [window, long]


def test_a_step_waits_until_the_one_before_is_through() -> None:
    queue = WorkQueue()
    owner = session(1)
    first, second = work(owner, 100), work(owner, 1)
    queue.put_step(first)
    queue.put_step(second)
    assert queue.take_steps(PASS) == [(first, PASS)]
    first.done = PASS
    other = work(session(2), 1)
    queue.put_step(other)
    # While a pass runs, its session has nothing that could run.
    assert queue.take_steps(PASS) == [(other, 1)]
    queue.release_work(first)
    assert run_pass(queue) == [(first, 36)]
    assert run_pass(queue) == [(second, 1)]


def test_the_parts_of_a_pass_go_on_where_the_last_ended() -> None:
    item = work(session(1), 5, 3, 4, start=10)
    seen: list[Chunk] = []
    while item.remaining:
        count = min(4, item.remaining)
        parts = item.parts(count)
        assert sum(part.length for part in parts) == count
        seen += parts
        item.done += count
    assert seen == [
        Chunk(1, 10, 4, 0),
        Chunk(1, 14, 1, 1),
        Chunk(2, 10, 3, 1),
        Chunk(3, 10, 4, 1),
    ]


def test_what_the_client_wants_back_is_spread_over_the_passes() -> None:
    part = Chunk(1, 0, 10, 5)
    item = Work(session(1), Step(bytes(16), 1, 1, (part,), None, 0, 0), 10, 0.0)
    kept: list[int] = []
    for count in (4, 3, 3):
        kept += [part.keep for part in item.parts(count)]
        item.done += count
    assert kept == [0, 2, 3]


def test_prefills_take_turns() -> None:
    queue = WorkQueue()
    owners = [session(name) for name in range(3)]
    for owner in owners:
        queue.put_step(work(owner, 10 * PASS))
    turns = [run_pass(queue)[0][0].session for _ in range(9)]
    assert turns == owners * 3


def test_a_prefill_without_end_starves_nobody() -> None:
    queue = WorkQueue()
    greedy, modest = session(1), session(2)
    for _ in range(50):
        queue.put_step(work(greedy, 10 * PASS))
    queue.put_step(work(modest, 2 * PASS))
    passes = 0
    while modest.queue_state.steps:
        run_pass(queue)
        passes += 1
    assert passes <= 4


def test_decode_without_end_does_not_starve_prefill() -> None:
    queue = WorkQueue()
    # Together they fill every pass, and each has its next step waiting already.
    decoders = [session(name) for name in range(2 * PASS // DECODE_POSITIONS)]
    for owner in decoders:
        for _ in range(200):
            queue.put_step(work(owner, DECODE_POSITIONS))
    prefill = session(99)
    queue.put_step(work(prefill, 2 * PASS))
    passes = 0
    while prefill.queue_state.steps:
        chosen = run_pass(queue)
        assert any(item.session is not prefill for item, _ in chosen), "decode goes on beside it"
        passes += 1
    assert passes <= 4 * (MAX_PASSED_OVER + 1)


def test_decode_of_all_sessions_goes_on_when_it_fills_more_than_a_pass() -> None:
    queue = WorkQueue()
    owners = [session(name) for name in range(3 * PASS)]
    for owner in owners:
        queue.put_step(work(owner, 1))
        queue.put_step(work(owner, 1))
    first = [item.session for _ in range(3) for item, _ in run_pass(queue)]
    assert len(first) == len(set(first)) == len(owners)


def test_only_sessions_with_the_same_blocks_share_a_pass() -> None:
    queue = WorkQueue()
    whole = [session(1), session(2)]
    half = session(3, 0, 2)
    for owner in (*whole, half):
        queue.put_step(work(owner, 1))
    assert [item.session for item, _ in run_pass(queue)] == whole
    assert [item.session for item, _ in run_pass(queue)] == [half]


def test_other_blocks_are_not_starved() -> None:
    queue = WorkQueue()
    decoders = [session(1), session(2)]
    for owner in decoders:
        for _ in range(200):
            queue.put_step(work(owner, 1))
    lonely = session(3, 0, 2)
    queue.put_step(work(lonely, PASS))
    passes = 0
    while lonely.queue_state.steps:
        run_pass(queue)
        passes += 1
    # One pass for each half that is kept for it would be the worst.
    assert passes <= 2 * (MAX_PASSED_OVER + 1)


def test_discarding_a_session_whose_step_is_in_a_pass() -> None:
    queue = WorkQueue()
    owner, other = session(1), session(2)
    running, waiting = work(owner, 100), work(owner, 5)
    queue.put_step(running)
    queue.put_step(waiting)
    [(item, count)] = queue.take_steps(PASS)
    queue.discard(owner)
    assert queue.queued_positions == 0
    assert owner.waiting_size == 0
    item.done += count
    queue.release_work(item)
    assert queue.queued_positions == 0
    queue.put_step(work(other, 1))
    assert [item.session for item, _ in run_pass(queue)] == [other]


def test_forks_count_as_memory_but_not_as_work() -> None:
    queue = WorkQueue()
    owner = session(1)
    queue.put_step(work(owner, 2, forks=tuple(Fork(row, 1) for row in range(30))))
    assert owner.waiting_size == 32
    assert queue.queued_positions == 2
    run_pass(queue)
    assert owner.waiting_size == 0


def test_closing_wakes_the_engine() -> None:
    queue = WorkQueue()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue.take_steps, PASS)
        queue.close()
        assert waiting.result(timeout=WAIT_S) == []
    queue.put_step(work(session(1), 1))
    assert queue.take_steps(PASS) == []


def test_steps_from_several_threads_all_run_once_and_in_order() -> None:
    queue = WorkQueue()
    owners = [session(name) for name in range(6)]
    steps = 60
    done: list[Work] = []
    finished = threading.Event()

    def engine() -> None:
        while chosen := queue.take_steps(PASS):
            for item, count in chosen:
                item.done += count
                if not item.remaining:
                    done.append(item)
            for item, _ in chosen:
                queue.release_work(item)
            if len(done) == steps * len(owners):
                finished.set()

    def send(owner: HopSession) -> None:
        for number in range(steps):
            queue.put_step(work(owner, 1 + 13 * number % 90, number=number))

    with ThreadPoolExecutor(len(owners) + 1) as pool:
        running = pool.submit(engine)
        list(pool.map(send, owners))
        assert finished.wait(WAIT_S)
        queue.close()
        running.result(timeout=WAIT_S)
    for owner in owners:
        assert [item.step.number for item in done if item.session is owner] == list(range(steps))
    assert queue.queued_positions == 0
    assert all(not owner.queue_state.steps and owner.waiting_size == 0 for owner in owners)


class QueueMachine(RuleBasedStateMachine):
    """Clients put and leave while passes begin and end, in any order."""

    running: Bundle[list[tuple[Work, int]]] = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.unsent = dict.fromkeys((NEXT, OTHER_NEXT), 0)
        self.queue = WorkQueue(unsent=self.unsent.__getitem__)
        self.owners = [session(name, 0, 2 + name % 2, following=FOLLOWING[name % 3]) for name in range(5)]
        self.expected: dict[HopSession, list[Work]] = {owner: [] for owner in self.owners}
        self.in_passes: Counter[HopSession] = Counter()

    @rule(owner=st.integers(0, 4), lengths=st.lists(st.integers(1, 100), min_size=1, max_size=3))
    def put(self, owner: int, lengths: list[int]) -> None:
        item = work(self.owners[owner], *lengths)
        self.expected[item.session].append(item)
        self.queue.put_step(item)

    @rule(target=running, positions=st.integers(1, 128))
    def take(self, positions: int) -> list[tuple[Work, int]]:
        if not any(
            waiting and not self.in_passes[owner] and not self.is_held(waiting[0])
            for owner, waiting in self.expected.items()
        ):
            return []  # it would wait
        chosen = self.queue.take_steps(positions)
        assert chosen
        assert sum(count for _, count in chosen) <= positions
        assert len({(item.session.start, item.session.end) for item, _ in chosen}) == 1
        assert len({item.session for item, _ in chosen}) == len(chosen)
        for item, count in chosen:
            assert 1 <= count <= item.remaining
            assert not self.is_held(item)
            assert not self.in_passes[item.session], "one step of a session at a time"
            assert self.expected[item.session][0] is item, "in the order of arrival"
            self.in_passes[item.session] += 1
        return chosen

    def is_held(self, item: Work) -> bool:
        following = item.session.next
        waits = following is not None and self.unsent[following] > UNSENT_BYTES
        return waits and item.remaining > DECODE_POSITIONS

    @rule(following=st.sampled_from([NEXT, OTHER_NEXT]), unsent=st.sampled_from([0, UNSENT_BYTES, UNSENT_BYTES + 1]))
    def sends(self, following: Endpoint, unsent: int) -> None:
        self.unsent[following] = unsent

    @rule(chosen=consumes(running))
    def end(self, chosen: list[tuple[Work, int]]) -> None:
        for item, count in chosen:
            item.done += count
            self.in_passes[item.session] -= 1
            if not item.remaining and item in self.expected.get(item.session, []):
                self.expected[item.session].remove(item)
            self.queue.release_work(item)

    @rule(owner=st.integers(0, 4))
    def leave(self, owner: int) -> None:
        gone = self.owners[owner]
        self.queue.discard(gone)
        del self.expected[gone]
        self.owners[owner] = session(100 + owner, gone.start, gone.end, following=gone.next)
        self.expected[self.owners[owner]] = []

    @rule(owner=st.integers(0, 4))
    def begin_anew(self, owner: int) -> None:
        again = self.owners[owner]
        self.queue.discard_waiting(again)
        begun = [item for item in self.expected[again] if item.done or self.in_passes[again]]
        self.expected[again] = begun[:1]

    @invariant()
    def counted(self) -> None:
        waiting = [item for items in self.expected.values() for item in items]
        assert self.queue.queued_positions == sum(item.total for item in waiting)
        for owner, items in self.expected.items():
            assert list(owner.queue_state.steps) == items
            assert owner.waiting_size == sum(item.size for item in items)

    def teardown(self) -> None:
        """Whatever was going on, all that is left runs in a bounded number of passes."""
        for owner in [owner for owner in self.expected if self.in_passes[owner]]:
            self.queue.discard(owner)
            del self.expected[owner]
        self.unsent.update(dict.fromkeys(self.unsent, 0))
        left = sum(item.remaining for items in self.expected.values() for item in items)
        steps = sum(map(len, self.expected.values()))
        passes = 0
        while self.queue.queued_positions:
            for item, _ in run_pass(self.queue):
                if not item.remaining:
                    self.expected[item.session].remove(item)
            passes += 1
            assert passes <= left + steps
        assert not any(self.expected.values())


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=examples(60), stateful_step_count=30)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 200)), min_size=1, max_size=30))
def test_every_step_is_computed_in_full(steps: list[tuple[int, int]]) -> None:
    queue = WorkQueue()
    owners = [session(name, 0, 2 + name % 2) for name in range(5)]
    items = [work(owners[owner], length) for owner, length in steps]
    for item in items:
        queue.put_step(item)
    while queue.queued_positions:
        run_pass(queue)
    assert all(not item.remaining for item in items)


def test_prompts_wait_for_the_way_to_their_next_hop_and_nothing_else_does() -> None:
    unsent = {NEXT: UNSENT_BYTES + 1, OTHER_NEXT: UNSENT_BYTES}
    queue = WorkQueue(unsent=unsent.__getitem__)
    held, decodes, elsewhere, ends_here = (
        session(number, following=following) for number, following in enumerate((NEXT, NEXT, OTHER_NEXT, None))
    )
    for owner, length in ((held, 100), (decodes, 1), (elsewhere, 20), (ends_here, 20)):
        queue.put_step(work(owner, length))
    assert {item.session for item, _ in run_pass(queue)} == {decodes, elsewhere, ends_here}
    with ThreadPoolExecutor(1) as threads:
        taken = threads.submit(run_pass, queue)
        queue.put_step(work(decodes, 1))
        assert [item.session for item, _ in taken.result(WAIT_S)] == [decodes]
        taken = threads.submit(run_pass, queue)
        unsent[NEXT] = UNSENT_BYTES
        assert [item.session for item, _ in taken.result(WAIT_S)] == [held]
        unsent[NEXT] = UNSENT_BYTES + 1
        taken = threads.submit(run_pass, queue)
        queue.close()
        assert taken.result(WAIT_S) == []


def test_prompts_do_not_wait_for_a_way_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile next hop keeps its connection and does not read; its session must get lost where that is seen."""
    now, unsent = 1000.0, 2 * UNSENT_BYTES
    monkeypatch.setattr("peers.queue.time", SimpleNamespace(monotonic=lambda: now))
    queue = WorkQueue(unsent=lambda endpoint: unsent)
    held, decodes = session(0, following=NEXT), session(1)
    queue.put_step(work(held, 100))

    def runs() -> list[HopSession]:
        queue.put_step(work(decodes, 1))
        return [item.session for item, _ in run_pass(queue)]

    for _ in range(3):
        assert runs() == [decodes]
        now += STUCK_S - 1.0
        assert runs() == [decodes]
        unsent -= 1  # it takes little, but something
    assert runs() == [decodes]
    now += STUCK_S
    assert held in runs()


def test_passes_of_training_run_when_no_step_is_ready() -> None:
    queue = WorkQueue()
    trains, decodes = session(1), session(2)
    first, second = training(trains), training(trains)
    queue.put_pass(first)
    queue.put_pass(second)
    queue.put_step(work(decodes, 1))
    assert [item.session for item, _ in run_pass(queue)] == [decodes]
    assert queue.take_steps(PASS) == []
    assert queue.take_pass() is first
    assert queue.pass_positions == 10
    queue.release_pass(first)
    assert queue.pass_positions == 5
    # Between two blocks of a pass:
    queue.put_step(work(decodes, 1, number=1))
    assert [item.session for item, _ in queue.take_between(first, PASS, first=True)] == [decodes]
    assert queue.take_between(first, PASS, first=False) == []


def test_training_has_its_turn_among_steps_that_never_end() -> None:
    queue = WorkQueue()
    decodes = session(2)
    queue.put_pass(training(session(1)))
    turns = 0
    queue.put_step(work(decodes, 1))
    while run_pass(queue):
        turns += 1
        queue.put_step(work(decodes, 1, number=turns))
    assert turns == MAX_PASSED_OVER
    assert queue.take_pass() is not None
    assert run_pass(queue)


def test_passes_of_a_session_that_ends_are_forgotten() -> None:
    queue = WorkQueue()
    ends, stays = session(1), session(2)
    gone, kept = training(ends), training(stays)
    queue.put_pass(gone)
    queue.put_pass(kept)
    assert (ends.queue_state.pass_count, stays.queue_state.pass_count) == (1, 1)
    assert queue.discard_passes(ends) == [gone]
    assert queue.pass_positions == 5
    assert queue.take_pass() is kept
    assert (ends.queue_state.pass_count, stays.queue_state.pass_count) == (0, 1), "one that runs still counts"
    queue.release_pass(kept)
    assert stays.queue_state.pass_count == 0


class TestSeveralKeys:
    """A device on which a pass takes 10 ms, and 1 ms for each position beyond the fourth."""

    def queue(self) -> WorkQueue:
        return WorkQueue(lambda positions: (10 + max(0, positions - 4)) / 1000)

    def run(self, queue: WorkQueue) -> list[tuple[Work, int]]:
        chosen = run_pass(queue, 512)
        queue.charge_pass(chosen, queue.pass_s(sum(count for _, count in chosen)))
        return chosen

    def test_a_pass_has_a_step_of_each_and_more_where_they_cost_little(self) -> None:
        queue = self.queue()
        many = [session(name, owner=b"many") for name in range(64)]
        for owner in many:
            queue.put_step(work(owner, 1))
        one = session(99, owner=b"one")
        queue.put_step(work(one, 1))
        chosen = [item.session for item, _ in self.run(queue)]
        assert one in chosen
        assert 4 <= len(chosen) <= 6, "not 65, which take seven times as long"

    def test_one_session_has_a_step_in_every_pass_beside_64_of_another_key(self) -> None:
        queue = self.queue()
        for name in range(64):
            for number in range(10):
                queue.put_step(work(session(name, owner=b"many"), 1, number=number))
        one = session(99, owner=b"one")
        for number in range(20):
            queue.put_step(work(one, 1, number=number))
            assert one in [item.session for item, _ in self.run(queue)]

    def test_decode_steps_of_many_keys_still_share_a_pass(self) -> None:
        queue = self.queue()
        owners = [session(name, owner=name.to_bytes(2, "big")) for name in range(40)]
        for owner in owners:
            queue.put_step(work(owner, 1))
        assert {item.session for item, _ in self.run(queue)} == set(owners)

    def test_the_shortest_prompt_runs_first_whoever_has_had_less(self) -> None:
        queue = self.queue()
        owners = {left: session(left, owner=left.to_bytes(2, "big"), reservation=left) for left in (900, 100, 400)}
        for left, owner in owners.items():
            queue.put_step(work(owner, min(left, 300)))
        done = list[int]()
        while queue.queued_positions:
            done += [item.session.reservation for item, _ in self.run(queue) if not item.remaining]
        assert done == [100, 400, 900], "of 900 reserved positions 300 have come, and more may"

    def test_who_let_a_prompt_go_ahead_that_did_not_run_pays_for_no_other(self) -> None:
        queue = self.queue()
        lets, ahead = session(1, owner=b"lets", reservation=900), session(2, owner=b"ahead", reservation=100)
        for owner in (lets, ahead):
            queue.put_step(work(owner, 90))
        assert [item.session for item, _ in run_pass(queue)] == [ahead]  # its session has ended, so nothing is charged
        queue.discard(ahead)
        decodes, joins = session(3, owner=b"decodes"), session(4, owner=b"ahead")
        queue.put_step(work(decodes, 1))
        queue.put_step(work(joins, 90))
        queue.charge(lets, 1.0)
        queue.charge(joins, 0.5)
        balance = queue._shares._balance(queue._shares._accounts[b"lets"])
        chosen = {item.session for item, _ in self.run(queue)}
        assert {decodes, joins} <= chosen and lets not in chosen
        assert queue._shares._balance(queue._shares._accounts[b"lets"]) == balance

    def test_a_key_whose_prompts_never_end_goes_ahead_for_a_while_only(self) -> None:
        queue = self.queue()
        patient = session(1, owner=b"patient", reservation=5000)
        queue.put_step(work(patient, 5000))
        had, number = Counter[bytes](), 1
        while patient.queue_state.steps[0].remaining > 1000:
            if not any(owner.owner == b"hurried" for owner in queue._ready):
                number += 1
                queue.put_step(work(session(number, owner=b"hurried", reservation=100), 100, start=0))
            for item, count in self.run(queue):
                had[item.owner] += count
        more_s = queue.pass_s(had[b"hurried"] - had[b"patient"])
        assert AHEAD_S < more_s < 2 * AHEAD_S + 0.5, "what one has got, the other has let go"

    def test_a_long_prompt_beside_short_ones_of_many_keys_goes_on(self) -> None:
        """Each key goes ahead a little only, but all of them together could have every turn of the long one."""
        queue = self.queue()
        patient = session(0, owner=b"patient", reservation=50_000)
        queue.put_step(work(patient, 50_000))
        others = [session(number, owner=number.to_bytes(2, "big"), reservation=88) for number in range(1, 30)]
        had_s, took_s = 0.0, 0.0
        while took_s < 120.0:
            for owner in others:
                if not owner.queue_state.steps:
                    queue.put_step(work(owner, 88, start=0))
            chosen = self.run(queue)
            pass_s = queue.pass_s(sum(count for _, count in chosen))
            took_s += pass_s
            had_s += pass_s * any(item.session is patient for item, _ in chosen)
        assert had_s > (120.0 / 30 - AHEAD_S) / 3, "its share is a thirtieth"

    def test_keys_that_have_had_about_as_much_share_every_pass(self) -> None:
        queue = self.queue()
        owners = [session(name, owner=name.to_bytes(2, "big")) for name in range(8)]
        for number in range(20):
            # They come in two halves, as those that missed a pass do.
            for owner in owners[:: 1 if number % 3 else 2]:
                queue.put_step(work(owner, 1, number=number))
            ready = {owner for owner in owners if owner.queue_state.steps}
            assert {item.session for item, _ in self.run(queue)} == ready

    def test_a_prefill_is_cut_while_another_key_is_active(self) -> None:
        queue = self.queue()
        long, one = session(1, owner=b"long"), session(2, owner=b"one")
        queue.put_step(work(long, 4000))
        assert self.run(queue)[0][1] == 512, "nobody else is here"
        queue.put_step(work(one, 1))
        assert [(item.session, count) for item, count in self.run(queue)] == [(one, 1), (long, 5)], "12 ms, not 10"
        assert max(count for _ in range(12) for _, count in self.run(queue)) <= 44, "50 ms"

    def test_a_prefill_joins_decode_passes_and_delays_them_little(self) -> None:
        queue = self.queue()
        long, one = session(1, owner=b"long"), session(2, owner=b"one")
        for number in range(20):
            queue.put_step(work(long, 4000, number=number))
        took_s, prefilled = 0.0, 0
        for number in range(200):
            queue.put_step(work(one, 1, number=number))
            while one.queue_state.steps:
                chosen = self.run(queue)
                took_s += queue.pass_s(sum(count for _, count in chosen))
                prefilled += sum(count for item, count in chosen if item.session is long)
        assert took_s <= 1.25 * 200 * queue.pass_s(1)
        assert prefilled > 44 / 0.05 * took_s / 5, "more than in a fifth of the time without"

    @pytest.mark.parametrize("free", [1, 2])
    def test_decoding_waits_for_a_chunk_and_has_most_of_the_time(self, free: int) -> None:
        """On a device on which what joins costs what it costs alone, or but for one position does."""
        queue = WorkQueue(lambda positions: 0.01 * max(1, positions - free + 1))
        long, one = session(1, owner=b"long"), session(2, owner=b"one")
        for number in range(20):
            queue.put_step(work(long, 4000, number=number))
        alone_s, took_s, prefilled = 0.0, 0.0, 0
        waited, longest = 0.0, 0.0
        for number in range(400):
            queue.put_step(work(one, 1, number=number))
            while one.queue_state.steps:
                chosen = self.run(queue)
                took = queue.pass_s(sum(count for _, count in chosen))
                took_s += took
                prefilled += sum(count for item, count in chosen if item.session is long)
                if all(item.session is long for item, _ in chosen):
                    alone_s += took
                    waited += took
                    longest = max(longest, waited)
                else:
                    waited = 0.0
        assert longest <= 0.05 + 1e-9
        assert prefilled >= 0.15 * took_s / 0.01, "it goes on, too"
        assert alone_s <= 0.25 * took_s

    def test_training_goes_on_when_those_who_decode_have_had_their_share(self) -> None:
        queue = self.queue()
        trains, one = session(1, owner=b"trains"), session(2, owner=b"one")
        queue.put_pass(training(trains))
        running = queue.take_pass()
        assert running is not None
        between: list[int] = []
        for piece in range(10):
            queue.charge(trains, 0.05)
            steps = 0
            while True:
                queue.put_step(work(one, 1, number=100 * piece + steps))
                chosen = queue.take_between(running, PASS, first=not steps)
                if not chosen:
                    break
                for item, count in chosen:
                    item.done += count
                for item, _ in chosen:
                    queue.release_work(item)
                queue.charge_pass(chosen, 0.01)
                steps += 1
                queue.discard(one)
            between.append(steps)
        assert sum(between[2:]) / len(between[2:]) == pytest.approx(20, abs=3), "four fifths of the time"

    def test_passes_of_keys_take_turns(self) -> None:
        queue = self.queue()
        first, second = session(1, owner=b"first"), session(2, owner=b"second")
        for _ in range(5):
            queue.put_pass(training(first))
        queue.put_pass(training(second))
        order: list[HopSession] = []
        for _ in range(3):
            assert queue.take_steps(PASS) == []
            running = queue.take_pass()
            assert running is not None
            order.append(running.session)
            queue.charge(running.session, 1.0)
            queue.release_pass(running)
        assert second in order[:2]

    def test_a_key_that_is_about_to_come_is_waited_for(self) -> None:
        queue = WorkQueue(lambda positions: WAIT_S)
        greedy, one = session(1, owner=b"greedy"), session(2, owner=b"one")
        queue.put_step(work(one, 1))
        queue.put_step(work(greedy, 1))
        assert len(run_pass(queue)) == 2
        queue.charge(greedy, 10 * WAIT_S)
        queue._shares._accounts[b"one"].away.add(WAIT_S / 2)
        queue.put_step(work(greedy, 1, number=1))
        with ThreadPoolExecutor(1) as threads:
            taken = threads.submit(queue.take_steps, PASS)
            queue.put_step(work(one, 1, number=1))
            assert {item.session for item, _ in taken.result(WAIT_S / 4)} == {one, greedy}


def test_queues_of_passes_are_bounded_and_emptied_in_their_order() -> None:
    queue = WorkQueue()
    owners = [session(name, owner=b"greedy") for name in range(8)]
    waiting = [training(owner, 1) for owner in owners[:4] for _ in range(MAX_SESSION_PASSES)]
    for number in range(MAX_SESSION_PASSES):
        for owner in range(4):
            queue.put_pass(waiting[owner * MAX_SESSION_PASSES + number])
    for owner, what in ((owners[0], "session"), (owners[5], "key")):
        with pytest.raises(PeerBusy, match=f"of this {what} wait already, .* when those are answered"):
            queue.put_pass(training(owner))
    queue.put_pass(training(session(9, owner=b"other")))
    assert queue.discard_passes(owners[1]) == waiting[MAX_SESSION_PASSES : 2 * MAX_SESSION_PASSES]
    assert queue.pass_positions == 3 * MAX_SESSION_PASSES + 5
    queue.put_pass(training(owners[5]))
