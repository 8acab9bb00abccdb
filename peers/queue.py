"""Work that waits for the device, and the choice of what runs next.

While one client's key is active, decode comes first, then prefill, then passes over whole sequences
(`scheduler/batching.py:next_pass`). Several active keys share the device's time (`scheduler/fairness.py`).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from peers.sessions import HopSession, MemoryAccount, MemoryPurpose, PassWork, Work
from scheduler.batching import DECODE_POSITIONS, MAX_PASSED_OVER, UNSENT_BYTES, BatchingDelay, next_pass
from scheduler.fairness import CHUNK_S, FairPasses
from scheduler.liveness import STUCK_S
from splitnet.errors import PeerBusy
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Adapter, FetchKV, Forward, Gradient, ReadImages, Step

# Maximum number of waiting passes over whole sequences, adapters and requests for KV caches of one session.
MAX_SESSION_PASSES = 64
MAX_KEY_PASSES = 256  # the same for all sessions of one key
LOOK_S = 0.02  # poll interval while all ready prompts wait for congested links


@dataclass(eq=False)
class WorkQueue:
    """Steps and passes over whole sequences that wait for the device. Thread-safe.

    A session with a step in a pass is not ready, so the steps of a session run in order.
    """

    pass_s: Callable[[int], float] = lambda positions: 0.0  # seconds of a pass, by its positions
    # Returns the weight of a client's key in the shares of the device.
    weight: Callable[[bytes], float] = lambda key: 1.0
    step_bytes: int = 1 << 29  # limit of the memory of waiting steps
    unsent: Callable[[Endpoint], int] = lambda endpoint: 0  # bytes that wait for the link to a next hop

    def __post_init__(self) -> None:
        self.memory = MemoryAccount(self.step_bytes, "no memory for waiting steps of", "send fewer at a time")
        self._fair = FairPasses[Work](self.pass_s, self.weight)
        self._shares = self._fair.shares
        self.delay = BatchingDelay()  # by session id
        self._ready: OrderedDict[HopSession, None] = OrderedDict()
        # By next hop of ready prompts: unsent bytes, and the time of their last decrease.
        self._unsent: dict[Endpoint, tuple[int, float]] = {}
        self._changed = threading.Condition()
        self.closed = False
        self._passes: OrderedDict[bytes, dict[PassWork, None]] = OrderedDict()  # by key
        self._next_pass_of: bytes | None = None
        self._idle_job: Callable[[], None] | None = None
        self._prefix_hits: dict[HopSession, None] = {}  # sessions whose rows can load pages before their steps arrive
        self.defers = False  # after `put_step`, the caller wakes the engine through `Engine.run_here`
        self._turns_without_pass = 0
        self.queued_positions = 0
        self.pass_positions = 0  # of passes that wait or run

    @property
    def has_work(self) -> bool:
        return bool(self._ready or self._passes)

    def put_step(self, work: Work) -> None:
        """Adds a step, and drops waiting windows of drafts that the step shows to be rejected. Raises PeerBusy: memory
        is short."""
        with self._changed:
            session, steps = work.session, work.session.queue_state.steps
            while len(steps) > self._begun(session) and _supersedes(work, steps[-1]):
                self._drop_work(steps.pop())
            if not steps:
                self._ready.pop(session, None)
            self.memory.take_memory(session, MemoryPurpose.STEPS, work.nbytes)
            self._shares.work_arrived(session.owner, time.monotonic())
            work.follows = bool(steps)
            steps.append(work)
            session.waiting_size += work.size
            self.queued_positions += work.total
            if len(steps) == 1:
                self._ready[session] = None
                if not self.defers:
                    self._changed.notify()

    def wake(self) -> None:
        with self._changed:
            if self.has_work:
                self._changed.notify()

    def take_short(self, within_s: float, is_quick: Callable[[Work], bool]) -> Work | None:
        """Takes the decode step that is the only work, if it is quick and no other step is expected to join its pass.

        is_quick: whether a step only computes its positions.
        """
        with self._changed:
            if len(self._ready) != 1 or self._passes or self.closed:
                return None
            session = next(iter(self._ready))
            work = session.queue_state.steps[0]
            if (
                work.remaining > DECODE_POSITIONS
                or self.pass_s(work.remaining) > within_s
                or self.delay.delay_s(1)
                or self._shares.contended(time.monotonic())
                or not is_quick(work)
            ):
                return None
            session.queue_state.passed_over = 0
            del self._ready[session]
            return work

    def put_pass(self, work: PassWork) -> None:
        """Adds a pass. Raises PeerBusy, and changes nothing: too many passes of the session or key wait."""
        with self._changed:
            session, own = work.session, work.session.queue_state
            of_key = self._passes.get(session.owner, {})
            for what, waiting, most in (
                ("session", len(own.passes), MAX_SESSION_PASSES),
                ("key", len(of_key), MAX_KEY_PASSES),
            ):
                if waiting >= most:
                    wait_s = self.pass_s(self.pass_positions)
                    raise PeerBusy(
                        f"{waiting} passes of this {what} wait already, the maximum: send more when those are "
                        f"answered, the last in about {wait_s:.0f} s"
                    )
            of_key[work] = None
            self._passes[session.owner] = of_key
            own.passes[work] = None
            own.pass_count += 1
            self.pass_positions += work.positions
            self._shares.work_arrived(session.owner, time.monotonic())
            self._changed.notify()

    def take_pass(self) -> PassWork | None:
        """The next pass, or None; `release_pass` ends it."""
        with self._changed:
            self._turns_without_pass = 0
            if not self._passes or self.closed:
                return None
            owner, self._next_pass_of = self._next_pass_of, None
            if owner not in self._passes:
                owner = next(iter(self._passes))
            work = next(iter(self._passes[owner]))
            self._take_out(work)
            if owner in self._passes:
                self._passes.move_to_end(owner)
            return work

    def release_pass(self, work: PassWork) -> None:
        with self._changed:
            self._count_out(work)

    def discard_passes(self, session: HopSession) -> list[PassWork]:
        with self._changed:
            discarded = list(session.queue_state.passes)
            for work in discarded:
                self._take_out(work)
                self._count_out(work)
            return discarded

    def put_idle_job(self, job: Callable[[], None]) -> None:
        """Leaves a job for the engine's thread, for a time without other work; it replaces an earlier job."""
        with self._changed:
            self._idle_job = job
            self._changed.notify()

    def take_idle_job(self) -> Callable[[], None] | None:
        """The job of `put_idle_job`, if no work waits."""
        with self._changed:
            if self.has_work or self.closed:
                return None
            job, self._idle_job = self._idle_job, None
            return job

    @property
    def is_contended(self) -> bool:
        """Whether several keys are active."""
        with self._changed:
            return self._shares.contended(time.monotonic())

    def put_prefix_hit(self, session: HopSession) -> None:
        """Stored pages were found for a session: its row can load them while no work waits."""
        with self._changed:
            if session not in self._prefix_hits:
                self._shares.work_arrived(session.owner, time.monotonic())
                self._prefix_hits[session] = None
                self._changed.notify()

    def take_prefix_hit(self) -> HopSession | None:
        """A session of `put_prefix_hit`, if no work waits; it remains until `release_prefix_hit`."""
        with self._changed:
            return None if self.has_work or self.closed else next(iter(self._prefix_hits), None)

    def release_prefix_hit(self, session: HopSession) -> None:
        with self._changed:
            if session in self._prefix_hits:
                del self._prefix_hits[session]
                self._shares.work_done(session.owner, time.monotonic())

    def gather(self) -> None:
        """Waits for work, and then for expected steps while these keep arriving."""
        with self._changed:
            self._wait_for_work()
            ready = 0
            while len(self._ready) > ready and (delay_s := self.delay.delay_s(len(self._ready))):
                ready, until = len(self._ready), time.monotonic() + delay_s
                while len(self._ready) == ready and not self.closed and (remaining := until - time.monotonic()) > 0:
                    self._changed.wait(remaining)

    def take_steps(self, max_positions: int) -> list[tuple[Work, int]]:
        """Waits for work and returns the steps of the next pass, with the number of positions of each.

        Empty: the queue is closed, a pass over whole sequences comes next (`take_pass`), or no work waits. While one
        key is active, passes over whole sequences come when no step is ready, or after `MAX_PASSED_OVER` turns.
        """
        with self._changed:
            self._wait_for_work()
            while self.has_work and not self.closed:
                ready = self._not_held()
                if not ready and not self._passes:
                    self._changed.wait(LOOK_S)
                    continue
                if not self._shares.contended(time.monotonic()):
                    if not ready or (self._passes and self._turns_without_pass >= MAX_PASSED_OVER):
                        return []
                    self._turns_without_pass += 1
                    return self._begin_steps(self._next_pass(ready, max_positions))
                chosen = self._take_shared(ready, max_positions, [*(each.owner for each in ready), *self._passes])
                if chosen is not None:
                    return chosen
            return []

    def take_between(self, running: PassWork, max_positions: int, *, first: bool) -> list[tuple[Work, int]]:
        """Steps to run between two pieces of a pass; empty: the pass continues. first: the first call since the last
        piece."""
        owner = running.session.owner
        with self._changed:
            while not self.closed:
                ready = self._not_held()
                if not self._shares.contended(time.monotonic()):
                    return self._begin_steps(self._next_pass(ready, max_positions)) if first and ready else []
                # Between two pieces, the key of the pass may run one pass of steps.
                ready = [session for session in ready if first or session.owner != owner]
                keys = [*(session.owner for session in ready), owner]
                chosen = self._take_shared(ready, max_positions, keys, running_key=owner, own_steps=first)
                if chosen is not None:
                    return chosen
            return []

    def release_work(self, work: Work) -> None:
        """Ends a pass of a step: the step, or the session's next step, is ready again."""
        with self._changed:
            session, steps = work.session, work.session.queue_state.steps
            if not work.remaining and steps and steps[0] is work:
                steps.popleft()
                self._drop_work(work)
            if steps:
                self._ready[session] = None
                self._changed.notify()

    def charge_pass(self, chosen: Sequence[tuple[Work, int]], seconds: float) -> None:
        with self._changed:
            self._fair.charge_pass(chosen, seconds, time.monotonic())

    def charge(self, session: HopSession, seconds: float) -> None:
        with self._changed:
            self._shares.charge(session.owner, seconds, time.monotonic(), bulk=True)

    def piece_positions(self, blocks: int) -> int | None:
        """Positions of one piece of a pass over whole sequences through `blocks` blocks; a piece is run through one
        block. None: no limit."""
        with self._changed:
            now = time.monotonic()
            if not self._shares.contended(now):
                return None
            return self._fair.positions_within(self._fair.chunk_s(now) * blocks)

    def discard_waiting(self, session: HopSession) -> None:
        """Drops the steps of a session that no pass has begun: the client will repeat them."""
        with self._changed:
            self._drop_steps(session, keep=self._begun(session))

    def discard(self, session: HopSession) -> None:
        with self._changed:
            self._drop_steps(session, keep=0)
            self.release_prefix_hit(session)
            self.delay.forget_source(session.id)
            self.memory.end_session(session)

    def count(self, session: HopSession) -> int:
        """Steps of a session that wait, and passes that wait or run."""
        return len(session.queue_state.steps) + session.queue_state.pass_count

    def first_waiting(self, session: HopSession) -> Step | Forward | Gradient | Adapter | FetchKV | ReadImages | None:
        """The message of the first step or pass that waits."""
        with self._changed:
            own = session.queue_state
            return own.steps[0].step if own.steps else next((work.message for work in own.passes), None)

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _not_held(self) -> list[HopSession]:
        """The ready sessions, except for those with a prompt whose link to the next hop is congested."""
        now, links = time.monotonic(), dict[Endpoint, tuple[int, float]]()
        ready: list[HopSession] = []
        for session in self._ready:
            following = session.next
            if following is not None and session.queue_state.steps[0].remaining > DECODE_POSITIONS:
                if following not in links:
                    unsent = self.unsent(following)
                    before, since = self._unsent.get(following, (0, now))
                    links[following] = unsent, (since if unsent >= before > UNSENT_BYTES else now)
                unsent, since = links[following]
                if unsent > UNSENT_BYTES and now - since < STUCK_S:
                    continue
            ready.append(session)
        self._unsent = links
        return ready

    def _take_shared(
        self,
        ready: Sequence[HopSession],
        max_positions: int,
        keys: Iterable[bytes],
        *,
        running_key: bytes | None = None,
        own_steps: bool = True,
    ) -> list[tuple[Work, int]] | None:
        """The next pass when several keys are active; empty: a pass over whole sequences begins or continues.

        None: this call has waited for a key with less device time; call it again. keys: all keys with work.
        running_key: the key of the pass over whole sequences that runs; own_steps: whether steps of that key may come
        first.
        """
        now = time.monotonic()
        ranked = self._shares.ranked(dict.fromkeys(keys))
        first = ranked[0]
        own = [session for session in ready if session.owner == first]
        is_pass = not own or (first == running_key and not own_steps)
        if first in self._passes and running_key is None and self._turns_without_pass >= MAX_PASSED_OVER:
            is_pass = True
        takes_s = CHUNK_S if is_pass else self.pass_s(own[0].queue_state.steps[0].remaining)
        waits = self._shares.awaited(first, min(takes_s, self._fair.chunk_s(now)), now)
        if waits is not None:
            key, left_s = waits
            self._changed.wait(left_s)
            self._shares.charge(key, time.monotonic() - now, now)
            return None
        self._shares.begin_rounds(first)
        if is_pass:
            self._next_pass_of = first
            return []
        self._turns_without_pass += 1
        if any(session.queue_state.steps[0].remaining > DECODE_POSITIONS for session in own):
            heads = [session.queue_state.steps[0] for session in ready]
            turn = [work.session for work in self._fair.prefill_turn(heads, first, now)]
            most = min(max_positions, self._fair.positions_within(self._fair.chunk_s(now)))
            return self._begin_steps(self._next_pass(turn, most))
        return self._begin_steps(
            self._fair.decode_pass([session.queue_state.steps[0] for session in ready], ranked, max_positions, now)
        )

    def _next_pass(self, ready: Iterable[HopSession], max_positions: int) -> dict[Work, int]:
        # Sessions are in the order of their last pass, so the first has waited longest.
        heads = [session.queue_state.steps[0] for session in ready]
        counts = next_pass(heads, heads[0].session.queue_state.passed_over, max_positions)
        for work in heads:
            own = work.session.queue_state
            own.passed_over = 0 if work in counts else own.passed_over + 1
        return counts

    def _begin_steps(self, counts: dict[Work, int]) -> list[tuple[Work, int]]:
        for work in counts:
            del self._ready[work.session]
        return list(counts.items())

    def _take_out(self, work: PassWork) -> None:
        session = work.session
        del session.queue_state.passes[work]
        of_key = self._passes[session.owner]
        del of_key[work]
        if not of_key:
            del self._passes[session.owner]

    def _count_out(self, work: PassWork) -> None:
        work.session.queue_state.pass_count -= 1
        self.pass_positions -= work.positions
        self._shares.work_done(work.session.owner, time.monotonic())

    def _wait_for_work(self) -> None:
        while not (self.has_work or self._idle_job or self._prefix_hits or self.closed):
            self._changed.wait()

    def _begun(self, session: HopSession) -> int:
        """The number of waiting steps that a pass has begun, 0 or 1."""
        steps = session.queue_state.steps
        return int(bool(steps) and (session not in self._ready or steps[0].done > 0))

    def _drop_steps(self, session: HopSession, keep: int) -> None:
        steps = session.queue_state.steps
        while len(steps) > keep:
            self._drop_work(steps.pop())
        if not steps:
            self._ready.pop(session, None)

    def _drop_work(self, work: Work) -> None:
        work.session.waiting_size -= work.size
        self.queued_positions -= work.total
        self.memory.give_back(work.session, MemoryPurpose.STEPS, work.nbytes)
        self._shares.work_done(work.session.owner, time.monotonic())


def _supersedes(later: Work, earlier: Work) -> bool:
    """Whether a step replaces all positions of an earlier step: each has one chunk, of the same row, and the later one
    begins no later in the row."""
    for step in (later.step, earlier.step):
        if len(step.parts) != 1 or step.forks is not None or step.replay_until:
            return False
    new, old = later.step.parts[0], earlier.step.parts[0]
    return new.row == old.row and new.start <= old.start and later.step.number > earlier.step.number
